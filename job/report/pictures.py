"""Pictures small enough that all of a run's fit into one page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO

from PIL import Image, ImageSequence

from job.exits import JobError
from job.store import Store

GRIDS = 60
"""On a page, at most: of more, as many as that, evenly spaced."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 36_000, 400_000, 600_000, 150_000
"""Of a picture, at most: all of them together, as base64, leave a page below 5 MB."""
THUMBNAIL_BYTES, THUMBNAIL_PIXELS = 14_000, 320
WIDEST_PIXELS = 1200


class Shelf:
    """Pictures as data URIs, each read and made small once: none changes under its name while a run goes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is told what could not be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """An object's picture; empty for one that is not there, or cannot be read."""
        return self.made((store.uri_of(key), most_bytes, widest_pixels), lambda: store.read(key).data)

    def made(self, name: tuple[str, int, int], data: Callable[[], bytes]) -> str:
        """A picture by what tells it from all others: where it is from, its bytes at most, and its widest pixels."""
        if name not in self._made:
            try:
                self._made[name] = small(data(), *name[1:])
            except (JobError, OSError, ValueError, SyntaxError) as error:
                # Whatever somebody put in the place of a picture is none, which is no reason for a page to fail.
                why = error if isinstance(error, JobError) else f"it is no picture ({type(error).__name__})"
                self._say(f"the page is without {name[0]}: {why}")
                return ""
        return self._made[name]


def small(data: bytes, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
    """A picture, or an animation, as the data URI of a WebP of about so many bytes at most."""
    with Image.open(BytesIO(data)) as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        milliseconds = picture.info.get("duration", 200)
    encoded = b""
    # Fewer pixels where a lower quality would show.
    for scale in (1.0, 0.7, 0.5, 0.35, 0.25):
        width = min(widest_pixels, round(frames[0].width * scale))
        size = width, max(1, round(frames[0].height * width / frames[0].width))
        scaled = [frame.resize(size, Image.Resampling.LANCZOS) if frame.size != size else frame for frame in frames]
        for quality in (82, 60):
            file = BytesIO()
            more = {"save_all": True, "append_images": scaled[1:], "duration": milliseconds, "loop": 0}
            scaled[0].save(file, "WEBP", quality=quality, method=2, **(more if len(scaled) > 1 else {}))
            encoded = file.getvalue()
            if len(encoded) <= most_bytes:
                return _uri(encoded)
    return _uri(encoded)


def _uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{b64encode(webp).decode()}"


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
