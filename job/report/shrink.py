"""Shrinks pictures. Pages run this module as a program, so that decoding cannot take their memory or time.

The program reads a line `BYTES MOST_BYTES WIDEST_PIXELS` and a picture of that many bytes, again and again. For each it
writes a line: a data URI, or an error.
"""

from __future__ import annotations

import resource
import signal
import sys
from base64 import b64encode
from io import BytesIO
from math import prod, sqrt

from PIL import Image, ImageSequence

MOST_FRAMES, MOST_PIXELS = 1000, 89_478_485
"""Limits of a picture; the pixels are those of all frames together, with Pillow's limit for one image."""
MEMORY_BYTES, SECONDS = 1 << 30, 20
"""Limits of the program: address space, and processor time for each picture."""


def shrunk(data: bytes, most_bytes: int, widest_pixels: int) -> str:
    """Returns a PNG, or the animation of a GIF, as the data URI of a WebP of at most about `most_bytes`.

    Raises:
        ValueError: it has more frames or pixels than are shown.
        OSError, SyntaxError: it is damaged, or not a picture.
    """
    # Runs have no other formats, and some decoders allocate memory before they know the size.
    with Image.open(BytesIO(data), formats=("PNG", "GIF")) as picture:
        size, count = picture.size, getattr(picture, "n_frames", 1)
        if count > MOST_FRAMES or count * prod(size) > MOST_PIXELS:
            raise ValueError(f"it has {count:,} × {size[0]:,} × {size[1]:,} pixels; {MOST_PIXELS:,} are the most")
        width = min(widest_pixels, size[0])
        # Frames are resized one at a time: hundreds of whole ones would not fit into memory.
        frames = [_resized(frame.convert("RGB"), width) for frame in ImageSequence.Iterator(picture)]
        milliseconds = picture.info.get("duration", 200)
    more = {"save_all": True, "duration": milliseconds, "loop": 0} if len(frames) > 1 else {}
    while True:
        file = BytesIO()
        frames[0].save(file, "WEBP", quality=75, method=2, append_images=frames[1:], **more)
        over = file.tell() / most_bytes
        if over <= 1 or width == 1:
            return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
        # Bytes grow with pixels. A lower quality instead would be visible.
        width = int(0.95 * width / sqrt(over)) or 1
        frames = [_resized(frame, width) for frame in frames]


def _resized(frame: Image.Image, width: int) -> Image.Image:
    size = width, max(1, round(frame.height * width / frame.width))
    return frame if frame.size == size else frame.resize(size, Image.Resampling.HAMMING)


def main() -> None:
    """Shrinks pictures until the input ends; one that exceeds `SECONDS`, or crashes the decoder, ends the process."""
    # macOS refuses such a limit.
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while line := sys.stdin.buffer.readline():
        size_bytes, most_bytes, widest_pixels = map(int, line.split())
        # Counts processor time, so that a busy machine loses no pictures. Its signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = shrunk(sys.stdin.buffer.read(size_bytes), most_bytes, widest_pixels)
        # For broken files decoders raise anything from SyntaxError to ZeroDivisionError.
        except Exception as error:
            # Pillow's message ends with the address of a Python object.
            answer = " ".join(str(error).partition(" <_io")[0].split()) or type(error).__name__
        print(answer, flush=True)
