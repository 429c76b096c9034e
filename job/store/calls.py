"""Waits for calls of libraries that end at a stop, and when the server falls silent.

In the calling thread neither would end a request before the server answers.
"""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from job.store.retry import Retry

T = TypeVar("T")

POLL_SECONDS = 0.1
LAST_SECONDS = 0.5
"""Time that a call has after a stop: enough to write a record or to give back a lease."""


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
