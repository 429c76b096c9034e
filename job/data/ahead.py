"""Work that threads do a little ahead of whoever takes its results."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_POLL_SECONDS = 0.05
"""How soon a thread that waits for others hears of a stop."""


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    window: int,
    check: Callable[[], object] = bool,
) -> Iterator[Result]:
    """`pool.map` that takes items only `window` ahead of what it yields, so that memory does not grow with them.

    Args:
        pool: does the work.
        function: is the work.
        items: taken one by one.
        window: how many results are on their way at a time.
        check: called for each result, and while it is waited for; raises if this process is to stop.
    """
    waiting: deque[Future[Result]] = deque()
    failed = threading.Event()

    def work(item: Item) -> Result:
        # The error of an earlier item is raised: one that begins later would only wait as long for the same outage.
        if failed.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    def first() -> Result:
        future = waiting.popleft()
        check()
        while not wait([future], timeout=STOP_POLL_SECONDS).done:
            check()
        return future.result()

    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= window:
                yield first()
        while waiting:
            yield first()
    finally:
        for future in waiting:
            future.cancel()
