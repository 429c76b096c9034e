"""A picture made small. As a program it does so for others: what a picture costs is never theirs.

For each line of its input, `BYTES MOST_BYTES WIDEST_PIXELS`, and the bytes after that, it writes a line of JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from base64 import b64encode
from contextlib import suppress
from io import BytesIO
from math import prod, sqrt

from PIL import Image, ImageSequence, UnidentifiedImageError

MOST_FRAMES, MOST_PIXELS = 1000, 89_478_485
"""Of a picture; pixels of all its frames together, which is Pillow's own limit for one."""
NARROWEST_PIXELS = 32
MEMORY_BYTES, SECONDS = 1 << 30, 20
"""Of a process that does this: a picture that needs more ends it."""


def small(data: bytes, most_bytes: int, widest_pixels: int) -> str:
    """Returns a PNG, or the animation of a GIF, as the data URI of a WebP of about so many bytes at most.

    Raises:
        ValueError: it has more frames or pixels than are shown, or other sizes than it says.
        OSError, SyntaxError: it is damaged, or something else.
    """
    # No other kind is written into a run's folder, and some decoders take memory before they tell a size.
    with Image.open(BytesIO(data), formats=("PNG", "GIF")) as picture:
        size, count = picture.size, getattr(picture, "n_frames", 1)
        if count > MOST_FRAMES or count * prod(size) > MOST_PIXELS:
            most = f"at most {MOST_FRAMES:,} frames and {MOST_PIXELS:,} pixels in all are shown"
            raise ValueError(f"it has {count:,} × {size[0]:,} × {size[1]:,} pixels: {most}")
        width = min(widest_pixels, size[0])
        frames = list[Image.Image]()
        for frame in ImageSequence.Iterator(picture):
            if frame.size != size:
                raise ValueError("its frames are larger than it says")
            # One at a time: hundreds of whole frames would not fit into the memory.
            frames.append(_resized(frame.convert("RGB"), width))
        milliseconds = picture.info.get("duration", 200)
    more = {"save_all": True, "duration": milliseconds, "loop": 0} if len(frames) > 1 else {}
    while True:
        for quality in (82, 60):
            file = BytesIO()
            frames[0].save(file, "WEBP", quality=quality, method=2, append_images=frames[1:], **more)
            over = file.tell() / most_bytes
            if over <= 1 or width <= NARROWEST_PIXELS:
                return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
            if over > 1.5:
                break
        # Fewer pixels where a lower quality would show; bytes grow with them.
        width = max(NARROWEST_PIXELS, int(0.95 * width / sqrt(over)))
        frames = [_resized(frame, width) for frame in frames]


def _resized(frame: Image.Image, width: int) -> Image.Image:
    size = width, max(1, round(frame.height * width / frame.width))
    return frame if frame.size == size else frame.resize(size, Image.Resampling.HAMMING)


def main() -> None:
    """Answers until its input ends; a picture that takes too long ends it, as one that a decoder stumbles over does."""
    # Some systems have no such limit.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while line := sys.stdin.buffer.readline():
        size_bytes, most_bytes, widest_pixels = map(int, line.split())
        data = sys.stdin.buffer.read(size_bytes)
        # Of the processor: a machine that others use is no reason to leave out a picture.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = {"src": small(data, most_bytes, widest_pixels)}
        # Decoders meet broken files with anything from SyntaxError to ZeroDivisionError, and MemoryError is none.
        except UnidentifiedImageError:
            answer = {"why": "it is neither a PNG nor a GIF, or damaged from its beginning"}
        except Exception as error:
            answer = {"why": " ".join(str(error).split()) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
