"""Text on pictures: captions as wide as their places, and titles."""

from __future__ import annotations

from functools import cache
from math import inf
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WHITE, INK = (255, 255, 255), (64, 64, 64)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font of all texts, `size` pixels high."""
    import matplotlib

    # Pillow's own font draws boxes for é, β and all else beyond ASCII; this one is also that of the plots.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def text_size(tile_width: int) -> int:
    """Returns the size of the text beside tiles of this width, in pixels."""
    return min(max(tile_width // 7, 12), 18)


def put_text(
    canvas: Image.Image, xy: tuple[float, float], text: str, *, size: int, anchor: str, limit: float = inf
) -> None:
    """Writes a text on a picture at `xy`, smaller or cut if it is wider than `limit` pixels."""
    while size > 9 and font(size).getlength(text) > limit:
        size -= 1
    while len(text) > 1 and font(size).getlength(text) > limit:
        text = text[:-2] + "…"
    ImageDraw.Draw(canvas).text(xy, text, fill=INK, font=font(size), anchor=anchor)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Returns the picture with a title above it, which breaks into lines at ` · `."""
    if not title:
        return picture
    size, margin = 13, 8
    width = max(picture.width, 240)
    lines = [""]
    for part in title.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if lines[-1] and font(size).getlength(longer) > width - 2 * margin:
            lines.append(part)
        else:
            lines[-1] = longer
    step = round(1.5 * size)
    canvas = Image.new("RGB", (width, picture.height + len(lines) * step + margin), WHITE)
    canvas.paste(picture, (0, canvas.height - picture.height))
    for number, line in enumerate(lines):
        put_text(
            canvas, (margin, margin / 2 + step * (number + 0.5)), line, size=size, anchor="lm", limit=width - 2 * margin
        )
    return canvas
