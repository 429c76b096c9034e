"""Converts one image: from a source's file to the PNG in a shard, and from there to the array for training.

Crop and filter change an FID more than most methods do, so both are part of a dataset's index.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features

from ddpm.image_size import ImageSize
from job.exits import BadDataError, BadRequestError

FILTERS = ("lanczos", "bicubic", "bilinear", "box")
PIXEL_LIMIT = 89_478_485
"""Pillow's limit (a quarter of a gigabyte as RGB): a file of a few kilobytes may decode to more than the memory."""

# Pillow would pass other formats to Ghostscript and other interpreters, which must not read strangers' files.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_NO_PACKED_IMAGE = "an image is damaged, or not a PNG"
_CROP = re.compile(r"center|center:(?P<side>[1-9]\d{0,5})|squash|(?P<box>\d{1,6},\d{1,6},[1-9]\d{0,5},[1-9]\d{0,5})")
_RANGE = re.compile(r"(-?\d{1,10}),(-?\d{1,10})")
_SIGNIFICANT_BITS = re.compile(rb"\0\0\0[\1-\4]sBIT([\1-\x10]{1,4})")
_DEEP = re.compile(r"(?:RGB|RGBA|RGBX|CMYK);16[LBN]")
"""Pillow's layouts of 16 bits of which it also reads the lower bytes, as those of the other byte order."""
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
        channels: 3 for RGB, 1 for grey (ITU-R 601-2 luma).
        min_side: images with a shorter side under this many pixels are rejected.
        pixel_range: `LOW,HIGH`, which integers of more than 8 bits become 0 and 255; empty for what each file says.
    """

    size: ImageSize
    crop: str
    resize_filter: str
    channels: int
    min_side: int
    pixel_range: str = ""

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
        if self.channels not in (1, 3):
            raise BadRequestError(f"{self.channels} channels: use 3 for colour or 1 for grey")
        if self.pixel_range and not self.levels:
            raise BadRequestError(f"--range {self.pixel_range!r}: use LOW,HIGH, whole numbers such as 0,4095")

    @property
    def levels(self) -> tuple[int, int] | None:
        """Returns LOW and HIGH of `pixel_range`; None without a valid one."""
        match = _RANGE.fullmatch(self.pixel_range)
        return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None

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


def prepare(encoded: bytes, recipe: Recipe, converted: Counter[str] | None = None) -> np.ndarray:
    """Decodes an image file, turns it upright, crops and resizes it.

    Args:
        encoded: the file.
        recipe: the size, and how the image gets it.
        converted: counts how the pixels changed: `grey` into colour, `colour` into grey, `CMYK`, `transparent`.

    Returns:
        uint8 [H, W, channels].

    Raises:
        RejectedImageError: the image is unreadable, truncated, too small or too large, or the crop is outside.
        UndecidedImageError: it has more than 8 bits per channel, and their range is unknown.
    """
    try:
        file = _opened(encoded)
        image = ImageOps.exif_transpose(_in_eight_bits(file, encoded, recipe.levels))
        if min(image.size) < recipe.min_side:
            width, height = file.size
            raise RejectedImageError(f"has {width}×{height} pixels, under --min-side={recipe.min_side}")
        box = recipe.box(*image.size)
        image = _in_channels(image.crop(box), recipe.channels, Counter() if converted is None else converted)
    except RejectedImageError:
        raise
    except UnidentifiedImageError:
        raise RejectedImageError("is damaged at its beginning, or has an unknown format") from None
    # For damaged files decoders raise anything from SyntaxError to ZeroDivisionError, with the same meaning.
    except Exception as error:
        raise RejectedImageError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None
    size, resampling = recipe.size, Image.Resampling[recipe.resize_filter.upper()]
    image = image.resize((size.width, size.height), resampling, reducing_gap=None)
    return np.asarray(image).reshape(*size.shape, recipe.channels)


def are_grey(files: Iterable[bytes]) -> bool:
    """Returns whether some of these image files can be read, and none of them has colours."""
    found = False
    for encoded in files:
        # As in `prepare`.
        with suppress(Exception):
            if not _is_grey(_opened(encoded)):
                return False
            found = True
    return found


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


def _in_eight_bits(image: ImageFile.ImageFile, encoded: bytes, levels: tuple[int, int] | None) -> Image.Image:
    """Decodes an image, and maps integers of more than 8 bits from their range, by default the file's, to 0 … 255."""
    layout, maxval = _layout(image)
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image)
    elif (";16" in layout and image.format in ("PNG", "TIFF")) or maxval == 65535:
        # Pillow reads the upper bytes alone.
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(_of_lower_bytes(encoded, layout))
    else:
        return image
    colours = values[..., :3] if image.mode == "RGBA" else values
    if maxval and maxval != 65535:
        # Pillow scales it to 65535.
        levels = 0, 65535
    if not (levels := levels or _own_range(image, encoded, colours)):
        low, high = int(colours.min()), int(colours.max())
        example = f"--range {min(0, low)},{max(255, (1 << high.bit_length()) - 1)}"
        raise UndecidedImageError(
            f"has more than 8 bits, with values from {low:,} to {high:,}, and does not say which are black and white: "
            f"pack with --range LOW,HIGH, such as {example}, or save it with 8 bits"
        )
    low, high = levels
    scaled = np.empty(values.shape, np.uint8)
    # Floats of a whole image would take gigabytes.
    for row, of_row in zip(scaled, values, strict=True):
        row[...] = np.rint((of_row.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255)
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


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, channels] as a PNG for a shard."""
    file = io.BytesIO()
    # Run-length coding of filtered rows: 4 % smaller and 20 % faster for 64×64 photographs than deflate at level 1.
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def codec_versions() -> str:
    """Returns the versions of the decoders and encoders, which determine the bytes of a packed image."""
    libraries = ("jpg", "libjpeg_turbo", "zlib", "zlib_ng", "webp", "avif", "libtiff")
    versions = [f"pillow {features.version('pil')}", *(f"{name} {features.version(name)}" for name in libraries)]
    return " ".join([*versions, f"heif {metadata.version('pi-heif')}"])


def decode(encoded: bytes, channels: int, size: ImageSize) -> np.ndarray:
    """Decodes a packed image without holding the GIL.

    Args:
        encoded: a PNG.
        channels: 3 or 1.
        size: the size that it must have.

    Returns:
        uint8 [H, W, channels].

    Raises:
        BadDataError: the bytes are not a PNG, or have another size.
    """
    import torch

    if not encoded.startswith(_PNG_MAGIC) or encoded[12:16] != b"IHDR":
        raise BadDataError(_NO_PACKED_IMAGE)
    # A decoder would allocate memory for any size in the header.
    width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
    if (height, width) != size.shape:
        raise BadDataError(f"it is {width}×{height} pixels in a dataset of {size.words}")
    try:
        # torchvision's `ImageReadMode`s equal the numbers of channels.
        image: torch.Tensor = _decoder()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), channels)
    except RuntimeError:
        raise BadDataError(_NO_PACKED_IMAGE) from None
    return image.permute(1, 2, 0).numpy()


def encode_latents(moments: np.ndarray) -> bytes:
    """Encodes mean and log-variance, float16 [2 C, h, w], as an `.npy` for a shard."""
    return _npy_header(moments.shape) + moments.astype("<f2").tobytes()


def decode_latents(encoded: bytes, channels: int, size: ImageSize) -> np.ndarray:
    """Decodes packed latents of C = `channels`.

    Returns:
        uint8 [h, w, 4 C]: the bytes of float16 [h, w, 2 C], mean and log-variance.

    Raises:
        BadDataError: the bytes are not an `.npy` of this shape, or not finite.
    """
    shape = (2 * channels, *size.shape)
    header, size_bytes = _npy_header(shape), 2 * math.prod(shape)
    # `np.load` would allocate memory for any size in the header, or run a pickle.
    if len(encoded) != len(header) + size_bytes or not encoded.startswith(header):
        raise BadDataError(f"it holds no latents of {channels} channels and {size.words}")
    moments = np.frombuffer(encoded, "<f2", offset=len(header)).reshape(shape)
    if not np.isfinite(moments).all():
        raise BadDataError("its latents are not finite")
    return np.ascontiguousarray(moments.transpose(1, 2, 0)).view(np.uint8)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()


@functools.cache
def _decoder() -> Callable[..., Any]:
    """Returns torchvision's `decode_png`; to import the whole package would take another second."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).glob("image*.so")
    torch.ops.load_library(library)
    return torch.ops.image.decode_png
