"""Folders as buckets: links, full disks, missing rights, and what dead writers leave behind; and what a URI means."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from job import exits
from job.exits import BadDataError, BadRequestError, BucketAwayError, DiskFullError, MissingInputError
from job.store import ObjectMissingError, Retry, Store, files, open_store, open_to_read
from job.store.base import Entry
from job.store.files import scratch_folder, temporary_beside
from tests.job.command_line import raised
from tests.job.conftest import point_at
from tests.job.store.test_store import every_call, keys
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


def test_objects_are_ordinary_files(store: Store, bucket: Path, tmp_path: Path) -> None:
    out, old_umask = tmp_path / "new" / "out", os.umask(0o022)
    store.replace("runs/a/lease.json", b"2", store.create("runs/a/lease.json", b"1"))
    store.put("runs/a/status.json", b"3")
    store.upload(bucket / "runs/a/status.json", "runs/a/copy")
    store.download("runs/a/copy", out)
    os.umask(old_umask)
    assert names_in(bucket) == ["a", "copy", "lease.json", "runs", "status.json"]
    assert names_in(out.parent) == ["out"]
    assert {path.stat().st_mode & 0o777 for path in [*(bucket / "runs/a").iterdir(), out]} == {0o644}
    assert (bucket / "runs/a/lease.json").read_bytes() == b"2"
    # With the last object of a folder it goes too.
    store.delete("runs/a/copy")
    store.delete("runs/a/lease.json")
    assert names_in(bucket) == ["a", "runs", "status.json"]
    store.delete("runs/a/status.json")
    assert names_in(bucket) == keys(store) == []


def test_only_writers_make_a_missing_root(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"zip")
    for root in (tmp_path / "bucket", tmp_path / "archive.zip"):
        store = open_store(str(root))
        for look in (store.list, store.folders, store.sub("runs").list):
            raised(MissingInputError, f"{root} is not a folder: check the path", look)
        calls = every_call(store, tmp_path / "file")
        for name in ("read", "open", "download"):
            raised(ObjectMissingError, f"{root} is not a folder", calls[name])
        assert not store.exists("key")
        store.delete("key")
    raised(BadRequestError, "Not a directory", store.create, "key", b"1")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"zip"]
    store = open_store(str(tmp_path / "bucket"))
    store.sub("deep/down").create("key", b"1")
    assert list(store.list()) == [Entry("deep/down/key", 1)]
    assert list(store.sub("nothing/here").list()) == []


def test_impossible_objects_are_refused(store: Store, bucket: Path, tmp_path: Path, monkeypatch) -> None:
    """A name is a file or a folder; links lead nowhere else, nobody will ever write into a pipe, sizes are forged."""
    store.create("a/b", b"1")
    store.create("huge", b"1")
    os.truncate(bucket / "huge", 1 << 40)
    monkeypatch.setattr("job.store.base.READ_BYTES", 1 << 20)
    for name in (".DS_Store", "a/.hidden/x", "a/back\\slash"):
        (bucket / name).parent.mkdir(exist_ok=True)
        (bucket / name).write_bytes(b"2")
    os.mkfifo(bucket / "a" / "pipe")
    (bucket / "a" / "empty").mkdir()
    (outside := tmp_path / "outside").mkdir()
    (outside / "secret").write_bytes(b"secret")
    for link, target in (("folder", outside), ("file", outside / "secret"), ("dangling", outside / "new")):
        (bucket / link).symlink_to(target)
    outward = ("folder/secret", "folder/new", "file", "dangling")
    for key, names, error, words in (
        ("a/b/c", "create put", BadRequestError, "Not a directory: choose another name"),
        ("a", "put", BadRequestError, "Is a directory"),
        ("x" * 300, "put", BadRequestError, "File name too long"),
        ("huge", "read", BadDataError, "huge has more than 1,048,576 bytes"),
        ("a/pipe", "read open", ObjectMissingError, "pipe"),
        ("a/pipe", "create", BadDataError, "a/pipe is a folder or a pipe, where an object belongs"),
        ("a/empty", "create", BadDataError, "a/empty is a folder or a pipe, where an object belongs"),
        *((key, "read open delete put", BadRequestError, "leads out of") for key in outward),
    ):
        for name in names.split():
            raised(error, words, every_call(store, tmp_path, key)[name])
    raised(BadRequestError, "leads out of", store.list, "folder")
    assert list(store.list()) == [Entry("a/b", 1), Entry("huge", 1 << 40)]
    assert (store.folders(), store.folders("a")) == (["a"], [])
    assert names_in(outside) == ["secret"]


def test_links_within_the_root_work(store: Store, bucket: Path, tmp_path: Path) -> None:
    store.create("runs/best", b"1")
    (bucket / "best").symlink_to("runs/best")
    (bucket / "runs/loop").symlink_to(bucket)
    (tmp_path / "link").symlink_to(bucket)
    linked = open_store(str(tmp_path / "link"))
    assert linked.read("best").data == linked.read("runs/loop/runs/best").data == b"1"
    assert [entry.key for entry in linked.list()] == ["best", "runs/best"]


def test_removed_bucket_is_away(bucket: Path) -> None:
    notes: list[str] = []
    store = open_store(str(bucket), Retry(0.05, note=notes.append))
    store.create("runs/a", b"1")
    below = store.sub("runs")
    assert below.read("a").data == b"1"
    bucket.rename(bucket.with_name("elsewhere"))
    # As where a disk was mounted: nothing goes to the folder below it.
    bucket.mkdir()
    raised(BucketAwayError, "is gone", below.put, "b", b"1")
    bucket.rmdir()
    for name in ("put", "create", "read", "list"):
        raised(BucketAwayError, f"{bucket} is gone", every_call(below, bucket)[name])
    assert not bucket.exists()
    bucket.with_name("elsewhere").rename(bucket)
    below.put("b", b"1")
    assert "is back after" in notes[-1]


ABANDONED = """
import os, sys
from pathlib import Path
from job.store import open_store
from job.store.files import folder_lock, temporary_beside
path = Path(sys.argv[1])
store = open_store(str(path.parent))
store.create("a", b"1")
store.read("a"), list(store.list()), store.delete("a")
print({"fsspec", "gcsfs", "google.cloud", "botocore", "obstore", "aiohttp", "requests"} & set(sys.modules), flush=True)
with temporary_beside(path) as (temporary, file), folder_lock(path.parent):
    file.write(b"half a ")
    file.flush()
    os._exit(9)
"""


def test_temporaries_of_dead_writers_are_swept(store: Store, bucket: Path) -> None:
    for key in ("a/b/key", "a/d/e/key"):
        words = [sys.executable, "-c", ABANDONED, str(bucket / key)]
        child = subprocess.run(words, check=False, capture_output=True, text=True)
        assert (child.returncode, child.stdout, child.stderr) == (9, "set()\n", ""), "a folder needs no cloud"
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
    version, words = store.create("kept/lease", b"1"), "No space left on device: free some space"
    writes = {"create": "kept/a", "put": "kept/lease", "replace": "kept/lease", "upload": "new/folder/b"}
    for name, key in writes.items():
        write = every_call(store, large, key, version, large.read_bytes())[name]
        raised(DiskFullError, f"{small_disk / 'bucket'}.*{words}", write)
    assert list(store.list()) == [Entry("kept/lease", 1)]
    assert store.read("kept/lease").data == b"1"
    for source in (open_store(gcs_bucket), open_store(str(tmp_path / "bucket"))):
        source.upload(large, "large")
        out = small_disk / "cache" / "large"
        raised(DiskFullError, f"{out}.*No space left on device", source.download, "large", out)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [small_disk / "bucket/kept/lease"]
    store.create("kept/after", b"2")


def test_no_permission(store: Store, bucket: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    version = store.create("folder/object", b"1")
    store.create("secret/object", b"1")
    calls = every_call(store, bucket / "secret/object", "folder/object", version)
    calls["read"] = partial(store.read, "secret/object")
    (bucket / "folder").chmod(0o555)
    (bucket / "secret").chmod(0o000)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not (mode := folder.stat().st_mode) & 0o001:
            request.addfinalizer(partial(folder.chmod, mode))
            folder.chmod(0o755)
    # Root may do anything to any file.
    if os.geteuid() == 0:
        request.addfinalizer(lambda: os.seteuid(0))
        os.seteuid(NOBODY)
    for name in ("read", "create", "replace", "put", "upload", "download", "list", "folders", "delete"):
        raised(exits.NoPermissionError, f"{bucket}.*Permission denied: give user", calls[name])
    assert list(store.list("folder")) == [Entry("folder/object", 1)]


def test_ways_to_write_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    whole = ("{}", "file://{}", "file://localhost{}", "FILE://{}/", "{}/x/..")
    paths = {uri.format(tmp_path / "a b"): "a b" for uri in whole} | {"file:///100%25": "/100%", "/": "/"}
    paths |= {"./bucket": "bucket", "bucket/": "bucket", "~/bucket": "home/bucket", "100%25": "100%25"}
    for uri, path in paths.items():
        assert open_store(uri).uri == str(tmp_path / path), uri
    assert open_store("/").uri_of("etc/hosts") == "/etc/hosts"
    assert list(tmp_path.iterdir()) == []


def test_unsupported_uris_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:1", monkeypatch)
    no_buckets = [
        ("", "names no bucket: use "),
        ("UPPER", "names no bucket"),
        ("user:secret@bucket/x", "://…@bucket/x names no bucket: use "),
        ("bucket/x?sv=1&sig=secret", "://bucket/x?… names no bucket: use "),
        ("bucket/../other", "cannot be an object's key"),
    ]
    for uri, words in [
        ("https://host/a.zip?s=1", "'https://host/a.zip?…': https:// is not supported; download it first (curl -LO)"),
        ("https://storage.googleapis.com/bucket", "https://"),
        *((uri, "names no folder") for uri in ("file://", "file://server/share", "a\0b", "~nobody-of-this-name/x")),
        *((f"{scheme}://{bucket}", words) for scheme in SCHEMES for bucket, words in no_buckets),
    ]:
        raised(BadRequestError, re.escape(words), open_store, uri)


class Remembering(LocalFileSystem):
    """What another program's package may bring: it remembers what it was told of files until it is told to forget."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("remembering://"))

    def info(self, path: str, **how: object) -> dict[str, object]:
        return self.dircache.setdefault(path, super().info(path, **how))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    fsspec.register_implementation("remembering", Remembering)
    (tmp_path / "file").write_bytes(b"1" * 100)
    with open_to_read(f"remembering://{tmp_path}").open("file") as stream:
        (tmp_path / "file").write_bytes(b"2" * 99)
        raised(BadDataError, "file has changed during the read: begin again", stream.read, 10)


def test_wait_for_locks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    store = open_store(str(tmp_path), Retry(0))
    version = store.create("a", b"1")
    with (tmp_path / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        raised(BucketAwayError, r"\.lock was locked for 0\.3 s: end what `fuser", store.replace, "a", b"2", version)
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
    assert exits.ending_of(error.value) == (exits.Exit.DISK_FULL, words)
