"""S3 on a bad day: lost answers, silence, refusals, bytes damaged on the way; on each server that the tests have."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import boto3
import pytest

from job.exits import BucketAwayError, Exit
from job.store import ConflictError, Entry, ObjectExistsError, ObjectMissingError, Retry, Store, open_store
from tests.job.store.lost_answers import LostAnswers
from tests.job.store.proxy import Proxy, every_call, lose_the_answer_to, once

LARGE_BYTES = 17 << 20
"""Three parts."""


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes((b"0123456789" * (LARGE_BYTES // 10 + 1))[:LARGE_BYTES])
    return path


def refusal(request: bytes, status: int, code: str, message: str) -> bytes:
    """An answer such as S3 gives, which to a HEAD request is the bare number."""
    body = (
        b""
        if request.startswith(b"HEAD")
        else f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    )
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def refuse_once(proxy: Proxy, request: bytes, answer: bytes) -> threading.Event:
    """Answers the next request that begins so in the bucket's stead."""
    refused = threading.Event()

    def instead(data: bytes) -> bytes | None:
        if refused.is_set() or re.match(request, data) is None:
            return None
        refused.set()
        return answer

    proxy.instead = instead
    return refused


def record_requests(proxy: Proxy, method: bytes) -> list[bytes]:
    """The requests from now on, each with at least its head; `method` is a regular expression."""
    requests: list[bytes] = []

    def note(data: bytes) -> bytes:
        requests.extend([data] * (re.match(method + rb" /", data) is not None))
        return data

    proxy.request = note
    return requests


def unfinished_uploads(store: Store) -> int:
    listing = boto3.client("s3").list_multipart_uploads(Bucket=store.uri.removeprefix("s3://"))
    return len(listing.get("Uploads", []))


class TestLostAnswers(LostAnswers):
    request = b"PUT /"


@pytest.mark.parametrize("request_line", [b"?uploads", b"partNumber=2", b"?uploadId="])
def test_upload_in_parts_survives_a_lost_answer(
    proxy: Proxy, store: Store, large_file: Path, request_line: bytes
) -> None:
    lost = lose_the_answer_to(proxy, request_line)
    store.upload(large_file, "part")
    assert lost.is_set()
    assert store.read("part").data == large_file.read_bytes()
    store.upload(large_file, "part")
    large_file.write_bytes(large_file.read_bytes()[::-1])
    before = unfinished_uploads(store)
    with pytest.raises(ObjectExistsError, match="with other content"):
        store.upload(large_file, "part")
    assert unfinished_uploads(store) == before


@pytest.mark.parametrize("code", ["NoSuchUpload", "ConditionalRequestConflict"])
def test_parts_are_sent_again_when_another_writer_spoilt_them(
    proxy: Proxy, store: Store, large_file: Path, code: str
) -> None:
    requests = record_requests(proxy, b"PUT")
    answer = refusal(b"POST", 404 if code == "NoSuchUpload" else 409, code, "Another writer was here.")
    refused = refuse_once(proxy, rb"POST /\S+uploadId=", answer)
    store.upload(large_file, "part")
    assert refused.is_set()
    assert len(requests) == (6 if code == "NoSuchUpload" else 3)
    assert hashlib.sha256(store.read("part").data).digest() == hashlib.sha256(large_file.read_bytes()).digest()
    assert unfinished_uploads(store) == 0


def test_a_conflict_that_passes_is_no_conflict(proxy: Proxy, store: Store) -> None:
    conflict = refusal(b"PUT", 409, "ConditionalRequestConflict", "A conflicting operation is in progress.")
    refused = refuse_once(proxy, rb"PUT /", conflict)
    version = store.create("lease", b"1")
    assert refused.is_set()
    refused = refuse_once(proxy, rb"PUT /", conflict)
    assert store.read("lease").version == version != store.replace("lease", b"2", version)
    assert refused.is_set()
    assert store.read("lease").data == b"2"


def test_a_download_that_breaks_off_goes_on_where_it_broke(proxy: Proxy, store: Store, large_file: Path) -> None:
    store.upload(large_file, "part")
    content = large_file.read_bytes()
    with store.open("part") as stream:
        for target in ("out", "stream", "read"):
            passed = 0

            def cut(data: bytes) -> bytes | None:
                nonlocal passed
                passed += len(data)
                return data if passed < 5 << 20 or passed - len(data) >= 5 << 20 else None

            requests = record_requests(proxy, b"GET")
            proxy.answer = cut
            if target == "out":
                store.download("part", large_file.with_name(target))
            else:
                data = stream.read() if target == "stream" else store.read("part").data
                large_file.with_name(target).write_bytes(data)
            assert large_file.with_name(target).read_bytes() == content
            assert len(requests) == 2
            where = re.search(rb"[Rr]ange: bytes=(\d+)-", requests[1])
            assert where is not None
            assert 3 << 20 <= int(where[1]) <= 5 << 20
            assert b"if-match" in requests[1].lower()


def test_a_stream_takes_few_requests(proxy: Proxy, store: Store, large_file: Path) -> None:
    store.upload(large_file, "part")
    requests = record_requests(proxy, b"GET")
    with store.open("part") as stream:
        assert len(stream.read()) == LARGE_BYTES
    assert len(requests) == 1
    with store.open("part") as stream:
        assert sum(len(block) for block in iter(lambda: stream.read(10_240), b"")) == LARGE_BYTES
    assert len(requests) == 1 + 3


def test_small_operations_take_one_request(proxy: Proxy, store: Store) -> None:
    requests = record_requests(proxy, b"[A-Z]+")
    version = store.create("key", b"1")
    store.replace("key", b"2", version)
    assert store.read("key").data == b"2"
    assert store.exists("key")
    assert list(store.list()) == [Entry("key", 1)]
    store.delete("key")
    assert [request.split(b" ", 1)[0] for request in requests] == [b"PUT", b"PUT", b"GET", b"HEAD", b"GET", b"DELETE"]


@pytest.mark.parametrize("size_bytes", [1000, LARGE_BYTES])
def test_damage_on_the_way_is_noticed(proxy: Proxy, store: Store, file: Path, size_bytes: int) -> None:
    file.write_bytes(b"0123456789" * (size_bytes // 10))
    proxy.request = once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")
    with pytest.raises(BucketAwayError, match="damaged on the way") as error:
        store.upload(file, "part")
    assert store.uri_of("part") in str(error.value)
    assert not store.exists("part")
    assert unfinished_uploads(store) == 0
    store.upload(file, "part")
    reads: list[Callable[[], object]] = [
        lambda: store.download("part", file.with_name("out")),
        lambda: store.read("part"),
    ]
    for read in reads:
        proxy.answer = once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")
        with pytest.raises(BucketAwayError, match="damaged on the way"):
            read()
        assert [path.name for path in file.parent.iterdir()] == ["file"]
    store.download("part", file.with_name("out"))
    assert file.with_name("out").read_bytes() == file.read_bytes()


def test_damaged_writes_of_small_objects_are_noticed(proxy: Proxy, store: Store) -> None:
    version = store.create("lease", b"12345678")
    damage = lambda: once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")  # noqa: E731
    writes: list[Callable[[], object]] = [
        lambda: store.create("manifest", b"12345678"),
        lambda: store.put("status", b"12345678"),
        lambda: store.replace("lease", b"345678", version),
    ]
    for write in writes:
        proxy.request = damage()
        with pytest.raises(BucketAwayError, match="damaged on the way"):
            write()
    assert not store.exists("manifest")
    assert not store.exists("status")
    assert not store.exists("lease") or store.read("lease").data == b"12345678"


def test_damage_to_what_others_wrote_is_noticed(proxy: Proxy, store: Store, file: Path) -> None:
    name = store.uri.removeprefix("s3://")
    boto3.client("s3").put_object(Bucket=name, Key="theirs", Body=file.read_bytes())
    assert store.read("theirs").data == file.read_bytes()
    proxy.answer = once(lambda data: data.replace(b"345678", b"345578", 1), b"345678")
    with pytest.raises(BucketAwayError, match="damaged on the way"):
        store.read("theirs")
    with pytest.raises(ObjectExistsError):
        store.upload(file, "theirs")


def test_what_others_wrote_in_parts_is_read(store: Store, large_file: Path, tmp_path: Path) -> None:
    boto3.client("s3").upload_file(str(large_file), store.uri.removeprefix("s3://"), "theirs")
    store.download("theirs", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == large_file.read_bytes()


def test_an_object_that_changes_under_a_reader_is_noticed(store: Store, large_file: Path) -> None:
    store.upload(large_file, "part")
    with store.open("part") as stream:
        stream.read(10)
        store.put("part", b"2" * LARGE_BYTES)
        with pytest.raises(ObjectMissingError, match="was replaced while it was read"):
            stream.read()


def seconds_until_away(call: Callable[[], object], words: str) -> float:
    start = time.monotonic()
    with pytest.raises(BucketAwayError, match=rf"s3://bucket/runs.* away for 2 s \(.*{words}.*\): check") as error:
        call()
    assert error.value.exit_code == Exit.BUCKET_AWAY
    return time.monotonic() - start


@pytest.mark.parametrize(("listening", "words"), [(False, "Connection refused"), (True, "timed out")])
def test_server_that_is_away_is_told_within_the_deadline(
    listening: bool,
    words: str,
    aws_credentials: None,
    large_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as server, ThreadPoolExecutor(16) as pool:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen(200)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        store = open_store("s3://bucket/runs", Retry(2))
        calls = every_call(store, large_file)
        seconds = list(pool.map(lambda call: seconds_until_away(call, words), calls))
    assert max(seconds) < 4
    assert [path.name for path in large_file.parent.iterdir()] == ["file"]
    assert caplog.text == ""


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
def test_server_that_goes_away_before_the_content(proxy: Proxy, s3_bucket: str, file: Path) -> None:
    store = open_store(s3_bucket, Retry(1))
    store.upload(file, "part")
    stream = store.open("part")
    proxy.request = lambda data: None if data.startswith(b"GET") else data
    for read in (lambda: store.download("part", file.with_name("out")), stream.read, lambda: store.read("part")):
        start = time.monotonic()
        with pytest.raises(BucketAwayError, match=f"{s3_bucket}/part: the bucket was away"):
            read()
        assert time.monotonic() - start < 3
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
def test_a_short_outage_is_sat_out(proxy: Proxy, store: Store, file: Path) -> None:
    left: list[int] = []
    proxy.instead = lambda data: refusal(data, left.pop(), "SlowDown", "busy") if left else None
    for call in every_call(store, file):
        left += [503]
        with suppress(ObjectMissingError, ObjectExistsError, ConflictError):
            call()
        assert left == []


def test_a_process_ends_quietly_and_at_once(s3_bucket: str, file: Path) -> None:
    script = f"""
from pathlib import Path
from job.store import open_store
store = open_store({s3_bucket!r})
store.upload(Path({str(file)!r}), "part")
stream = store.open("part")
print(stream.read(10))
"""
    child = subprocess.run([sys.executable, "-W", "default", "-c", script], check=True, capture_output=True, timeout=60)
    assert child.stdout == b"b'0123456789'\n"
    assert child.stderr == b""
