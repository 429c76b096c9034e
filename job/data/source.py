"""A source of images: an ordered stream of named files, from a folder, an archive or a file of many images.

One unsafe or damaged file refuses the whole source: a path that leads outside, a link, or kilobytes that unpack to
terabytes show that an archive is not what its user expects.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from job.data import members
from job.data.ahead import in_order
from job.data.labels import sidecar_label
from job.data.members import Member, RefusedError
from job.data.splits import SPLITS, split_in
from job.progress import printable

HIDDEN = "hidden images"
"""The key of hidden images among the files that are skipped."""
SAMPLE_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
"""The key of a WebDataset sample, the path up to the first dot of the file's name, and the rest of the name."""

_FORK = re.compile(r"(^|/)(__MACOSX/|\._)")
"""A resource fork, which macOS adds beside each file under the same suffix."""
_SUFFIXES_NAMED = 20


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
        """Returns the content of one; raises `RefusedError` if it is larger than an image may be."""
        with self.open(name) as file:
            members.check_size(file.seek(0, io.SEEK_END))
            file.seek(0)
            return file.read()


class Found(NamedTuple):
    """An image before it is read: its name, its size and its class, empty without one."""

    name: str
    size_bytes: int = 0
    label: str = ""


@dataclass(frozen=True)
class Source:
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.

    Attributes:
        where: the path or URI that messages name.
        listed: yields its files in order, each readable until the next one is requested; raises `RefusedError`.
        listed_in: yields the files of one split alone, if the format finds them without the others.
        classes: the names of the classes, if the format has a list of them.
        note: how the source is interpreted, for people.
        readers: number of files to read at a time.
        sidecars: suffixes of the files that have the labels of the images beside them, as in WebDataset's tars.
        label_key: key of the label in those `.json` files; empty for a usual one.
        split: the split whose images are taken; "" takes all.
        other_splits: those that are left out unless a person chooses one.
        beside: the files among which a table of labels may be, if they can be read by name.
        unchosen: the words of `--labels` for labels that none of the images has got.
        skipped: number of files that `images` has left out: hidden images, and other files by suffix.
    """

    where: str
    listed: Callable[[], Iterator[Member]]
    listed_in: Callable[[str], Iterator[Member]] | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    readers: int = 0
    sidecars: tuple[str, ...] = ()
    label_key: str = ""
    split: str = ""
    other_splits: tuple[str, ...] = ()
    beside: Files | None = None
    unchosen: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Returns the name of the source in the dataset's index."""
        return printable(self.where.rstrip("/").rpartition("/")[2])

    def members(self) -> Iterator[Member]:
        """Yields all files with normalised names, each readable until the next one is requested."""
        wanted = SPLITS.get(self.split)
        with members.refusing(self.where):
            for member in self.listed_in(wanted) if self.listed_in and wanted else self.listed():
                parts = members.path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if wanted in (None, split_in(parts)):
                    yield replace(member, name=printable("/".join(part for part in parts if part not in ("", "."))))

    def images(self) -> Iterator[Member]:
        """Yields the images, in order, and counts the files that it leaves out; reads no content."""
        self.skipped.clear()
        return filter(self._is_image, self.members())

    def labelled(self) -> Iterator[Found]:
        """Yields what is known of each image, in the order of `images`; reads the labels, and no images."""
        self.skipped.clear()
        if not self.sidecars:
            yield from (Found(member.name, member.size_bytes, member.label) for member in self.images())
            return
        for _, files in groupby(self.members(), _sample_key):
            found, label = list[Found](), ""
            for member in files:
                if self._is_image(member):
                    found.append(Found(member.name, member.size_bytes))
                elif member.name.endswith(self.sidecars) and not label:
                    label = sidecar_label(member.name.rpartition(".")[2], self._load(member)[1], self.label_key)
            yield from (one._replace(label=label) for one in found)

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
        elif not members.is_hidden(member.name) and not member.name.endswith(self.sidecars):
            is_named = suffix in self.skipped or (1 < len(suffix) < 12 and len(self.skipped) < _SUFFIXES_NAMED)
            self.skipped[suffix if is_named else "other"] += 1
        return False

    def _load(self, member: Member) -> tuple[str, bytes]:
        with members.refusing(f"{self.where}: entry {member.name!r}"):
            return member.name, member.read()


def _sample_key(member: Member) -> str:
    match = SAMPLE_KEY.fullmatch(member.name)
    return match[1] if match else member.name
