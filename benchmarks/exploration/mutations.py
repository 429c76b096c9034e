"""Protocols broken on purpose, one at a time: an exploration that does not find each of them proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Breaks a protocol until the context ends; an empty name breaks none."""
    yield
