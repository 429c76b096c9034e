"""What gs:// and s3:// have in common: content that comes as a stream, with a checksum, and errors of HTTP."""

from __future__ import annotations

import abc
import base64
import io
import mimetypes
import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

import google_crc32c

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.store.base import ObjectMissingError, Store
from job.store.files import COPY_BYTES

CONNECTIONS = 64
_READ_AHEAD_BYTES = 8 << 20
_REASON_CHARACTERS = 200


class ByteRange(NamedTuple):
    """The bytes of one version of an object from `start` to `stop`."""

    version: str
    start: int
    stop: int

    @property
    def header(self) -> str:
        """As HTTP writes it."""
        return f"bytes={self.start}-{self.stop - 1}"


class RemoteStore(Store):
    """A bucket behind HTTP. A backend sends the requests, knows its client's errors and says what mends them."""

    _bucket_uri: str
    _roles: str
    """What somebody without permission needs."""
    _make: str
    """The command that makes the bucket."""

    @abc.abstractmethod
    def _head(self, key: str) -> tuple[int, str]:
        """Size in bytes, and version."""

    @abc.abstractmethod
    def _fetch(self, key: str, consume: Callable[[bytes], object], part: ByteRange | None = None) -> str:
        """Streams the content, or a part of it, to `consume`; returns the version.

        Raises:
            BucketAwayError: less arrived, or, of the whole content, something else than its checksum says.
        """

    @abc.abstractmethod
    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        """As `_write`."""

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        return self._send(key, Watched(content, partial(self.retry.is_under_way, self.uri_of(key))), over)

    def _open(self, key: str) -> BinaryIO:
        size_bytes, version = self._head(key)
        ranges = _Ranges(partial(self._attempt, self._part, key, version), size_bytes)
        return cast(BinaryIO, io.BufferedReader(ranges, _READ_AHEAD_BYTES))

    def _part(self, key: str, version: str, start: int, stop: int) -> bytes:
        content = io.BytesIO()
        self._fetch(key, content.write, ByteRange(version, start, stop))
        return content.getvalue()

    def _consume(self, key: str, read: Callable[[int], bytes], consume: Callable[[bytes], object]) -> tuple[int, str]:
        """Takes blocks from `read` until there are no more; returns how many bytes they were, and their crc32c."""
        checksum, size_bytes = google_crc32c.Checksum(), 0
        while block := read(COPY_BYTES):
            # What fits into a block is read to the end.
            if size_bytes:
                self.retry.is_under_way(self.uri_of(key))
            size_bytes += len(block)
            checksum.update(block)
            consume(block)
        return size_bytes, _encoded(checksum)

    def _told(self, error: Exception, uri: str) -> JobError | None:
        # A proxy on the way may answer 200 with a page of its own, or with nothing.
        if isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):
            return self._told_by_status(uri, None, f"an answer that is no bucket's: {type(error).__name__}")
        return None

    def _told_by_status(self, uri: str, status: int | None, reason: str, permission: str = "") -> JobError:
        """What an answer means, or that there was none; `permission` is the one that is lacking, if that is known."""
        if status == 404:
            return ObjectMissingError(f"no object at {uri}")
        if status in (401, 403):
            lacking = f"no permission {permission}".rstrip()
            return NoPermissionError(f"{uri}: {lacking} ({reason}): grant the account in use {self._roles}")
        if status in (None, 408, 429, 500, 502, 503, 504):
            return BucketAwayError(f"{uri}: the bucket is away ({reason}): check the network")
        return BadRequestError(f"{uri}: the bucket refused with {status}: {reason}")

    def _no_bucket(self) -> MissingInputError:
        return MissingInputError(f"no bucket {self._bucket_uri}: check the name, or make it with `{self._make}`")


class Watched:
    """Content on its way up, with its size and checksum; `report` is called at each read but those of the first block.

    So what fits into a block is sent to the end, as it is read to the end.
    """

    def __init__(self, content: BinaryIO, report: Callable[[], None]) -> None:
        self._content, self._report = content, report
        self.seek, self.tell = content.seek, content.tell
        checksum = google_crc32c.Checksum()
        self.size_bytes = sum(map(len, checksum.consume(content, COPY_BYTES)))
        self.crc32c = _encoded(checksum)
        self.seek(0)

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes."""
        if self.tell() >= COPY_BYTES:
            self._report()
        return self._content.read(size_bytes)


class _Ranges(io.RawIOBase):
    """A seekable file over a function that fetches the bytes from `start` to `stop`."""

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._fetch, self._size_bytes = fetch, size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # What it inherits would send a request for every 8 KiB.
        return self._next(self._size_bytes)

    def _next(self, size_bytes: int) -> bytes:
        stop = min(self._position + size_bytes, self._size_bytes)
        data = self._fetch(self._position, stop) if stop > self._position else b""
        self._position += len(data)
        return data


def damaged(uri: str) -> BucketAwayError:
    """The bytes that arrived are not the ones that were sent."""
    return BucketAwayError(f"{uri}: the bytes were damaged on the way (crc32c differs): check the network")


def cause(error: BaseException) -> str:
    """Why there is no answer: `Connection refused`, not a nest of classes that print a whole URL."""
    while not isinstance(error, TimeoutError) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return "timed out" if isinstance(error, TimeoutError) else one_line(str(error) or type(error).__name__)


def one_line(text: str) -> str:
    """The words of a server, short enough for a line of a log."""
    text = " ".join(text.split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}…"


def content_type(key: str) -> str:
    """What a browser needs to show a report or a picture that somebody clicks on in the bucket."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def _encoded(checksum: google_crc32c.Checksum) -> str:
    """The checksum as both buckets write it."""
    return base64.b64encode(checksum.digest()).decode()
