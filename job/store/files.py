"""Files on a local disk that are whole or absent, even if their writer is killed.

A file is written under a hidden temporary name in the same folder, then linked or renamed to its final name. The writer
locks the temporary file, so one without a lock belongs to a dead process and can be deleted. Temporary folders are
handled the same way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from job.exits import BadRequestError, BucketAwayError, DiskFullError, JobError, MissingInputError, NoPermissionError

LOCK_SECONDS = 5.0
LOCK_POLL_SECONDS = 0.002
COPY_BYTES = 1 << 20
_ATTEMPTS = 100
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_SCRATCH = "ddpm-tmp-"


def default_cache_dir() -> Path:
    """Returns `$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: neither variable is set, and the user has no home.
    """
    folder = os.environ.get("DDPM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/ddpm"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:
        raise BadRequestError("this user has no home folder: set DDPM_CACHE to a folder on a local disk") from None


@contextmanager
def os_errors(where: object) -> Iterator[None]:
    """Turns an `OSError` into a `JobError` with a remedy.

    Args:
        where: the path or URI that the message names.

    Raises:
        MissingInputError: the file or folder does not exist.
        NoPermissionError: this user lacks the permission.
        DiskFullError: the disk, the quota or the file size limit is exhausted.
        BadRequestError: the name cannot be used.
        BucketAwayError: any other error, such as a network file system that does not answer.
    """
    try:
        yield
    except OSError as error:
        kind: type[JobError] = BucketAwayError
        remedy = "see to the disk or its mount, then start again"
        match error.errno:
            case errno.ENOENT:
                kind, remedy = MissingInputError, "check the path"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                kind, remedy = NoPermissionError, f"give user {os.geteuid()} access, or choose another place"
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                kind, remedy = DiskFullError, "free some space or choose another disk, then start again"
            case errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENAMETOOLONG | errno.ELOOP:
                kind, remedy = BadRequestError, "choose another name; on a local disk it is either a file or a folder"
        raise kind(f"{where}: {error.strerror or error}: {remedy}") from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Makes an empty hidden file in `path`'s folder, which is created if necessary, and deletes it in the end.

    Yields:
        Its path, to be linked or renamed, and the file, open for writing and reading.
    """
    folder = path.parent

    def make() -> Path:
        make_folder(folder)
        made = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        made.touch(exist_ok=False)
        return made

    temporary, descriptor = _locked(make)
    with os.fdopen(descriptor, "w+b") as file:
        try:
            _sweep_once(folder, _TEMPORARY)
            yield temporary, file
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Locks an existing folder against other threads and processes; the death of a holder releases the lock.

    Raises:
        BucketAwayError: another process held the lock all the time, such as a suspended one.
    """
    # The lock file would create a missing folder.
    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    path = folder / _LOCK
    try:
        with FileLock(path, timeout=LOCK_SECONDS, poll_interval=LOCK_POLL_SECONDS):
            try:
                yield
            finally:
                # Otherwise no folder would ever be empty. A process that waits for this file creates a new one.
                path.unlink(missing_ok=True)
    except Timeout:
        raise BucketAwayError(f"{path} was locked for {LOCK_SECONDS:g} s: end what `fuser {path}` names") from None


def sync(path: Path) -> None:
    """Writes a file to the disk, or the names of a folder, so that a crash cannot undo a link or a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Makes an empty folder on the local disk, with `purpose` in its name, and deletes it in the end.

    Raises:
        FileNotFoundError: no folder for temporary files exists, or all are full; see `job.exits.ending_of`.
        DiskFullError: the disk is full.
    """
    above = Path(tempfile.gettempdir())
    with os_errors("the folder for temporary files (TMPDIR)"):
        _sweep_once(above, _SCRATCH)
        folder, descriptor = _locked(lambda: Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{purpose}-", dir=above)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked(make: Callable[[], Path]) -> tuple[Path, int]:
    """Makes a temporary file or folder, and locks it until the descriptor is closed or its process dies.

    It is made anew if another process has swept it away before.
    """
    for _ in range(_ATTEMPTS):
        # A process that deletes the last file of a folder removes the folder too, at any time.
        with suppress(FileNotFoundError):
            descriptor = _opened(path := make())
            is_swept = False
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # On a file system without locks no process can sweep.
                is_swept = isinstance(error, BlockingIOError)
            if not is_swept and path.exists():
                return path, descriptor
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def sweep_temporaries(folder: Path, prefix: str = _TEMPORARY) -> None:
    """Removes the temporary files and folders of dead processes from `folder`."""
    for leftover in folder.glob(f"{prefix}*"):
        # A living writer holds the lock, and another process may sweep too.
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


_sweep_once = cache(sweep_temporaries)
"""To list a folder for every file would be slow."""


def _opened(path: Path) -> int:
    # Network file systems lock only files that are open for writing.
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    return os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, such that their names survive a power failure."""
    if not folder.exists():
        make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
        sync(folder.parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing.

    Raises:
        DiskFullError, NoPermissionError: the file cannot be written.
    """
    with os_errors(path), temporary_beside(path) as (temporary, file):
        file.write(data)
        file.flush()
        temporary.replace(path)
