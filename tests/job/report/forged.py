"""Pictures that are small files, and cost whoever believes their headers gigabytes or minutes."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

from PIL import Image

from tests.job.some_images import encoded, picture


def png(width: int, height: int, pixels: bytes = b"", kind: bytes = b"\x08\x02\0\0\0") -> bytes:
    """A PNG that says this of itself, whatever it holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">II", width, height) + kind
    chunks = (("IHDR", header), ("IDAT", zlib.compress(pixels)), ("IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name.encode(), data) for name, data in chunks)


def gif(width: int, height: int, frames: int, frame_width: int = 0, frame_height: int = 0) -> bytes:
    """A GIF of one colour, whose frames after the first are of another size if one is named."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "GIF")
    one = file.getvalue()
    start = one.index(b",\0\0\0\0")
    frame = bytearray(one[start:-1])
    if frame_width:
        frame[5:9] = struct.pack("<HH", frame_width, frame_height)
    return one[:-1] + bytes(frame) * (frames - 1) + b";"


FORGED = {
    "many large frames": lambda: gif(4000, 4000, 300),
    "many small frames": lambda: gif(1, 1, 100_000),
    "frames that grow": lambda: gif(16, 16, 3, 30_000, 30_000),
    "a header alone": lambda: png(30_000, 30_000),
    "a few pixels of many": lambda: png(9000, 9000, b"\0" * 9000),
    "sixteen bits": lambda: png(1000, 1000, bytes(1000 * (1000 * 8 + 1)), b"\x10\x06\0\0\0"),
    "a line": lambda: png(1, 80_000_000),
    "no pixels": lambda: png(0, 0),
    "cut off": lambda: encoded(picture(0, 400, 400))[:-99],
    "another kind": lambda: encoded(picture(0), "TIFF"),
    "nothing": lambda: b"",
}
"""By what is wrong, or odd."""


@cache
def forged(what: str) -> bytes:
    """One of these."""
    return FORGED[what]()
