"""Reading a dataset: `order` has that of a run's images, `stream` their batches, `cache` finds and decodes them.

Here: work of threads whose results are taken in order, with a limited number ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_POLL_SECONDS = 0.05
"""How often a waiting thread checks for a stop."""


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    window: int,
    check: Callable[[], object] = bool,
) -> Iterator[Result]:
    """Yields `function` of each item in order, like `pool.map`, but takes only `window` items ahead, to limit memory.

    Args:
        pool: the threads that call `function`.
        function: the work.
        items: taken one by one.
        window: number of items ahead.
        check: called for each result and during the wait for it; raises if this process has to stop.
    """
    waiting: deque[Future[Result]] = deque()
    failed: list[int] = []

    def work(number: int, item: Item) -> Result:
        # After an error no later item is started, which would only wait as long for the same outage.
        if min(failed, default=number) < number:
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            failed.append(number)
            raise

    def first() -> Result:
        future = waiting.popleft()
        check()
        while not wait([future], timeout=STOP_POLL_SECONDS).done:
            check()
        return future.result()

    try:
        for number, item in enumerate(items):
            waiting.append(pool.submit(work, number, item))
            if len(waiting) >= window:
                yield first()
        while waiting:
            yield first()
    finally:
        for future in waiting:
            future.cancel()
