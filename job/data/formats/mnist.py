"""MNIST's idx files (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a second file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from job.data.members import Files, Member, Opener, RefusedError, Source, first_split, is_hidden, read_exactly, unpacked
from job.exits import BadRequestError

IDX_NAME = re.compile(r"(?:.*/)?[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")


def idx_source(files: Files, column: str | None) -> Source | None:
    """Returns the file of images that was chosen, or the first one for training and its test set, in any folder."""
    sets = {_stem(name): name for name in files.names if _is_of_images(name)}
    if not sets or (files.chosen and not IDX_NAME.fullmatch(files.chosen)):
        return None
    train = [stem for stem in sets if _split_of(stem) == "train"]
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
    found = [(_split_of(stem), opened[stem], labels.get(_labels_of(stem))) for stem in own]
    split, other_splits = first_split(split for split, _, _ in found)
    others = sorted(sets.keys() - set(own))
    note = f"leaving out {', '.join(others)}" if others and not files.chosen else ""
    listed = partial(_members, found)
    return Source(files.place, listed, note=note, split=split, other_splits=other_splits)


def _is_of_images(name: str) -> bool:
    match = IDX_NAME.fullmatch(name)
    return match is not None and "images" in match[1] and not is_hidden(name)


def _stem(name: str) -> str:
    return name.removesuffix(".gz")


def _labels_of(stem: str) -> str:
    folder, slash, name = stem.rpartition("/")
    return f"{folder}{slash}{name.replace('images', 'labels').replace('idx3', 'idx1')}"


def _split_of(stem: str) -> str:
    name = stem.rpartition("/")[2]
    return "train" if "train" in name else "test" if re.search("t10k|test", name) else ""


def _members(sets: Iterable[tuple[str, Opener, Opener | None]]) -> Iterator[Member]:
    """Yields the images of each set, in a folder for its split."""
    for split, open_images, open_labels in sets:
        for member in _images(open_images, open_labels):
            yield replace(member, name=f"{split}/{member.name}" if split else member.name)


def _images(open_images: Opener, open_labels: Opener | None) -> Iterator[Member]:
    """Yields the images as PGM files, with their digits as labels if there are labels."""
    with open_images() as raw:
        file, limit_bytes = unpacked(raw)
        magic, count, height, width = struct.unpack(">4I", read_exactly(file, 16))
        pixels = height * width
        if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
            shape = f"header {magic:#x}, {count:,} of {height} × {width}"
            raise RefusedError(f"is not a complete MNIST image file ({shape})")
        labels = _idx_labels(open_labels, count) if open_labels else b""
        digits = len(str(count - 1))
        header = b"P5 %d %d 255\n" % (width, height)

        def read(number: int) -> bytes:
            # Images that another machine packs are not read.
            file.seek(16 + number * pixels)
            return header + read_exactly(file, pixels)

        for number in range(count):
            label = str(labels[number]) if labels else ""
            yield Member(f"{number:0{digits}d}.pgm", partial(read, number), label=label)
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
