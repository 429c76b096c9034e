"""What any fsspec file system reads, chained ones too: `sftp://HOST/photos`, `zip://train::gs://THEIRS/archive.zip`.

It is a source and no bucket: fsspec has no create that fails for a second writer. Each call is made in a thread, since
most of these file systems know neither a stop nor a deadline.
"""

from __future__ import annotations

import difflib
import logging
import lzma
import re
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, cast
from urllib.parse import urljoin

from job.code_version import how_to_install
from job.exits import BadDataError, BadRequestError, BucketAwayError, JobError, NoPermissionError
from job.store import WEB, check_source, is_safe, without_queries
from job.store.base import Entry, ObjectMissingError, Store
from job.store.calls import POLL_SECONDS, T, answer, in_thread
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, READ_AHEAD_BYTES, Ranges, one_line
from job.store.retry import Retry

if TYPE_CHECKING:
    import aiohttp

# It tells what our one line says, in many.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

_SILENCES_PER_READ = 8
_DAMAGES = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
"""Some file systems show nothing of what they read ahead."""
_EXTRAS = {**dict.fromkeys((*WEB, "hf"), "web"), **dict.fromkeys(("gs", "gcs"), "gs"), "az": "az", "abfs": "az"}
_VERSIONS = (
    "ETag",
    "etag",
    "Last-Modified",
    "generation",
    "blob_id",
    "sha",
    "mtime",
    "last_modified",
    "LastModified",
    "modified",
)


class About(NamedTuple):
    """What is known of a file: its size in bytes, None if nobody says it, and what changes with its content."""

    size_bytes: int | None
    version: str


class ForeignStore(Store):
    """Files below the folder that a URL names. The query of a URL, which may be a signature, is in no message."""

    def __init__(self, uri: str, retry: Retry) -> None:
        """Makes the file systems of the URL's links, most of which ask nobody yet.

        Raises:
            BadRequestError: a scheme that fsspec does not know, or whose package is missing; or a URL that holds a
                password, that anybody on the way could change, or that leads elsewhere.
        """
        check_source(uri)
        first, sep, _ = uri.partition("::")
        first, mark, query = first.partition("?")
        self._first = f"{_trimmed(first)}/"
        self._query, self._rest = mark + query, without_queries(uri)[len(first) :] if sep else ""
        super().__init__(_trimmed(first) + self._rest, retry)
        try:
            from fsspec import get_filesystem_class
            from fsspec.core import url_to_fs

            for scheme in _schemes(uri):
                get_filesystem_class(scheme)
            own = {scheme: self._options(scheme) for scheme in _schemes(uri)}
        except (ImportError, ValueError) as error:
            raise _not_installed(uri, error) from None
        self._turns = threading.Semaphore()
        # Some connect at once.
        self._fs = retry.elsewhere()(partial(self._ask, self.uri, url_to_fs, uri, **own))[0]
        if self._fs.async_impl or uri.lower().startswith("hf://"):
            # Threads may share it, as fsspec says of no other: of two that ask by SSH, one would wait for good.
            self._turns = threading.Semaphore(CONNECTIONS)

    def about(self, key: str) -> About:
        """Asks for a file's size and version.

        Raises:
            ObjectMissingError: there is none, or it is a folder.
        """
        self._fs.invalidate_cache()
        return self._attempt(self._about, key)

    def blocks(self, key: str, start: int = 0, version: str = "") -> tuple[int, Iterator[bytes]]:
        """Begins to read a file at the byte `start`, or at 0 if it cannot be read from there or has another version.

        Returns:
            Where it begins, and the content from there on; reading raises as any operation does, and tries once.
        """
        where, path = self.uri_of(key), self._path(key)
        how: dict[str, Any] = {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
        if is_web := "https" in self._fs.protocol:
            headers = {"Accept-Encoding": "identity"}
            if start:
                headers |= {"Range": f"bytes={start}-"} | ({"If-Range": version} if version else {})
            # A stream; with a size nobody asks for it.
            how = {"block_size": 0, "size": 1, "headers": headers}
        file = self._ask(where, self._fs.open, path, "rb", **how)
        if is_web:
            goes_on = file.r.status == 206 and file.r.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            start = start if goes_on else 0
        elif start:
            self._ask(where, file.seek, start)

        def content() -> Iterator[bytes]:
            try:
                while block := self._ask(where, file.read, COPY_BYTES):
                    self.retry.is_under_way(where)
                    yield block
            finally:
                self._ask(where, file.close)

        return start, content()

    def _uri(self, key: str) -> str:
        return f"{self.uri.removesuffix(self._rest)}/{key}{self._rest}"

    def _path(self, key: str) -> str:
        path: str = self._fs._strip_protocol(_trimmed(f"{self._first}{self._prefix}{key}") + self._query)
        return path or self._fs.root_marker

    def _options(self, scheme: str) -> dict[str, Any]:
        own: dict[str, Any] = {"skip_instance_cache": True}
        if scheme in WEB:
            import aiohttp

            silence_seconds = self.retry.silence_seconds
            limits = aiohttp.ClientTimeout(total=None, sock_connect=silence_seconds, sock_read=silence_seconds)
            redirects = aiohttp.TraceConfig()
            redirects.on_request_redirect.append(_check_redirect)
            own["client_kwargs"] = {"timeout": limits, "trace_configs": [redirects], "trust_env": True}
        return own

    def _ask(self, where: str, work: Callable[..., T], *args: Any, **named: Any) -> T:
        while not self._turns.acquire(timeout=POLL_SECONDS):
            self.retry.is_under_way(where)
        due = time.monotonic() + (_SILENCES_PER_READ - 1) * self.retry.silence_seconds
        try:
            return answer(in_thread(work, *args, **named), self.retry, where, lambda: due)
        except JobError:
            raise
        except Exception as error:
            raise self._meaning(error, where) from error
        finally:
            self._turns.release()

    def _about(self, key: str) -> About:
        found = self._ask(self.uri_of(key), self._fs.info, self._path(key))
        if found.get("type") == "directory":
            raise ObjectMissingError(f"{self.uri_of(key)} is a folder")
        return About(found.get("size"), "\0".join(str(found[name]) for name in _VERSIONS if found.get(name)))

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        about, received_bytes = self._about(key), 0
        for block in self.blocks(key)[1]:
            consume(block)
            received_bytes += len(block)
        if about.size_bytes not in (None, received_bytes):
            raise BucketAwayError(f"{self.uri_of(key)} sends {received_bytes:,} of {about.size_bytes:,} bytes")
        # A smaller one comes in a single request, and the hub answers few questions an hour.
        if received_bytes > READ_AHEAD_BYTES:
            self._check_same(key, about)
        return about.version

    def _check_same(self, key: str, about: About) -> None:
        if self.about(key) != about:
            raise BadDataError(f"{self.uri_of(key)} was changed just now: begin again")

    def _open(self, key: str) -> BinaryIO:
        about = self._about(key)
        if about.size_bytes is None:
            raise BadDataError(f"{self.uri_of(key)} does not say how large it is: download it")
        return cast(BinaryIO, Ranges(partial(self._attempt, self._part, key, about), about.size_bytes))

    def _part(self, key: str, about: About, start: int, stop: int) -> bytes:
        part = self._ask(self.uri_of(key), self._fs.cat_file, self._path(key), start, stop)
        self._check_same(key, about)
        if len(part) != stop - start:
            raise BadDataError(f"{self.uri_of(key)} cannot be read in parts: download it")
        return cast(bytes, part)

    def _list(self, prefix: str) -> Sequence[Entry]:
        folder = self._path(prefix.rstrip("/"))
        self._fs.invalidate_cache()
        found: dict[str, dict[str, Any]] = self._ask(self._uri(prefix), self._fs.find, folder, detail=True)
        below = len(self._path(""))
        return [Entry(name[below:].lstrip("/"), int(each.get("size") or 0)) for name, each in found.items()]

    def _folders(self, prefix: str) -> Sequence[str]:
        names = (entry.key.removeprefix(prefix) for entry in self._list(prefix))
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def _write(self, key: str, content: BinaryIO, over: str | None) -> NoReturn:
        raise BadRequestError(f"{self.uri_of(key)}: it can only be read: write to gs://, s3://, az:// or a folder")

    def _delete(self, key: str) -> NoReturn:
        raise BadRequestError(f"{self.uri_of(key)}: it can only be read: delete it where it is")

    def _meaning(self, error: Exception, uri: str) -> JobError:
        # fsspec raises a FileNotFoundError for any failure of the web, and its cause says which one it was.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, JobError):
            return error
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        # The query of an address may be a signature, also where a server redirects to.
        said = one_line(re.sub(r"\?[^\s'\")]+", "", str(error))) or type(error).__name__
        if status in (401, 403) or isinstance(error, PermissionError) or "Authentication" in type(error).__name__:
            how = "sign in with `hf auth login`" if uri.startswith("hf:") else "download it where you are signed in"
            return NoPermissionError(f"{uri} may not be read ({said}): {how}")
        if status in (404, 410) or isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return ObjectMissingError(f"there is nothing at {uri}: check the address")
        if status == 416:
            return BadDataError(f"{uri} ends before the size that the server gives: download it")
        if isinstance(error, _DAMAGES):
            return BadDataError(f"{uri} is truncated or damaged ({said}): get it again")
        # Any other failure may pass.
        return BucketAwayError(f"{uri} does not answer: {said}")


def _trimmed(url: str) -> str:
    return re.sub("(?<!:)(?<!:/)/+$", "", url)


async def _check_redirect(_: object, __: object, sent: aiohttp.TraceRequestRedirectParams) -> None:
    headers = sent.response.headers
    target = urljoin(str(sent.url), headers.get("Location") or headers.get("URI") or "")
    if not target.lower().startswith(WEB) or not is_safe(target):
        shown = target.partition("?")[0]
        raise BadRequestError(f"{sent.url.with_query(None)} leads to {shown:.100}, which is not https://: download it")


def _schemes(uri: str) -> list[str]:
    return [link.partition("://")[0].lower() for link in uri.split("::") if "://" in link]


def _not_installed(uri: str, error: Exception) -> BadRequestError:
    """Which package is missing, or which scheme was meant."""
    from fsspec import available_protocols

    for scheme in (schemes := _schemes(uri)):
        if scheme not in available_protocols():
            near = difflib.get_close_matches(scheme, available_protocols(), 1)
            meant = f"did you mean {near[0]}://?" if near else "`fsspec.available_protocols()` has all"
            return BadRequestError(f"{scheme}://: no file system of that name is known: {meant}")
    how = next((how_to_install(_EXTRAS[scheme]) for scheme in schemes if scheme in _EXTRAS), "install it with pip")
    return BadRequestError(f"{schemes[0]}:// needs more than is installed ({one_line(str(error))}): {how}")
