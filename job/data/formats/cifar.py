"""CIFAR-10's binary files (Krizhevsky 2009): a class, and 3,072 bytes of a 32×32 image, channel by channel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from job.data.members import Member, RefusedError, refused
from job.data.source import Files, Source

_IMAGE_BYTES = 1 + 3 * 32 * 32
_BATCH = re.compile(r"(?:.*/)?(data_batch_\d|test_batch)\.bin")
_PICKLE = re.compile(r"(?:.*/)?cifar-10-batches-py/\w+_batch\w*")
_NOTE = "packing the images for training; --split test packs the others"


def cifar_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of an unpacked folder."""
    if not any(_BATCH.fullmatch(name) or _PICKLE.fullmatch(name) for name in files.names):
        return None
    return source_of(files.where, files.members, column)


def is_cifar(name: str) -> bool:
    """Returns whether a tar that begins with this file is CIFAR's."""
    return name.startswith("cifar-10-batches-")


def source_of(where: str, listed: Callable[[], Iterator[Member]], column: str | None) -> Source:
    """Returns the images among these files, of an archive or a folder."""
    return Source(where, partial(_members, listed), split="train", note=_NOTE)


def _members(listed: Callable[[], Iterator[Member]]) -> Iterator[Member]:
    """Yields the images as PPM files, below train or test."""
    names = list(map(str, range(10)))
    for member in listed():
        if member.name.endswith("batches.meta.txt"):
            names = [name for name in member.read().decode("ascii", "replace").split() if name]
        elif _PICKLE.fullmatch(member.name):
            raise RefusedError("holds pickles, which are programs: get cifar-10-binary.tar.gz, of the same images")
    for member in listed():
        if not (match := _BATCH.fullmatch(member.name)):
            continue
        content, split = member.read(), "test" if match[1].startswith("test") else "train"
        count, rest = divmod(len(content), _IMAGE_BYTES)
        if rest or not count:
            raise refused(member.name, f"does not hold whole images of {_IMAGE_BYTES:,} bytes: get it again")
        for number in range(count):
            image = content[number * _IMAGE_BYTES : (number + 1) * _IMAGE_BYTES]
            if image[0] >= len(names):
                raise refused(member.name, f"has an image of class {image[0]}, of {len(names)}: get it again")
            pixels = np.frombuffer(image, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0).tobytes()
            name = f"{split}/{match[1]}-{number:05d}.ppm"
            yield Member(name, partial(bytes, b"P6 32 32 255\n" + pixels), label=names[image[0]])
