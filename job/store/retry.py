"""Repeats operations while a bucket is away, for a limited time, and reports each outage once.

It also waits for calls of libraries. The wait ends at a stop, and when the server falls silent: in the calling thread
neither would end a request before the server answers.
"""

from __future__ import annotations

import _thread
import copy
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Self, TypeVar

from job.exits import BucketAwayError, StoppedError
from job.stop import NEVER, Stop, beat, seconds_of

T = TypeVar("T")

PATIENCE_SECONDS = 15.0
"""How long an operation is repeated by default while the bucket is away: less than a lease lasts."""
AWAY_VARIABLE = "DDPM_AWAY_SECONDS"
AWAY_SECONDS = 900.0
SILENCE_SECONDS = 7.5
"""An attempt fails after this time without an answer: half the limit, which leaves time for a second attempt."""
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.1
LAST_SECONDS = 0.5
"""Time that a call has after a stop: enough to write a record or to give back a lease."""

_is_within_work = ContextVar("is_within_work", default=False)
"""Whether this thread is inside work that is repeated as a whole."""


def away_limit_seconds() -> float:
    """Returns how long a bucket may be away from a run: `DDPM_AWAY_SECONDS`, or a quarter of an hour."""
    return seconds_of(AWAY_VARIABLE, AWAY_SECONDS, "that a bucket may be away")


class UnknownHostError(BucketAwayError):
    """No name server knows the host of a URL, or none answers."""


class Retry:
    """Repeats work while the bucket is away. All stores of a bucket share one, which reports an outage once.

    An attempt ends soon after the server falls silent; a stop ends the pause between two attempts. Inside work that is
    repeated as a whole, the operations of a store fail at the first error.
    """

    def __init__(
        self, limit_seconds: float = PATIENCE_SECONDS, stop: Stop = NEVER, note: Callable[[str], None] = lambda _: None
    ) -> None:
        """Begins without an outage.

        Args:
            limit_seconds: how long the bucket may be away.
            stop: ends the wait for a bucket that is away.
            note: gets a line at the beginning and at the end of an outage; from any thread.
        """
        self.limit_seconds, self.stop = limit_seconds, stop
        self._outage = _Outage(note)

    def within(self, seconds: float, stop: Stop = NEVER) -> Self:
        """Returns a `Retry` of the same bucket that gives up after `seconds`, or at `stop`."""
        other = copy.copy(self)
        other.limit_seconds, other.stop = seconds, stop
        return other

    def elsewhere(self) -> Retry:
        """Returns a `Retry` with the same limit for another bucket, or for a source."""
        return Retry(self.limit_seconds, self.stop, self._outage.note)

    @property
    def outages(self) -> int:
        """How many outages of the bucket have ended."""
        return self._outage.ended_count

    @property
    def silence_seconds(self) -> float:
        """How long an attempt waits while the server is silent."""
        return min(SILENCE_SECONDS, self.limit_seconds / 2) or SILENCE_SECONDS

    def is_under_way(self, uri: str) -> None:
        """Reports progress of a transfer, which does not hang as long as blocks arrive, and ends it at a stop.

        Raises:
            StoppedError: this process has to stop.
        """
        beat()
        self.stop.check(f"while {uri} was transferred")

    def __call__(self, work: Callable[..., T], *args: object) -> T:
        """Does `work`, which can be repeated, until it succeeds, and returns its result.

        If the bucket has never answered and no name server knows its host, the limit is `PATIENCE_SECONDS` at most.

        Raises:
            BucketAwayError: the bucket was away for longer than the limit.
            StoppedError: a stop came while the bucket was away.
        """
        if _is_within_work.get():
            return work(*args)
        away_since, pause_seconds = float("inf"), FIRST_PAUSE_SECONDS
        while True:
            asked_at, outside = time.monotonic(), _is_within_work.set(True)
            try:
                result = work(*args)
            except BucketAwayError as error:
                now = time.monotonic()
                # The silence before a failure counts, but not the successful part of the attempt.
                away_since = min(away_since, max(asked_at, now - self.silence_seconds))
                limit_seconds = self.limit_seconds
                # An unknown host is misspelt, unless it has answered before.
                if isinstance(error, UnknownHostError) and not self._outage.answered_at:
                    limit_seconds = min(limit_seconds, PATIENCE_SECONDS)
                left_seconds = away_since + limit_seconds - now
                if left_seconds > 0 and not self.stop():
                    self._outage.began(error, asked_at, limit_seconds)
                # The random factor spreads the requests of many processes that have lost the same bucket.
                if self.stop.sleep(min(pause_seconds * random.uniform(0.5, 1), left_seconds)):  # noqa: S311
                    raise StoppedError(f"stopped while the bucket was away ({error})") from error
                if left_seconds <= 0:
                    raise BucketAwayError(
                        f"{error} (tried for {now - away_since:.0f} s in all); the same command goes on from here"
                    ) from error
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            else:
                self._outage.ended()
                return result
            finally:
                _is_within_work.reset(outside)


def in_thread(work: Callable[..., T], *args: Any, **named: Any) -> Future[T]:
    """Starts `work` in a new thread, for which the end of the process does not wait. It cannot be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work(*args, **named)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    # `threading.Thread.start` waits until the thread runs.
    _thread.start_new_thread(run, ())
    return future


def answer(future: Future[T], retry: Retry, where: str, active_at: Callable[[], float] | None = None) -> T:
    """Waits for a call and returns its result; cancels the call when the wait ends earlier.

    Args:
        future: of `in_thread`, or of a coroutine.
        retry: its stop and its `silence_seconds` end the wait.
        where: the URI that the error of a stop names.
        active_at: returns the time of the server's last activity, by the monotonic clock. Without it the call must end
            by itself when the server falls silent.

    Raises:
        StoppedError: this process has to stop, and `LAST_SECONDS` have passed since.
        TimeoutError: the server was silent for longer than `retry.silence_seconds`.
    """
    stopped_at = float("inf")
    try:
        while True:
            try:
                return future.result(POLL_SECONDS)
            except TimeoutError:
                # The error may be the call's, or the call may just have ended.
                if future.done():
                    return future.result()
            now = time.monotonic()
            if retry.stop():
                stopped_at = min(stopped_at, now)
                if now - stopped_at >= LAST_SECONDS:
                    retry.stop.check(f"while waiting for {where}")
            if active_at and now - active_at() > retry.silence_seconds:
                raise TimeoutError
    finally:
        future.cancel()


class _Outage:
    """The state of a bucket's current outage, if any."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._lock = threading.Lock()
        self._since: float | None = None
        self.answered_at = 0.0
        """Reading of the monotonic clock at the latest answer; 0 before the first one."""
        self.ended_count = 0

    def began(self, error: BucketAwayError, asked_at: float, limit_seconds: float) -> None:
        """Records the failure of an attempt that began at this reading of the monotonic clock."""
        with self._lock:
            # Another thread may have had an answer meanwhile.
            is_news = self._since is None and asked_at > self.answered_at
            if is_news:
                self._since = time.monotonic()
        if is_news:
            self.note(f"{error}; trying again for up to {limit_seconds:g} s")

    def ended(self) -> None:
        """Records the success of an attempt."""
        with self._lock:
            since, self._since, self.answered_at = self._since, None, time.monotonic()
            self.ended_count += since is not None
        if since is not None:
            self.note(f"the bucket is back after {time.monotonic() - since:.0f} s")
