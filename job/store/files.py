"""Files on a local disk that are whole or absent, whoever is killed while writing them.

A file is written under a hidden temporary name beside its place and then linked or renamed into it. Its writer holds a
lock on it all the while, so a temporary file that nobody locks belongs to a process that died, and may go. So it is
with temporary folders.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from filelock import FileLock, Timeout

from job.exits import BadRequestError, BucketAwayError, DiskFullError, JobError, MissingInputError, NoPermissionError

LOCK_SECONDS = 5.0
LOCK_POLL_SECONDS = 0.002
COPY_BYTES = 1 << 20
_ATTEMPTS = 100
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_SCRATCH = "ddpm-tmp-"
_swept: set[Path] = set()


@contextmanager
def os_errors(where: object) -> Iterator[None]:
    """Turns an `OSError` into the error a person can act on.

    Args:
        where: the path or URI the message names.

    Raises:
        MissingInputError: it is not there.
        NoPermissionError: this user may not.
        DiskFullError: no space, quota or allowed file size is left.
        BadRequestError: the name cannot be used.
        BucketAwayError: anything else, such as a network file system that fell silent.
    """
    try:
        yield
    except OSError as error:
        what: type[JobError] = BucketAwayError
        todo = "see to the disk or its mount, then start again"
        match error.errno:
            case errno.ENOENT:
                what, todo = MissingInputError, "check the path"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                what, todo = NoPermissionError, f"give user {os.geteuid()} access, or choose another place"
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                what, todo = DiskFullError, "free some space or choose another disk, then start again"
            case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
                what, todo = BadRequestError, "a name on a local disk is either a file or a folder"
            case errno.ENAMETOOLONG | errno.ELOOP:
                what, todo = BadRequestError, "choose another name"
        raise what(f"{where}: {error.strerror or error}: {todo}") from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An empty file with a hidden name in `path`'s folder, which is made if need be; gone when the context ends.

    Yields:
        Its path, to be linked or renamed, and the file, open for writing and reading.
    """
    folder = path.parent
    for _ in range(_ATTEMPTS):
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        # Whoever deletes the last file of a folder removes the folder too, so that it may vanish at any time.
        with suppress(FileNotFoundError):
            _make_folder(folder)
            temporary.touch(exist_ok=False)
        if (descriptor := _locked_descriptor(temporary)) is not None:
            break
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    with os.fdopen(descriptor, "w+b") as file:
        try:
            _sweep_once(folder, _TEMPORARY)
            yield temporary, file
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the one lock of a folder that exists, across threads and processes; a holder's death frees it.

    Raises:
        BucketAwayError: somebody else held it all the time, such as a process that was suspended.
    """
    # One that is missing would be made.
    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    path = folder / _LOCK
    try:
        with FileLock(path, timeout=LOCK_SECONDS, poll_interval=LOCK_POLL_SECONDS):
            try:
                yield
            finally:
                # Or no folder would ever be empty. Who waits for this very file finds it gone, and makes another.
                path.unlink(missing_ok=True)
    except Timeout:
        raise BucketAwayError(
            f"{path} was locked by another process for {LOCK_SECONDS:g} s: `fuser {path}` names it; wake or end it"
        ) from None


def sync_folder(folder: Path) -> None:
    """Returns when the folder's names are on the disk: without it a crash could undo a link or a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c_of(file: BinaryIO) -> int:
    """CRC-32C (RFC 3720, section 12.1) of the rest of `file`."""
    checksum = 0
    while block := file.read(COPY_BYTES):
        checksum = google_crc32c.extend(checksum, block)
    return checksum


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder of this process on the local disk, with `purpose` in its name; gone when the context ends.

    Raises:
        FileNotFoundError: there is no folder for temporary files, or no space in any; see `job.exits.ending_of`.
        DiskFullError: no space is left by now.
    """
    parent = Path(tempfile.gettempdir())
    with os_errors("the folder for temporary files (TMPDIR)"):
        _sweep_once(parent, _SCRATCH)
        descriptor = None
        while descriptor is None:
            folder = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{purpose}-", dir=parent))
            descriptor = _locked_descriptor(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_descriptor(path: Path) -> int | None:
    """Locks a temporary file or folder that was just made, until the descriptor is closed or its process dies.

    None if it is gone, or if somebody who sweeps was faster: it is to be made anew.
    """
    with suppress(FileNotFoundError):
        descriptor = _opened(path)
        is_swept = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_swept = True
        except OSError:
            # A file system without locks: nobody can sweep there.
            pass
        if not is_swept and path.exists():
            return descriptor
        os.close(descriptor)
    return None


def _sweep_once(folder: Path, prefix: str) -> None:
    """Sweeps a folder that this process has not swept yet, which keeps it cheap."""
    if folder not in _swept:
        _swept.add(folder)
        sweep_temporaries(folder, prefix)


def sweep_temporaries(folder: Path, prefix: str = _TEMPORARY) -> None:
    """Removes what dead processes left in `folder`: files and folders of theirs whose names begin with `prefix`."""
    for leftover in folder.glob(f"{prefix}*"):
        # Somebody who still writes holds the lock, and somebody else may sweep too.
        with suppress(OSError):
            descriptor = _opened(leftover)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not leftover.is_dir():
                    leftover.unlink()
                elif os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


def _opened(path: Path) -> int:
    # Network file systems lock only what may be written to.
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    return os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)


def _make_folder(folder: Path) -> None:
    """`mkdir --parents` whose new names survive a power failure."""
    if not folder.exists():
        _make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
        sync_folder(folder.parent)
