"""MNIST's idx files (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a second file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import partial

from job.data.members import Member, Opener, RefusedError, read_exactly, unpacked
from job.data.source import Files, Source

IDX_NAME = re.compile(r"[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")


def idx_source(files: Files, column: str | None) -> Source | None:
    """Returns the set of images that was chosen among the files, or the first one for training."""
    sets = sorted(name for name in files.names if IDX_NAME.fullmatch(name) and "images" in name)
    if not sets or (files.chosen and not IDX_NAME.fullmatch(files.chosen)):
        return None
    name = files.chosen or next((name for name in sets if "train" in name), sets[0])
    wanted = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = [partial(files.open, file) for file in files.names if file.removesuffix(".gz") == wanted]
    others = [other for other in sets if other.removesuffix(".gz") != name.removesuffix(".gz")]
    note = f"packing {name}, leaving out {', '.join(others)}" if others and not files.chosen else ""
    listed = partial(_members, partial(files.open, name), *labels[:1])
    return Source(f"{files.where}/{name}", listed, channels=1, note=note)


def _members(open_images: Opener, open_labels: Opener | None = None) -> Iterator[Member]:
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
        return read_exactly(file, count)
