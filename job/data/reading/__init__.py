"""Reading a dataset: `stream` has the order of a run's images and their batches, `cache` finds and decodes them.

Here: the place of all caches, and work of threads whose results are taken in order, with a limited number ahead.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from job.exits import BadRequestError

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_POLL_SECONDS = 0.05
"""How often a waiting thread checks for a stop."""


def default_cache_dir() -> Path:
    """Returns `$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: neither variable is set, and the user has no home.
    """
    folder = os.environ.get("DDPM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/ddpm"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:
        raise BadRequestError("this user has no home folder: set DDPM_CACHE to a folder on a local disk") from None


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
