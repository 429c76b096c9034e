"""Files on a local disk that are whole or absent, whoever is killed while writing them.

A file is written under a hidden temporary name beside its place and then linked or renamed into it. Its writer holds a
lock on it all the while, so a temporary file that nobody locks belongs to a process that died, and may go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from job.exits import BadRequestError, BucketAwayError, DiskFullError, JobError, MissingInputError, NoPermissionError

LOCK_SECONDS = 5.0
LOCK_POLL_SECONDS = 0.002
_ATTEMPTS = 100
_COPY_BYTES = 1 << 20
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
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
        raise disk_error(error, where) from error


def disk_error(error: OSError, where: object) -> JobError:
    """See `os_errors`."""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT:
            return MissingInputError(f"{where} is not there: check the path")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return NoPermissionError(f"{where}: {reason}: give user {os.geteuid()} access, or choose another place")
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return DiskFullError(f"{where}: {reason}: free some space or choose another disk, then start again")
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
            return BadRequestError(f"{where}: {reason}: a name on a local disk is either a file or a folder")
        case errno.ENAMETOOLONG | errno.ELOOP:
            return BadRequestError(f"{where}: {reason}: choose another name")
        case _:
            return BucketAwayError(f"{where}: {reason}: see to the disk or its mount, then start again")


@contextmanager
def temporary_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An empty file with a hidden name in `path`'s folder, which is made if need be; gone when the context ends.

    Yields:
        Its path, to be linked or renamed, and the file, open for writing and reading.
    """
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            descriptor = _locked_file(temporary)
            break
        # Whoever deletes the last file of a folder removes the folder too, so that it may vanish at any time.
        with suppress(FileNotFoundError):
            _make_folder(path.parent)
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with os.fdopen(descriptor, "w+b") as file:
        try:
            # Once per process and folder, which keeps it cheap.
            if path.parent not in _swept:
                _swept.add(path.parent)
                sweep_temporaries(path.parent)
            yield temporary, file
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the one lock of a folder that exists, across threads and processes; a holder's death frees it."""
    path = folder / _LOCK
    descriptor = _locked_file(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sync_file(file: BinaryIO) -> None:
    """Returns when everything written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the folder's names are on the disk: without it a crash could undo a link or a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c_of(file: BinaryIO, copy_to: BinaryIO | None = None) -> int:
    """CRC-32C (RFC 3720, section 12.1) of the rest of `file`, which is copied on the way if asked."""
    checksum = 0
    while block := file.read(_COPY_BYTES):
        checksum = google_crc32c.extend(checksum, block)
        if copy_to is not None:
            copy_to.write(block)
    return checksum


def _make_folder(folder: Path) -> None:
    """`mkdir --parents` whose new names survive a power failure."""
    with suppress(FileExistsError):
        try:
            folder.mkdir()
        except FileNotFoundError:
            _make_folder(folder.parent)
            folder.mkdir()
        sync_folder(folder.parent)


def _locked_file(path: Path) -> int:
    """Descriptor of the file at `path`, made if need be, under an exclusive lock.

    Raises:
        BucketAwayError: somebody else held the lock all the time.
    """
    give_up_at = time.monotonic() + LOCK_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path, give_up_at)
        except BaseException:
            os.close(descriptor)
            raise
        # Its former holder may have removed the file while this one waited: a lock on a nameless file is worth nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        os.close(descriptor)


def _lock(descriptor: int, path: Path, give_up_at: float) -> None:
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        # A process that was suspended inside would hold up all others for as long as it sleeps.
        if time.monotonic() >= give_up_at:
            raise BucketAwayError(
                f"{path} was locked by another process for {LOCK_SECONDS:g} s: `fuser {path}` names it; wake or end it"
            )
        time.sleep(LOCK_POLL_SECONDS)


def sweep_temporaries(folder: Path) -> None:
    """Removes what dead writers left in `folder`."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        # Somebody who still writes holds the lock, and somebody else may sweep too.
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(descriptor)
