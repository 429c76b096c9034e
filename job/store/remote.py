"""The common part of gs://, s3:// and az://: content that comes in pieces, with a checksum, and errors of HTTP."""

from __future__ import annotations

import abc
import base64
import mimetypes
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial, wraps
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import google_crc32c
from fsspec.spec import AbstractBufferedFile

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.stop import beat
from job.store.base import Entry, ObjectMissingError, Store
from job.store.calls import T, answer
from job.store.files import COPY_BYTES
from job.store.retry import Retry

CONNECTIONS = 64
PIECE_BYTES = 4 << 20
"""Of an object are asked for at a time: longer on the way than the question, on most networks."""
_PIECES_AHEAD = 6
READ_AHEAD_BYTES = PIECE_BYTES
_REASON_CHARACTERS = 200


Page = tuple[Iterable[tuple[str, int]], Iterable[str]]
"""A page of a listing: whole names and sizes of objects, and names of folders."""


class Piece(NamedTuple):
    """Some bytes of an object, and what the bucket says of the whole: size, version and, if it knows it, crc32c."""

    blocks: Sequence[bytes]
    size_bytes: int
    version: str
    crc32c: str


class RemoteStore(Store):
    """A bucket behind HTTP. A backend sends the requests, knows its client's errors and says what mends them."""

    _cloud: str
    _login_by: str
    _roles: str
    """Somebody without permission needs these; `{uri}` is the bucket's."""
    _make: str
    """The command that makes the bucket `{name}`."""

    def __init__(self, scheme: str, name: str, retry: Retry) -> None:
        super().__init__(f"{scheme}://{name}", retry)
        self._bucket_uri = self.uri
        self._roles, self._make = (text.format(uri=self.uri, name=name) for text in (self._roles, self._make))

    @abc.abstractmethod
    def _get(self, key: str, start: int, stop: int | None, version: str = "") -> Future[Piece]:
        """Begins to read the bytes from `start` to `stop`, or to the end, of this version or of any."""

    @abc.abstractmethod
    def _status(self, error: Exception) -> int | None:
        """The number with which a server refused; None if none did."""

    @abc.abstractmethod
    def _send(self, key: str, content: Watched, over: str | None) -> str | None:
        """As `_write`."""

    @abc.abstractmethod
    def _pages(self, start: str, delimiter: str) -> Iterator[Page]:
        """Lists the names that begin so; with a delimiter, the folders up to it."""

    def _list(self, prefix: str) -> Sequence[Entry]:
        pages = self._pages(self._prefix + prefix, "")
        return [Entry(name.removeprefix(self._prefix), size_bytes) for page, _ in pages for name, size_bytes in page]

    def _folders(self, prefix: str) -> Sequence[str]:
        start = self._prefix + prefix
        folders = (folder for _, page in self._pages(start, "/") for folder in page)
        return [folder.removeprefix(start).removesuffix("/") for folder in folders]

    def _sign_in(self, *, anew: bool = False) -> bool:
        """Waits for a token if it is missing; `anew` gets another one, and returns whether it could."""
        return False

    def _attempt(self, work: Callable[..., T], key: str, *args: Any) -> T:
        @wraps(work)
        def signed_in(key: str, *args: Any) -> T:
            # In the midst of a request nothing would bound the wait, and a lease would expire meanwhile.
            self._sign_in()
            try:
                return work(key, *args)
            except Exception as error:
                if self._status(error) != 401 or not self._sign_in(anew=True):
                    raise
                return work(key, *args)

        return super()._attempt(signed_in, key, *args)

    def _in_time(self, future: Future[T]) -> T:
        """As `_answer`, of a call that does not end by itself when a server is silent."""
        began = time.monotonic()
        return self._answer(future, lambda: began)

    def _answer(self, future: Future[T], signed_at: Callable[[], float] | None = None) -> T:
        return answer(future, self.retry, self.uri, signed_at)

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        return self._send(key, Watched(content, partial(self.retry.is_under_way, self.uri_of(key))), over)

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        checksum = google_crc32c.Checksum()
        # If the disk is full, nothing more is to come.
        with closing(self._pieces(key)) as pieces:
            for piece in pieces:
                for block in piece.blocks:
                    checksum.update(block)
                    consume(block)
        if piece.crc32c and piece.crc32c != _encoded(checksum):
            raise damaged(self.uri_of(key))
        return piece.version

    def _pieces(self, key: str) -> Generator[Piece]:
        """The content in order and of one version; while a piece is used, the next ones are on their way."""
        piece = self._first(key, PIECE_BYTES)
        size_bytes, version = piece.size_bytes, piece.version
        stops = ((start, min(start + PIECE_BYTES, size_bytes)) for start in range(PIECE_BYTES, size_bytes, PIECE_BYTES))
        ahead: deque[tuple[int, int, Future[Piece]]] = deque()
        try:
            while True:
                for start, stop in islice(stops, _PIECES_AHEAD - len(ahead)):
                    ahead.append((start, stop, self._get(key, start, stop, version)))
                yield piece
                if not ahead:
                    return
                self.retry.is_under_way(self.uri_of(key))
                piece = self._whole(key, *ahead.popleft())
        finally:
            for *_, piece_ahead in ahead:
                piece_ahead.cancel()

    def _first(self, key: str, stop: int) -> Piece:
        try:
            return self._whole(key, 0, stop, self._get(key, 0, stop))
        except Exception as error:
            # HTTP has no range for what is in an empty object.
            if self._status(error) != 416:
                raise
        return self._answer(self._get(key, 0, None))

    def _open(self, key: str) -> BinaryIO:
        _, size_bytes, version, _ = self._first(key, 1)
        return cast(BinaryIO, Ranges(partial(self._attempt, self._part, key, version), size_bytes))

    def _part(self, key: str, version: str, start: int, stop: int) -> bytes:
        return b"".join(self._whole(key, start, stop, self._get(key, start, stop, version)).blocks)

    def _whole(self, key: str, start: int, stop: int, piece: Future[Piece]) -> Piece:
        found = self._answer(piece)
        if sum(map(len, found.blocks)) != min(stop, found.size_bytes) - start:
            raise damaged(self.uri_of(key))
        return found

    def _job_error(self, error: Exception, uri: str) -> JobError | None:
        # A proxy on the way may answer 200 with a page of its own, or with nothing.
        if isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):
            return self._status_error(uri, None, f"an answer that is no bucket's: {type(error).__name__}")
        return None

    def _status_error(self, uri: str, status: int | None, reason: str, permission: str = "") -> JobError:
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

    def _no_credentials(self, reason: str) -> NoPermissionError:
        return NoPermissionError(
            f"{self._bucket_uri}: no usable {self._cloud} credentials ({reason}): {self._login_by}"
        )


class Watched:
    """Content on its way up, with its size and checksum; `read_at` is when the server last took some of it."""

    def __init__(self, content: BinaryIO, report: Callable[[], None]) -> None:
        """Reads it once; `report` is called after each block but the first."""
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

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes."""
        # A transfer that gets on does not hang.
        beat()
        self.read_at = time.monotonic()
        return self._content.read(size_bytes)


class Ranges(AbstractBufferedFile):
    """A seekable file over a function that fetches the bytes from `start` to `stop`, and some more ahead."""

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._fetch_range = fetch
        super().__init__(None, "", block_size=READ_AHEAD_BYTES, size=size_bytes)


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
