"""What every store promises, asked of each kind."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from google.cloud import storage

from job.exits import BadRequestError, Exit, MissingInputError
from job.store import Blob, ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store, open_store

LARGE_BYTES = 9 << 20
"""More than one read of a stream, and more than google-cloud-storage sends in a single request."""


@pytest.fixture
def store(bucket_uri: str) -> Store:
    return open_store(bucket_uri)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "part.safetensors"
    path.write_bytes(random.Random(0).randbytes(LARGE_BYTES))
    return path


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


@pytest.mark.parametrize("data", [b"", b"\x00\xff\r\n", b"x" * 100_000])
def test_what_is_created_is_read(store: Store, data: bytes) -> None:
    version = store.create("runs/a/object", data)
    assert store.read("runs/a/object") == Blob(data, version)
    assert list(store.list()) == [Entry("runs/a/object", len(data))]
    with store.open("runs/a/object") as file:
        assert file.read() == data


def test_create_never_replaces(store: Store) -> None:
    version = store.create("key", b"mine")
    with pytest.raises(ObjectExistsError, match="somebody else was first") as error:
        store.create("key", b"theirs")
    assert store.uri_of("key") in str(error.value)
    assert store.create("key", b"mine") == version
    assert store.read("key") == Blob(b"mine", version)


def test_replace_compares_and_swaps(store: Store) -> None:
    first = store.create("lease", b"1")
    second = store.replace("lease", b"2", first)
    assert second != first
    assert store.read("lease") == Blob(b"2", second)
    with pytest.raises(ConflictError, match="somebody else wrote it"):
        store.replace("lease", b"3", first)
    assert store.read("lease") == Blob(b"2", second)
    assert store.replace("lease", b"2", first) == second, "a repeated write whose answer was lost is no conflict"
    store.delete("lease")
    with pytest.raises(ConflictError, match="gone"):
        store.replace("lease", b"3", second)
    assert not store.exists("lease")
    with pytest.raises(ConflictError):
        store.replace("never/there", b"3", second)
    assert keys(store) == []


def test_put_replaces_whatever_there_is(store: Store) -> None:
    store.put("status.json", b"1")
    version = store.read("status.json").version
    store.put("status.json", b"22")
    assert store.read("status.json").data == b"22"
    with pytest.raises(ConflictError):
        store.replace("status.json", b"3", version)


def test_upload_and_download(store: Store, large_file: Path, tmp_path: Path) -> None:
    store.upload(large_file, "checkpoints/1/part")
    assert list(store.list("checkpoints")) == [Entry("checkpoints/1/part", LARGE_BYTES)]
    target = tmp_path / "made" / "on" / "the" / "way"
    target.parent.parent.mkdir(parents=True)
    for _ in range(2):
        store.download("checkpoints/1/part", target)
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(large_file.read_bytes()).digest()
    assert [path.name for path in target.parent.iterdir()] == ["way"]


@pytest.mark.parametrize("size_bytes", [0, 1, 70_000])
def test_upload_never_replaces(store: Store, tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * size_bytes)
    store.upload(path, "key")
    store.upload(path, "key")
    version = store.read("key").version
    path.write_bytes(b"a" * size_bytes + b"b")
    with pytest.raises(ObjectExistsError, match="other content"):
        store.upload(path, "key")
    assert store.read("key") == Blob(b"a" * size_bytes, version)


def test_stream_is_seekable(store: Store, large_file: Path) -> None:
    store.upload(large_file, "archive")
    content = large_file.read_bytes()
    with store.open("archive") as file:
        assert file.seekable()
        for start, size in [(0, 10), (LARGE_BYTES - 7, 100), ((8 << 20) - 5, 10), (3, 0), (5, LARGE_BYTES)]:
            assert file.seek(start) == start
            assert file.read(size) == content[start : start + size]
        assert file.seek(-3, io.SEEK_END) == file.tell() == LARGE_BYTES - 3
        assert file.read() == content[-3:]
        assert file.read(1) == b""


def test_zip_is_read_in_place(store: Store) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.txt", f"image {number}")
    store.put("archive.zip", packed.getvalue())
    with store.open("archive.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("37.txt") == b"image 37"
        assert len(archive.namelist()) == 50


def test_missing_objects_are_named_and_leave_nothing(store: Store, tmp_path: Path) -> None:
    store.create("folder/object", b"1")
    target = tmp_path / "cache" / "file"
    reads: list[Callable[[str], object]] = [store.read, store.open, lambda key: store.download(key, target)]
    for key in ("none", "folder", "folder/none", "folder/object/below"):
        assert not store.exists(key)
        for read in reads:
            with pytest.raises(ObjectMissingError) as error:
                read(key)
            assert store.uri_of(key) in str(error.value)
            assert error.value.exit_code == Exit.MISSING_INPUT
        store.delete(key)
        assert keys(store, key) == (["folder/object"] if key == "folder" else [])
    assert not target.parent.exists()
    assert store.folders("none") == []
    with pytest.raises(MissingInputError, match="not-here"):
        store.upload(tmp_path / "not-here", "key")
    assert keys(store) == ["folder/object"]


def test_failed_download_keeps_what_was_there(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(ObjectMissingError):
        store.download("none", target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "bucket"] == ["file"]


def test_listing_is_in_key_order_and_never_stale(store: Store) -> None:
    other = open_store(store.uri)
    assert keys(other) == []
    assert other.folders() == []
    names = ["b", "a/b/c", "a-b/c", "a/a", "a.b", "a0", "B", "a/b-c", "a/b.c/d", "0/x"]
    for number, name in enumerate(names):
        store.create(name, b"." * number)
        assert keys(other) == sorted(names[: number + 1])
    assert list(other.list("a")) == [Entry(key, names.index(key)) for key in sorted(names) if key.startswith("a/")]
    assert other.folders() == ["0", "a", "a-b"]
    assert other.folders("a") == ["b", "b.c"]
    for name in names:
        store.delete(name)
        assert not other.exists(name)
    assert keys(other) == []
    assert other.folders() == []


def test_long_listing_is_whole(store: Store) -> None:
    names = [f"many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert keys(store) == names
    listing = store.list("many")
    assert next(listing).key == names[0]
    for entry in listing:
        store.delete(entry.key)
    assert keys(store) == names[:1]


def test_sub_is_the_same_bucket_below_a_folder(store: Store) -> None:
    run = store.sub("runs").sub("celeba")
    assert run.uri == store.uri_of("runs/celeba")
    assert keys(run) == []
    run.create("samples/grid.png", b"png")
    assert run.uri_of("samples/grid.png") == store.uri_of("runs/celeba/samples/grid.png")
    assert keys(store) == ["runs/celeba/samples/grid.png"]
    for same in (run, open_store(run.uri), open_store(run.uri + "/")):
        assert same.uri == run.uri
        assert keys(same) == keys(same, "samples") == ["samples/grid.png"]
        assert same.folders() == ["samples"]
        assert same.read("samples/grid.png").data == b"png"
    run.delete("samples/grid.png")
    assert store.folders() == []


BAD_KEYS = ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", ".hidden", "a/.hidden", "gs://b/a"]
BAD_KEYS += ["a\\b", "a\n", "a\0", "\x7f", "a\udcff"]
ODD_KEYS = ["two words/image (1).jpg", "ä", "a*", "a?b=c", "a#7", "~", "-a", "%2e%2e/a", "a:b", "a'b\"c", "a\u202fb"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused_by_everything(store: Store, key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    calls: list[Callable[[], object]] = [
        lambda: store.uri_of(key),
        lambda: store.sub(key),
        lambda: store.read(key),
        lambda: store.create(key, b"1"),
        lambda: store.replace(key, b"1", "1"),
        lambda: store.put(key, b"1"),
        lambda: store.upload(file, key),
        lambda: store.download(key, tmp_path / "out"),
        lambda: store.open(key),
        lambda: store.delete(key),
        lambda: store.exists(key),
    ]
    if key:
        calls += [lambda: list(store.list(key)), lambda: store.folders(key)]
    for call in calls:
        with pytest.raises(BadRequestError, match=r"cannot be an? (new )?object's key"):
            call()
    assert keys(store) == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_of_others_are_read_but_not_written(store: Store, key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"2")
    for write in (store.create, store.put, lambda key, _: store.upload(file, key)):
        with pytest.raises(BadRequestError, match="cannot be a new object's key"):
            write(key, b"2")
    assert keys(store) == []
    scheme, _, bucket = store.uri.partition("://")
    match scheme:
        case "gs":
            storage.Client(project="test").bucket(bucket).blob(key).upload_from_string(b"1")
        case "s3":
            boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"1")
        case _:
            Path(store.uri_of(key)).parent.mkdir(exist_ok=True)
            Path(store.uri_of(key)).write_bytes(b"1")
    assert list(store.list()) == [Entry(key, 1)]
    assert store.exists(key)
    store.download(key, tmp_path / "out")
    with store.open(key) as stream:
        assert store.read(key).data == stream.read() == (tmp_path / "out").read_bytes() == b"1"
    folder, _, name = key.rpartition("/")
    if folder:
        assert store.folders() == [folder]
        assert open_store(store.uri_of(folder)).read(name).data == b"1"
    store.delete(key)
    assert keys(store) == []


RACERS = 16


def race_to_create(store: Store, racer: int) -> bool:
    try:
        store.create("race", f"racer {racer}".encode())
    except ObjectExistsError:
        return False
    return True


def count_up(store: Store, times: int) -> None:
    for _ in range(times):
        while True:
            counter = store.read("counter")
            count = int(counter.data.split()[0]) + 1
            with suppress(ConflictError):
                # Two racers that write the same bytes would both count as the one whose answer was lost.
                store.replace("counter", f"{count} {secrets.token_hex(4)}".encode(), counter.version)
                break


def race_in_child(uri: str, child: int) -> list[bool]:
    """Four threads that begin when the parent says so; returns who of them won."""
    store = open_store(uri)
    store.create(f"ready/{child}", b"")
    while not store.exists("go"):
        time.sleep(0.001)
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda thread: race_to_create(store, 4 * child + thread), range(4)))
        list(pool.map(lambda _: count_up(store, 3), range(2)))
    return won


def test_sixteen_racing_threads_have_one_winner(store: Store) -> None:
    barrier = threading.Barrier(RACERS)

    def race(racer: int) -> bool:
        barrier.wait()
        return race_to_create(store, racer)

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(race, range(RACERS)))
    assert won.count(True) == 1
    assert store.read("race").data == f"racer {won.index(True)}".encode()


def test_sixteen_racers_in_four_processes_have_one_winner_and_lose_no_count(store: Store) -> None:
    store.create("counter", b"0")
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        children = [pool.submit(race_in_child, store.uri, child) for child in range(4)]
        while len(keys(store, "ready")) < 4:
            time.sleep(0.01)
        store.create("go", b"")
        won = [racer for child in children for racer in child.result()]
    assert won.count(True) == 1
    assert store.read("race").data == f"racer {won.index(True)}".encode()
    assert store.read("counter").data.split()[0] == b"24"


def test_eight_threads_lose_no_count(store: Store) -> None:
    store.create("counter", b"0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: count_up(store, 6), range(8)))
    assert store.read("counter").data.split()[0] == b"48"


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


def test_killed_writers_leave_nothing_half_visible(store: Store, large_file: Path) -> None:
    sizes = {"small": 50_000, "large": LARGE_BYTES, "status": 50_000}
    rng = random.Random(0)
    attempts = 12 if store.uri.startswith("/") else 3
    for attempt in range(attempts):
        command = [sys.executable, "-c", WRITER, store.uri, str(large_file), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.1 if attempts == 12 else 0.5))
            while attempt == attempts - 1 and not keys(store, "large"):
                time.sleep(0.01)
            os.kill(writer.pid, signal.SIGKILL)
        for entry in store.list():
            assert entry.size_bytes == sizes[entry.key.partition("/")[0]]
    content = large_file.read_bytes()
    whole = keys(store, "large")
    assert len(whole) >= 1
    assert all(store.read(key).data == content for key in whole)
    if store.exists("status"):
        assert len(set(store.read("status").data)) == 1
    store.put("status", b"alive")
    assert store.read("status").data == b"alive"
