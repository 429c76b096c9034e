"""Property tests: a few fixed examples in `make test`, many random ones among the slow tests."""

import resource
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

MOST_SECONDS, MOST_BYTES, MOST_ADDRESSES = 20.0, 1 << 30, 4 << 30
"""Of one example, on a busy machine; and of the memory by which all of them together let this process grow: that which
is used, and that which may be asked for, most of which the stacks of threads take."""


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test twice, with its argument `count`: `few` in `make test`, `many` among the slow ones."""
    slow = pytest.param(many, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])
    return pytest.mark.parametrize("count", [pytest.param(few, id="few"), slow])


def search(count: int, *strategies: SearchStrategy, few: int = 100) -> Callable[[Callable[..., object]], object]:
    """Calls what it decorates with so many examples, in bounded time and memory; up to `few` are the same each time."""
    always = settings(
        max_examples=count,
        derandomize=count <= few,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )

    def bounded(check: Callable[..., object]) -> object:
        @wraps(check)
        def timed(**example: object) -> None:
            began = time.monotonic()
            check(**example)
            assert time.monotonic() - began < MOST_SECONDS

        before, (soft, hard) = _peak_bytes(), resource.getrlimit(resource.RLIMIT_AS)
        # What asks for more gets a MemoryError, which no command may end with, and the machine stays usable.
        resource.setrlimit(resource.RLIMIT_AS, (_address_bytes() + MOST_ADDRESSES, hard))
        try:
            always(given(*strategies)(timed))()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert _peak_bytes() - before < MOST_BYTES
        return None

    return bounded


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
