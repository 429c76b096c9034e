"""The common part of gs://, s3:// and az://: downloads by ranges with a checksum, and the errors of HTTP."""

from __future__ import annotations

import abc
import base64
import io
import mimetypes
import mmap
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial, wraps
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import google_crc32c
from fsspec.spec import AbstractBufferedFile

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.stop import beat
from job.store.base import ObjectMissingError, Store
from job.store.files import COPY_BYTES
from job.store.retry import Retry, T, UnknownHostError, answer

CONNECTIONS = 64
RANGE_BYTES = 4 << 20
"""Size of one ranged read: on most networks its transfer takes longer than its request."""
_RANGES_AHEAD = 6
_REASON_CHARACTERS = 200
_UNKNOWN_HOST = re.compile("not known|not resolve")
"""Part of what name servers say of a name that does not exist."""


class Fetched(NamedTuple):
    """`got_bytes` of an object, and the size, version and, if the bucket knows it, crc32c of the whole."""

    blocks: Iterable[bytes]
    """They can be read once."""
    got_bytes: int
    size_bytes: int
    version: str
    crc32c: str


class RemoteStore(Store):
    """A bucket behind HTTP. A backend sends the requests and translates its client's errors."""

    _cloud: str
    _login_by: str
    _roles: str
    """The roles that grant all permissions; `{uri}` is the bucket's."""
    _make: str
    """The command that creates the bucket `{name}`."""

    def __init__(self, scheme: str, name: str, retry: Retry) -> None:
        super().__init__(f"{scheme}://{name}", retry)
        self._bucket_uri = self.uri
        self._roles, self._make = (text.format(uri=self.uri, name=name) for text in (self._roles, self._make))

    @abc.abstractmethod
    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Fetched]:
        """Starts to read the bytes from `start` to `stop`, or to the end, of this version or of any."""

    @abc.abstractmethod
    def _status(self, error: Exception) -> int | None:
        """Returns the HTTP status of a refusal; None for other errors."""

    @abc.abstractmethod
    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        """Does what `_write` does."""

    def _sign_in(self, *, anew: bool = False) -> bool:
        """Waits for a missing token; `anew` gets a new one. Returns whether that is possible."""
        return False

    def _attempt(self, work: Callable[..., T], key: str, *args: Any) -> T:
        @wraps(work)
        def signed_in(key: str, *args: Any) -> T:
            # During a request nothing would limit the wait, and a lease would expire.
            self._sign_in()
            try:
                return work(key, *args)
            except Exception as error:
                if self._status(error) != 401 or not self._sign_in(anew=True):
                    raise
                return work(key, *args)

        return super()._attempt(signed_in, key, *args)

    def _in_time(self, future: Future[T]) -> T:
        """Waits for a call that does not end by itself when the server is silent, and returns its result."""
        began = time.monotonic()
        return self._answer(future, lambda: began)

    def _answer(self, future: Future[T], active_at: Callable[[], float] | None = None) -> T:
        return answer(future, self.retry, self.uri, active_at)

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        return self._send(key, Watched(content, partial(self.retry.is_under_way, self.uri_of(key))), over)

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        checksum = google_crc32c.Checksum()
        # A full disk cancels the ranges ahead.
        with closing(self._ranges(key)) as ranges:
            for fetched in ranges:
                for block in fetched.blocks:
                    checksum.update(block)
                    consume(block)
        if fetched.crc32c and fetched.crc32c != _encoded(checksum):
            raise damaged(self.uri_of(key))
        return fetched.version

    def _ranges(self, key: str) -> Generator[Fetched]:
        """Yields the content of one version in order, and reads some ranges ahead."""
        fetched = self._first(key, RANGE_BYTES)
        size_bytes, version = fetched.size_bytes, fetched.version
        stops = ((start, min(start + RANGE_BYTES, size_bytes)) for start in range(RANGE_BYTES, size_bytes, RANGE_BYTES))
        ahead: deque[tuple[int, int, Future[Fetched]]] = deque()
        try:
            while True:
                for start, stop in islice(stops, _RANGES_AHEAD - len(ahead)):
                    ahead.append((start, stop, self._get(key, start, stop, version)))
                yield fetched
                if not ahead:
                    return
                self.retry.is_under_way(self.uri_of(key))
                fetched = self._whole(key, *ahead.popleft())
        finally:
            for *_, coming in ahead:
                coming.cancel()

    def _first(self, key: str, stop: int) -> Fetched:
        try:
            return self._whole(key, 0, stop, self._get(key, 0, stop))
        except Exception as error:
            # An empty object has no valid range.
            if self._status(error) != 416:
                raise
        return self._answer(self._get(key, 0, None))

    def _open(self, key: str) -> BinaryIO:
        # Azurite's answer to a request for one byte of an empty object has no valid range.
        first = self._first(key, 2)
        return cast(BinaryIO, Ranges(partial(self._attempt, self._range, key, first.version), first.size_bytes))

    def _range(self, key: str, version: str, start: int, stop: int) -> bytes:
        return b"".join(self._whole(key, start, stop, self._get(key, start, stop, version)).blocks)

    def _whole(self, key: str, start: int, stop: int, coming: Future[Fetched]) -> Fetched:
        found = self._answer(coming)
        if found.got_bytes != min(stop, found.size_bytes) - start:
            raise damaged(self.uri_of(key))
        return found

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        if isinstance(error, TimeoutError):
            return self._status_error(uri, None, cause(error))
        # A proxy may answer 200 with its own page, or without content.
        if isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):
            return self._status_error(uri, None, f"the answer is not a bucket's: {type(error).__name__}")
        return None

    def _status_error(self, uri: str, status: int | None, reason: str, permission: str = "") -> JobError:
        """Returns the meaning of an HTTP status; None means no answer. `permission` is the missing one, if known."""
        if status == 404:
            return ObjectMissingError(f"no object at {uri}")
        if status in (401, 403):
            missing = f"no permission {permission}".rstrip()
            return NoPermissionError(f"{uri}: {missing} ({reason}): grant the account in use {self._roles}")
        if status in (None, 408, 429, 500, 502, 503, 504):
            kind = UnknownHostError if status is None and _UNKNOWN_HOST.search(reason) else BucketAwayError
            return kind(f"{uri}: the bucket is away ({reason}): check the network")
        return BadRequestError(f"{uri}: the bucket refused with {status}: {reason}")

    def _no_bucket(self) -> MissingInputError:
        return MissingInputError(f"no bucket {self._bucket_uri}: check the name, or make it with `{self._make}`")

    def _no_credentials(self, why: str) -> NoPermissionError:
        return NoPermissionError(f"{self._bucket_uri}: no usable {self._cloud} credentials ({why}): {self._login_by}")


class Watched:
    """The content of an upload, with its size and checksum; `read_at` is the time of the last read."""

    def __init__(self, content: BinaryIO, report: Callable[[], None]) -> None:
        """Reads the content once for its checksum; calls `report` after each block but the first."""
        self._content, self.size_bytes = content, 0
        self.seek, self.tell = content.seek, content.tell
        checksum = google_crc32c.Checksum()
        for block in checksum.consume(content, COPY_BYTES):
            if self.size_bytes:
                report()
            self.size_bytes += len(block)
        self.crc32c = _encoded(checksum)
        self.seek(0)
        self.read_at = time.monotonic()

    def whole(self) -> bytes | memoryview:
        """Returns the content; that of a file is not copied into memory."""
        if isinstance(self._content, io.BytesIO) or not self.size_bytes:
            return self._content.read()
        return memoryview(mmap.mmap(self._content.fileno(), 0, prot=mmap.PROT_READ))

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes."""
        # A transfer that makes progress does not hang.
        beat()
        self.read_at = time.monotonic()
        return self._content.read(size_bytes)


class Ranges(AbstractBufferedFile):
    """A seekable file over a function that fetches the bytes from `start` to `stop`, and some more ahead."""

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        """Takes the function, which threads call: one connection does not fill a network."""
        self._fetch = fetch
        super().__init__(None, "", block_size=RANGE_BYTES, size=size_bytes)

    def read_ahead(self, size_bytes: int) -> None:
        """Sets how many bytes each later request fetches behind those that are read."""
        self.cache.blocksize = size_bytes

    def _fetch_range(self, start: int, stop: int) -> bytes:
        starts = range(start, stop, 2 * RANGE_BYTES)
        if len(starts) < 2:
            return self._fetch(start, stop)
        with ThreadPoolExecutor(_RANGES_AHEAD) as pool:
            return b"".join(pool.map(lambda start: self._fetch(start, min(start + 2 * RANGE_BYTES, stop)), starts))


def damaged(uri: str) -> BucketAwayError:
    """Returns the error that the received bytes are not those that were sent."""
    return BucketAwayError(f"{uri}: the bytes were damaged in transit (crc32c differs): check the network")


def cause(error: BaseException) -> str:
    """Returns the innermost reason of an error, such as `Connection refused`: the outer ones print a whole URL."""
    while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return "timed out" if isinstance(error, TimeoutError) else one_line(str(error) or type(error).__name__)


def one_line(text: str) -> str:
    """Returns a server's text, short enough for a line of a log."""
    text = " ".join(text.split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}…"


def content_type(key: str) -> str:
    """Returns the media type by which a browser shows a report or a picture from the bucket."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def _encoded(checksum: google_crc32c.Checksum) -> str:
    """Returns the checksum in the encoding of Google's and Amazon's API."""
    return base64.b64encode(checksum.digest()).decode()
