"""What can happen to objects in a bucket: a bit flips, bytes are cut off, two are swapped, one is gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from job.store import Store


def _flipped(place: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = min(int(place * len(data)), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "first bit": _flipped(0),
    "bit in the middle": _flipped(0.5),
    "last byte": _flipped(1),
    "half of it": lambda data: data[: len(data) // 2],
    "all but a byte": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\n",
    "empty": lambda data: b"",
    "gone": None,
}
"""By name: what becomes of an object's bytes; none if nothing is left."""


def flip_a_bit(path: Path, at: int | None = None) -> Path:
    """Of a file: in its middle, unless it is said in which byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)
    return path


@contextmanager
def damaged(store: Store, key: str, damage: Callable[[bytes], bytes] | None) -> Iterator[None]:
    """The store with one object damaged, until the context ends."""
    before = store.read(key).data
    try:
        if damage is None:
            store.delete(key)
        else:
            after = damage(before)
            assert after != before
            store.put(key, after)
        yield
    finally:
        store.put(key, before)


@contextmanager
def swapped(store: Store, one: str, other: str) -> Iterator[None]:
    """The store with two objects in each other's place, until the context ends."""
    a, b = store.read(one).data, store.read(other).data
    assert a != b
    try:
        store.put(one, b)
        store.put(other, a)
        yield
    finally:
        store.put(one, a)
        store.put(other, b)


def pairs(keys: list[str]) -> list[tuple[str, str]]:
    """Objects of the same kind, whose keys differ in numbers alone, two by two."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(keys):
        kinds.setdefault(re.sub(r"\d+", "0", key), []).append(key)
    return [pair for same in kinds.values() for pair in pairwise(same)]
