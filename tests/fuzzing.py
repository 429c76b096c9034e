"""Property tests: a few fixed examples in `make test`, many random ones among the slow tests."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test twice, with its argument `count`: `few` in `make test`, `many` among the slow ones."""
    slow = pytest.param(many, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])
    return pytest.mark.parametrize("count", [pytest.param(few, id="few"), slow])


def search(count: int, *strategies: SearchStrategy, few: int = 100) -> Callable[[Callable[..., object]], object]:
    """Calls what it decorates with so many examples; up to `few` of them are the same in every run."""
    always = settings(
        max_examples=count,
        derandomize=count <= few,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda check: always(given(*strategies)(check))()
