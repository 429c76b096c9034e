"""Temporary folders that do not outlive their process for long: what a killed one left, the next one clears away."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job.exits import DiskFullError
from job.store.files import locked_descriptor, os_errors, sweep_once

_PREFIX = "ddpm-tmp-"


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder of this process on the local disk, with `purpose` in its name; gone when the context ends.

    Raises:
        DiskFullError: there is no folder for temporary files, or no space in it.
        NoPermissionError: this user may not write there.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        # Python tries to write to each of them, so that a full disk looks like this as well.
        raise DiskFullError(f"no folder for temporary files can be written to: set TMPDIR ({error.strerror})") from None
    with os_errors("the folder for temporary files (TMPDIR)"):
        sweep_once(parent, _PREFIX)
        descriptor = None
        while descriptor is None:
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=parent))
            descriptor = locked_descriptor(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
