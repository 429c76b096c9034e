"""Folders as buckets: links, full disks, missing rights, and what dead writers leave behind."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job import exits
from job.exits import (
    BadDataError,
    BadRequestError,
    BucketAwayError,
    DiskFullError,
    Exit,
    MissingInputError,
    NoPermissionError,
)
from job.store import ObjectMissingError, Retry, Store, files, open_store
from job.store.base import Entry
from job.store.files import scratch_folder, temporary_beside
from tests.job.conftest import point_at
from tests.servers import KINDS as SCHEMES

NOBODY = 65534


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def store(bucket: Path) -> Store:
    return open_store(str(bucket))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Gives up root's right to do anything to any file, until the test ends."""
    closed = {
        folder: folder.stat().st_mode
        for folder in (tmp_path, *tmp_path.parents)
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001
    }

    def give_up() -> None:
        for folder in closed:
            folder.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)

    yield give_up
    os.seteuid(os.getuid())
    for folder, mode in closed.items():
        folder.chmod(mode)


def test_objects_are_ordinary_files(store: Store, bucket: Path, tmp_path: Path) -> None:
    old_umask = os.umask(0o022)
    try:
        version = store.create("runs/a/lease.json", b"1")
        store.replace("runs/a/lease.json", b"2", version)
        store.put("runs/a/status.json", b"3")
        store.upload(bucket / "runs/a/status.json", "runs/a/copy")
        store.download("runs/a/copy", tmp_path / "out" / "copy")
    finally:
        os.umask(old_umask)
    assert names_in(bucket) == ["a", "copy", "lease.json", "runs", "status.json"]
    assert names_in(tmp_path / "out") == ["copy"]
    for path in [*(bucket / "runs/a").iterdir(), tmp_path / "out" / "copy"]:
        assert path.stat().st_mode & 0o777 == 0o644
    assert (bucket / "runs/a/lease.json").read_bytes() == b"2"


def test_only_writers_make_a_missing_root(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"zip")
    for root in (tmp_path / "bucket", tmp_path / "archive.zip"):
        store = open_store(str(root))
        for look in (store.list, store.folders, store.sub("runs").list):
            with pytest.raises(MissingInputError, match=f"{root} is not a folder: check the path"):
                look()
        for read in (store.read, store.open, lambda key, store=store: store.download(key, tmp_path / "out")):
            with pytest.raises(ObjectMissingError, match=f"{root} is not a folder"):
                read("key")
        assert not store.exists("key")
        store.delete("key")
    with pytest.raises(BadRequestError, match="Not a directory"):
        store.create("key", b"1")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"zip"]
    store = open_store(str(tmp_path / "bucket"))
    store.sub("deep/down").create("key", b"1")
    assert list(store.list()) == [Entry("deep/down/key", 1)]
    assert list(store.sub("nothing/here").list()) == []


def test_name_is_file_or_folder(store: Store) -> None:
    store.create("a/b", b"1")
    for write in (store.create, store.put):
        with pytest.raises(BadRequestError, match="Not a directory: choose another name"):
            write("a/b/c", b"2")
    with pytest.raises(BadRequestError, match="Is a directory"):
        store.put("a", b"2")
    with pytest.raises(BadRequestError, match="File name too long"):
        store.put("x" * 300, b"2")
    assert list(store.list()) == [Entry("a/b", 1)]


def test_links_out_of_root_are_refused(store: Store, bucket: Path, tmp_path: Path) -> None:
    store.create("inside/object", b"1")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (bucket / "folder").symlink_to(outside)
    (bucket / "file").symlink_to(outside / "secret")
    (bucket / "dangling").symlink_to(outside / "new")
    calls: list[Callable[[str], object]] = [store.read, store.open, store.delete, lambda key: store.put(key, b"2")]
    for call in calls:
        for key in ("folder/secret", "folder/new", "file", "dangling"):
            with pytest.raises(BadRequestError, match="leads out of"):
                call(key)
    with pytest.raises(BadRequestError, match="leads out of"):
        store.list("folder")
    assert list(store.list()) == [Entry("inside/object", 1)]
    assert store.folders() == ["inside"]
    assert names_in(outside) == ["secret"]


def test_links_within_the_root_work(store: Store, bucket: Path, tmp_path: Path) -> None:
    store.create("runs/best", b"1")
    (bucket / "best").symlink_to("runs/best")
    (bucket / "runs/loop").symlink_to(bucket)
    (tmp_path / "link").symlink_to(bucket)
    linked = open_store(str(tmp_path / "link"))
    assert linked.read("best").data == linked.read("runs/loop/runs/best").data == b"1"
    assert [entry.key for entry in linked.list()] == ["best", "runs/best"]


def test_pipes_and_hidden_are_no_objects(store: Store, bucket: Path) -> None:
    store.create("a/object", b"1")
    for name in (".DS_Store", "a/.hidden/x", "a/back\\slash"):
        (bucket / name).parent.mkdir(exist_ok=True)
        (bucket / name).write_bytes(b"2")
    os.mkfifo(bucket / "a" / "pipe")
    (bucket / "a" / "empty").mkdir()
    assert list(store.list()) == [Entry("a/object", 1)]
    assert store.folders("a") == []
    # Nobody will ever write into the pipe.
    for read in (store.read, store.open):
        with pytest.raises(ObjectMissingError, match="pipe"):
            read("a/pipe")
    for name in ("a/pipe", "a/empty"):
        with pytest.raises(BadDataError, match=f"{name} is a folder or a pipe, where an object belongs"):
            store.create(name, b"1")


def test_huge_objects_are_not_read(store: Store, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.store.base.READ_BYTES", 1 << 20)
    store.create("object", b"1")
    os.truncate(bucket / "object", 1 << 40)
    with pytest.raises(BadDataError, match="object has more than 1,048,576 bytes"):
        store.read("object")


def test_removed_bucket_is_away(bucket: Path) -> None:
    notes: list[str] = []
    store = open_store(str(bucket), Retry(0.05, note=notes.append))
    store.create("runs/a", b"1")
    below = store.sub("runs")
    assert below.read("a").data == b"1"
    bucket.rename(bucket.with_name("elsewhere"))
    # As where a disk was mounted: nothing goes to the folder below it.
    bucket.mkdir()
    with pytest.raises(BucketAwayError):
        below.put("b", b"1")
    bucket.rmdir()
    for call in (lambda: below.put("b", b"1"), lambda: below.create("c", b"1"), lambda: below.read("a"), below.list):
        with pytest.raises(BucketAwayError, match=f"{bucket} is gone"):
            call()
    assert not bucket.exists()
    bucket.with_name("elsewhere").rename(bucket)
    below.put("b", b"1")
    assert "is back after" in notes[-1]


def test_delete_takes_empty_folders_along(store: Store, bucket: Path) -> None:
    store.create("runs/a/checkpoints/1/part", b"1")
    store.create("runs/a/config.yaml", b"1")
    store.delete("runs/a/checkpoints/1/part")
    assert names_in(bucket) == ["a", "config.yaml", "runs"]
    store.delete("runs/a/config.yaml")
    assert names_in(bucket) == []
    assert list(store.list()) == []


ABANDONED = """
import os, sys
from pathlib import Path
from job.store.files import folder_lock, temporary_beside
path = Path(sys.argv[1])
with temporary_beside(path) as (temporary, file), folder_lock(path.parent):
    file.write(b"half a ")
    file.flush()
    os._exit(9)
"""


def test_temporaries_of_dead_writers_are_swept(store: Store, bucket: Path) -> None:
    for key in ("a/b/key", "a/d/e/key"):
        child = subprocess.run([sys.executable, "-c", ABANDONED, str(bucket / key)], check=False)
        assert child.returncode == 9
    assert {path.name[:5] for path in (bucket / "a/b").iterdir()} == {".tmp-", ".lock"}
    assert (list(store.list()), store.folders()) == ([], [])
    (bucket / "a/.DS_Store").write_bytes(b"")
    with temporary_beside(bucket / "a/b/living") as (living, _):
        # A writer sweeps where it writes.
        store.put("a/b/key", b"whole")
        assert names_in(bucket / "a/b") == [living.name, "key"]
        store.sub("a").sweep()
        assert [path.name for path in bucket.rglob(".tmp-*")] == [living.name]
    assert (bucket / "a/.DS_Store").exists()
    assert store.read("a/b/key").data == b"whole"


def test_files_become_objects_without_a_copy(store: Store, bucket: Path, small_disk: Path, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", small_disk / "elsewhere"
    for file in (here, elsewhere):
        file.write_bytes(b"whole")
    inode = here.stat().st_ino
    store.move(here, "a/new/folder/here")
    store.move(elsewhere, "a/new/folder/elsewhere")
    assert (bucket / "a/new/folder/here").stat().st_ino == inode
    assert (bucket / "a/new/folder/elsewhere").read_bytes() == b"whole"
    assert names_in(bucket / "a/new/folder") == ["elsewhere", "here"]
    assert not here.exists() and not elsewhere.exists()


def test_full_disk(small_disk: Path, gcs_bucket: str, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(3 << 20))
    store = open_store(str(small_disk / "bucket"))
    version = store.create("kept/lease", b"1")
    writes: list[Callable[[], object]] = [
        lambda: store.create("kept/a", large.read_bytes()),
        lambda: store.put("kept/lease", large.read_bytes()),
        lambda: store.replace("kept/lease", large.read_bytes(), version),
        lambda: store.upload(large, "new/folder/b"),
    ]
    for write in writes:
        with pytest.raises(DiskFullError, match="No space left on device: free some space") as error:
            write()
        assert error.value.exit_code == Exit.DISK_FULL
        assert str(small_disk / "bucket") in str(error.value)
    assert list(store.list()) == [Entry("kept/lease", 1)]
    assert store.read("kept/lease").data == b"1"
    for source in (open_store(gcs_bucket), open_store(str(tmp_path / "bucket"))):
        source.upload(large, "large")
        with pytest.raises(DiskFullError, match="No space left on device") as error:
            source.download("large", small_disk / "cache" / "large")
        assert str(small_disk / "cache" / "large") in str(error.value)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [small_disk / "bucket/kept/lease"]
    store.create("kept/after", b"2")


def test_no_permission(store: Store, bucket: Path, unprivileged: Callable[[], None]) -> None:
    store.create("folder/object", b"1")
    store.create("secret/object", b"1")
    (bucket / "folder").chmod(0o555)
    (bucket / "secret").chmod(0o000)
    unprivileged()
    calls: list[Callable[[], object]] = [
        lambda: store.create("folder/new", b"2"),
        lambda: store.delete("folder/object"),
        lambda: store.replace("folder/object", b"2", store.read("folder/object").version),
        lambda: store.read("secret/object"),
        lambda: list(store.list()),
        lambda: store.upload(bucket / "secret/object", "copy"),
        lambda: store.download("folder/object", bucket / "folder" / "out"),
    ]
    for call in calls:
        with pytest.raises(NoPermissionError, match="Permission denied: give user") as error:
            call()
        assert str(bucket) in str(error.value)
        assert error.value.exit_code == Exit.NO_PERMISSION
    assert list(store.list("folder")) == [Entry("folder/object", 1)]


def test_ways_to_write_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri in ("{0}", "file://{0}", "file://localhost{0}", "FILE://{0}/", "{0}/x/.."):
        assert open_store(uri.format(tmp_path / "a b")).uri == str(tmp_path / "a b"), uri
    assert open_store("./bucket").uri == open_store("bucket/").uri == str(tmp_path / "bucket")
    assert open_store("~/bucket").uri == str(tmp_path / "home/bucket")
    assert open_store("100%25").uri == str(tmp_path / "100%25")
    assert open_store("file:///100%25").uri == "/100%"
    assert open_store("/").uri == "/"
    assert open_store("/").uri_of("etc/hosts") == "/etc/hosts"
    assert list(tmp_path.iterdir()) == []


def test_unsupported_uris_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:1", monkeypatch)
    for uri, words in [
        ("https://host/a.zip?s=1", "'https://host/a.zip?…': https:// is not supported; download it first (curl -LO)"),
        ("https://storage.googleapis.com/bucket", "https://"),
        ("file://", "names no folder"),
        ("file://server/share", "names no folder"),
        ("a\0b", "names no folder"),
        ("~nobody-of-this-name/x", "names no folder"),
        *((f"{scheme}://{bucket}", words) for scheme in SCHEMES for bucket, words in _NO_BUCKETS),
    ]:
        with pytest.raises(BadRequestError, match=re.escape(words)):
            pytest.fail(f"{uri} was opened as {open_store(uri)}")


_NO_BUCKETS = [
    ("", "names no bucket: use "),
    ("UPPER", "names no bucket"),
    ("user:secret@bucket/x", "://…@bucket/x names no bucket: use "),
    ("bucket/x?sv=1&sig=secret", "://bucket/x?… names no bucket: use "),
    ("bucket/../other", "cannot be an object's key"),
]


def test_wait_for_locks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    store = open_store(str(tmp_path), Retry(0))
    version = store.create("a", b"1")
    with (tmp_path / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BucketAwayError, match=r"\.lock was locked for 0\.3 s: end what `fuser"):
            store.replace("a", b"2", version)
    assert store.replace("a", b"2", version)


HOLD = """
import sys, time
from job.store.files import scratch_folder
with scratch_folder("save") as folder:
    (folder / "model.safetensors").write_bytes(b"1")
    print(folder, flush=True)
    time.sleep(60)
"""


def holder() -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    return child, Path(child.stdout.readline().strip())


def test_scratch_of_dead_processes_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # What this process has swept already.
    files._sweep_once.cache_clear()
    (dead, left), (living, used) = holder(), holder()
    dead.kill()
    dead.wait()
    theirs = tmp_path / "ddpm-notes"
    theirs.mkdir()
    (tmp_path / "ddpm-tmp-link").symlink_to(theirs)
    with scratch_folder("save") as first:
        assert not left.exists()
        # As a process that begins now.
        files._sweep_once.cache_clear()
        with pytest.raises(ZeroDivisionError), scratch_folder("save") as second:
            assert {path.parent for path in (first, second)} == {tmp_path}
            assert all(path.is_dir() for path in (first, second, used, theirs))
            raise ZeroDivisionError
        assert not second.exists()
    living.kill()
    living.wait()


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as error, scratch_folder("save"):
        pass
    words = "no folder for temporary files can be written: free some space, or set TMPDIR"
    assert exits.ending_of(error.value) == (Exit.DISK_FULL, words)
