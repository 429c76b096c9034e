"""What every bucket keeps to: a folder, servers of gs://, s3:// and az://, and in the slow part another of s3://."""

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
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from job.exits import BadDataError, BadRequestError, Exit, MissingInputError
from job.store import ConflictError, ObjectExistsError, ObjectMissingError, Store, open_store
from job.store.base import Blob, Entry
from tests.conftest import new_bucket
from tests.servers import KINDS, SERVERS

LARGE_BYTES = 33 << 20
"""More than any client sends or gets in a single request unless it is told to."""


@pytest.fixture(params=["local", *KINDS, pytest.param("s3-moto", marks=pytest.mark.slow)])
def bucket_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Here alone, one of another S3 server as well."""
    return new_bucket(request.param, request, monkeypatch, tmp_path)


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

    first = store.create("lease", b"1")
    with pytest.raises(ObjectExistsError, match="another writer was first") as error:
        store.create("lease", b"theirs")
    assert store.uri_of("lease") in str(error.value)
    assert store.create("lease", b"1") == first, "a repeated write whose answer was lost is no conflict"
    second = store.replace("lease", b"2", first)
    assert store.read("lease") == Blob(b"2", second) != Blob(b"2", first)
    with pytest.raises(ConflictError, match="another writer replaced it"):
        store.replace("lease", b"3", first)
    assert store.replace("lease", b"2", first) == second, "nor is this"
    store.put("lease", b"4")
    with pytest.raises(ConflictError):
        store.replace("lease", b"5", second)
    assert store.read("lease").data == b"4"
    store.delete("lease")
    for key in ("lease", "never/there"):
        with pytest.raises(ConflictError, match="gone"):
            store.replace(key, b"6", second)

    path = tmp_path / "file"
    for size_bytes in (0, 1, 70_000):
        path.write_bytes(b"a" * size_bytes)
        store.upload(path, f"{size_bytes}")
        store.upload(path, f"{size_bytes}")
        path.write_bytes(b"b" * (size_bytes or 1))
        with pytest.raises(ObjectExistsError, match="other content"):
            store.upload(path, f"{size_bytes}")
        assert store.read(f"{size_bytes}").data == b"a" * size_bytes
    assert keys(store) == ["0", "1", "70000"]
    with pytest.raises(ObjectExistsError, match="other content"):
        store.move(path, "1")
    assert path.exists()
    store.move(path, "moved")
    assert store.read("moved").data == b"b" * 70_000
    assert not path.exists()


def test_large_files_are_transferred_and_read(store: Store, large_file: Path, tmp_path: Path) -> None:
    store.upload(large_file, "checkpoints/1/part")
    assert list(store.list("checkpoints")) == [Entry("checkpoints/1/part", LARGE_BYTES)]
    content, target = large_file.read_bytes(), tmp_path / "made" / "on" / "the" / "way"
    for _ in range(2):
        assert store.download("checkpoints/1/part", target) == hashlib.sha256(content).hexdigest()
        assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["way"]
    with store.open("checkpoints/1/part") as file:
        assert file.seekable()
        for start, size in [(0, 10), (LARGE_BYTES - 7, 100), ((8 << 20) - 5, 10), (3, 0), (5, LARGE_BYTES)]:
            assert file.seek(start) == start
            assert file.read(size) == content[start : start + size]
        assert file.seek(-3, io.SEEK_END) == file.tell() == LARGE_BYTES - 3
        assert file.read() == content[-3:]
        assert file.read(1) == b""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.txt", f"image {number}")
    store.put("archive.zip", packed.getvalue())
    with store.open("archive.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("37.txt") == b"image 37"


# moto compares and then writes, with a thread for each request and no lock: there both may win.
@pytest.mark.parametrize("bucket_uri", ["local", *KINDS], indirect=True)
def test_one_of_two_large_uploads_wins(store: Store, tmp_path: Path) -> None:
    contents = [bytes([number]) * (5 << 20) for number in (1, 2)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(content)

    def upload(round_and_number: tuple[int, int]) -> bool:
        with suppress(ObjectExistsError):
            store.upload(tmp_path / f"{round_and_number[1]}", f"part-{round_and_number[0]}")
            return True
        return False

    with ThreadPoolExecutor(2) as pool:
        for turn in range(4):
            won = list(pool.map(upload, [(turn, 0), (turn, 1)]))
            assert won.count(True) == 1
            assert store.read(f"part-{turn}").data == contents[won.index(True)]


def test_missing_objects_are_named(store: Store, tmp_path: Path) -> None:
    store.create("folder/object", b"1")
    target = tmp_path / "file"
    target.write_bytes(b"old")
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
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "bucket"] == ["file"]
    assert store.folders("none") == []
    with pytest.raises(MissingInputError, match="not-here"):
        store.upload(tmp_path / "not-here", "key")
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
    for same in (below, open_store(below.uri), open_store(below.uri + "/")):
        assert same.uri == below.uri
        assert keys(same) == ["c"]
        assert same.read("c").data == b"."
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
NO_KEYS = [".DS_Store", "folder/.tmp-1"]


def test_keys(store: Store, tmp_path: Path) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_bytes(b"2")
    writes: dict[str, Callable[[str], object]] = {
        "create": lambda key: store.create(key, b"1"),
        "put": lambda key: store.put(key, b"1"),
        "upload": lambda key: store.upload(file, key),
    }
    calls: dict[str, Callable[[str], object]] = writes | {
        "sub": store.sub,
        "read": store.read,
        "replace": lambda key: store.replace(key, b"1", "1"),
        "download": lambda key: store.download(key, out),
        "open": store.open,
        "delete": store.delete,
        "list": lambda key: (key and list(store.list(key))) or store.uri_of(key),
        "folders": lambda key: (key and store.folders(key)) or store.uri_of(key),
    }
    refused = [(key, call, "a bad one") for key in BAD_KEYS for call in calls]
    refused += [(key, call, "one that others may have") for key in ODD_KEYS for call in writes]
    for key, call, why in refused:
        with pytest.raises(BadRequestError, match=r"cannot be an? (new )?object's key"):
            pytest.fail(f"{call} took {key!r}, {why}: {calls[call](key)}")
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
    for key in [*NO_KEYS, "folder/object"]:
        put_by_others(store.uri, key)
    is_obstore = type(store).__module__ == "job.store.objects"
    if is_obstore:
        # What consoles put where somebody makes a folder.
        put_by_others(store.uri, "folder/", b"")
    assert (keys(store), store.folders()) == (["folder/object"], ["folder"])
    put_by_others(store.uri, "tab\t")
    if is_obstore:
        with pytest.raises(BadDataError, match=r"cannot be listed, because the key 'tab\\t' has.*: rename it"):
            keys(store)
    else:
        assert keys(store) == ["folder/object"]


def test_odd_keys_of_others_stop_nothing_beside_them(store: Store) -> None:
    """A person who keeps other things in the bucket cannot stop a run, whose folders alone are listed."""
    below = store.sub("runs").sub("walk")
    for key in ("tab\t", "a//b", "runs-\t/a"):
        put_by_others(store.uri, key)
    below.check_writable("probe")
    below.create("a/b", b"1")
    assert (keys(below), below.folders(), keys(below, "a")) == (["a/b"], ["a"], ["a/b"])
    assert store.folders("runs") == ["walk"]
    below.delete("a/b")
    assert keys(below) == []


def race_in_child(uri: str, child: int) -> list[bool]:
    """Four threads that begin when the parent says so; returns who of them won."""
    store = open_store(uri)
    store.create(f"ready/{child}", b"")
    while not store.exists("go"):
        time.sleep(0.001)

    def create(racer: int) -> bool:
        with suppress(ObjectExistsError):
            store.create("race", f"racer {racer}".encode())
            return True
        return False

    def count_up(_: int) -> None:
        for _ in range(3):
            counted = False
            while not counted:
                counter = store.read("counter")
                count = int(counter.data.split()[0]) + 1
                with suppress(ConflictError):
                    # Two racers that write the same bytes would both count as the one whose answer was lost.
                    store.replace("counter", f"{count} {secrets.token_hex(4)}".encode(), counter.version)
                    counted = True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(create, range(4 * child, 4 * child + 4)))
        list(pool.map(count_up, range(2)))
    return won


@pytest.mark.parametrize(
    "bucket_uri",
    ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)],
    indirect=True,
)
def test_sixteen_racers_have_one_winner(store: Store) -> None:
    """Not on moto, as above."""
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
    "bucket_uri",
    ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)],
    indirect=True,
)
def test_killed_writers_leave_nothing_half_visible(store: Store, large_file: Path) -> None:
    sizes = {"small": 50_000, "large": LARGE_BYTES, "status": 50_000}
    rng = random.Random(0)
    attempts = 6 if store.uri.startswith("/") else 3
    for attempt in range(attempts):
        command = [sys.executable, "-c", WRITER, store.uri, str(large_file), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.1 if attempts == 6 else 0.5))
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


def test_abfs_is_another_name_of_az(azure_container: str) -> None:
    by_another_name = open_store(azure_container.replace("az://", "abfs://"))
    by_another_name.put("a", b"1")
    assert by_another_name.uri_of("a") == f"{azure_container}/a"
    assert open_store(azure_container).read("a").data == b"1"
