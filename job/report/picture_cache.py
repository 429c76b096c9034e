"""Pictures as data URIs, small enough that all of a run's pictures fit into one page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from math import prod, sqrt

from PIL import Image, ImageSequence

from job.exits import BadDataError, JobError
from job.store import Store

GRIDS = 60
"""The largest number of grids on a page; of more, evenly spaced ones are chosen."""
OWN_PICTURES = 12
"""The largest number of pictures of `ddpm sample` on a page; it has links to the others."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 28_000, 400_000, 600_000, 150_000
"""Size limits of the pictures, by which a page with all of them, as base64, stays below 5 MB."""
ALL_OWN_BYTES, OWN_BYTES = 600_000, 150_000
"""Those of all pictures of `ddpm sample` together, and of one."""
WIDEST_PIXELS = 1200
MOST_FILE_BYTES = 1 << 27
"""The limit of reading: a longer object counts as truncated."""
MOST_FRAMES, MOST_PIXELS = 1000, 70_000_000
"""Limits of decoding; the pixels are those of all frames together. A grid of 64 images of 1024² is within them, and a
GIF of 12 images of 512². At four bytes a pixel, or eight with transparency, no picture takes a gigabyte.
"""


class PictureCache:
    """A cache of pictures as data URIs, each read and shrunk once: pictures keep their names while a run trains.

    Attributes:
        missing: the reasons why pictures are missing, by URI.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Makes an empty cache; `say` receives messages about pictures that cannot be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()
        self.missing = dict[str, str]()

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """Returns the picture in an object; empty if it is missing or cannot be read."""

        def data() -> bytes:
            with store.open(key) as file:
                return file.read(MOST_FILE_BYTES)

        return self.made((store.uri_of(key), most_bytes, widest_pixels), data)

    def made(self, name: tuple[str, int, int], data: Callable[[], bytes]) -> str:
        """Returns the picture of a name (its source, and the limits of bytes and width); calls `data` if it is new."""
        if name not in self._made:
            self.missing.pop(name[0], None)
            try:
                self._made[name] = _shrunk(data(), *name[1:])
            except Exception as error:
                # A picture that cannot be shown must not fail the page.
                self.missing[name[0]] = str(error) or type(error).__name__
                self._say(f"the page is without {name[0]}: {self.missing[name[0]]}")
                if isinstance(error, BadDataError) or not isinstance(error, JobError | OSError):
                    # A second attempt would fail in the same way.
                    self._made[name] = ""
        return self._made.get(name, "")


def _shrunk(data: bytes, most_bytes: int, widest_pixels: int) -> str:
    """Returns a PNG, or the animation of a GIF, as the data URI of a WebP of at most about `most_bytes`.

    Raises:
        BadDataError: it is damaged, not a picture, or larger than the limits.
    """
    try:
        frames, milliseconds = _frames(data, widest_pixels)
        more = {"save_all": True, "duration": milliseconds, "loop": 0} if len(frames) > 1 else {}
        width = frames[0].width
        while True:
            file = BytesIO()
            frames[0].save(file, "WEBP", quality=75, method=2, append_images=frames[1:], **more)
            over = file.tell() / most_bytes
            if over <= 1 or width == 1:
                return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
            # Bytes grow with pixels. A lower quality instead would be visible.
            width = int(0.95 * width / sqrt(over)) or 1
            frames = [_resized(frame, width) for frame in frames]
    # For broken files decoders raise anything from SyntaxError to ZeroDivisionError.
    except Exception as error:
        # Pillow's message ends with the address of a Python object.
        raise BadDataError(" ".join(str(error).partition(" <_io")[0].split()) or type(error).__name__) from None


def _frames(data: bytes, widest_pixels: int) -> tuple[list[Image.Image], int]:
    """Returns the frames, at most so wide, and the milliseconds of each; decodes only what the headers allow."""
    # Runs have no other formats, and some decoders allocate memory before they know the size.
    with Image.open(BytesIO(data), formats=("PNG", "GIF")) as picture:
        count, frames, width = getattr(picture, "n_frames", 1), list[Image.Image](), min(widest_pixels, picture.width)
        for frame in ImageSequence.Iterator(picture):
            # Frames of a GIF may be larger than the first.
            if count > MOST_FRAMES or count * prod(frame.size) > MOST_PIXELS:
                size = " × ".join(f"{number:,}" for number in (count, *frame.size))
                raise BadDataError(f"it has {size} pixels; {MOST_PIXELS:,} in {MOST_FRAMES:,} frames are the most")
            frames.append(_resized(frame if frame.mode == "RGB" else frame.convert("RGB"), width))
        return frames, picture.info.get("duration", 200)


def _resized(frame: Image.Image, width: int) -> Image.Image:
    return frame.resize((width, max(1, round(frame.height * width / frame.width))), Image.Resampling.HAMMING)


def evenly(count: int, most: int) -> list[int]:
    """Returns at most `most` indices, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
