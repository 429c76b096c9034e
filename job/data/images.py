"""Converts one image of a source: from its file to the array that is packed.

Crop and filter change an FID more than most methods do, so both are part of a dataset's index.
"""

from __future__ import annotations

import functools
import io
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ddpm.catalogue import FILTERS
from ddpm.image_size import ImageSize
from job.data.codecs import NPY_MAGIC, decode_npy
from job.exits import BadRequestError, needs_extra

MOST_CHANNELS = 16
PIXEL_LIMIT = 89_478_485
"""Pillow's limit (a quarter of a gigabyte as RGB): a file of a few kilobytes may decode to more than the memory."""

# Pillow would pass other formats to Ghostscript and other interpreters, which must not read strangers' files.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
_CROP = re.compile(r"center|center:(?P<side>[1-9]\d{0,5})|squash|(?P<box>\d{1,6},\d{1,6},[1-9]\d{0,5},[1-9]\d{0,5})")
_RANGE = re.compile(r"(-?\d{1,10}),(-?\d{1,10})")
_SIGNIFICANT_BITS = re.compile(rb"\0\0\0[\1-\4]sBIT([\1-\x10]{1,4})")
_DEEP = re.compile(r"(?:RGB|RGBA|RGBX|CMYK);16[LBN]")
"""Pillow's layouts of 16 bits of which it also reads the lower bytes, as those of the other byte order."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*")
_ORIENTATION, _SIDEWAYS = 0x0112, 5
_BITS_PER_SAMPLE, _MIN_SAMPLE_VALUE, _MAX_SAMPLE_VALUE = 258, 280, 281

# Pillow's warnings of large images, which are rejected here, and of broken EXIF would break a progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.")


class RejectedImageError(Exception):
    """The reason why an image is left out of the dataset."""


class UndecidedImageError(RejectedImageError):
    """The reason why a person has to choose an option before such images are packed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each image is cropped and resized.

    Attributes:
        size: of the result.
        crop: `center` (the largest centred box of the result's shape), `center:SIDE` (the largest one in the centred
            square of this side), `squash` (everything), or `LEFT,TOP,WIDTH,HEIGHT`, in pixels of the upright image.
        resize_filter: one of `FILTERS`.
        channels: 3 for RGB, 1 for grey (ITU-R 601-2 luma), others up to `MOST_CHANNELS` as they are.
        min_side: images with a shorter side under this many pixels are rejected.
        pixel_range: `LOW,HIGH`, which integers of more than 8 bits become 0 and the largest value; empty for what each
            file says.
        bits: 8 or 16, of a value of the result.
    """

    size: ImageSize
    crop: str
    resize_filter: str
    channels: int
    min_side: int
    pixel_range: str = ""
    bits: int = 8

    def __post_init__(self) -> None:
        """Raises `BadRequestError` for an invalid value."""
        if not (crop := _CROP.fullmatch(self.crop)):
            raise BadRequestError(f"--crop {self.crop!r}: use center, center:SIDE, squash or LEFT,TOP,WIDTH,HEIGHT")
        if crop["box"] and not self.size.is_square:
            left, top, *sides = map(int, self.crop.split(","))
            # The box of a preset is a square, which would be squashed in silence.
            if 2 * abs(sides[0] * self.size.height - sides[1] * self.size.width) > max(self.size.shape):
                box = ",".join(map(str, (left, top, *self._largest_in(*sides))))
                raise BadRequestError(f"--crop {self.crop} is not of the shape of {self.size}: use center, or {box}")
        if self.resize_filter not in FILTERS:
            raise BadRequestError(f"unknown resize filter {self.resize_filter!r}: use {', '.join(FILTERS)}")
        if not 1 <= self.channels <= MOST_CHANNELS:
            said = f"use 3 for colour, 1 for grey, or as many as arrays and TIFF have, up to {MOST_CHANNELS}"
            raise BadRequestError(f"{self.channels} channels: {said}")
        if self.bits not in (8, 16):
            raise BadRequestError(f"--bits {self.bits}: use 8 or 16")
        if self.pixel_range and not self.levels:
            raise BadRequestError(f"--range {self.pixel_range!r}: use LOW,HIGH, whole numbers such as 0,4095")

    @property
    def levels(self) -> tuple[int, int] | None:
        """Returns LOW and HIGH of `pixel_range`; None without a valid one."""
        match = _RANGE.fullmatch(self.pixel_range)
        return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Returns uint8 or uint16."""
        return np.dtype(np.uint16 if self.bits == 16 else np.uint8)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns the crop (left, top, right, bottom) of an image of this size.

        Raises:
            RejectedImageError: the crop is outside the image.
        """
        crop = _CROP.fullmatch(self.crop)
        assert crop is not None
        if self.crop == "squash":
            return 0, 0, width, height
        if crop["box"]:
            left, top, box_width, box_height = map(int, self.crop.split(","))
        else:
            within = (int(crop["side"]),) * 2 if crop["side"] else (width, height)
            box_width, box_height = self._largest_in(*within)
            left, top = (width - box_width) // 2, (height - box_height) // 2
        if left < 0 or top < 0 or left + box_width > width or top + box_height > height:
            raise RejectedImageError(f"crop {self.crop} is outside of its {width}×{height} pixels")
        return left, top, left + box_width, top + box_height

    def _largest_in(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height of the largest box of the result's shape in one of these sides."""
        scale = min(Fraction(width, self.size.width), Fraction(height, self.size.height))
        return max(1, round(scale * self.size.width)), max(1, round(scale * self.size.height))


def prepare(
    encoded: bytes, recipe: Recipe, converted: Counter[str] | None = None, of: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes an image file, turns it upright, crops and resizes it.

    Args:
        encoded: the file.
        recipe: the size, and how the image gets it.
        converted: counts how the pixels changed: `grey` into colour, `colour` into grey, `CMYK`, `transparent`; and in
            datasets of 16 bits `8-bit`, and `clipped` to the range.
        of: width and height of the image whose condition this is: it gets the same crop.

    Returns:
        [H, W, channels] of the recipe's dtype: 0 and its largest value are the ends of the range.

    Raises:
        RejectedImageError: the image is unreadable, truncated, too small or too large, the crop is outside, or a
            condition has other proportions than its image.
        UndecidedImageError: it has more than 8 bits per channel, and their range is unknown.
    """
    counted = Counter[str]() if converted is None else converted
    is_usual = recipe.bits == 8 and recipe.channels in (1, 3)
    try:
        if is_usual:
            planes = [ImageOps.exif_transpose(_in_eight_bits(_opened(encoded), encoded, recipe.levels))]
        else:
            planes = _planes(encoded, recipe, counted)
        width, height = planes[0].size
        if min(width, height) < recipe.min_side:
            raise RejectedImageError(f"has {width}×{height} pixels, under --min-side={recipe.min_side}")
        whole: tuple[float, float, float, float] | None = None
        if of is None:
            box = recipe.box(width, height)
            planes = [plane.crop(box) for plane in planes]
        elif abs(width * of[1] - height * of[0]) > max(width, height, *of):
            said = f"has {of[0]}×{of[1]} pixels, and its condition {width}×{height}"
            raise RejectedImageError(f"{said}, which cannot be the same place")
        else:
            left, top, right, bottom = recipe.box(*of)
            whole = left * width / of[0], top * height / of[1], right * width / of[0], bottom * height / of[1]
        if is_usual:
            planes = [_in_channels(planes[0], recipe.channels, counted)]
    except (RejectedImageError, BadRequestError):
        raise
    except UnidentifiedImageError:
        raise RejectedImageError("is damaged at its beginning, or has an unknown format") from None
    # For damaged files decoders raise anything from SyntaxError to ZeroDivisionError, with the same meaning.
    except Exception as error:
        raise RejectedImageError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None
    size, resampling = recipe.size, Image.Resampling[recipe.resize_filter.upper()]
    resized = [plane.resize((size.width, size.height), resampling, whole, reducing_gap=None) for plane in planes]
    pixels = np.stack([np.asarray(plane) for plane in resized], axis=-1).reshape(*size.shape, recipe.channels)
    return pixels if is_usual else np.rint(pixels).clip(0, np.iinfo(recipe.dtype).max).astype(recipe.dtype)


def upright_size(encoded: bytes) -> tuple[int, int]:
    """Returns the width and height of an image file that `prepare` has read."""
    if (values := _array_in(encoded)) is not None:
        return values.shape[1], values.shape[0]
    image = _opened(encoded)
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS else (width, height)


def is_mask(encoded: bytes) -> bool:
    """Returns whether an image file has a palette or one bit, whose values stand for classes."""
    with suppress(Exception):
        return _opened(encoded).mode in ("P", "1")
    return False


class Found(NamedTuple):
    """The channels, bits and range that the first images of a source have."""

    channels: int = 3
    """1 if they are all grey, or those of arrays and TIFF."""
    bits: int = 8
    """16 if they all have more than 8."""
    pixel_range: str = ""
    """LOW,HIGH of more than 8 bits, if they agree on it, or fill more than half of 16 bits."""


def found_in(files: Iterable[bytes]) -> Found:
    """Returns what these image files tell; those that cannot be read tell nothing.

    Raises:
        BadRequestError: a library is not installed.
    """
    channels, depths, ranges, highest = list[int](), set[int](), set[tuple[int, int] | None](), 0
    for encoded in files:
        try:
            values, own = _array_in(encoded), None
            if values is not None:
                there = values.shape[2]
            else:
                image = _opened(encoded)
                values, own = _deep_samples(image, encoded)
                there = 1 if _is_grey(image) else 3
            channels.append(there)
            depths.add(16 if values is not None and values.itemsize > 1 else 8)
            if values is not None and values.itemsize > 1:
                ranges.add(own)
                highest = max(highest, int(values.max()))
        except BadRequestError:
            raise
        # As in `prepare`.
        except Exception:  # noqa: S112
            continue
        if 8 in depths and 3 in channels:
            break
    if not channels:
        return Found()
    said = next(iter(ranges)) if len(ranges) == 1 else None
    if ranges == {None} and 1 << 15 <= highest < 1 << 16:
        said = 0, 65535
    in_all = channels[0] if len({*channels}) == 1 else 3
    return Found(in_all, min(depths), "{},{}".format(*said) if said and depths == {16} else "")


def _opened(encoded: bytes) -> ImageFile.ImageFile:
    """Returns an image whose pixels are not decoded yet."""
    formats = (*_FORMATS, *_heif()) if encoded[4:8] == b"ftyp" else _FORMATS
    image = Image.open(io.BytesIO(encoded), formats=formats)
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise RejectedImageError(f"has {width}×{height} pixels, more than the limit of {PIXEL_LIMIT:,}")
    return image


@functools.cache
def _heif() -> tuple[str, ...]:
    """Registers the reader of HEIF, the format of many telephones, and returns its name."""
    import pi_heif

    pi_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return ("HEIF",)


def _planes(encoded: bytes, recipe: Recipe, counted: Counter[str]) -> list[Image.Image]:
    """Decodes an image to a plane of float32 for each channel of the recipe, in the range of its dtype, and upright."""
    values = _array_in(encoded) if recipe.channels not in (1, 3) else None
    own, info, mode = None, {}, ""
    if values is None:
        file = _opened(encoded)
        values, own = _deep_samples(file, encoded)
        if values is None:
            image = ImageOps.exif_transpose(file)
            if len(image.getbands()) != recipe.channels or image.mode == "P":
                image = _in_channels(image, 3 if recipe.channels == 3 else 1, counted)
            values = np.asarray(image)
        else:
            info, mode = file.info, file.mode
    values = values.reshape(*values.shape[:2], -1)
    is_transparent = mode == "RGBA" and recipe.channels != 4
    colours, levels = values[..., :3] if is_transparent else values, (0, 255)
    if values.itemsize > 1:
        levels = recipe.levels or own or _undecided(colours)
        counted["clipped"] += bool(colours.min() < levels[0] or colours.max() > levels[1])
    elif recipe.bits == 16:
        counted["8-bit"] += 1
    scaled: np.ndarray = _scaled(colours, levels, recipe.dtype).astype(np.float32)
    if is_transparent:
        white, share = np.iinfo(recipe.dtype).max, values[..., 3:] / np.float32(65535)
        scaled = white + (scaled - white) * share
        counted["transparent"] += bool(share.min() < 1)
    if (there := scaled.shape[2]) != recipe.channels:
        if {there, recipe.channels} != {1, 3}:
            raise RejectedImageError(f"has {there} channels, and the dataset {recipe.channels}")
        counted["grey" if there == 1 else "colour"] += 1
        scaled = scaled @ np.array([[0.299], [0.587], [0.114]], np.float32) if there == 3 else scaled.repeat(3, axis=2)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(scaled, 2, 0)]
    for plane in planes:
        plane.info = info
    return [ImageOps.exif_transpose(plane) for plane in planes]


def _array_in(encoded: bytes) -> np.ndarray | None:
    """Returns the integers [H, W, C] of an `.npy`, or of a TIFF of more channels than Pillow reads; None for others.

    Raises:
        RejectedImageError: it has other numbers or axes.
        BadRequestError: the library for such a TIFF is not installed.
    """
    if encoded.startswith(NPY_MAGIC):
        file = io.BytesIO(encoded)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return decode_npy(encoded, shape, dtype)
    if encoded[:4] not in _TIFF_MAGIC:
        return None
    with suppress(UnidentifiedImageError):
        image = _opened(encoded)
        if getattr(image, "n_frames", 1) == 1 and image.mode != "RGBX":
            return None
    with needs_extra("tiff", "a TIFF of several pages, or of more than three channels"):
        import tifffile
    # Its warnings of damaged tags would break a progress bar.
    logging.getLogger("tifffile").disabled = True
    with tifffile.TiffFile(io.BytesIO(encoded)) as tiff:
        series = tiff.series[0]
        if series.size > PIXEL_LIMIT or series.dtype not in (np.uint8, np.uint16):
            raise RejectedImageError(f"has {series.dtype} {[*series.shape]}: save it as uint8 or uint16")
        values, others = series.asarray(), [axis for axis, name in enumerate(series.axes) if name not in "YX"]
    if values.ndim - len(others) != 2 or len(others) > 1:
        raise RejectedImageError(f"has the axes {series.axes}, and not height, width and channels")
    return np.moveaxis(values, others[0], 2) if others else values[..., None]


def _deep_samples(image: ImageFile.ImageFile, encoded: bytes) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """Decodes an image of more than 8 bits, and returns its integers and the file's own range; None of 8 bits."""
    layout, maxval = _layout(image)
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image)
    elif (";16" in layout and image.format in ("PNG", "TIFF")) or maxval == 65535:
        # Pillow reads the upper bytes alone.
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(_of_lower_bytes(encoded, layout))
    else:
        return None, None
    if maxval and maxval != 65535:
        # Pillow scales it to 65535.
        return np.rint(values * (maxval / 65535)).astype(np.uint16), (0, maxval)
    return values, _own_range(image, encoded, values[..., :3] if image.mode == "RGBA" else values)


def _undecided(values: np.ndarray) -> tuple[int, int]:
    """Raises `UndecidedImageError` for integers whose range is unknown."""
    low, high = int(values.min()), int(values.max())
    example = f"--range {min(0, low)},{max(255, (1 << high.bit_length()) - 1)}"
    raise UndecidedImageError(
        f"has more than 8 bits, with values from {low:,} to {high:,}, and does not say which are black and white: "
        f"pack with --range LOW,HIGH, such as {example}, or save it with 8 bits"
    )


def _scaled(values: np.ndarray, levels: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """Returns integers mapped from their range to that of a dtype, and clamped."""
    (low, high), most = levels, np.iinfo(dtype).max
    scaled = np.empty(values.shape, dtype)
    # Floats of a whole image would take gigabytes.
    for row, of_row in zip(scaled, values, strict=True):
        row[...] = np.rint((of_row.astype(np.float64) - low) * (most / (high - low))).clip(0, most)
    return scaled


def _in_eight_bits(image: ImageFile.ImageFile, encoded: bytes, levels: tuple[int, int] | None) -> Image.Image:
    """Decodes an image, and maps integers of more than 8 bits from their range, by default the file's, to 0 … 255."""
    values, own = _deep_samples(image, encoded)
    if values is None:
        return image
    if image.format == "PPM" and own:
        levels = own
    colours = values[..., :3] if image.mode == "RGBA" else values
    scaled = _scaled(values, levels or own or _undecided(colours), np.dtype(np.uint8))
    if image.mode == "RGBA":
        scaled[..., 3] = values[..., 3] >> 8
    mode = "L" if image.mode.startswith("I") else image.mode
    converted = Image.frombytes(mode, image.size, scaled.tobytes())
    converted.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return converted


def _layout(image: ImageFile.ImageFile) -> tuple[str, int]:
    """Returns Pillow's name of how the samples lie in a file, such as `RGB;16B`, and the Maxval of a PGM or PPM."""
    arguments = image.tile[0].args if image.tile else ""
    layout, *more = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    return str(layout), more[-1] if more and image.format == "PPM" else 0


def _of_lower_bytes(encoded: bytes, layout: str) -> Image.Image:
    """Decodes the lower bytes of 16 bits."""
    if not _DEEP.fullmatch(layout):
        raise RejectedImageError(f"has 16 bits in a layout that is not read ({layout}): save it with 8 bits")
    native = "L" if sys.byteorder == "little" else "B"
    other = layout[:-1] + ("B" if layout[-1].replace("N", native) == "L" else "L")
    image = _opened(encoded)
    image.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *(tile.args or ())[1:]))
        for tile in image.tile
    ]
    image.load()
    return image


def _own_range(image: ImageFile.ImageFile, encoded: bytes, values: np.ndarray) -> tuple[int, int] | None:
    """Returns the values of black and white that the file states; None without any.

    A PNG whose chunk sBIT says b bits has them scaled to 16 (Portable Network Graphics, 3rd edition, 12.4), so that
    values below 2^b are multiples of 2^(16 - b). Some programs write b bits as they are.
    """
    if image.format == "PNG" and (found := _SIGNIFICANT_BITS.search(encoded, 0, encoded.find(b"IDAT"))):
        limit = 1 << max(found[1])
        if values.max() >= limit or not values.any() or limit == 1 << 16:
            return 0, 65535
        return (0, limit - 1) if (values % ((1 << 16) // limit)).any() else None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_MAX_SAMPLE_VALUE):
            low, high = int(np.min(tags.get(_MIN_SAMPLE_VALUE, 0))), int(np.max(tags[_MAX_SAMPLE_VALUE]))
            return (low, high) if low < high else None
        if (bits := max(tags[_BITS_PER_SAMPLE])) < 16:
            return 0, (1 << bits) - 1
    return None


def _is_grey(image: Image.Image) -> bool:
    """Returns whether an image has no colours by its mode or its palette."""
    if image.mode == "P":
        palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;")


def _in_channels(image: Image.Image, channels: int, converted: Counter[str]) -> Image.Image:
    """Returns the image with 8 bits per channel, transparency replaced by white."""
    if image.mode == "F":
        raise RejectedImageError("has floating-point pixels, whose range is unknown")
    is_grey = _is_grey(image)
    if image.mode == "CMYK":
        converted["CMYK"] += 1
    if is_grey == (channels == 3):
        converted["grey" if is_grey else "colour"] += 1
    if image.has_transparency_data:
        image = image.convert("RGBA")
        converted["transparent"] += image.getchannel("A").getextrema() != (255, 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
