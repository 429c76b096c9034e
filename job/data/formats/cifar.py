"""The binary files of CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the labels and 3,072 bytes of each 32×32 image.

An image of CIFAR-100 has a coarse label and then a fine one. The pixels follow channel by channel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from job.data import members
from job.data.formats.image_bytes import netpbm
from job.data.labels import chosen_label, label_of
from job.data.members import Files, Member, RefusedError, Source, first_split, refused

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Kind:
    """One of the two datasets.

    Attributes:
        archive: the one that has no pickles.
        batch: the files of images.
        pickle: the files that have the same images as pickles.
        labels: the number of classes of each label of a record, in order, and the file that names them.
        note: which of the labels is taken by default.
    """

    archive: str
    batch: re.Pattern[str]
    pickle: re.Pattern[str]
    labels: dict[str, tuple[int, str]]
    note: str = ""


_TEN = _Kind(
    "cifar-10-binary.tar.gz",
    re.compile(r"(?:.*/)?(data_batch_\d|test_batch)\.bin"),
    re.compile(r"(?:.*/)?(data_batch_\d|test_batch)"),
    {"label": (10, "batches.meta.txt")},
)
_HUNDRED = _Kind(
    "cifar-100-binary.tar.gz",
    re.compile(r"(?:.*/)?(train|test)\.bin"),
    re.compile(r"(?:.*/)?(train|test|meta)"),
    {"coarse": (20, "coarse_label_names.txt"), "fine": (100, "fine_label_names.txt")},
    "taking the fine labels of CIFAR-100; --labels :coarse takes the others",
)
_IS_TEN = re.compile(r"/cifar-10-batches-(bin|py)/")
_IS_HUNDRED = re.compile(r"/cifar-100-(binary|python)/|/fine_label_names\.txt$")


def cifar_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of an unpacked folder, or of the file of it that was chosen."""
    kind = _HUNDRED if any(_IS_HUNDRED.search(f"{files.where}/{name}") for name in files.names) else _TEN
    batches = files.matching(kind.batch)
    if not batches and not files.matching(kind.pickle):
        return None

    def listed() -> Iterator[Member]:
        return (each for each in files.members() if each.name in batches or not kind.batch.fullmatch(each.name))

    splits = map(_split_of, filter(None, map(kind.batch.fullmatch, batches)))
    return _source(kind, files.place, listed, column, splits)


def archive_source(first: str, where: str, listed: Callable[[], Iterator[Member]], column: str | None) -> Source | None:
    """Returns the images of a tar whose first file has this name; None if the tar is not CIFAR's."""
    kind = _HUNDRED if _IS_HUNDRED.search(f"/{first}") else _TEN if _IS_TEN.search(f"/{first}") else None
    return _source(kind, where, listed, column, ("train", "test")) if kind else None


def _source(
    kind: _Kind, where: str, listed: Callable[[], Iterator[Member]], column: str | None, splits: Iterable[str]
) -> Source:
    label = chosen_label(where, tuple(kind.labels), column or "", usual=("fine",))
    with members.refusing(where):
        names = _class_names(kind, label, listed)
    split, others = first_split(splits)
    note, classes = kind.note if column == "" else "", names if column is not None else ()
    images = partial(_members, kind, [*kind.labels].index(label), names, listed)
    return Source(where, images, classes=classes, note=note, split=split, other_splits=others)


def _class_names(kind: _Kind, label: str, listed: Callable[[], Iterator[Member]]) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers if no file has the names."""
    count, file = kind.labels[label]
    for member in listed():
        if kind.pickle.fullmatch(member.name):
            raise RefusedError(f"holds pickles, which are programs: get {kind.archive}, of the same images")
        if member.name.rpartition("/")[2] == file:
            names = tuple(map(label_of, member.read().decode("ascii", "replace").split()))
            if len(set(filter(None, names))) != count:
                raise refused(member.name, f"does not name {count} classes: get it again")
            return names
    return tuple(map(str, range(count)))


def _members(
    kind: _Kind, label: int, names: tuple[str, ...], listed: Callable[[], Iterator[Member]]
) -> Iterator[Member]:
    """Yields the images as PPM files, below train or test."""
    labels = len(kind.labels)
    for member in listed():
        if not (match := kind.batch.fullmatch(member.name)):
            continue
        content = member.read()
        count, rest = divmod(len(content), labels + _PIXELS)
        if rest or not count:
            raise refused(member.name, f"does not hold whole images of {labels + _PIXELS:,} bytes: get it again")
        for number in range(count):
            start = number * (labels + _PIXELS)
            if content[start + label] >= len(names):
                said = f"has an image of class {content[start + label]}, of {len(names)}: get it again"
                raise refused(member.name, said)
            read = partial(_ppm, content, start + labels)
            yield Member(
                f"{_split_of(match)}/{match[1]}-{number:05d}.ppm",
                read,
                size_bytes=_PIXELS,
                label=names[content[start + label]],
            )


def _ppm(content: bytes, start: int) -> bytes:
    return netpbm(np.frombuffer(content, np.uint8, _PIXELS, start).reshape(3, 32, 32).transpose(1, 2, 0))


def _split_of(batch: re.Match[str]) -> str:
    return "test" if batch[1].startswith("test") else "train"
