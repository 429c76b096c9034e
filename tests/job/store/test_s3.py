"""S3 on a bad day: lost answers, silence, refusals, bytes damaged on the way; on each server that the tests have."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import boto3
import pytest

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError
from job.store import ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store, open_store
from tests.conftest import SECRET
from tests.job.store.test_gcs import Proxy, every_call, lose_the_answer_to, once

LARGE_BYTES = 17 << 20
"""Three parts."""


@pytest.fixture
def proxy(s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: Proxy, s3_bucket: str) -> Store:
    return open_store(s3_bucket, deadline_seconds=10)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 1000)
    return path


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


def test_create_survives_a_lost_answer(proxy: Proxy, store: Store) -> None:
    lost = lose_the_answer_to(proxy, b"PUT /")
    version = store.create("manifest", b"mine")
    assert lost.is_set()
    assert store.read("manifest").version == version
    with pytest.raises(ObjectExistsError):
        store.create("manifest", b"theirs")


def test_replace_survives_a_lost_answer(proxy: Proxy, store: Store) -> None:
    first = store.create("lease", b"1")
    lost = lose_the_answer_to(proxy, b"PUT /")
    second = store.replace("lease", b"2", first)
    assert lost.is_set()
    assert store.read("lease").version == second != first
    with pytest.raises(ConflictError):
        store.replace("lease", b"3", first)


def test_upload_survives_a_lost_answer(proxy: Proxy, store: Store, file: Path) -> None:
    lost = lose_the_answer_to(proxy, b"PUT /")
    store.upload(file, "part")
    assert lost.is_set()
    assert store.read("part").data == file.read_bytes()


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
    with pytest.raises(BucketAwayError, match=rf"s3://bucket/runs.* away for 1 s \(.*{words}.*\): check") as error:
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
        store = open_store("s3://bucket/runs", deadline_seconds=1)
        calls = every_call(store, large_file)
        seconds = list(pool.map(lambda call: seconds_until_away(call, words), calls))
    assert max(seconds) < 3
    assert [path.name for path in large_file.parent.iterdir()] == ["file"]
    assert caplog.text == ""


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
def test_server_that_goes_away_before_the_content(proxy: Proxy, s3_bucket: str, file: Path) -> None:
    store = open_store(s3_bucket, deadline_seconds=1)
    store.upload(file, "part")
    stream = store.open("part")
    proxy.request = lambda data: None if data.startswith(b"GET") else data
    for read in (lambda: store.download("part", file.with_name("out")), stream.read, lambda: store.read("part")):
        start = time.monotonic()
        with pytest.raises(BucketAwayError, match=f"{s3_bucket}/part: the bucket was away"):
            read()
        assert time.monotonic() - start < 3
    assert [path.name for path in file.parent.iterdir()] == ["file"]


FORBIDDEN = "User: arn:aws:iam::123456789012:user/trainer is not authorized to perform: s3:PutObject on the bucket"
ECHO = f"The Credential=owner/20261125 with the secret {SECRET} is not known"


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
@pytest.mark.parametrize(
    ("status", "code", "message", "error", "words"),
    [
        (403, "AccessDenied", FORBIDDEN, NoPermissionError, r"no permission s3:PutObject \(AccessDenied\): grant the "),
        (401, "Unauthorized", ECHO, NoPermissionError, r"no permission \(Unauthorized\): grant the account in use"),
        (403, "InvalidAccessKeyId", ECHO, NoPermissionError, r"no usable AWS credentials \(InvalidAccessKeyId\): run"),
        (403, "SignatureDoesNotMatch", ECHO, NoPermissionError, r"credentials \(SignatureDoesNotMatch\)"),
        (400, "ExpiredToken", ECHO, NoPermissionError, r"credentials \(ExpiredToken\): run `aws configure`"),
        (400, "AuthorizationHeaderMalformed", ECHO, NoPermissionError, r"\(AuthorizationHeaderMalformed\)"),
        (403, "RequestTimeTooSkewed", ECHO, NoPermissionError, "this machine's clock is wrong"),
        (400, "InvalidRequest", "No such bucket type", BadRequestError, "refused with 400: No such bucket type"),
        (501, "NotImplemented", "A header is not known", BadRequestError, "refused with 501: A header is not known"),
        (503, "SlowDown", "Please reduce your request rate.", BucketAwayError, "away for 0.5 s"),
        (500, "InternalError", "We encountered an internal error.", BucketAwayError, "away for 0.5 s"),
        (429, "TooManyRequests", "Slower", BucketAwayError, "away for 0.5 s"),
    ],
)
def test_refusals_are_told_in_a_line(
    proxy: Proxy, s3_bucket: str, file: Path, status: int, code: str, message: str, error: type[JobError], words: str
) -> None:
    proxy.instead = lambda data: refusal(data, status, code, message)

    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(error, match=words) as caught:
            call()
        return str(caught.value)

    with ThreadPoolExecutor(16) as pool:
        store = open_store(s3_bucket, deadline_seconds=0.5 if error is BucketAwayError else 10)
        for line in pool.map(refused, every_call(store, file)):
            assert s3_bucket in line
            assert "\n" not in line
            assert SECRET not in line
            assert "owner" not in line
            assert len(line) < 450
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "AccessDenied", NoPermissionError, r"no permission s3:GetObject \(AccessDenied\)"),
        (400, "InvalidRequest", BadRequestError, "refused with 400: without s3:GetObject this is invalid"),
        (404, "NoSuchKey", ObjectMissingError, "no object at"),
    ],
)
def test_refused_content(
    proxy: Proxy, store: Store, file: Path, status: int, code: str, error: type[JobError], words: str
) -> None:
    store.upload(file, "part")
    stream = store.open("part")
    answer = refusal(b"GET", status, code, "without s3:GetObject this is invalid")
    proxy.instead = lambda data: answer if re.match(rb"GET /\S+/part", data) else None
    for read in (lambda: store.download("part", file.with_name("out")), stream.read):
        with pytest.raises(error, match=words) as caught:
            read()
        assert store.uri_of("part") in str(caught.value)
        assert "\n" not in str(caught.value)
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


def test_missing_bucket_is_not_a_missing_object(s3_server: str, file: Path) -> None:
    store = open_store("s3://no-such-bucket/runs")
    for call in every_call(store, file):
        with pytest.raises(MissingInputError, match="no bucket s3://no-such-bucket: check the name") as error:
            call()
        assert not isinstance(error.value, ObjectMissingError)
        assert error.value.exit_code == Exit.MISSING_INPUT


@pytest.mark.parametrize("s3_server", ["seaweedfs"], indirect=True)
def test_who_may_only_read_is_told_so(s3_bucket: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(s3_bucket).create("key", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    store = open_store(s3_bucket)
    assert store.read("key").data == b"1"
    assert list(store.list()) == [Entry("key", 1)]
    writes: list[Callable[[], object]] = [
        lambda: store.create("new", b"1"),
        lambda: store.put("key", b"2"),
        lambda: store.replace("key", b"2", store.read("key").version),
        lambda: store.upload(file, "part"),
        lambda: store.delete("key"),
    ]
    for write in writes:
        with pytest.raises(NoPermissionError, match=rf"no permission.*s3:ListBucket on {s3_bucket}") as error:
            write()
        assert error.value.exit_code == Exit.NO_PERMISSION
    assert store.read("key").data == b"1"


@pytest.mark.parametrize("s3_server", ["seaweedfs"], indirect=True)
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_but_not_repeated(
    s3_bucket: str, file: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "quite-another")
    for call in every_call(open_store(s3_bucket), file):
        with pytest.raises(NoPermissionError, match=r"no usable AWS credentials \([A-Za-z]+\): run") as error:
            call()
        assert "quite-another" not in str(error.value)
        assert SECRET not in str(error.value)


def test_missing_credentials_are_told_how_to_get(
    aws_credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NoPermissionError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as error:
        open_store("s3://bucket")
    assert "s3://bucket: no usable AWS credentials (none were found)" in str(error.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NoPermissionError, match="ProfileNotFound"):
        open_store("s3://bucket")


@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        ("AWS_ENDPOINT_URL", "owner:top-secret@somewhere", BadRequestError, "AWS_ENDPOINT_URL must be the URL of"),
        ("AWS_ENDPOINT_URL_S3", "http://", BadRequestError, "AWS_ENDPOINT_URL must be the URL of"),
        ("AWS_ENDPOINT_URL", "http://owner:top-secret@127.0.0.1:1", BadRequestError, "without a user and password"),
        ("AWS_ENDPOINT_URL", "http://no-such-host.invalid", BucketAwayError, "away for 0.5 s"),
        ("AWS_DEFAULT_REGION", "no region", BadRequestError, "check the AWS settings"),
    ],
)
def test_wrong_settings_are_told_without_the_passwords_in_them(
    variable: str,
    value: str,
    error: type[JobError],
    words: str,
    aws_credentials: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=words) as caught:
        open_store("s3://bucket", deadline_seconds=0.5).read("key")
    assert "s3://bucket" in str(caught.value)
    assert "top-secret" not in str(caught.value)


def test_the_endpoint_for_s3_alone_comes_first(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    open_store(s3_bucket, deadline_seconds=1).create("key", b"1")


def test_what_is_no_key_is_left_out_of_listings(s3_bucket: str) -> None:
    client = boto3.client("s3")
    for key in ("folder/", "folder/object", "tab\t", ".hidden", "folder/.tmp-1"):
        client.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key, Body=b"")
    store = open_store(s3_bucket)
    assert list(store.list()) == [Entry("folder/object", 0)]
    assert store.folders() == ["folder"]


def test_objects_have_the_type_a_browser_needs(s3_bucket: str, file: Path) -> None:
    store = open_store(s3_bucket)
    store.put("report.html", b"<p>")
    store.upload(file, "grid.png")
    store.upload(file, "shard.tar.gz")
    client = boto3.client("s3")
    heads = {
        key: client.head_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key)
        for key in ("report.html", "grid.png", "shard.tar.gz")
    }
    assert {key: (head["ContentType"], head.get("ContentEncoding")) for key, head in heads.items()} == {
        "report.html": ("text/html", None),
        "grid.png": ("image/png", None),
        "shard.tar.gz": ("application/x-tar", None),
    }


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


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "s3:// names no bucket: use s3://BUCKET"),
        ("s3://UPPER", "names no bucket"),
        ("s3://b", "names no bucket"),
        ("s3://user@bucket/x", "has a user or password in it"),
        ("s3://bucket/../other", "cannot be an object's key"),
        ("s3://bucket//folder", "cannot be an object's key"),
    ],
)
def test_uris_that_name_no_bucket(uri: str, words: str, aws_credentials: None) -> None:
    with pytest.raises(BadRequestError, match=words):
        open_store(uri)


def test_without_the_library_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["s3fs"] = None
from job.exits import BadRequestError
from job.store import open_store
try:
    open_store("s3://bucket")
except BadRequestError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "pip install 'ddpm-job[s3]'" in child.stdout
