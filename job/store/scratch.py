"""Temporary folders that do not outlive their process for long: what a killed one left, the next one clears away.

A folder's owner holds a lock on it all the while, so one that nobody locks belongs to a process that died.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from job.exits import DiskFullError
from job.store.files import os_errors

_PREFIX = "ddpm-tmp-"
_WHERE = "the folder for temporary files (TMPDIR)"
_swept: set[str] = set()


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder of this process on the local disk, with `purpose` in its name; gone when the context ends.

    Raises:
        DiskFullError: there is no folder for temporary files, or no space in it.
        NoPermissionError: this user may not write there.
    """
    with os_errors(_WHERE):
        parent = _parent()
        _sweep(parent)
        folder, descriptor = _locked_folder(parent, purpose)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _parent() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        # Python tries to write to each of them, so that a full disk looks like this as well.
        raise DiskFullError(f"no folder for temporary files can be written to: set TMPDIR ({error.strerror})") from None


def _locked_folder(parent: str, purpose: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=parent))
        # Between its making and the lock, somebody who sweeps may have taken it for a dead one's.
        with suppress(FileNotFoundError):
            descriptor = _opened(folder)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            except OSError:
                # A file system without locks: nobody clears anything away there.
                return folder, descriptor
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _sweep(parent: str) -> None:
    """Once per process, which keeps it cheap."""
    if parent in _swept:
        return
    _swept.add(parent)
    for leftover in Path(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = _opened(leftover)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
