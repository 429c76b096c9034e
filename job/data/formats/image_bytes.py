"""Image files in memory: the suffix that their first bytes stand for, and the file that an array of pixels becomes."""

from __future__ import annotations

import numpy as np

START_BYTES = 16
"""How many of a file's first bytes tell its format."""

_STARTS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def suffix_of(start: bytes) -> str:
    """Returns the suffix of an image file that begins with these bytes; an empty string for other files."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return ".webp"
    if start[4:8] == b"ftyp":
        return ".avif" if start[8:11] == b"avi" else ".heic"
    return next((suffix for magic, suffix in _STARTS.items() if start.startswith(magic)), "")


def netpbm(pixels: np.ndarray) -> bytes:
    """Returns uint8 [height, width, 1 or 3] as a PGM or PPM file."""
    height, width, channels = pixels.shape
    return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + pixels.tobytes()


def netpbm_suffix(channels: int) -> str:
    """Returns the suffix of such a file."""
    return ".ppm" if channels == 3 else ".pgm"
