"""Sources on the web: an https:// archive, or a file or folder of a dataset at the hub (hf://datasets/ORG/NAME/…).

A file is fetched into the cache once, in blocks, so that a fetch that broke off goes on where it was. What a server
says of a file, its size and its version, must stay the same meanwhile. A folder's files are read one by one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from job.code_version import how_to_install
from job.data.cache import default_cache_dir
from job.exits import (
    BadDataError,
    BadRequestError,
    BucketAwayError,
    DiskFullError,
    MissingInputError,
    NoPermissionError,
)
from job.progress import Progress
from job.store import Retry
from job.store.files import os_errors

SCHEMES = ("https", "http", "hf")
BLOCK_BYTES = 16 << 20
SPARE_BYTES = 1 << 30
"""Of the disk, that a fetched file leaves free."""
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def is_on_the_web(source: str) -> bool:
    """Whether a source is one of these."""
    return source.partition("://")[0].lower() in SCHEMES and "://" in source


def check_web_source(source: str) -> None:
    """Returns if a source on the web may be asked for.

    Raises:
        BadRequestError: it is no https:// or hf://datasets/, or holds a password, which lists would show.
    """
    parts = urlsplit(source)
    if parts.scheme.lower() == "http" and parts.netloc.rpartition(":")[0] not in _LOCAL:
        raise BadRequestError(f"{source.partition('?')[0]}: anybody on the way could change it: use https://")
    if parts.username or parts.password:
        raise BadRequestError("a source on the web must not hold a user or password: lists and logs would show them")
    if parts.scheme.lower() == "hf" and (parts.netloc != "datasets" or parts.path.count("/") < 2):
        raise BadRequestError(f"{source}: of the hub datasets are read, as hf://datasets/ORG/NAME[@REVISION][/PATH]")


class Web:
    """A file system of the web, as fsspec has it, with this program's patience and errors."""

    def __init__(self, source: str, retry: Retry) -> None:
        """Raises `BadRequestError` if what speaks to it is not installed."""
        check_web_source(source)
        self.source, self._retry = source, retry
        scheme = source.partition("://")[0].lower()
        try:
            import fsspec

            # Listings and files may have changed since another command asked.
            self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise BadRequestError(
                f"{scheme}:// needs more than is installed ({error}): {how_to_install('web')}"
            ) from None
        self.path = source.removeprefix("hf://") if scheme == "hf" else source
        self.shown = source.partition("?")[0]
        """Without a query, which may be a signature."""
        self.name = self.shown.rstrip("/").rpartition("/")[2]

    def info(self) -> dict[str, Any]:
        """What is known of the source itself: `type`, `size` and what tells a version, where the server says it."""
        found: dict[str, Any] = self._ask(partial(self._files.info, self.path))
        return found

    def files(self) -> list[tuple[str, int]]:
        """Relative paths and sizes in bytes of what is below it, in order."""
        found: dict[str, dict[str, Any]] = self._ask(partial(self._files.find, self.path, detail=True))
        return sorted((name.removeprefix(f"{self.path}/"), int(each["size"] or 0)) for name, each in found.items())

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file below the source, or of the source itself."""
        path = f"{self.path}/{name}" if name else self.path
        content: bytes = self._ask(partial(self._files.cat_file, path, start=start, end=end))
        return content

    def _ask(self, question: Callable[[], Any]) -> Any:
        return self._retry(partial(self._told, question))

    def _told(self, question: Callable[[], Any]) -> Any:
        where = self.shown
        try:
            return question()
        except Exception as error:
            # fsspec takes whatever a server refuses for a file that is not there.
            cause = error.__cause__ or error
            status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
            said = " ".join(str(error).replace(self.source, where).split()) or type(error).__name__
            if status in (401, 403):
                raise NoPermissionError(f"{where} may not be read ({said:.200}): sign in (`hf auth login`)") from None
            if status in (404, 410) or isinstance(error, FileNotFoundError):
                raise MissingInputError(f"there is nothing at {where}: check the address") from None
            # Of all else nobody knows that it will not pass.
            raise BucketAwayError(f"{where} does not answer: {said:.200}") from None


def fetched(web: Web, info: dict[str, Any]) -> Path:
    """The file at a source, on the local disk, where it stays for the next time.

    Raises:
        BadDataError: the server does not say how large it is, or it changed meanwhile.
        BadRequestError: another process fetches it.
        DiskFullError: the disk has no room for it.
    """
    size_bytes = info.get("size")
    if not size_bytes:
        raise BadDataError(f"{web.shown} does not say how large it is: download it, and pack the file")
    version = str(info.get("ETag") or info.get("blob_id") or info.get("last_commit") or "")
    known = hashlib.sha256(f"{web.path}\0{size_bytes}\0{version}".encode()).hexdigest()[:32]
    whole = default_cache_dir() / "sources" / known
    with os_errors(whole.parent):
        whole.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{whole}.lock", timeout=0):
            if not whole.exists():
                _fetch(web, whole, size_bytes)
    except Timeout:
        raise BadRequestError(f"another process fetches {web.shown} just now: begin again when it is done") from None
    return whole


def _fetch(web: Web, whole: Path, size_bytes: int) -> None:
    part = whole.with_suffix(".part")
    with os_errors(part), part.open("ab") as file:
        there, free_bytes = file.tell(), shutil.disk_usage(part.parent).free
        if size_bytes - there > free_bytes - SPARE_BYTES:
            raise DiskFullError(
                f"{web.shown} has {size_bytes:,} bytes, and {part.parent} room for {free_bytes:,}: set DDPM_CACHE to a "
                "larger disk, or pack it from a bucket"
            )
        with Progress(f"fetching {web.name}", total=size_bytes >> 20, unit="MiB", start=there >> 20) as bar:
            while there < size_bytes:
                block = web.read("", there, min(there + BLOCK_BYTES, size_bytes))
                if not block or there + len(block) > size_bytes:
                    part.unlink()
                    raise BadDataError(f"{web.shown} gave other bytes than it said: begin again")
                file.write(block)
                there += len(block)
                bar.update(there >> 20)
    part.replace(whole)
