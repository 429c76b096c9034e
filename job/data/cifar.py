"""CIFAR-10's binary archive (Krizhevsky 2009): a class, and 3,072 bytes of a 32×32 image, channel by channel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import numpy as np

from job.data.archives import tar_members
from job.data.members import Member, Opener, RefusedError, refused

_IMAGE_BYTES = 1 + 3 * 32 * 32


def cifar_members(opener: Opener) -> Iterator[Member]:
    """Yields the images as PPM files, below train or test, in a folder per class."""
    names = list(map(str, range(10)))
    for member in tar_members(opener):
        if member.name.endswith("batches.meta.txt"):
            names = [name for name in member.read().decode("ascii", "replace").split() if name]
        elif re.search(r"cifar-10-batches-py/\w+_batch", member.name):
            raise RefusedError("holds pickles, which are programs: get cifar-10-binary.tar.gz, of the same images")
    for member in tar_members(opener):
        if not (match := re.search(r"(data_batch_\d|test_batch)\.bin$", member.name)):
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
            name = f"{split}/{names[image[0]]}/{match[1]}-{number:05d}.ppm"
            yield Member(name, partial(bytes, b"P6 32 32 255\n" + pixels))
