"""Waiting for threads and event loops, such that a stop and silence end the wait.

`fsspec.asyn.sync` and a request in the calling thread hear of neither until the server answers.
"""

from __future__ import annotations

import _thread
import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from job.store.retry import Retry

T = TypeVar("T")

POLL_SECONDS = 0.1
LAST_SECONDS = 0.5
"""A call has so long once a stop is heard: enough to write a record or to give back a lease."""


def on_loop(loop: asyncio.AbstractEventLoop, asked: Awaitable[T]) -> Future[T]:
    """Begins a call to an fsspec file system on its event loop, which serves all threads. It can be cancelled."""

    async def call() -> T:
        # asyncio would complain of a call that fails when its waiter has left.
        cast(asyncio.Task[T], asyncio.current_task()).add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )
        return await asked

    return asyncio.run_coroutine_threadsafe(call(), loop)


def in_thread(work: Callable[..., T], *args: Any, **named: Any) -> Future[T]:
    """Begins `work` in a thread of its own, for which the end of the process does not wait. It cannot be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work(*args, **named)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    # As a `threading.Thread` it would be waited for until it has begun.
    _thread.start_new_thread(run, ())
    return future


def answer(future: Future[T], retry: Retry, where: str, signed_at: Callable[[], float] | None = None) -> T:
    """Waits for a call, and cancels it when the wait ends before it.

    Args:
        future: of `on_loop` or `in_thread`.
        retry: whose stop is heard, and which says how long silence lasts.
        where: the URI that a stop names.
        signed_at: gives when the server last gave a sign, by the monotonic clock, if the call does not end by itself.

    Raises:
        StoppedError: this process is to stop, and the call has had `LAST_SECONDS` since.
        TimeoutError: the server gave no sign for so long.
    """
    heard_at = float("inf")
    try:
        while True:
            try:
                return future.result(POLL_SECONDS)
            except TimeoutError:
                # It may be the call's own, or have been too early by a moment.
                if future.done():
                    return future.result()
            now = time.monotonic()
            if retry.stop():
                heard_at = min(heard_at, now)
                if now - heard_at >= LAST_SECONDS:
                    retry.stop.check(f"while waiting for {where}")
            if signed_at and now - signed_at() > retry.silence_seconds:
                raise TimeoutError
    finally:
        future.cancel()
