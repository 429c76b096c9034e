"""Files of published datasets with a form of their own: MNIST's idx, CIFAR-10 and CIFAR-100, and LSUN's LMDB.

A file of idx has a big-endian header and a byte per pixel; the labels are in a second file (LeCun et al. 1998). CIFAR
has the labels and 3,072 bytes of each 32×32 image, channel by channel; CIFAR-100 a coarse label and then a fine one
(Krizhevsky 2009).

LSUN has encoded images in the order of their keys, which do not name classes (Yu et al. 2015). The package lmdb maps a
file into the memory and believes what it finds there: a damaged file would end the process. So its verifier, which
reads the pages of the tree as bytes, checks the file first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, starmap
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from job.data.source import members
from job.data.source.formats import netpbm
from job.data.source.labels import chosen_label, label_of
from job.data.source.members import Files, Member, Opener, RefusedError, Source, read_exactly, refused, unpacked
from job.exits import BadRequestError, needs_extra

IDX_NAME = re.compile(r"(?:.*/)?[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_IDX_IMAGES = re.compile(r"(?:.*/)?[^/]*images[-.]idx3-ubyte(\.gz)?")


def idx_source(files: Files, column: str | None) -> Source | None:
    """Returns the file of images that was chosen, or the first one for training and its test set, in any folder."""
    sets = {_stem(name) for name in files.names if _IDX_IMAGES.fullmatch(name) and not members.is_hidden(name)}
    if not sets or (files.chosen and not IDX_NAME.fullmatch(files.chosen)):
        return None
    train = [stem for stem in sets if _idx_split(stem) == "train"]
    # Kaggle's zip has each file twice, the second one in a folder.
    first = _stem(files.chosen) or min(train or sets, key=lambda stem: (stem.count("/"), stem))
    # EMNIST's folder has six datasets.
    pair = dict.fromkeys((first, *(re.sub("train(?=[^/]*$)", split, first) for split in ("t10k", "test"))))
    own = [first] if files.chosen else [stem for stem in pair if stem in sets]
    opened = {_stem(name): partial(files.open, name) for name in files.names}
    # The files of labels name none of theirs.
    labels = {} if column else opened
    if column == "" and (lacking := next((stem for stem in own if _labels_of(stem) not in labels), None)):
        said = f"{lacking} lies without its labels, {_labels_of(lacking)}"
        raise BadRequestError(f"{files.place}: {said}: get that file, or use --no-classes")
    found = [(_idx_split(stem), opened[stem], labels.get(_labels_of(stem))) for stem in own]
    others = sorted(sets.difference(own))
    note = f"leaving out {', '.join(others)}" if others and not files.chosen else ""
    source = Source(files.place, lambda: chain.from_iterable(starmap(_idx_images, found)), note=note)
    return source.split_by(split for split, _, _ in found)


def _stem(name: str) -> str:
    return name.removesuffix(".gz")


def _labels_of(stem: str) -> str:
    folder, slash, name = stem.rpartition("/")
    return f"{folder}{slash}{name.replace('images', 'labels').replace('idx3', 'idx1')}"


def _idx_split(stem: str) -> str:
    name = stem.rpartition("/")[2]
    return "train" if "train" in name else "test" if re.search("t10k|test", name) else ""


def _idx_images(split: str, open_images: Opener, open_labels: Opener | None) -> Iterator[Member]:
    """Yields the images as PGM files in a folder for their split, with their digits as labels if there are labels."""
    with open_images() as raw:
        file, limit_bytes = unpacked(raw)
        magic, count, height, width = struct.unpack(">4I", read_exactly(file, 16))
        pixels = height * width
        if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
            shape = f"header {magic:#x}, {count:,} of {height} × {width}"
            raise RefusedError(f"is not a complete MNIST image file ({shape})")
        labels = _idx_labels(open_labels, count) if open_labels else b""
        start, digits = f"{split}/" if split else "", len(str(count - 1))
        header = b"P5 %d %d 255\n" % (width, height)

        def read(number: int) -> bytes:
            # Images that another machine packs are not read.
            file.seek(16 + number * pixels)
            return header + read_exactly(file, pixels)

        for number in range(count):
            label = str(labels[number]) if labels else ""
            yield Member(f"{start}{number:0{digits}d}.pgm", partial(read, number), label=label)
        file.seek(16 + count * pixels)
        if file.read(1):
            raise RefusedError(f"holds more than the {count:,} images of its header: get it again")


def _idx_labels(opener: Opener, count: int) -> bytes:
    with opener() as raw:
        file, _ = unpacked(raw)
        if struct.unpack(">2I", read_exactly(file, 8)) != (0x801, count):
            raise RefusedError("does not go with its labels, which are for another number of images")
        labels = read_exactly(file, count)
        # gzip compares its checksum at the end of the stream.
        if file.read(1):
            raise RefusedError(f"has more than {count:,} labels: get it again")
        return labels


_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Kind:
    """One of the two datasets.

    Attributes:
        archive: the one that has no pickles.
        batch: the files of images, of which those without a suffix are pickles.
        labels: the number of classes of each label of a record, in order, and the file that names them.
    """

    archive: str
    batch: re.Pattern[str]
    labels: dict[str, tuple[int, str]]


_TEN = _Kind(
    "cifar-10-binary.tar.gz",
    re.compile(r"(?:.*/)?(data_batch_\d|test_batch)(\.bin)?"),
    {"label": (10, "batches.meta.txt")},
)
_HUNDRED = _Kind(
    "cifar-100-binary.tar.gz",
    re.compile(r"(?:.*/)?(train|test)(\.bin)?"),
    {"coarse": (20, "coarse_label_names.txt"), "fine": (100, "fine_label_names.txt")},
)
_IS_TEN = re.compile(r"/cifar-10-batches-(bin|py)/")
_IS_HUNDRED = re.compile(r"/cifar-100-(binary|python)/|/fine_label_names\.txt$")


def cifar_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of an unpacked folder, or of the file of it that was chosen."""
    kind = _HUNDRED if any(_IS_HUNDRED.search(f"{files.where}/{name}") for name in files.names) else _TEN
    batches = files.matching(kind.batch)
    if not batches:
        return None

    def listed() -> Iterator[Member]:
        names = (name for name in files.names if name in batches or not kind.batch.fullmatch(name))
        return (Member(name, partial(files.read, name)) for name in names)

    splits = map(_cifar_split, filter(None, map(kind.batch.fullmatch, batches)))
    return _cifar_source(kind, files.place, listed, column, splits)


def archive_source(first: str, where: str, listed: Callable[[], Iterator[Member]], column: str | None) -> Source | None:
    """Returns the images of a tar whose first file has this name; None if the tar is not CIFAR's."""
    kind = _HUNDRED if _IS_HUNDRED.search(f"/{first}") else _TEN if _IS_TEN.search(f"/{first}") else None
    return _cifar_source(kind, where, listed, column, ("train", "test")) if kind else None


def _cifar_source(
    kind: _Kind, where: str, listed: Callable[[], Iterator[Member]], column: str | None, splits: Iterable[str]
) -> Source:
    label = chosen_label(where, tuple(kind.labels), column or "", usual=("fine",))
    with members.refusing(where):
        names = _class_names(kind, label, listed)
    images = partial(_cifar_members, kind, [*kind.labels].index(label), names, listed)
    return Source(where, images, classes=() if column is None else names).split_by(splits)


def _class_names(kind: _Kind, label: str, listed: Callable[[], Iterator[Member]]) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers if no file has the names."""
    count, file = kind.labels[label]
    for member in listed():
        if (match := kind.batch.fullmatch(member.name)) and not match[2]:
            raise RefusedError(f"holds pickles, which are programs: get {kind.archive}, of the same images")
        if member.name.rpartition("/")[2] == file:
            names = tuple(map(label_of, member.read().decode("ascii", "replace").split()))
            if len(set(filter(None, names))) != count:
                raise refused(member.name, f"does not name {count} classes: get it again")
            return names
    return tuple(map(str, range(count)))


def _cifar_members(
    kind: _Kind, label: int, names: tuple[str, ...], listed: Callable[[], Iterator[Member]]
) -> Iterator[Member]:
    """Yields the images as PPM files, below train or test."""
    for member in listed():
        if not (match := kind.batch.fullmatch(member.name)):
            continue
        content, record_bytes = member.read(), len(kind.labels) + _PIXELS
        if not content or len(content) % record_bytes:
            raise refused(member.name, f"does not hold whole images of {record_bytes:,} bytes: get it again")
        records = np.frombuffer(content, np.uint8).reshape(-1, record_bytes)
        if (highest := records[:, label].max()) >= len(names):
            raise refused(member.name, f"has an image of class {highest}, of {len(names)}: get it again")
        for number, record in enumerate(records):
            name = f"{_cifar_split(match)}/{match[1]}-{number:05d}.ppm"
            pixels = record[-_PIXELS:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield Member(name, partial(netpbm, pixels), size_bytes=_PIXELS, label=names[record[label]])


def _cifar_split(batch: re.Match[str]) -> str:
    return "test" if batch[1].startswith("test") else "train"


_LMDB = re.compile(r"(?:.*/)?(?:data\.mdb|[^/]+\.lmdb)", re.IGNORECASE)
_LMDB_FOLDER = re.compile(r"(?:^|/)data\.mdb$", re.IGNORECASE)
_OPEN = WeakValueDictionary[str, Any]()
"""The files that are open: lmdb opens one no more than once in a process."""


def lsun_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of a folder of LSUN, or of all such folders in one."""
    names = files.matching(_LMDB)
    if not names:
        return None
    if files.folder is None:
        raise BadRequestError(f"{files.place} holds LMDB: copy or unzip its folder to a disk, and pack that")
    with needs_extra("lsun", f"{files.place} is LMDB, which"):
        import lmdb  # noqa: F401
    folders = {_LMDB_FOLDER.sub("", name): str(files.folder / name) for name in names}
    for name, path in zip(names, folders.values(), strict=True):
        with members.refusing(f"{files.where}/{name}"):
            _verify(path)
    return Source(files.place, partial(_lsun_members, folders)).split_by(folders)


def _verify(path: str) -> None:
    from lmdb.verify import VerifyError, verify

    try:
        # A reader uses no free pages: one that their list lacks is lost space, and no damage.
        problems = [problem for problem in verify(path) if "freeDB" not in problem]
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise RefusedError(f"is damaged, or not LMDB of a 64-bit machine ({problems[0]}): get it again")


def _lsun_members(paths: Mapping[str, str]) -> Iterator[Member]:
    """Yields the images below each folder in the order of their keys, each readable until the next one is."""
    import lmdb

    for folder, path in paths.items():
        try:
            if (environment := _OPEN.get(path)) is None:
                environment = _OPEN[path] = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
            with environment.begin(buffers=True) as transaction:
                for key, value in transaction.cursor():
                    text = bytes(key).decode("latin-1")
                    name = text if text.isascii() and text.isprintable() else bytes(key).hex()
                    # LSUN's suffix; the content decides how it is decoded.
                    path_of = "/".join(filter(None, (folder, f"{name}.webp")))
                    yield Member(path_of, partial(_value, transaction, bytes(key)), size_bytes=len(value))
        except lmdb.Error as error:
            raise RefusedError(f"cannot be read ({error}): get it again") from None


def _value(transaction: Any, key: bytes) -> bytes:
    value = transaction.get(key)
    members.check_size(len(value))
    return bytes(value)
