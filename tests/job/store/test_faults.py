"""Buckets on a bad day: damage, silence, refusals, outages and stops, and in which words a person learns of it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import google_crc32c
import pytest

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, StoppedError
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Retry, Store, open_store
from job.store.base import Blob
from job.store.retry import UnknownHostError
from tests.conftest import new_bucket, only_linux
from tests.faulty_proxy import Fault, FaultyProxy, Request
from tests.job.answering import serving
from tests.job.command_line import environment, raised
from tests.job.conftest import point_at
from tests.job.launching import lasting
from tests.job.store.test_store import all_raise, every_call, keys, put_by_others
from tests.servers import SECRET, SERVERS, free_port

CONTENT = b"0123456789" * 1000
LARGE_BYTES = 17 << 20
"""More than a stream reads ahead, twice."""
of_one_kind = pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def absent_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server that is not there, or might as well not be."""
    if request.param == "reads nothing":
        with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    elif request.param == "answers nothing":
        with FaultyProxy("http://nowhere") as proxy:
            proxy.hang()
            yield proxy.url
    else:
        yield "http://no-such-host.invalid" if request.param == "is unknown" else f"http://127.0.0.1:{free_port()}"


def damaging_once() -> Callable[[bytes], bytes]:
    left = [b"345678"]
    return lambda body: body.replace(left.pop(), b"345578", 1) if left and b"345678" in body else body


def test_damage_in_transit_is_repaired(proxy: FaultyProxy, remote_bucket: str, file: Path) -> None:
    store, large, out = open_store(remote_bucket, Retry(10)), file.with_name("large"), file.with_name("out")
    large.write_bytes(b"0123456789" * (LARGE_BYTES // 10))

    def damage_requests() -> None:
        damage = damaging_once()
        proxy.passed = lambda request: replace(request, body=damage(request.body))

    version = store.create("replace", b"0")
    names = ("create", "put", "replace", "upload")
    writes = {name: every_call(store, file, name, version, b"345678")[name] for name in names}
    writes |= {"large": lambda: store.upload(large, "large"), "own": lambda: store.upload(large, "own", fresh=True)}
    # Google compares checksums as well, and refuses (see below); the server of the tests does not. To Azure obstore
    # sends none: there a reader notices.
    for key, write in writes.items() if remote_bucket.startswith("s3://") else ():
        damage_requests()
        before = proxy.requests.total()
        write()
        assert proxy.requests.total() > before + 1, key
        assert b"345678" in store.read(key).data
    store.upload(large, "large")
    store.put("upload", CONTENT)
    for key, data in (("upload", CONTENT), ("large", large.read_bytes())):
        proxy.received = damaging_once()
        store.download(key, out)
        assert out.read_bytes() == data
    proxy.received = lambda body: body.replace(b"345678", b"345578")
    raised(BucketAwayError, "damaged in transit", store.within(0.5).read, "upload")
    proxy.received = bytes
    if remote_bucket.startswith("az://"):
        damage_requests()
        store.put("upload", CONTENT)
        raised(BucketAwayError, "damaged in transit", store.within(0.5).read, "upload")
    assert {path.name for path in file.parent.iterdir()} == {"file", "large", "out"}
    with store.open("large") as stream:
        stream.read(10)
        store.put("large", b"2" * LARGE_BYTES)
        raised(ObjectMissingError, r"was replaced while it was read|no object at", stream.read)


def test_broken_reads_take_few_requests(proxy: FaultyProxy, remote_bucket: str, file: Path, monkeypatch) -> None:
    monkeypatch.setattr("job.store.remote.RANGE_BYTES", 1 << 20)
    # A busy server is silent for a second, which would add requests.
    monkeypatch.setattr("job.store.retry.SILENCE_SECONDS", 60.0)
    store, size_bytes, requests = open_store(remote_bucket, Retry(120)), LARGE_BYTES >> 2, proxy.requests
    file.write_bytes(bytes(size_bytes))
    store.upload(file, "part")
    for fault in (Fault.SHORT, Fault.SHORT_CHUNKS, Fault.LOST_ANSWER):
        stream = store.open("part")
        stream.seek(-1000, io.SEEK_END)
        for read, ranges in (
            (lambda: store.download("part", file.with_name("out")), 5),
            (stream.read, 1),
            (lambda: store.read("part"), 5),
        ):
            before = requests["GET"]
            proxy.inject(fault, "^GET .*part")
            assert read() != bytes(999)
            assert requests["GET"] == before + 1 + ranges
        assert stream.tell() == size_bytes
        proxy.inject(fault, "^GET .*missing")
        assert not store.exists("missing")
    with store.open("part") as stream:
        before = requests["GET"]
        assert sum(len(block) for block in iter(lambda: stream.read(10_240), b"")) == size_bytes
        assert requests["GET"] == before + 5
    before = requests.total()
    store.replace("key", b"2", store.create("key", b"1"))
    store.exists("key")
    assert store.read("key").data == b"2"
    list(store.list())
    store.delete("key")
    assert requests.total() == before + 6


def test_one_failure_is_one_request(proxy: FaultyProxy, remote_bucket: str, file: Path) -> None:
    """Only our own retry asks again; a library's would outlive a lease."""
    # The first write to a bucket may take its server a while.
    version = open_store(remote_bucket, Retry(20)).create("key", CONTENT)
    store = open_store(remote_bucket, Retry(0))
    new, there = every_call(store, file, "new"), every_call(store, file, version=version)
    for fault in (Fault.UNAVAILABLE, Fault.TOO_MANY, Fault.RESET, Fault.SHORT):
        # When a connection that was idle is reset, aiohttp takes another one, at once.
        most = 2 if fault is Fault.RESET else 1
        for name in there:
            # Other answers have nothing that could be missing.
            if fault is not Fault.SHORT or name in ("read", "download", "open", "list", "folders"):
                proxy.inject(fault, ".", times=most)
                before = proxy.requests.total()
                raised(BucketAwayError, ".", (new if name in ("create", "upload") else there)[name])
                assert proxy.requests.total() - before <= most, name
                proxy.forget()


ABSENT = [
    ("refuses", 0.6, r"Connection refused.*\(tried for \d+ s in all\)"),
    ("reads nothing", 0.6, r"timed out.*\(tried for \d+ s in all\)"),
    # It is misspelt; resolvers may take 5 s to say so.
    ("is unknown", 60, r"not known.*\(tried for \d s in all\)"),
]


@pytest.mark.parametrize(("absent_url", "limit_seconds", "words"), ABSENT, indirect=["absent_url"])
def test_absent_server_is_an_outage(remote_bucket, absent_url, limit_seconds, words, file, monkeypatch, caplog) -> None:
    # More than a socket takes of it.
    file.write_bytes(bytes(LARGE_BYTES))
    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.3)
    point_at(absent_url, monkeypatch)
    calls = every_call(open_store(f"{remote_bucket}/runs", Retry(limit_seconds)), file)
    for line in all_raise(BucketAwayError, words, calls.values()):
        assert re.search(rf"^{remote_bucket}/runs.*the bucket is away \(.*\): check the network \(tried", line)
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    assert caplog.text == ""


def answer(status: int, code: str, message: str, request: Request) -> bytes:
    """An answer such as Google's or, with a `code`, S3's or Azure's; that to a HEAD request is the bare number.

    With status 200 it comes from what stands between, such as a proxy that wants a password.
    """
    error = {"error": {"code": status, "message": message, "errors": []}}
    xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    body = (message if status == 200 else xml if code else json.dumps(error)).encode()
    body = b"" if request.method == "HEAD" and status != 200 else body
    lines = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", "Connection: close"]
    if status != 200:
        lines += [f"Content-Type: application/{'xml' if code else 'json'}", f"x-ms-error-code: {code}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_refusals_are_one_line(proxy: FaultyProxy, remote_bucket: str, file: Path, monkeypatch) -> None:
    """Foreign answers are an outage; least of all they mean that nothing is there."""
    # A busy machine is silent for a second, which would be an outage.
    monkeypatch.setattr("job.store.retry.SILENCE_SECONDS", 60.0)
    store, scheme = open_store(remote_bucket, Retry(0)), remote_bucket.partition("://")[0]
    put_by_others(remote_bucket, "key", b"theirs")
    foreign = [(200, "", body, BucketAwayError, "the bucket is away") for body in ("", "<html></html>", "[]")]
    for status, code, message, error, words in [*SERVERS[scheme].refusals, *foreign]:
        proxy.instead = lambda request, said=(status, code, message): answer(*said, request)
        calls = every_call(store, file)
        if code == "ConditionalRequestConflict":
            calls = {name: calls[name] for name in ("create", "replace", "put", "upload")}
        if status == 200:
            # Nobody is told whether something was deleted.
            del calls["delete"]
        for line in all_raise(error, words, calls.values()):
            assert remote_bucket in line
            assert SECRET not in line
            assert "owner" not in line
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    # A conflict without a word: the answer of some servers, as to a request that only asks for the head.
    wordless = b"HTTP/1.1 412 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    proxy.instead = lambda request: None if request.method == "GET" else wordless
    for name in ("create", "upload") if scheme != "az" else ():
        raised(ObjectExistsError, "another writer was first", every_call(store, file)[name])
    proxy.instead = lambda request: None
    words = f"no bucket {scheme}://no-such-bucket: check the name, or make it with `[a-z]+ s.*no-such-bucket`"
    calls = every_call(open_store(f"{scheme}://no-such-bucket/runs"), file)
    all_raise(MissingInputError, words, calls.values())


class RefusingAtOnce(BaseHTTPRequestHandler):
    """Answers to an upload before the content is there, and closes the connection on which it comes."""

    def do_POST(self) -> None:
        self.send_error(412)

    def do_GET(self) -> None:
        self.send_response(206)
        for name, value in {"X-Goog-Generation": "1", "X-Goog-Hash": "", "Content-Length": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"x")


def test_early_refusals_are_conflicts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(bytes(LARGE_BYTES))
    with serving(RefusingAtOnce) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        store = open_store("gs://bucket", Retry(2))
        raised(ObjectExistsError, "another writer was first", store.upload, file, "key")


@of_one_kind
def test_every_operation_waits(proxy: FaultyProxy, remote_bucket: str, file: Path) -> None:
    """That it does so is told once."""
    notes: list[str] = []
    store = open_store(remote_bucket, Retry(60, note=notes.append))
    # More than a stream reads at once.
    file.write_bytes(content := CONTENT * 1000)
    versions = {name: store.create(f"{name}/key", b"0") for name in ("read", "replace", "delete", "exists")}
    for name in ("download", "open"):
        store.upload(file, f"{name}/key")
    names = [*every_call(store, file)]
    calls = {name: every_call(store, file, f"{name}/key", versions.get(name, ""))[name] for name in names}
    with ThreadPoolExecutor(len(calls)) as pool:
        with proxy.away():
            futures = {name: pool.submit(call) for name, call in calls.items()}
            time.sleep(1.5)
            assert not any(future.done() for future in futures.values())
        found = {name: future.result(30) for name, future in futures.items()}
        with proxy.away():
            there = pool.submit(keys, store)
            time.sleep(1.5)
    assert there.result(30) == [f"{name}/key" for name in sorted(calls.keys() - {"delete", "list", "folders"})]
    assert found["read"] == Blob(b"0", versions["read"])
    assert store.read("replace/key") == Blob(b"1", found["replace"])
    assert found["open"].read() == file.with_name("out").read_bytes() == store.read("upload/key").data == content
    assert found["exists"] and found["list"] and "open" in found["folders"]
    assert ["trying again" in note for note in notes] == [True, False, True, False]
    assert "Connection refused" in notes[0] and notes[0].endswith("trying again for up to 60 s")
    assert notes[1].startswith("the bucket is back after ")


def test_limit_counts_from_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has never answered is given up soon, for it is misspelt; a source is another host than the bucket."""

    def away(error: JobError) -> None:
        raise error

    monkeypatch.setattr("job.store.retry.PATIENCE_SECONDS", 0.0)
    retry, unknown = Retry(1.0), UnknownHostError("away")
    retry(bool)
    source = retry.elsewhere()
    raised(BucketAwayError, "tried for 0 s", source, away, unknown)
    source(bool)
    for again, error, seconds in ((retry, unknown, 1), (retry, BucketAwayError("away"), 1), (source, unknown, 1)):
        with lasting(seconds):
            raised(BucketAwayError, f"tried for {seconds} s", again, away, error)
    raised(BucketAwayError, "tried for 0 s", Retry(0), away, BucketAwayError("away"))
    # A transfer that was under way for longer than the limit and then breaks off has only begun to wait.
    endings = [BucketAwayError("it broke off"), None]

    def transfer() -> None:
        time.sleep(0.6)
        if error := endings.pop(0):
            raise error

    Retry(0.5)(transfer)
    assert endings == []


@of_one_kind
def test_stop_ends_only_the_waiting(proxy: FaultyProxy, remote_bucket: str, file: Path) -> None:
    stop = Stop(30)
    store = open_store(remote_bucket, Retry(60, stop))
    file.write_bytes(CONTENT * 1000)
    store.create("key", b"1")
    store.upload(file, "large")
    stop.request("SIGTERM")
    # From a bucket that answers, what is small arrives; what is large breaks off.
    assert store.read("key").data == b"1"
    store.put("there", CONTENT)
    calls = every_call(store, file, "large")
    for name in ("upload", "download"):
        raised(StoppedError, r"stopped by SIGTERM while gs://.*/large was transferred", calls[name])
    proxy.refuse()
    raised(StoppedError, r"while the bucket was away \(.*refused", store.read, "key")
    raised(StoppedError, r"by SIGTERM while .*/large was transferred", calls["upload"])


@of_one_kind
def test_work_is_repeated_as_a_whole(proxy: FaultyProxy, remote_bucket: str) -> None:
    notes: list[str] = []
    store = open_store(remote_bucket, Retry(60, note=notes.append))
    below = store.sub("run").within(30)
    assert (below.retry.limit_seconds, store.sub("run").retry) == (30, store.retry)
    done: list[str] = []

    def work() -> str:
        done.append("read")
        below.exists("none")
        done.append("create")
        return store.create("key", b"1")

    proxy.inject(Fault.UNAVAILABLE, "^POST", times=2)
    assert store.retry(work) == store.read("key").version
    assert done == ["read", "create"] * 3
    assert ["trying again for up to 60 s" in note for note in notes] == [True, False], "once for all of them"


def seconds_after_stop(store: Store, stop: Stop, file: Path) -> float:
    """How long all operations at once go on after a stop was asked for."""
    asked_at: list[float] = []

    def ask() -> None:
        asked_at.append(time.monotonic())
        stop.request("SIGTERM")

    threading.Timer(0.5, ask).start()
    all_raise(StoppedError, "stopped by SIGTERM", every_call(store, file).values())
    return time.monotonic() - asked_at[0]


@pytest.mark.parametrize("absent_url", ["reads nothing", "answers nothing"], indirect=True)
def test_stop_is_heard_at_once(remote_bucket: str, absent_url: str, file: Path, monkeypatch) -> None:
    """A second without load: every request would wait 7.5 s for its own limit of silence."""
    stop = Stop(30)
    file.write_bytes(bytes(LARGE_BYTES))
    point_at(absent_url, monkeypatch)
    assert seconds_after_stop(open_store(f"{remote_bucket}/runs", Retry(60, stop)), stop, file) < 5
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@of_one_kind
def test_large_upload_is_one_conditional_request(proxy: FaultyProxy, remote_bucket: str, file: Path) -> None:
    # What gcsfs takes for the end of a content is part of this one.
    file.write_bytes(b"\r\n--==0==--" * 200_000)
    seen: list[Request] = []
    proxy.instead = lambda request: seen.append(request) if "/upload/" in request.target else None
    store = open_store(remote_bucket)
    store.upload(file, "large")
    assert store.read("large").data == file.read_bytes()
    (request,) = seen
    assert "uploadType=multipart" in request.target
    assert "ifGenerationMatch=0" in request.target
    checksum = base64.b64encode(google_crc32c.Checksum(file.read_bytes()).digest()).decode()
    assert json.loads(request.body.split(b"\r\n\r\n")[1].split(b"\r\n--")[0])["crc32c"] == checksum


@pytest.mark.parametrize("which", ["gs", "s3-moto"])
def test_bucket_without_conditions_is_refused(which: str, request, started, monkeypatch, tmp_path: Path) -> None:
    """Before anything is computed: a proxy on the way drops what only the first writer may do."""

    def without_condition(request: Request) -> Request:
        headers = tuple((name, value) for name, value in request.headers if name.lower() != "if-none-match")
        return replace(request, target=request.target.replace("ifGenerationMatch", "x"), headers=headers)

    uri = new_bucket(which, request, monkeypatch, tmp_path)
    with FaultyProxy(started(which)) as proxy:
        point_at(proxy.url, monkeypatch)
        open_store(uri).check_writable("probe")
        proxy.passed = without_condition
        words = r"lets a second writer overwrite the first.*honours If-None-Match"
        raised(BadRequestError, words, open_store(uri).check_writable, "probe")
        assert keys(open_store(uri)) == []


MOVED_BYTES, MOST_ABOVE_BYTES = 300 * 10**6, 64 << 20
MOVE = """
import sys
from pathlib import Path
from job.store import open_store
store, folder = open_store(sys.argv[1]), Path(sys.argv[2])
for name in ("small", "large"):
    store.upload(folder / name, name)
    store.upload(folder / name, "own-" + name, fresh=True)
    store.download(name, folder / "down")
    print((folder / "down").stat().st_size, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@only_linux
def test_a_large_object_takes_little_memory(remote_bucket: str, tmp_path: Path) -> None:
    for name, size_bytes in (("small", 1 << 20), ("large", MOVED_BYTES)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size_bytes)
    words, held = [sys.executable, "-c", MOVE, remote_bucket, str(tmp_path)], []
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == f"{1 << 20}\n"
        while child.poll() is None:
            # A process that has just ended has no such line.
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
            held += [int(found[1]) << 10] if found else []
            time.sleep(0.02)
        assert child.stdout.read() == f"{MOVED_BYTES}\n"
    assert max(held) - held[0] < MOST_ABOVE_BYTES
