"""MNIST's idx files (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a second file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import partial

from job.data.members import Member, Opener, RefusedError, read_exactly, unpacked

IDX_NAME = re.compile(r"[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")


def idx_members(open_images: Opener, open_labels: Opener | None = None) -> Iterator[Member]:
    """Yields the images as PGM files, in a folder per class if there are labels."""
    with open_images() as raw:
        file, limit_bytes = unpacked(raw)
        magic, count, height, width = struct.unpack(">4I", read_exactly(file, 16))
        pixels = height * width
        if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
            shape = f"header {magic:#x}, {count:,} of {height} × {width}"
            raise RefusedError(f"is not a complete MNIST image file ({shape})")
        labels = _idx_labels(open_labels, count) if open_labels else b""
        digits, label_digits = len(str(count - 1)), len(str(max(labels, default=0)))
        header = b"P5 %d %d 255\n" % (width, height)

        def read(number: int) -> bytes:
            # Images that another machine packs are not read.
            file.seek(16 + number * pixels)
            return header + read_exactly(file, pixels)

        for number in range(count):
            folder = f"{labels[number]:0{label_digits}d}/" if labels else ""
            yield Member(f"{folder}{number:0{digits}d}.pgm", partial(read, number))
        file.seek(16 + count * pixels)
        if file.read(1):
            raise RefusedError(f"holds more than the {count:,} images of its header: get it again")


def _idx_labels(opener: Opener, count: int) -> bytes:
    with opener() as raw:
        file, _ = unpacked(raw)
        if struct.unpack(">2I", read_exactly(file, 8)) != (0x801, count):
            raise RefusedError("does not go with its labels, which are for another number of images")
        return read_exactly(file, count)
