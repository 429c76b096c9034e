"""A read-only store of what an fsspec file system reads: `sftp://HOST/photos`, `hf://datasets/…`, `https://…`.

It cannot be a bucket, because fsspec has no create that fails for a second writer. Each call runs in a thread, because
most of these file systems end a call neither at a stop nor after a time.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast
from urllib.parse import urljoin

from fsspec import get_filesystem_class
from fsspec.config import conf

from job.exits import BadDataError, BadRequestError, BucketAwayError, JobError, NoPermissionError, how_to_install
from job.store import URIS, WEB, check_source, is_safe, redacted, split_query
from job.store.base import Entry, ObjectMissingError, Store
from job.store.files import COPY_BYTES
from job.store.remote import CONNECTIONS, RANGE_BYTES, Ranges, one_line
from job.store.retry import POLL_SECONDS, Retry, T, UnknownHostError, answer, in_thread

# It logs many lines about an error that this program reports in one.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

_SILENCES_PER_READ = 8
"""Times of silence per read: some file systems report no progress of a block that they read ahead."""
_EXTRAS = dict.fromkeys((*WEB, "hf"), "web")
_SIGN_IN = {"hf": "sign in with `hf auth login`"} | dict.fromkeys(WEB, "download it where you are signed in")
_VERSIONS = ("ETag", "etag", "Last-Modified", "generation", "blob_id", "sha", "mtime", "last_modified", "modified")
"""Names under which file systems give a file's version."""
_UNKNOWN_HOST = re.compile("not known|not resolve|name resolution|no address associated", re.IGNORECASE)
_HUB_DATASET = re.compile(r"datasets/[^/]+/[^/]")
_MOST_FOLDERS_DEEP = 64
_FINAL = {"TypeError", "AttributeError", "NotImplementedError", "IsADirectoryError", "ValueError", "TooManyRedirects"}
_FINAL |= {"HFValidationError", "HfUriError", "UnsupportedProtocol"}
_FINAL |= {"InvalidURL", "InvalidUrlRedirectClientError", "NonHttpUrlRedirectClientError"}
"""Types of errors that another attempt would raise again."""


class About(NamedTuple):
    """A file's size in bytes, None if it is unknown, and strings that change with its content."""

    size_bytes: int | None
    version: tuple[str, ...]


class SourceStore(Store):
    """Files below the folder that a URL names. No message contains the URL's query, which may be a signature."""

    def __init__(self, uri: str, retry: Retry) -> None:
        """Finds the file system of the scheme, without any request.

        Raises:
            BadRequestError: an unknown scheme, a missing package, or a URL that `check_source` refuses.
        """
        check_source(uri)
        scheme, _, rest = uri.partition("://")
        scheme = scheme.lower()
        self._url, query = split_query(f"{scheme}://{rest}")
        super().__init__(self._url if self._url.endswith("://") else self._url.rstrip("/"), retry)
        try:
            self._kind = kind = get_filesystem_class(scheme)
        except (ImportError, ValueError, AttributeError) as error:
            raise _not_installed(scheme, error) from None
        self._options = _options(scheme, retry.silence_seconds)
        # A server never gets the fragment.
        self._query, self._is_web, self._is_hub = query.partition("#")[0], "https" in kind.protocol, scheme == "hf"
        self.report: Callable[[int], object] = lambda received_bytes: None
        """Called with the progress of each file that is read whole."""
        # The root of an SSH server is `/`.
        root: str = kind._strip_protocol(self._url) or ("/" if scheme in ("sftp", "ssh") else "")
        self._is_fixed = self._is_hub and _HUB_DATASET.match(root) is not None
        """Whether no file can change, because all of them are those of one commit."""
        # The stores of sub-folders share them, and the first call after a failure makes a new file system.
        self._shared = SimpleNamespace(fs=None, root=root)
        # fsspec lets threads share these alone: of two threads that use SSH, one would wait without end.
        self._turns = threading.Semaphore(CONNECTIONS if kind.async_impl or self._is_hub else 1)
        if "?" in self._url and "?" not in self._path(""):
            raise BadRequestError(f"{self._url}: a folder with a ? in its name cannot be read: rename it")

    def about(self, key: str) -> About:
        """Returns a file's current size and version.

        Raises:
            ObjectMissingError: the file is missing, or a folder.
        """
        return self._attempt(self._about, key, True)

    def _opened(self) -> Any:
        """Returns the file system; to make it, some kinds connect to the server."""
        if self._shared.fs is None:
            try:
                fs = self._kind(**self._kind._get_kwargs_from_urls(self._url) | self._options)
            except (ValueError, AttributeError) as error:
                # Its text may repeat a secret.
                said = f"cannot be opened ({type(error).__name__}): check the URL, and fsspec's configuration"
                raise BadRequestError(f"{self.uri} {said}") from None
            if self._is_fixed:
                from huggingface_hub import HfApi

                found, api = fs.resolve_path(self._shared.root), HfApi(endpoint=fs.endpoint, token=fs.token)
                commit = api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
                self._shared.root = type(found)(found.repo_type, found.repo_id, commit, found.path_in_repo).unresolve()
            self._shared.fs = fs
        return self._shared.fs

    def _path(self, key: str) -> str:
        """Returns the file system's name of a file; in a whole URL some would read part of the name as a query."""
        root = self._shared.root
        start = root if root[-1:] in ("", "/") else f"{root}/"
        return (f"{start}{self._prefix}{key}".rstrip("/") or root) + self._query

    def _ask(self, where: str, work: Callable[[Any], T]) -> T:
        """Returns `work` of the file system, and translates its errors."""
        while not self._turns.acquire(timeout=POLL_SECONDS):
            self.retry.is_under_way(where)
        due = time.monotonic() + (_SILENCES_PER_READ - 1) * self.retry.silence_seconds
        try:
            return answer(in_thread(lambda: work(self._opened())), self.retry, where, lambda: due)
        except JobError:
            raise
        except Exception as error:
            meaning = _meaning(error, where)
            if isinstance(meaning, BucketAwayError):
                self._shared.fs = None
            raise meaning from error
        finally:
            self._turns.release()

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
        where, is_web = self.uri_of(key), self._is_web
        (size_bytes, version), received_bytes = self._about(key), 0
        # On the web, block size 0 opens a stream; a size saves the request for it.
        how = {"block_size": 0, "size": 1} if is_web else {"block_size": RANGE_BYTES, "cache_type": "readahead"}
        file = self._ask(where, lambda fs: fs.open(self._path(key), "rb", **how))
        # A whole answer is final; an empty one may be an outage.
        is_final = is_web and "Content-Length" in file.r.headers
        while block := self._ask(where, lambda _: bytes(file.read(COPY_BYTES))):
            consume(block)
            received_bytes += len(block)
            self.retry.is_under_way(where)
            self.report(received_bytes)
            if size_bytes is not None and received_bytes > size_bytes:
                is_final = True
                break
        self._ask(where, lambda _: file.close())
        if size_bytes not in (None, received_bytes):
            said = f"{where} sends {received_bytes:,} of {size_bytes:,} bytes"
            raise BadDataError(f"{said}: download it") if is_final and received_bytes else BucketAwayError(said)
        # A smaller file arrives in one request, and the hub limits the requests per hour.
        if received_bytes > RANGE_BYTES:
            self._check_same(key, About(size_bytes, version))
        return repr(version)

    def _check_same(self, key: str, about: About) -> None:
        if not self._is_fixed and self._about(key, anew=True) != about:
            raise BadDataError(f"{self.uri_of(key)} has changed during the read: begin again")

    def _open(self, key: str) -> BinaryIO:
        about = self._about(key)
        if about.size_bytes is None:
            raise BadDataError(f"the server does not give the size of {self.uri_of(key)}: download it")
        return cast(BinaryIO, Ranges(partial(self._attempt, self._part, key, about), about.size_bytes))

    def _part(self, key: str, about: About, start: int, stop: int) -> bytes:
        def part_of(fs: Any) -> bytes:
            # The end is known: bytes behind it would be for nothing.
            how = {"block_size": RANGE_BYTES, "cache_type": "none", "size": about.size_bytes}
            with fs.open(self._path(key), "rb", **how) as file:
                file.seek(start)
                return bytes(file.read(stop - start))

        part = self._ask(self.uri_of(key), part_of)
        self._check_same(key, about)
        if len(part) != stop - start:
            raise BucketAwayError(f"{self.uri_of(key)} sends {len(part):,} of {stop - start:,} bytes")
        return part

    def _list(self, prefix: str) -> Sequence[Entry]:
        if self._query:
            remedy = "check address and signature; a folder with a query cannot be listed"
            raise ObjectMissingError(f"there is nothing at {self.uri}: {remedy}")
        entries, folders = list[Entry](), [prefix]
        # `fs.find` would leave out a sub-folder that cannot be read.
        for folder in folders:
            if folder.count("/") > _MOST_FOLDERS_DEEP:
                raise BadDataError(f"{self._uri(prefix)} has more than {_MOST_FOLDERS_DEEP} levels: name a sub-folder")
            for key, found in self._listed(folder):
                if found["type"] == "directory":
                    folders.append(f"{key}/")
                    continue
                linked = found if found["type"] == "file" else self._info(key)
                if linked["type"] == "directory":
                    raise BadDataError(f"{self.uri_of(key)} is a link to a folder: put a copy in its place")
                entries.append(Entry(key, int(linked.get("size") or 0)))
        return entries

    def _listed(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        """Lists the keys and properties of a folder's files and folders; nothing for a missing folder."""

        def ask(fs: Any) -> list[dict[str, Any]]:
            path = self._path(folder)
            fs.invalidate_cache()
            # The hub limits the requests per hour, but lists all files below a folder in one.
            return [*fs.find(path, detail=True).values()] if self._is_hub else fs.ls(path, detail=True)

        try:
            found = self._ask(self._uri(folder), ask)
        except ObjectMissingError:
            return []
        start = f"{self._path('').rstrip('/')}/" if self._path("") else ""
        # The links of a page may lead outside the folder, and some servers begin them with a dot.
        names = [(each["name"].replace("/./", "/"), each) for each in found]
        keys = [(name[len(start) :].strip("/"), each) for name, each in names if name.startswith(start)]
        return [(key, each) for key, each in keys if key and key.startswith(folder)]

    def _refused(self, *_: object) -> NoReturn:
        raise BadRequestError(f"{self.uri} can only be read: write to a folder, {URIS}")

    _folders = _write = _delete = cast(Any, _refused)


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
        own["headers"] = {**configured.get("headers", {}), "Accept-Encoding": "identity"}
    return own


def _meaning(error: Exception, uri: str) -> JobError:
    # fsspec raises a FileNotFoundError for any failure of HTTP, with the failure as its cause.
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, JobError):
        return error
    # pyarrow finds Java's library for HDFS no earlier.
    if isinstance(error, ImportError) or "load lib" in str(error):
        return _not_installed(uri.partition("://")[0], error)
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    # The query of a URL may be a signature, also that of a redirect.
    reason = one_line(re.sub(r"[?#][^\s'\")]+", "", str(error))) or type(error).__name__
    is_refused = isinstance(error, PermissionError) or "Authentication" in type(error).__name__
    if status in (401, 403) or is_refused or reason.startswith("No authentication"):
        how = _SIGN_IN.get(uri.partition("://")[0], "its user and key go into fsspec's configuration")
        return NoPermissionError(f"{uri} may not be read ({reason}): {how}")
    if status in (404, 410) or isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ObjectMissingError(f"there is nothing at {uri}: check the address")
    if type(error).__name__ in _FINAL:
        said = f"{type(error).__name__}: {reason}"
        return BadRequestError(f"{uri} cannot be read ({said}): check the URL, and fsspec's configuration")
    if status == 416:
        return BadDataError(f"{uri} ends before the size that the server gives: download it")
    if _UNKNOWN_HOST.search(reason):
        return UnknownHostError(f"{uri}: the name of its host is not known ({reason}): check address and network")
    # Any other failure may be temporary.
    return BucketAwayError(f"{uri} does not answer: {reason}")


async def _check_redirect(_: object, __: object, sent: Any) -> None:
    headers = sent.response.headers
    target = urljoin(str(sent.url), headers.get("Location") or headers.get("URI") or "")
    if not target.lower().startswith(WEB) or not is_safe(target):
        shown = f"{sent.url.with_query(None)} leads to {redacted(target):.100}"
        raise BadRequestError(f"{shown}, which is not https://: download it")


def _not_installed(scheme: str, error: Exception) -> BadRequestError:
    """Returns the error of an unknown scheme, or of a missing package."""
    how = how_to_install(_EXTRAS[scheme]) if scheme in _EXTRAS else "check the scheme, and install its package"
    return BadRequestError(f"{scheme}:// needs more than is installed ({one_line(str(error))}): {how}")
