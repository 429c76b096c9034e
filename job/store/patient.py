"""A store that outlasts a bucket that is away.

A store retries one operation for seconds. Work that has hours behind it waits longer: every operation is tried again
until the bucket is back, up to a limit that counts from its first failure. Who is asked to stop does not wait for a
bucket that keeps silent: operations run in threads that can be left behind.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar, cast

from job.exits import BadRequestError, BucketAwayError, StoppedError
from job.stop import Stop, beat
from job.store import open_store
from job.store.base import Blob, Entry, Store

P = ParamSpec("P")
R = TypeVar("R")

LIMIT_VARIABLE = "DDPM_AWAY_SECONDS"
LIMIT_SECONDS = 900.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.2
LAST_SECONDS = 2.0
"""How long an operation that is under way may still take once a stop was asked for."""
READ_BYTES = 1 << 20


def away_limit_seconds() -> float:
    """How long a bucket may be away: `DDPM_AWAY_SECONDS`, or a quarter of an hour.

    Raises:
        BadRequestError: the variable holds no such number.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    with suppress(ValueError):
        if not text or 0 <= float(text) < float("inf"):
            return float(text or LIMIT_SECONDS)
    raise BadRequestError(f"{LIMIT_VARIABLE}={text!r}: give the seconds that a bucket may be away, such as 900")


def open_patient(uri: str, stop: Stop, note: Callable[[str], None]) -> PatientStore:
    """Opens a store, see `open_store`, that waits for its bucket as long as the environment says.

    Args:
        uri: where the objects lie.
        stop: asked while an operation takes its time.
        note: told when the bucket goes away and when it is back; from any thread.

    Raises:
        BadRequestError: `uri` or the limit means nothing.
        NoPermissionError: no credentials for the bucket were found.
    """
    return PatientStore(open_store(uri), Outage(away_limit_seconds(), note), stop)


class Outage:
    """What is known about a bucket being away, shared by all stores in it: it is told once, not once per operation."""

    def __init__(self, limit_seconds: float, note: Callable[[str], None]) -> None:
        self.limit_seconds = limit_seconds
        self._note = note
        self._lock = threading.Lock()
        self._since: float | None = None
        self._answered_at = 0.0

    def began(self, error: BucketAwayError, asked_at: float) -> None:
        """An operation failed that was begun at this reading of the monotonic clock."""
        with self._lock:
            # Others may have had an answer meanwhile.
            first = self._since is None and asked_at > self._answered_at
            if first:
                self._since = time.monotonic()
        if first:
            self._note(f"{error}; trying again for up to {self.limit_seconds:g} s")

    def ended(self) -> None:
        """An operation succeeded."""
        with self._lock:
            since, self._since, self._answered_at = self._since, None, time.monotonic()
        if since is not None:
            self._note(f"the bucket is back after {time.monotonic() - since:.0f} s")


class PatientStore(Store):
    """`inner`, tried again while its bucket is away.

    Every method raises what `inner`'s does; `BucketAwayError` (69) only after the limit; and `StoppedError` (75) when
    `stop` says so while the bucket is away or silent.
    """

    def __init__(self, inner: Store, outage: Outage, stop: Stop) -> None:
        """`outage` has the limit and knows whom to tell; `stop` is asked by whoever waits for the bucket."""
        super().__init__(inner.uri)
        # Patience upon patience would double the limit.
        self.inner: Store = inner.inner if isinstance(inner, PatientStore) else inner
        self.outage, self._stop = outage, stop

    def insist(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Does `work`, which must bear repetition, until the bucket is there for all of it."""
        first_failure: float | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            asked_at = time.monotonic()
            try:
                result = self._attempt(partial(work, *args, **kwargs))
            except BucketAwayError as error:
                now = time.monotonic()
                first_failure = first_failure or now
                limit = self.outage.limit_seconds
                if now - first_failure >= limit:
                    if not limit:
                        raise
                    raise BucketAwayError(f"{error} (tried for {now - first_failure:.0f} s in all)") from error
                self.outage.began(error, asked_at)
                self._pause(min(pause, first_failure + limit - now), error)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.outage.ended()
                return result

    def _attempt(self, work: Callable[[], R]) -> R:
        done: Future[R] = Future()

        def attempt() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=attempt, name=f"bucket {self.uri}", daemon=True).start()
        leave_at: float | None = None
        while not wait([done], timeout=POLL_SECONDS).done:
            # In whichever thread: what waits for a bucket does not hang, and operations on one are bounded.
            beat()
            if self._stop():
                leave_at = leave_at or time.monotonic() + LAST_SECONDS
                if time.monotonic() >= leave_at:
                    raise StoppedError(f"stopped while {self.uri} did not answer; the same command goes on")
        return done.result()

    def _pause(self, seconds: float, error: BucketAwayError) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            beat()
            if self._stop():
                raise StoppedError(f"stopped while the bucket was away ({error})")
            time.sleep(min(POLL_SECONDS, left))

    def sub(self, prefix: str) -> PatientStore:
        """A store below, with the same patience."""
        return self.around(self.inner.sub(prefix))

    def around(self, store: Store) -> PatientStore:
        """Another store, with the same patience."""
        return PatientStore(store, self.outage, self._stop)

    def read(self, key: str) -> Blob:
        """As `Store.read`."""
        return self.insist(self.inner.read, key)

    def create(self, key: str, data: bytes) -> str:
        """As `Store.create`; a repetition that finds what it wrote before counts as success there."""
        return self.insist(self.inner.create, key, data)

    def replace(self, key: str, data: bytes, version: str) -> str:
        """As `Store.replace`."""
        return self.insist(self.inner.replace, key, data, version)

    def put(self, key: str, data: bytes) -> None:
        """As `Store.put`."""
        self.insist(self.inner.put, key, data)

    def upload(self, path: Path, key: str) -> None:
        """As `Store.upload`."""
        self.insist(self.inner.upload, path, key)

    def download(self, key: str, path: Path) -> None:
        """As `Store.download`."""
        self.insist(self.inner.download, key, path)

    def open(self, key: str) -> BinaryIO:
        """As `Store.open`; every read from the stream is tried again like any other operation."""
        file = self.insist(self.inner.open, key)
        return cast(BinaryIO, io.BufferedReader(_PatientFile(file, self.insist), READ_BYTES))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As `Store.list`, but whole before the first entry: a listing cannot be taken up again in the middle."""
        return iter(self.insist(lambda: [*self.inner.list(prefix)]))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """As `Store.folders`."""
        return self.insist(self.inner.folders, prefix)

    def delete(self, key: str) -> None:
        """As `Store.delete`."""
        self.insist(self.inner.delete, key)

    def exists(self, key: str) -> bool:
        """As `Store.exists`."""
        return self.insist(self.inner.exists, key)

    def sweep(self) -> None:
        """As `Store.sweep`."""
        self.insist(self.inner.sweep)


class _PatientFile(io.RawIOBase):
    """A seekable file over another, each read of which begins at a position of its own and can be repeated."""

    def __init__(self, file: BinaryIO, insist: Callable[..., Any]) -> None:
        self._file, self._insist = file, insist
        self._position = 0

    @property
    def name(self) -> str:
        """Where the file lies, if it is one on this machine."""
        return self._file.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._insist(self._read_at, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read_at(self, position: int, size_bytes: int) -> bytes:
        self._file.seek(position)
        return self._file.read(size_bytes)
