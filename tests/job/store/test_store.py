"""What every bucket keeps to: a folder, servers of gs://, s3:// and az://, and in the slow part another of s3://."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import boto3
import pytest

from job.exits import BadDataError, BadRequestError, JobError, MissingInputError
from job.store import ConflictError, ObjectExistsError, ObjectMissingError, Store, open_store
from job.store.base import Blob, Entry
from tests.conftest import new_bucket
from tests.job.command_line import raised
from tests.servers import KINDS, SERVERS

LARGE_BYTES = 33 << 20
"""More than any client sends or gets in a single request unless it is told to."""


@pytest.fixture(params=["local", *KINDS, pytest.param("s3-moto", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A bucket of each kind, and here alone one of another S3 server."""
    return open_store(new_bucket(request.param, request, monkeypatch, tmp_path))


Calls = dict[str, Callable[[], object]]


def every_call(store: Store, file: Path, key: str = "key", version: str = "12345", data: bytes = b"1") -> Calls:
    """All that a store does with an object; `file` is uploaded, and `out` beside it is downloaded."""
    return {
        "read": lambda: store.read(key),
        "create": lambda: store.create(key, data),
        "replace": lambda: store.replace(key, data, version),
        "put": lambda: store.put(key, data),
        "upload": lambda: store.upload(file, key),
        "download": lambda: store.download(key, file.with_name("out")),
        "open": lambda: store.open(key),
        "list": lambda: list(store.list()),
        "folders": lambda: store.folders(),
        "delete": lambda: store.delete(key),
        "exists": lambda: store.exists(key),
    }


def all_raise(error: type[JobError], words: str, calls: Collection[Callable[[], object]]) -> list[str]:
    """The short line with which each call, all at once, raises this error."""
    with ThreadPoolExecutor(len(calls)) as pool:
        lines = list(pool.map(partial(raised, error, words), calls))
    assert all("\n" not in line and len(line) < 450 for line in lines)
    return lines


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


def put_by_others(uri: str, key: str, data: bytes = b"1") -> None:
    """Writes an object as somebody without this program would."""
    scheme, _, bucket = uri.partition("://")
    if bucket:
        SERVERS[scheme].put(bucket, key, data)
        return
    Path(uri, key).parent.mkdir(parents=True, exist_ok=True)
    Path(uri, key).write_bytes(data)


def test_writes_are_read_and_conflicts_noticed(store: Store, tmp_path: Path) -> None:
    for data in (b"", b"\x00\xff\r\n", b"x" * 100_000):
        version = store.create("runs/a/object", data)
        assert store.read("runs/a/object") == Blob(data, version)
        assert list(store.list()) == [Entry("runs/a/object", len(data))]
        with store.open("runs/a/object") as file:
            assert file.read() == data
        store.delete("runs/a/object")

    first, there = store.create("lease", b"1"), re.escape(store.uri_of("lease"))
    raised(ObjectExistsError, f"{there}.*another writer was first", store.create, "lease", b"theirs")
    assert store.create("lease", b"1") == first, "a repeated write whose answer was lost is no conflict"
    second = store.replace("lease", b"2", first)
    assert store.read("lease") == Blob(b"2", second) != Blob(b"2", first)
    raised(ConflictError, "another writer replaced it", store.replace, "lease", b"3", first)
    assert store.replace("lease", b"2", first) == second, "nor is this"
    store.put("lease", b"4")
    raised(ConflictError, "another writer replaced it", store.replace, "lease", b"5", second)
    assert store.read("lease").data == b"4"
    store.delete("lease")
    for key in ("lease", "never/there"):
        raised(ConflictError, "gone", store.replace, key, b"6", second)

    path = tmp_path / "file"
    for size_bytes in (0, 1, 70_000):
        path.write_bytes(b"a" * size_bytes)
        store.upload(path, f"{size_bytes}")
        store.upload(path, f"{size_bytes}")
        path.write_bytes(b"b" * (size_bytes or 1))
        raised(ObjectExistsError, "other content", store.upload, path, f"{size_bytes}")
        assert store.read(f"{size_bytes}").data == b"a" * size_bytes
    assert keys(store) == ["0", "1", "70000"]
    raised(ObjectExistsError, "other content", store.move, path, "1")
    assert path.exists()
    store.move(path, "moved")
    assert store.read("moved").data == b"b" * 70_000
    assert not path.exists()


def test_large_files_are_transferred_and_read(store: Store, tmp_path: Path) -> None:
    path, target = tmp_path / "part.safetensors", tmp_path / "made" / "on" / "the" / "way"
    path.write_bytes(content := random.Random(0).randbytes(LARGE_BYTES))
    scheme, _, name = store.uri.partition("://")
    store.upload(path, "checkpoints/1/part")
    assert list(store.list("checkpoints")) == [Entry("checkpoints/1/part", LARGE_BYTES)]
    if scheme == "s3":
        # Others upload in parts without a checksum of the whole.
        boto3.client("s3").upload_file(str(path), name, "theirs")
        store.upload(path, "theirs")
    for key in ("checkpoints/1/part", "theirs" if scheme == "s3" else "checkpoints/1/part"):
        assert store.download(key, target) == hashlib.sha256(content).hexdigest()
        assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["way"]
    with store.open("checkpoints/1/part") as file:
        assert file.seekable()
        for start, size in [(0, 10), (LARGE_BYTES - 7, 100), ((8 << 20) - 5, 10), (3, 0), (5, LARGE_BYTES)]:
            assert file.seek(start) == start
            assert file.read(size) == content[start : start + size]
        assert file.seek(-3, io.SEEK_END) == file.tell() == LARGE_BYTES - 3
        assert (file.read(), file.read(1)) == (content[-3:], b"")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.txt", f"image {number}")
    store.put("archive.zip", packed.getvalue())
    with store.open("archive.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("37.txt") == b"image 37"
    if name:
        store.put("report.html", b"<p>")
        store.move(path, "shard.tar.gz")
        assert SERVERS[scheme].media(name, "report.html") == ("text/html", None)
        assert SERVERS[scheme].media(name, "shard.tar.gz") == ("application/x-tar", None)


def test_missing_objects_are_named(store: Store, tmp_path: Path) -> None:
    store.create("folder/object", b"1")
    target = tmp_path / "file"
    target.write_bytes(b"old")
    for key in ("none", "folder", "folder/none", "folder/object/below"):
        assert not store.exists(key)
        for read in (store.read, store.open, lambda key: store.download(key, target)):
            raised(ObjectMissingError, re.escape(store.uri_of(key)), read, key)
        store.delete(key)
        assert keys(store, key) == (["folder/object"] if key == "folder" else [])
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "bucket"] == ["file"]
    assert store.folders("none") == []
    raised(MissingInputError, "not-here", store.upload, tmp_path / "not-here", "key")
    assert keys(store) == ["folder/object"]


def test_listings_are_ordered_and_complete(store: Store, monkeypatch) -> None:
    other = open_store(store.uri)
    assert (keys(other), other.folders()) == ([], [])
    names = ["b", "a/b/c", "a-b/c", "a/a", "a.b", "a0", "B", "a/b-c", "a/b.c/d", "0/x"]
    for number, name in enumerate(names):
        store.create(name, b"." * number)
        assert keys(other) == sorted(names[: number + 1])
    assert list(other.list("a")) == [Entry(key, names.index(key)) for key in sorted(names) if key.startswith("a/")]
    assert (other.folders(), other.folders("a")) == (["0", "a", "a-b"], ["b", "b.c"])

    below = store.sub("a").sub("b")
    assert below.uri_of("c") == store.uri_of("a/b/c")
    # Both are other names of the same scheme.
    alias = below.uri.replace("az://", "abfs://").replace("gs://", "gcs://")
    for same in (below, open_store(below.uri), open_store(below.uri + "/"), open_store(alias)):
        assert (same.uri, keys(same), same.read("c").data) == (below.uri, ["c"], b".")
    below.create("deeper/d", b"")
    assert (below.folders(), keys(below, "deeper")) == (["deeper"], ["deeper/d"])
    below.delete("deeper/d")
    for name in names:
        store.delete(name)
        assert not other.exists(name)
    assert (keys(other), other.folders()) == ([], [])

    # More than a bucket tells on one page: 1,000 at S3. Azurite tells 5,000, and obstore asks alike.
    many = [f"many/{number:04d}" for number in range(1010 if store.uri.startswith("s3:") else 10)]
    if store.uri.startswith("gs:"):
        listed = type(store)._listed
        monkeypatch.setattr(type(store), "_listed", lambda self, **asked: listed(self, page_size=3, **asked))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b""), many))
    listing = store.list("many")
    assert next(listing).key == many[0]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda entry: store.delete(entry.key), listing))
    assert keys(store) == many[:1]


BAD_KEYS = ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", ".hidden", "a/.hidden", "gs://b/a"]
BAD_KEYS += ["a\\b", "a\n", "a\0", "\x7f", "a\udcff"]
ODD_KEYS = ["two words/image (1).jpg", "ä", "a*", "a?b=c", "a#7", "~", "-a", "%2e%2e/a", "a:b", "a'b\"c", "a\u202fb"]


def test_keys(store: Store, tmp_path: Path) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_bytes(b"2")
    for key in [*BAD_KEYS, *ODD_KEYS]:
        calls = every_call(store, file, key)
        refused = [calls[name] for name in ("create", "replace", "put", "upload")]
        if key in BAD_KEYS:
            refused += [calls[name] for name in ("read", "download", "open", "delete", "exists")]
            refused += [partial(call, key) for call in (store.sub, store.uri_of)]
            # Of the whole bucket these are told without a key.
            refused += [partial(call, key) for call in (store.list, store.folders) if key]
        for call in refused:
            raised(BadRequestError, r"cannot be an? (new )?object's key", call)
    assert keys(store) == []

    for key in ODD_KEYS:
        put_by_others(store.uri, key)
        assert list(store.list()) == [Entry(key, 1)]
        assert store.exists(key)
        store.download(key, out)
        with store.open(key) as stream:
            assert store.read(key).data == stream.read() == out.read_bytes() == b"1", key
        folder, _, name = key.rpartition("/")
        if folder:
            assert store.folders() == [folder]
            assert open_store(store.uri_of(folder)).read(name).data == b"1"
        store.delete(key)
        assert keys(store) == []
    is_obstore = type(store).__module__ == "job.store.objects"
    # The last is what consoles put where somebody makes a folder.
    for key in [".DS_Store", "folder/.tmp-1", "folder/object", *(["folder/"] if is_obstore else [])]:
        put_by_others(store.uri, key, b"" if key.endswith("/") else b"1")
    assert (keys(store), store.folders()) == (["folder/object"], ["folder"])

    put_by_others(store.uri, "tab\t")
    if is_obstore:
        raised(BadDataError, r"cannot be listed, because the key 'tab\\t' has.*: rename it", keys, store)
    else:
        assert keys(store) == ["folder/object"]
    # A person who keeps other things in the bucket cannot stop a run, whose folders alone are listed.
    for key in ("a//b", "runs-\t/a"):
        put_by_others(store.uri, key)
    below = store.sub("runs").sub("walk")
    below.check_writable("probe")
    below.create("a/b", b"1")
    assert (keys(below), below.folders(), keys(below, "a")) == (["a/b"], ["a"], ["a/b"])
    assert store.folders("runs") == ["walk"]
    below.delete("a/b")
    assert keys(below) == []


RACERS = 9


def race(uri: str, folder: Path, racers: range) -> list[tuple[str, int]]:
    """Has threads write the same objects at the same moment, and count up; returns which of them won what."""

    def run(racer: int) -> list[tuple[str, int]]:
        store, won, path = open_store(uri), [], folder / f"racer-{racer}"
        path.write_bytes(b"%d" % racer * (5 << 20))
        store.create(f"ready/{racer}", b"")
        while len(keys(store, "ready")) < RACERS:
            time.sleep(0.001)
        small = partial(store.create, data=b"%d" % racer)
        for key, write in {"small": small, "large": partial(store.upload, path)}.items():
            with suppress(ObjectExistsError):
                write(key=key)
                won.append((key, racer))
        for _ in range(3):
            counted = False
            while not counted:
                counter = store.read("counter")
                count = int(counter.data.split()[0]) + 1
                with suppress(ConflictError):
                    # Two racers that write the same bytes would both count as the one whose answer was lost.
                    store.replace("counter", f"{count} {secrets.token_hex(4)}".encode(), counter.version)
                    counted = True
        return won

    with ThreadPoolExecutor(len(racers)) as pool:
        return [each for won in pool.map(run, racers) for each in won]


# moto compares and then writes, with a thread for each request and no lock: there several may win.
@pytest.mark.parametrize("store", [pytest.param("local", marks=pytest.mark.slow), *KINDS], indirect=True)
def test_one_of_many_writers_wins(store: Store, tmp_path: Path) -> None:
    """In a folder those of several processes: a server does not know whose threads they are."""
    store.create("counter", b"0")
    if store.uri.startswith("/"):
        with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
            races = [pool.submit(race, store.uri, tmp_path, range(start, start + 3)) for start in range(0, RACERS, 3)]
            won = [each for each_race in races for each in each_race.result()]
    else:
        won = race(store.uri, tmp_path, range(RACERS))
    assert sorted(key for key, _ in won) == ["large", "small"]
    for key, racer in won:
        assert store.read(key).data == b"%d" % racer * (5 << 20 if key == "large" else 1)
    assert store.read("counter").data.split()[0] == b"%d" % (3 * RACERS)


WRITER = """
import sys
from pathlib import Path
from job.store import open_store
store, source, attempt = open_store(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
for number in range(10_000):
    store.create(f"small/{attempt}-{number}", b"s" * 50_000)
    store.upload(source, f"large/{attempt}-{number}")
    store.put("status", bytes([number % 256]) * 50_000)
"""


@pytest.mark.parametrize(
    "store", ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)], indirect=True
)
def test_killed_writers_leave_nothing_half_visible(store: Store, tmp_path: Path) -> None:
    sizes = {"small": 50_000, "large": LARGE_BYTES, "status": 50_000}
    rng, attempts = random.Random(0), 6 if store.uri.startswith("/") else 3
    (tmp_path / "large").write_bytes(content := rng.randbytes(LARGE_BYTES))
    for attempt in range(attempts):
        command = [sys.executable, "-c", WRITER, store.uri, str(tmp_path / "large"), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.1 if attempts == 6 else 0.5))
            while attempt == attempts - 1 and not keys(store, "large"):
                time.sleep(0.01)
            os.kill(writer.pid, signal.SIGKILL)
        for entry in store.list():
            assert entry.size_bytes == sizes[entry.key.partition("/")[0]]
    whole = keys(store, "large")
    assert len(whole) >= 1
    assert all(store.read(key).data == content for key in whole)
    if store.exists("status"):
        assert len(set(store.read("status").data)) == 1
    store.put("status", b"alive")
    assert store.read("status").data == b"alive"
