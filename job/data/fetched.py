"""Fetches a file from a server that is not a bucket into the cache, where it stays until it is packed.

An interrupted fetch resumes at its position if the file on the server has not changed.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from job.data.cache import default_cache_dir
from job.exits import BadDataError, BadRequestError, BucketAwayError, DiskFullError
from job.progress import Progress
from job.store import is_foreign, split_chain
from job.store.files import os_errors
from job.store.retry import FIRST_PAUSE_SECONDS

if TYPE_CHECKING:
    from job.store.foreign import About, ForeignStore

SPARE_BYTES = 1 << 30
"""Space that a fetched file leaves free on the disk."""


def fetched(store: ForeignStore, key: str, source: str) -> Path:
    """Fetches the file `key` of a store, at the URL `source`, and returns its local path.

    Raises:
        BadDataError: the server does not give the file's size, sends another size, or changes the file meanwhile.
        BadRequestError: another process fetches the same file.
        DiskFullError: the file does not fit the disk.
    """
    about = store.about(key)
    if not about.size_bytes:
        raise BadDataError(f"the server does not give the size of {store.uri_of(key)}: download it, and pack the file")
    known = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    whole = _place(source).with_suffix(f".{known}")
    with os_errors(whole.parent):
        whole.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{whole}.lock", timeout=0):
            if not whole.exists():
                _fetch(store, key, about, whole)
    except Timeout:
        where = store.uri_of(key)
        raise BadRequestError(f"another process fetches {where}: begin again when it has finished") from None
    return whole


def forget(source: str) -> None:
    """Removes the fetched files of a source, after it is packed or refused."""
    inside, archive = split_chain(source)
    if inside:
        forget(archive)
    if inside or not is_foreign(source):
        return
    place = _place(source)
    for path in place.parent.glob(f"{place.name}.*"):
        path.unlink(missing_ok=True)


def _place(source: str) -> Path:
    return default_cache_dir() / "sources" / hashlib.sha256(source.encode()).hexdigest()[:32]


def _fetch(store: ForeignStore, key: str, about: About, whole: Path) -> None:
    where, size_bytes = store.uri_of(key), about.size_bytes or 0
    part = whole.with_name(f"{whole.name}-part")
    with os_errors(part), part.open("a+b") as file:
        if not about.version:
            # Without a version the part may belong to another file.
            file.truncate(0)
        free_bytes = shutil.disk_usage(part.parent).free
        if size_bytes - file.tell() > free_bytes - SPARE_BYTES:
            raise DiskFullError(
                f"{where} has {size_bytes:,} bytes, and {part.parent} has {free_bytes:,} free: set DDPM_CACHE to a "
                "larger disk, or pack it from a bucket"
            )
        furthest = file.tell()
        with Progress(f"fetching {key}", total=size_bytes >> 20, unit="MiB", start=furthest >> 20) as bar:

            def go_on() -> None:
                nonlocal furthest
                asked = file.seek(0, 2)
                start, blocks = store.blocks(key, asked, version=about.version)
                if start != asked:
                    file.seek(file.truncate(0))
                try:
                    for block in blocks:
                        file.write(block)
                        bar.update(file.tell() >> 20)
                        if file.tell() > size_bytes:
                            break
                    # A server may send the rest in parts, but an answer from byte 0 on is the whole file.
                    if start and file.tell() < size_bytes:
                        raise BucketAwayError(f"{where} sends {file.tell():,} of {size_bytes:,} bytes")
                except BucketAwayError:
                    # A server without ranges would send the same bytes again without end.
                    if file.tell() <= furthest:
                        raise
                    furthest = file.tell()
                    store.retry.stop.sleep(FIRST_PAUSE_SECONDS)
                    return
                if (received_bytes := file.tell()) != size_bytes:
                    file.truncate(0)
                    sizes = (
                        f"{where}: the server gives a size of {size_bytes:,} bytes and sends {received_bytes:,} or more"
                    )
                    # An empty answer may be an outage.
                    if not received_bytes:
                        raise BucketAwayError(sizes)
                    raise BadDataError(f"{sizes}: download it, and pack the file")

            while file.seek(0, 2) < size_bytes:
                store.retry(go_on)
        if store.about(key) != about:
            file.truncate(0)
            raise BadDataError(f"{where} has changed during the read: begin again")
    part.replace(whole)
