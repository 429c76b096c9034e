"""A read-only store of what an fsspec file system reads: `sftp://HOST/photos`, `hf://datasets/…`, `https://…`.

It cannot be a bucket, because fsspec has no create that fails for a second writer. Each call runs in a thread, because
most of these file systems end a call neither at a stop nor after a time.
"""

from __future__ import annotations

import difflib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, cast
from urllib.parse import urljoin

from fsspec import available_protocols, get_filesystem_class
from fsspec.config import conf

from job.exits import BadDataError, BadRequestError, BucketAwayError, JobError, NoPermissionError, how_to_install
from job.store import URIS, WEB, check_source, is_safe, redacted, split_query
from job.store.base import Entry, ObjectMissingError, Store
from job.store.calls import POLL_SECONDS, T, answer, in_thread
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, PART_BYTES, READ_AHEAD_BYTES, Ranges, one_line
from job.store.retry import Retry, UnknownHostError, is_unknown_host

if TYPE_CHECKING:
    import aiohttp

# It logs many lines about an error that this program reports in one.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

_SILENCES_PER_READ = 8
"""Times of silence per read: some file systems report no progress of a block that they read ahead."""
_EXTRAS = dict.fromkeys((*WEB, "hf"), "web")
_SIGN_IN = {
    "hf": "sign in with `hf auth login`",
    **dict.fromkeys(WEB, "download it where you are signed in"),
}
_VERSIONS = ("ETag", "etag", "Last-Modified", "generation", "blob_id", "sha", "mtime", "last_modified", "modified")
"""Names under which file systems give a file's version; `If-Range` takes the first two."""
_HUB_DATASET = re.compile(r"datasets/[^/]+/[^/]")
_MOST_FOLDERS_DEEP = 64
_FINAL = (TypeError, AttributeError, NotImplementedError, IsADirectoryError)
_FINAL_NAMES = {"ValueError", "HFValidationError", "HfUriError", "UnsupportedProtocol", "TooManyRedirects"}
_FINAL_NAMES |= {"InvalidURL", "InvalidUrlRedirectClientError", "NonHttpUrlRedirectClientError"}
"""Errors that another attempt would raise again: their types, and names of types of libraries."""


class About(NamedTuple):
    """A file's size in bytes, None if it is unknown, and strings that change with its content."""

    size_bytes: int | None
    version: tuple[str, ...]


class _Connection:
    """The file system of a store and its copies; the first call after a failure makes a new one."""

    def __init__(self, scheme: str, kind: Any, url: str, options: dict[str, Any]) -> None:
        self.scheme, self.kind, self._url, self._options = scheme, kind, url, options
        self._fs: Any = None
        # The root of an SSH server is `/`.
        self._root: str = kind._strip_protocol(url) or ("/" if scheme in ("sftp", "ssh") else "")
        self.is_fixed = False
        """Whether no file can change, because all of them are those of one commit."""
        # fsspec lets threads share these alone: of two threads that use SSH, one would wait without end.
        self.turns = threading.Semaphore(CONNECTIONS if kind.async_impl or scheme == "hf" else 1)

    def path(self, below: str) -> str:
        """Returns the file system's name of a path below the URL."""
        # In a whole URL some file systems would read part of a name as a query.
        start = self._root if self._root[-1:] in ("", "/") else f"{self._root}/"
        return f"{start}{below}".rstrip("/") or self._root

    def fs(self) -> Any:
        """Returns the file system; to make it, some kinds connect to the server."""
        if self._fs is None:
            try:
                self._fs = self.kind(**{**self.kind._get_kwargs_from_urls(self._url), **self._options})
            except (ImportError, OSError) as error:
                # pyarrow finds Java's library for HDFS no earlier.
                if isinstance(error, OSError) and "load lib" not in str(error):
                    raise
                raise _not_installed(self.scheme, error) from None
            except (TypeError, ValueError, AttributeError) as error:
                # Other texts may repeat a secret.
                reason = one_line(str(error)) if isinstance(error, TypeError) else type(error).__name__
                raise BadRequestError(
                    f"{self.scheme}:// cannot be opened ({reason}): check the URL, and fsspec's configuration"
                ) from None
        if self.scheme == "hf" and not self.is_fixed and _HUB_DATASET.match(self._root):
            self._fix_commit(self._fs)
        return self._fs

    def _fix_commit(self, fs: Any) -> None:
        """Makes all reads of a dataset of the hub see one commit, so that no part of a file has to be compared."""
        from huggingface_hub import HfApi

        found = fs.resolve_path(self._root)
        api = HfApi(endpoint=fs.endpoint, token=fs.token)
        commit = api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
        fixed = type(found)(found.repo_type, found.repo_id, commit, found.path_in_repo)
        self._root, self.is_fixed = fixed.unresolve(), True

    def drop(self) -> None:
        """Makes the next call open a new file system."""
        self._fs = None


class ForeignStore(Store):
    """Files below the folder that a URL names. No message contains the URL's query, which may be a signature."""

    def __init__(self, uri: str, retry: Retry) -> None:
        """Finds the file system of the scheme, without any request.

        Raises:
            BadRequestError: an unknown scheme, a missing package, or a URL that `check_source` refuses.
        """
        check_source(uri)
        scheme, _, rest = uri.partition("://")
        scheme = scheme.lower()
        path, query = split_query(f"{scheme}://{rest}")
        # A server never gets the fragment.
        self._query = query.partition("#")[0]
        super().__init__(path if path.endswith("://") else path.rstrip("/"), retry)
        try:
            kind = get_filesystem_class(scheme)
        except (ImportError, ValueError, AttributeError) as error:
            raise _not_installed(scheme, error) from None
        self._connection = _Connection(scheme, kind, path, _options(scheme, retry.silence_seconds))
        if "?" in path and "?" not in self._path(""):
            raise BadRequestError(f"{path}: a folder with a ? in its name cannot be read: rename it")

    def about(self, key: str) -> About:
        """Returns a file's current size and version.

        Raises:
            ObjectMissingError: the file is missing, or a folder.
        """
        return self._attempt(self._about, key, True)

    def blocks(
        self, key: str, start: int = 0, stop: int | None = None, version: tuple[str, ...] = ()
    ) -> tuple[int, Iterator[bytes]]:
        """Starts to read a file at the byte `start`, or at 0 if that is impossible or its version has changed.

        Returns:
            The first byte's position, and the content from there on, at least up to `stop`. A read makes one attempt,
            and raises as any operation does.
        """
        where, is_web = self.uri_of(key), "https" in self._connection.kind.protocol

        def opened(fs: Any) -> Any:
            path = self._path(key)
            if not is_web:
                # The end is known: bytes behind it would be for nothing.
                kind = "none" if stop else "readahead"
                return fs.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type=kind)
            headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            if start or stop:
                headers["Range"] = f"bytes={start}-{stop - 1 if stop else ''}"
            if start and version:
                headers["If-Range"] = version[0]
            # Block size 0 opens a stream; a size saves the request for it.
            return fs.open(path, "rb", block_size=0, size=1, headers=headers)

        file = self._ask(where, opened)
        if is_web:
            goes_on = file.r.status == 206 and file.r.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            start = start if goes_on else 0
        elif start:
            self._ask(where, lambda _: file.seek(start))

        def content() -> Iterator[bytes]:
            at = start
            try:
                while stop is None or is_web or at < stop:
                    size = min(stop - at, PART_BYTES) if stop and not is_web else COPY_BYTES
                    block = self._ask(where, partial(_next_block, file, size))
                    if not block:
                        return
                    at += len(block)
                    self.retry.is_under_way(where)
                    yield block
            finally:
                self._ask(where, lambda _: file.close())

        return start, content()

    def _path(self, key: str) -> str:
        return self._connection.path(self._prefix + key) + self._query

    def _ask(self, where: str, work: Callable[[Any], T]) -> T:
        """Returns `work` of the file system, and translates its errors."""
        while not self._connection.turns.acquire(timeout=POLL_SECONDS):
            self.retry.is_under_way(where)
        due = time.monotonic() + (_SILENCES_PER_READ - 1) * self.retry.silence_seconds
        try:
            return answer(in_thread(lambda: work(self._connection.fs())), self.retry, where, lambda: due)
        except JobError:
            raise
        except Exception as error:
            meaning = _meaning(error, where)
            if isinstance(meaning, BucketAwayError):
                self._connection.drop()
            raise meaning from error
        finally:
            self._connection.turns.release()

    def _info(self, key: str, anew: bool = False) -> dict[str, Any]:
        def info(fs: Any) -> dict[str, Any]:
            if anew:
                fs.invalidate_cache()
            found: dict[str, Any] = fs.info(self._path(key))
            return found

        return self._ask(self._uri(key), info)

    def _about(self, key: str, anew: bool = False) -> About:
        found = self._info(key, anew)
        if found.get("type") == "directory":
            raise ObjectMissingError(f"{self.uri_of(key)} is a folder")
        return About(found.get("size"), tuple(str(found[name]) for name in _VERSIONS if found.get(name)))

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        about, received_bytes = self._about(key), 0
        for block in self.blocks(key)[1]:
            consume(block)
            received_bytes += len(block)
        if about.size_bytes not in (None, received_bytes):
            raise BucketAwayError(f"{self.uri_of(key)} sends {received_bytes:,} of {about.size_bytes:,} bytes")
        # A smaller file arrives in one request, and the hub limits the requests per hour.
        if received_bytes > READ_AHEAD_BYTES:
            self._check_same(key, about)
        return repr(about.version)

    def _check_same(self, key: str, about: About) -> None:
        if not self._connection.is_fixed and self._about(key, anew=True) != about:
            raise BadDataError(f"{self.uri_of(key)} has changed during the read: begin again")

    def _open(self, key: str) -> BinaryIO:
        about = self._about(key)
        if about.size_bytes is None:
            raise BadDataError(f"the server does not give the size of {self.uri_of(key)}: download it")
        return cast(BinaryIO, Ranges(partial(self._attempt, self._part, key, about), about.size_bytes))

    def _part(self, key: str, about: About, start: int, stop: int) -> bytes:
        begins_at, blocks = self.blocks(key, start, stop, about.version)
        if begins_at != start:
            raise BadDataError(f"{self.uri_of(key)} cannot be read in parts, or has changed: download it")
        part = bytearray()
        for block in blocks:
            part += block
            if len(part) >= stop - start:
                break
        if len(part) < stop - start:
            raise BucketAwayError(f"{self.uri_of(key)} sends {len(part):,} of {stop - start:,} bytes")
        self._check_same(key, about)
        return bytes(part[: stop - start])

    def _list(self, prefix: str) -> Sequence[Entry]:
        if self._query:
            remedy = "check address and signature; a folder with a query cannot be listed"
            raise ObjectMissingError(f"there is nothing at {self.uri}: {remedy}")
        entries, folders = list[Entry](), [prefix]
        while folders:
            for key, found in self._listed(folder := folders.pop()):
                match found.get("type"):
                    case "directory":
                        folders.append(f"{key}/")
                    case "file":
                        entries.append(Entry(key, int(found.get("size") or 0)))
                    case _:
                        entries.append(Entry(key, self._linked_bytes(key)))
            if folder.count("/") > _MOST_FOLDERS_DEEP:
                raise BadDataError(f"{self._uri(prefix)} has more than {_MOST_FOLDERS_DEEP} levels: name a sub-folder")
        return entries

    def _listed(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lists the keys and properties of a folder's files and folders; nothing for a missing folder."""

        def ask(fs: Any) -> list[dict[str, Any]]:
            path = self._path(folder)
            fs.invalidate_cache()
            # The hub limits the requests per hour, but lists all files below a folder in one.
            is_hub = self._connection.scheme == "hf"
            return [*fs.find(path, detail=True).values()] if is_hub else fs.ls(path, detail=True)

        found = []
        with suppress(ObjectMissingError):
            found = self._ask(self._uri(folder), ask)
        start = self._connection.path(self._prefix).rstrip("/")
        for each in found:
            # The links of a page may lead outside the folder, and some servers begin them with a dot.
            name = each["name"].replace("/./", "/")
            key = name[len(start) :].strip("/")
            if name.startswith(f"{start}/" if start else "") and key and key.startswith(folder):
                yield key, each

    def _linked_bytes(self, key: str) -> int:
        found = {}
        # A reader of the file gets the error.
        with suppress(ObjectMissingError):
            found = self._info(key)
        if found.get("type") == "directory":
            raise BadDataError(f"{self.uri_of(key)} is a link to a folder: put a copy in its place")
        return int(found.get("size") or 0)

    def _folders(self, prefix: str) -> Sequence[str]:
        names = (entry.key.removeprefix(prefix) for entry in self._list(prefix))
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def _write(self, key: str, content: BinaryIO, over: str | None) -> NoReturn:
        raise BadRequestError(f"{self.uri_of(key)} can only be read: write to a folder, {URIS}")

    def _delete(self, key: str) -> NoReturn:
        raise BadRequestError(f"{self.uri_of(key)} can only be read: delete it with another program")


def _next_block(file: Any, size_bytes: int, _: Any) -> bytes:
    return bytes(file.read(size_bytes))


def _options(scheme: str, silence_seconds: float) -> dict[str, Any]:
    """Returns options of a file system, beside fsspec's configuration."""
    own: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in WEB:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=silence_seconds, sock_read=silence_seconds)
        redirects = aiohttp.TraceConfig()
        redirects.on_request_redirect.append(_check_redirect)
        session = {"timeout": limits, "trace_configs": [redirects], "trust_env": True}
        configured = conf.get(scheme, {})
        own["client_kwargs"] = {**configured.get("client_kwargs", {}), **session}
        own["headers"] = {**configured.get("headers", {})}
    return own


def _meaning(error: Exception, uri: str) -> JobError:
    has_unknown_host = is_unknown_host(error)
    # fsspec raises a FileNotFoundError for any failure of HTTP, with the failure as its cause.
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, JobError):
        return error
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    # The query of a URL may be a signature, also that of a redirect.
    reason = one_line(re.sub(r"[?#][^\s'\")]+", "", str(error))) or type(error).__name__
    is_refused = isinstance(error, PermissionError) or "Authentication" in type(error).__name__
    if status in (401, 403) or is_refused or reason.startswith("No authentication"):
        how = _SIGN_IN.get(uri.partition("://")[0], "its user and key go into fsspec's configuration")
        return NoPermissionError(f"{uri} may not be read ({reason}): {how}")
    if status in (404, 410) or isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ObjectMissingError(f"there is nothing at {uri}: check the address")
    if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
        said = f"{type(error).__name__}: {reason}"
        return BadRequestError(f"{uri} cannot be read ({said}): check the URL, and fsspec's configuration")
    if status == 416:
        return BadDataError(f"{uri} ends before the size that the server gives: download it")
    if has_unknown_host:
        return UnknownHostError(
            f"{uri}: the name of its host is not known ({reason}): check the address and the network"
        )
    # Any other failure may be temporary.
    return BucketAwayError(f"{uri} does not answer: {reason}")


async def _check_redirect(_: object, __: object, sent: aiohttp.TraceRequestRedirectParams) -> None:
    headers = sent.response.headers
    target = urljoin(str(sent.url), headers.get("Location") or headers.get("URI") or "")
    if not target.lower().startswith(WEB) or not is_safe(target):
        shown = f"{sent.url.with_query(None)} leads to {redacted(target):.100}"
        raise BadRequestError(f"{shown}, which is not https://: download it")


def _not_installed(scheme: str, error: Exception) -> BadRequestError:
    """Returns the error of an unknown scheme, or of a missing package."""
    if scheme not in available_protocols():
        near = difflib.get_close_matches(scheme, available_protocols(), 1)
        meant = f"did you mean {near[0]}://?" if near else "`fsspec.available_protocols()` lists all"
        return BadRequestError(f"{scheme}://: no file system of that name is known: {meant}")
    how = how_to_install(_EXTRAS[scheme]) if scheme in _EXTRAS else "install that"
    return BadRequestError(f"{scheme}:// needs more than is installed ({one_line(str(error))}): {how}")
