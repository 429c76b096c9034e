"""A source of images: an ordered stream of named files, from a folder, an archive or a file of many images.

One unsafe or damaged file refuses the whole source: a path that leads outside, a link, or kilobytes that unpack to
terabytes show that an archive is not what its user expects.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from job.data import members
from job.data.ahead import in_order
from job.data.labels import LabelTable
from job.data.members import Member, RefusedError
from job.data.splits import SPLITS, split_in
from job.progress import printable

HIDDEN = "hidden images"
"""The key of hidden images among the files that are skipped."""

_FORK = re.compile(r"(^|/)(__MACOSX/|\._)")
"""A resource fork, which macOS adds beside each file under the same suffix."""
_SUFFIXES_NAMED = 20
_TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Files:
    """The files of a folder, a bucket or a zip, before anything is known of their content.

    Attributes:
        where: the place, for messages.
        names: their relative names, in order.
        open: opens one as a seekable stream.
        chosen: the file that the user named, and not its folder; else empty.
        folder: the local folder, for libraries that read nothing else.
    """

    where: str
    names: tuple[str, ...]
    open: Callable[[str], BinaryIO]
    chosen: str = ""
    folder: Path | None = None

    @property
    def place(self) -> str:
        """Returns the chosen file, or the place of all."""
        return f"{self.where}/{self.chosen}" if self.chosen else self.where

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """Returns the names that a pattern matches from beginning to end: of a chosen file, its own alone."""
        return [name for name in self.names if pattern.fullmatch(name) and self.chosen in ("", name)]

    def members(self) -> Iterator[Member]:
        """Yields all files in order."""
        return (Member(name, partial(self.read, name)) for name in self.names)

    def read(self, name: str) -> bytes:
        """Returns the content of one; raises `RefusedError` if it is larger than a table of labels may be."""
        with self.open(name) as file:
            return members.read_table(file)


@dataclass(frozen=True)
class Source:
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.

    Attributes:
        where: the path or URI that messages name.
        listed: yields its files in order, each readable until the next one is requested; raises `RefusedError`.
        listed_in: yields the files of one split alone, if the format finds them without the others.
        with_labels: yields the same files in the same order with their labels, unread, where `listed` has none.
        table: the labels by name, where a table has them.
        classes: the names of the classes, if the format has a list of them.
        note: how the source is interpreted, for people.
        readers: number of files to read at a time.
        split: the split whose images are taken; "" takes all, and None what the names of folders say.
        other_splits: those that are left out unless a person chooses one.
        beside: the files among which a table of labels may be, if they can be read by name.
        unchosen: the words of `--labels` for labels of the format that none of the images has got.
        skipped: number of files that `images` has left out: hidden images, and other files by suffix.
    """

    where: str
    listed: Callable[[], Iterator[Member]]
    listed_in: Callable[[str], Iterator[Member]] | None = None
    with_labels: Callable[[], Iterator[Member]] | None = None
    table: LabelTable | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    readers: int = 0
    split: str | None = None
    other_splits: tuple[str, ...] = ()
    beside: Files | None = None
    unchosen: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def choices(self) -> tuple[str, ...]:
        """Returns the words of `--labels` for labels that none of the images has got, in tables, too."""
        names = self.beside.names if self.beside else ()
        return self.unchosen or tuple(f"{name}:COLUMN" for name in names if name.endswith(_TABLES))

    @property
    def name(self) -> str:
        """Returns the name of the source in the dataset's index."""
        return printable(self.where.rstrip("/").rpartition("/")[2])

    def members(self, labelled: bool = False) -> Iterator[Member]:
        """Yields all files with normalised names, each readable until the next one is requested.

        `labelled` ones have their labels, and may not be read.
        """
        wanted, listed = SPLITS.get(self.split or ""), (labelled and self.with_labels) or self.listed
        with members.refusing(self.where):
            for member in self.listed_in(wanted) if self.listed_in and wanted else listed():
                parts = members.path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if wanted in (None, split_in(parts)):
                    name, label = printable("/".join(part for part in parts if part not in ("", "."))), member.label
                    if labelled and self.table and members.is_image(name):
                        label = self.table.of(name)
                    yield replace(member, name=name, label=label)

    def images(self, labelled: bool = False) -> Iterator[Member]:
        """Yields the images, in order, and counts the files that it leaves out; reads no content. See `members`."""
        self.skipped.clear()
        return filter(self._is_image, self.members(labelled))

    def loaded(self, images: Iterable[Member]) -> Iterator[tuple[str, bytes]]:
        """Yields the relative paths and contents of these images, in order."""
        if not self.readers:
            yield from map(self._load, images)
            return
        with ThreadPoolExecutor(self.readers) as pool:
            yield from in_order(pool, self._load, images, window=2 * self.readers)

    def _is_image(self, member: Member) -> bool:
        if members.is_image(member.name):
            return True
        suffix = Path(member.name).suffix.lower()
        if suffix in members.SUFFIXES:
            if not _FORK.search(member.name):
                self.skipped[HIDDEN] += 1
        elif not members.is_hidden(member.name):
            is_named = suffix in self.skipped or (1 < len(suffix) < 12 and len(self.skipped) < _SUFFIXES_NAMED)
            self.skipped[suffix if is_named else "other"] += 1
        return False

    def _load(self, member: Member) -> tuple[str, bytes]:
        with members.refusing(f"{self.where}: entry {member.name!r}"):
            return member.name, member.read()
