"""Which tars a person means: URIs, brace patterns such as `{00000..00099}.tar`, and folders of tars."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from job.data.members import is_litter, path_parts
from job.data.places import split_uri
from job.data.shards import TAR_URI
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.store import Store, open_store
from job.store.base import is_key

MOST_TARS = 100_000
"""What the five digits in a shard's name can count."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


@dataclass(frozen=True)
class TarUri:
    """One tar: the store and key to read it with, its full URI, and its size."""

    store: Store
    key: str
    bytes: int

    @property
    def uri(self) -> str:
        """Absolute, and the same however it was typed."""
        return self.store.uri_of(self.key)


def find_tars(words: Iterable[str], opened: Callable[[str], Store] = open_store) -> list[TarUri]:
    """The tars that `words` name, in that order; those of a folder in key order, with those of its sub-folders.

    Args:
        words: URIs of tars and folders, or patterns of such.
        opened: opens the store of a URI.

    Raises:
        MissingInputError: there is nothing at one of them.
        BadRequestError: a pattern that is none, the same tar twice, or more than `MOST_TARS`.
        BadDataError: a folder without tars.
    """
    tars: list[TarUri] = []
    seen: set[str] = set()
    finder = _Finder(opened)
    for tar in itertools.chain.from_iterable(map(finder.at, words)):
        if tar.uri in seen:
            raise BadRequestError(f"{tar.uri} is named twice: its images would count twice")
        if not re.fullmatch(TAR_URI, tar.uri) or _is_no_text(tar.uri):
            raise BadRequestError(f"{tar.uri!r} has bytes in its name that no index can hold: rename it")
        seen.add(tar.uri)
        tars.append(tar)
        if len(tars) > MOST_TARS:
            raise BadRequestError(f"more than {MOST_TARS:,} tars: a dataset has no names for so many shards")
    return tars


def _is_no_text(name: str) -> bool:
    return any(0xD800 <= ord(character) <= 0xDFFF for character in name)


def expand_braces(pattern: str) -> Iterator[str]:
    """As a shell does it: `{a,b}` and `{007..010}`, several of them, but none within another.

    Raises:
        BadRequestError: a brace that is not closed or holds neither a list nor a range, or one with no end.
    """
    pieces = _BRACES.split(pattern)
    if "{" in "".join(pieces[::2]) or "}" in "".join(pieces[::2]):
        raise BadRequestError(f"{pattern!r}: write a pattern as {{00000..00099}} or {{a,b}}, none within another")
    choices = [[piece] if number % 2 == 0 else _choices(piece, pattern) for number, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MOST_TARS:
        raise BadRequestError(f"{pattern!r} stands for more than {MOST_TARS:,} tars")
    return map("".join, itertools.product(*choices))


def _choices(piece: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(piece):
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < MOST_TARS:
            raise BadRequestError(f"{pattern!r}: {{{piece}}} runs backwards, or over more than {MOST_TARS:,} tars")
        return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    if "," not in piece:
        raise BadRequestError(f"{pattern!r}: {{{piece}}} is neither a range as {{00000..00099}} nor a list as {{a,b}}")
    return piece.split(",")


class _Finder:
    """Opens each folder once, and asks a bucket for a pattern's tars by one listing instead of one by one."""

    def __init__(self, opened: Callable[[str], Store]) -> None:
        self._opened = cache(opened)

    def at(self, word: str) -> Iterator[TarUri]:
        uris = [uri.rstrip("/") for uri in expand_braces(word)]
        listed: dict[str, dict[str, int]] = {}
        for uri in uris:
            folder, name = split_uri(uri) if "/" in uri else (".", uri)
            # A bucket itself lies in no folder.
            if folder.endswith(":/") or name in ("", "~", "..", "."):
                yield from self._below(uri)
                continue
            store = self._opened(folder)
            if len(uris) > 1 and "://" in store.uri:
                if folder not in listed:
                    listed[folder] = {entry.key: entry.size_bytes for entry in store.list()}
                size_bytes = listed[folder].get(name)
            else:
                size_bytes = _size_bytes(store, name)
            if size_bytes is None:
                yield from self._below(uri)
            else:
                yield TarUri(store, name, size_bytes)

    def _below(self, uri: str) -> Iterator[TarUri]:
        store = self._opened(uri)
        nowhere = store.uri.startswith("/") and not Path(store.uri).is_dir()
        objects = [] if nowhere else list(store.list())
        if not objects:
            raise MissingInputError(f"there is nothing at {store.uri}: give tars, a pattern, or a folder of tars")
        entries = [entry for entry in objects if entry.key.endswith(".tar") and not _is_hidden(entry.key)]
        if not entries:
            raise BadDataError(f"{store.uri} holds no .tar: only tars that are not compressed can be indexed in place")
        for entry in entries:
            yield TarUri(store, entry.key, entry.size_bytes)


def _size_bytes(store: Store, name: str) -> int | None:
    if not is_key(name) or not store.exists(name):
        return None
    with store.open(name) as file:
        return file.seek(0, io.SEEK_END)


def _is_hidden(key: str) -> bool:
    return any(map(is_litter, path_parts(key)))
