"""Property tests: a few fixed examples in `make test`, many random ones among the slow tests."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

MOST_SECONDS, MOST_BYTES, MOST_ADDRESS_BYTES = 20.0, 1 << 30, 4 << 30
"""Processor time of one example; and of the memory by which all of them together let this process grow: that which
is used, and that which may be asked for, most of which the stacks of threads take. Beyond it is a `MemoryError`."""


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test twice, with its argument `count`: `few` in `make test`, `many` among the slow ones."""
    slow = pytest.param(many, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])
    return pytest.mark.parametrize("count", [pytest.param(few, id="few"), slow])


def search(count: int, *strategies: SearchStrategy, few: int = 100) -> Callable[[Callable[..., object]], object]:
    """Calls what it decorates with so many examples, in bounded time and memory; up to `few` are the same each time."""
    how = {"database": None, "deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
    always = settings(max_examples=count, derandomize=count <= few, **how)

    def bounded(check: Callable[..., object]) -> object:
        @wraps(check)
        def timed(**example: object) -> None:
            began = time.process_time()
            check(**example)
            assert time.process_time() - began < MOST_SECONDS

        if sys.platform != "linux":
            pytest.skip("macOS has no limit of the address space")
        before = _peak_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + MOST_ADDRESS_BYTES, hard))
        try:
            always(given(*strategies)(timed))()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert _peak_bytes() - before < MOST_BYTES
        return None

    return bounded


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def sealed(document: Any) -> bytes:
    """With the hash that makes it whole."""
    if isinstance(document, dict):
        content = {key: value for key, value in document.items() if key != "sha256"}
        document["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(document, indent=1) + "\n").encode()


def forged(data: bytes, at: int, value: Any) -> bytes:
    """A record of the right keys, of which one holds something else; and its hash is right."""
    try:
        document = json.loads(data)
    except ValueError:
        lines = data.decode(errors="replace").splitlines()
        lines[at % len(lines)] = f"{lines[at % len(lines)].partition(':')[0]}: {json.dumps(value)}"
        return "\n".join(lines).encode()
    places = [(document, key) for key in document] if isinstance(document, dict) else []
    for inner in [*places]:
        if isinstance(child := document[inner[1]], dict | list) and child:
            deeper = child[0] if isinstance(child, list) and isinstance(child[0], dict) else child
            places += [(deeper, key) for key in (deeper if isinstance(deeper, dict) else range(len(deeper)))]
    if places:
        holder, key = places[at % len(places)]
        holder[key] = value
    return sealed(document)
