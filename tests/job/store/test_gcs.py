"""Google Cloud Storage on a bad day: lost answers, silence, refusals, bytes damaged on the way."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from google.cloud import storage

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError
from job.store import ConflictError, Entry, ObjectExistsError, ObjectMissingError, Retry, Store, open_store
from tests.job.store.lost_answers import LostAnswers
from tests.job.store.proxy import Proxy, every_call, once

LARGE_BYTES = 9 << 20


def refusal(status: int, message: str) -> bytes:
    """An answer such as Google's JSON API gives."""
    body = json.dumps({"error": {"code": status, "message": message, "errors": []}}).encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@pytest.fixture
def proxy(gcs_server: str, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(gcs_server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: Proxy, gcs_bucket: str) -> Store:
    return open_store(gcs_bucket, Retry(10))


class TestLostAnswers(LostAnswers):
    request = b"POST /upload"


def test_a_download_that_breaks_off_is_begun_anew(proxy: Proxy, store: Store, file: Path) -> None:
    file.write_bytes(bytes(LARGE_BYTES))
    store.upload(file, "part")
    with store.open("part") as stream:
        for target in ("out", "stream"):
            proxy.answer = once(lambda data: None, b"\0" * 1000)
            if target == "out":
                store.download("part", file.with_name(target))
            else:
                file.with_name(target).write_bytes(stream.read())
            assert file.with_name(target).read_bytes() == bytes(LARGE_BYTES)


def test_a_stream_takes_few_requests(proxy: Proxy, store: Store, file: Path) -> None:
    file.write_bytes(bytes(LARGE_BYTES))
    store.upload(file, "part")
    requests: list[bytes] = []

    def count(data: bytes) -> bytes:
        requests.extend([data] * (b"alt=media" in data))
        return data

    proxy.request = count
    with store.open("part") as stream:
        assert len(stream.read()) == LARGE_BYTES
    assert len(requests) == 1
    with store.open("part") as stream:
        assert sum(len(block) for block in iter(lambda: stream.read(10_240), b"")) == LARGE_BYTES
    assert len(requests) == 1 + 2


@pytest.mark.parametrize("size_bytes", [1000, LARGE_BYTES])
def test_damage_on_the_way_is_noticed(proxy: Proxy, store: Store, file: Path, size_bytes: int) -> None:
    file.write_bytes(b"0123456789" * (size_bytes // 10))
    proxy.request = once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")
    with pytest.raises(BucketAwayError, match="damaged on the way") as error:
        store.upload(file, "part")
    assert store.uri_of("part") in str(error.value)
    assert not store.exists("part")
    store.upload(file, "part")
    proxy.answer = once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")
    with pytest.raises(BucketAwayError, match="damaged on the way"):
        store.download("part", file.with_name("out"))
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    store.download("part", file.with_name("out"))
    assert file.with_name("out").read_bytes() == file.read_bytes()


def seconds_until_away(call: Callable[[], object], words: str) -> float:
    start = time.monotonic()
    with pytest.raises(BucketAwayError, match=rf"gs://bucket/runs.* away for 2 s \(.*{words}.*\): check") as error:
        call()
    assert error.value.exit_code == Exit.BUCKET_AWAY
    return time.monotonic() - start


@pytest.mark.parametrize(("listening", "words"), [(False, "Connection refused"), (True, "timed out")])
def test_server_that_is_away_is_told_within_the_deadline(
    listening: bool, words: str, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as server, ThreadPoolExecutor(16) as pool:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen(200)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.getsockname()[1]}")
        store = open_store("gs://bucket/runs", Retry(2))
        seconds = list(pool.map(lambda call: seconds_until_away(call, words), every_call(store, file)))
    assert max(seconds) < 4
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    assert caplog.text == ""


def test_server_that_goes_away_before_the_content(proxy: Proxy, gcs_bucket: str, file: Path) -> None:
    store = open_store(gcs_bucket, Retry(2))
    store.upload(file, "part")
    stream = store.open("part")
    proxy.request = lambda data: None if b"alt=media" in data else data
    for read in (lambda: store.download("part", file.with_name("out")), stream.read):
        start = time.monotonic()
        with pytest.raises(BucketAwayError, match=f"{gcs_bucket}/part: the bucket was away"):
            read()
        assert time.monotonic() - start < 4
    assert [path.name for path in file.parent.iterdir()] == ["file"]


FORBIDDEN = (
    "trainer@project.iam.gserviceaccount.com does not have storage.objects.create access to the Google Cloud Storage "
    "object. Permission 'storage.objects.create' denied on resource (or it may not exist)."
)


@pytest.mark.parametrize(
    ("status", "message", "error", "words"),
    [
        (403, FORBIDDEN, NoPermissionError, "no permission storage.objects.create .*roles/storage.objectUser on gs://"),
        (401, "Invalid Credentials", NoPermissionError, "no usable Google credentials"),
        (400, "User project is invalid", BadRequestError, "refused with 400: User project is invalid"),
        (503, "Backend Error", BucketAwayError, "away for 0.5 s"),
        (429, "Rate limit exceeded", BucketAwayError, "away for 0.5 s"),
    ],
)
def test_refusals_are_told_in_a_line(
    proxy: Proxy, gcs_bucket: str, file: Path, status: int, message: str, error: type[JobError], words: str
) -> None:
    proxy.instead = lambda data: refusal(status, message)

    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(error, match=words) as caught:
            call()
        return str(caught.value)

    with ThreadPoolExecutor(16) as pool:
        for line in pool.map(refused, every_call(open_store(gcs_bucket, Retry(0.5)), file)):
            assert gcs_bucket in line
            assert "\n" not in line
            assert len(line) < 450
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (403, NoPermissionError, r"no permission storage.objects.get \(.*this is invalid\)"),
        (400, BadRequestError, "refused with 400: .*this is invalid"),
        (404, ObjectMissingError, "no object at"),
    ],
)
def test_refused_content(
    proxy: Proxy, store: Store, file: Path, status: int, error: type[JobError], words: str
) -> None:
    store.upload(file, "part")
    stream = store.open("part")
    message = "without storage.objects.get this is invalid"
    proxy.instead = lambda data: refusal(status, message) if b"alt=media" in data else None
    for read in (lambda: store.download("part", file.with_name("out")), stream.read):
        with pytest.raises(error, match=words) as caught:
            read()
        assert store.uri_of("part") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_short_outage_is_sat_out(proxy: Proxy, store: Store, file: Path) -> None:
    left: list[int] = []
    proxy.instead = lambda data: refusal(left.pop(), "busy") if left else None
    for call in every_call(store, file):
        left += [503]
        with suppress(ObjectMissingError, ObjectExistsError, ConflictError):
            call()
        assert left == []


def test_missing_bucket_is_not_a_missing_object(gcs_server: str, file: Path) -> None:
    store = open_store("gs://no-such-bucket/runs")
    for call in every_call(store, file):
        with pytest.raises(MissingInputError, match="no bucket gs://no-such-bucket: check the name") as error:
            call()
        assert not isinstance(error.value, ObjectMissingError)
        assert error.value.exit_code == Exit.MISSING_INPUT


def test_missing_credentials_are_told_how_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(NoPermissionError, match="gcloud auth application-default login") as error:
        open_store("gs://bucket")
    assert "gs://bucket" in str(error.value)


def test_what_is_no_key_is_left_out_of_listings(gcs_bucket: str) -> None:
    name = gcs_bucket.removeprefix("gs://")
    bucket = storage.Client(project="test").bucket(name)
    for key in ("folder/", "folder/object", "back\\slash", ".hidden", "folder/.tmp-1", "a//b"):
        bucket.blob(key).upload_from_string(b"1")
    store = open_store(gcs_bucket)
    assert list(store.list()) == [Entry("folder/object", 1)]
    assert "folder" in store.folders()


def test_objects_have_the_type_a_browser_needs(gcs_bucket: str, file: Path) -> None:
    store = open_store(gcs_bucket)
    store.put("report.html", b"<p>")
    store.upload(file, "grid.png")
    store.upload(file, "shard.tar.gz")
    blobs = storage.Client(project="test").list_blobs(gcs_bucket.removeprefix("gs://"))
    assert {blob.name: (blob.content_type, blob.content_encoding) for blob in blobs} == {
        "report.html": ("text/html", None),
        "grid.png": ("image/png", None),
        "shard.tar.gz": ("application/x-tar", None),
    }
