from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ddpm.image_size import ImageSize
from job.data.images import Recipe, RejectedImageError, UndecidedImageError, decode, encode_png, prepare
from job.exits import BadRequestError
from tests.job.some_images import deep_png, deep_tiff, encoded, jpeg, picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def recipe(size=8, crop="center", resize_filter="lanczos", channels=3, min_side=1, pixel_range=""):
    return Recipe(ImageSize.of(size), crop, resize_filter, channels, min_side, pixel_range)


def pixels(file: bytes, channels=3, **options) -> np.ndarray:
    """Prepared, and unharmed by the way through a shard."""
    got = prepare(file, recipe(channels=channels, **options))
    np.testing.assert_array_equal(decode(encode_png(got), channels, ImageSize(*got.shape[:2])), got)
    return got


def flat(mode: str, color, size=8) -> Image.Image:
    return Image.new(mode, (size, size), color)


def test_crop_precedes_pillow_s_resize():
    image = picture(1, 178, 218)
    for crop, box in [
        ("center", (0, 20, 178, 198)),
        ("center:140", (19, 39, 159, 179)),
        ("squash", (0, 0, 178, 218)),
        # Song et al. 2020 (DDIM): 128×128 around row 121, column 89.
        ("25,57,128,128", (89 - 64, 121 - 64, 89 + 64, 121 + 64)),
        ("0,0,178,10", (0, 0, 178, 10)),
    ]:
        for resize_filter in ("lanczos", "bicubic", "bilinear", "box"):
            expected = image.crop(box).resize((64, 64), getattr(Image.Resampling, resize_filter.upper()))
            got = pixels(encoded(image), size=64, crop=crop, resize_filter=resize_filter)
            np.testing.assert_array_equal(got, np.asarray(expected), err_msg=f"{crop} {resize_filter}")
    small = picture(2, 16, 16)
    np.testing.assert_array_equal(pixels(encoded(small), size=16), np.asarray(small))
    # An odd rest goes to the right and the bottom.
    assert (recipe().box(11, 8), recipe().box(8, 13)) == ((1, 0, 9, 8), (0, 2, 8, 10))


def test_a_crop_has_the_shape_of_the_size():
    for (width, height), size, crop, box in [
        # 3:2 of CelebA's 178 columns, and of its 218 rows on their side.
        ((178, 218), "96x64", "center", (0, 49, 178, 168)),
        ((218, 178), "64x96", "center", (49, 0, 168, 178)),
        ((300, 100), "96x64", "center", (75, 0, 225, 100)),
        ((96, 64), "96x64", "center", (0, 0, 96, 64)),
        ((178, 218), "96x64", "center:120", (29, 69, 149, 149)),
        ((178, 218), "64x96", "center:120", (49, 49, 129, 169)),
        ((178, 218), "96x64", "squash", (0, 0, 178, 218)),
        ((178, 218), "96x64", "25,57,128,85", (25, 57, 153, 142)),
    ]:
        image = picture(1, width, height)
        shape = tuple(map(int, size.split("x")))
        expected = image.crop(box).resize(shape, Image.Resampling.LANCZOS)
        got = pixels(encoded(image), size=size, crop=crop)
        np.testing.assert_array_equal(got, np.asarray(expected), err_msg=f"{size} {crop}")
    # However flat the size is, there is a row.
    assert pixels(encoded(picture(1, 64, 64)), size="4096x1").shape == (1, 4096, 3)


def test_exif_orientation_precedes_the_crop():
    upright, turns = picture(3, 8, 12), Image.Transpose
    # How each of the eight orientations is stored (EXIF 2.3, 4.6.4 A): the inverse of what shows it upright.
    for orientation, stored in {
        1: upright,
        2: upright.transpose(turns.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(turns.FLIP_TOP_BOTTOM),
        5: upright.transpose(turns.TRANSPOSE),
        6: upright.transpose(turns.ROTATE_90),
        7: upright.transpose(turns.TRANSVERSE),
        8: upright.transpose(turns.ROTATE_270),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = pixels(encoded(stored, "PNG", exif=exif), size=8, crop="0,4,8,8")
        np.testing.assert_array_equal(got, np.asarray(upright)[4:], err_msg=f"orientation {orientation}")
    for broken in (b"garbage", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"):
        got = pixels(encoded(flat("RGB", (200, 40, 90)), "JPEG", quality=95, exif=b"Exif\0\0" + broken))
        assert np.abs(got.astype(int) - [200, 40, 90]).max() <= 3


def test_every_mode_becomes_rgb_or_grey():
    for number, (file, colour) in enumerate(
        [
            (encoded(flat("RGB", (200, 40, 90))), (200, 40, 90)),
            (encoded(flat("L", 77)), (77, 77, 77)),
            (encoded(flat("1", 1)), (255, 255, 255)),
            (encoded(flat("RGBA", (200, 40, 90, 255))), (200, 40, 90)),
            (encoded(flat("RGBA", (200, 40, 90, 0))), (255, 255, 255)),
            (encoded(flat("RGBA", (200, 40, 90, 51))), (244, 212, 222)),
            (encoded(flat("LA", (100, 51))), (224, 224, 224)),
            (encoded(flat("RGB", (200, 40, 90)).quantize(4)), (200, 40, 90)),
            (encoded(flat("RGB", (200, 40, 90)).quantize(4), "GIF"), (200, 40, 90)),
            (encoded(flat("RGB", (200, 40, 90)).quantize(4), "PNG", transparency=0), (255, 255, 255)),
            (encoded(flat("L", 77), "PNG", transparency=77), (255, 255, 255)),
            (encoded(flat("RGB", (7, 8, 9)), "PNG", transparency=(7, 8, 9)), (255, 255, 255)),
            (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
            (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
            (encoded(flat("RGB", (200, 40, 90)), "BMP"), (200, 40, 90)),
            (encoded(flat("RGB", (200, 40, 90)), "WEBP", lossless=True), (200, 40, 90)),
        ]
    ):
        got = pixels(file)
        assert got.shape == (8, 8, 3)
        assert np.abs(got.astype(int) - colour).max() <= 1, number
    assert (pixels(encoded(flat("RGB", (200, 40, 90))), channels=1) == 94).all()  # .299 R + .587 G + .114 B = 93.5
    assert (pixels(encoded(flat("RGBA", (200, 40, 90, 0))), channels=1) == 255).all()
    assert pixels(encoded(flat("L", 77)), channels=1).shape == (8, 8, 1)
    assert (pixels(encoded(flat("L", 77)), channels=1) == 77).all()


def test_sixteen_bits_are_scaled():
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF", "PPM"):
        for channels in (1, 3):
            got = pixels(encoded(Image.fromarray(levels), kind), channels=channels, pixel_range="0,65535")
            np.testing.assert_array_equal(got[..., -1], np.round(levels / 257), err_msg=kind)


RAMP = np.linspace(0, 4095, 64).round().astype(int).reshape(8, 8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
MASKED = np.dstack([COLOURS, np.where(RAMP < 99, 0, 65535)])
TWELVE = COLOURS * 255 / 4095


DEEP = {
    "a PNG": (deep_png(RAMP), "0,4095", TWELVE[..., :1]),
    "a PNG of other levels": (deep_png(RAMP), "1000,1510", ((RAMP - 1000) / 2).clip(0, 255)[..., None]),
    "its black is below 0": (deep_png(RAMP), "-4095,4095", 127.5 + TWELVE[..., :1] / 2),
    "a PNG in colour": (deep_png(COLOURS), "0,4095", TWELVE),
    "a PNG with transparency": (deep_png(MASKED), "0,4095", np.where(RAMP[..., None] < 99, 255, TWELVE)),
    "sBIT, scaled": (deep_png(RAMP << 4 | RAMP >> 8, 12), "", TWELVE[..., :1]),
    "sBIT, not scaled": (deep_png(RAMP, 12), "", TWELVE[..., :1]),
    "sBIT of colours": (deep_png(COLOURS, 12), "", TWELVE),
    "the option precedes sBIT": (deep_png(RAMP, 16), "0,4095", TWELVE[..., :1]),
    "a TIFF": (deep_tiff(RAMP), "0,4095", TWELVE[..., :1]),
    "a TIFF in colour": (deep_tiff(COLOURS), "0,4095", TWELVE),
    "another order of bytes": (deep_tiff(COLOURS, order=">"), "0,4095", TWELVE),
    "MaxSampleValue": (deep_tiff(RAMP, t280=0, t281=4095), "", TWELVE[..., :1]),
    "MinSampleValue": (deep_tiff(RAMP, t280=1000, t281=1510), "", ((RAMP - 1000) / 2).clip(0, 255)[..., None]),
    "12 bits": (deep_tiff(RAMP, bits=12), "", TWELVE[..., :1]),
    "a TIFF of 32 bits": (encoded(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF"), "0,255", 200),
    "Maxval": (b"P5 8 8 4095\n" + RAMP.astype(">u2").tobytes(), "", TWELVE[..., :1]),
    "Maxval of colours": (b"P6 8 8 4095\n" + COLOURS.astype(">u2").tobytes(), "", TWELVE),
    "white alone": (deep_png(np.full((8, 8), 9)), "0,5", 255),
}
"""By what they show: a file, `--range`, and the pixels."""


@pytest.mark.parametrize("case", DEEP)
def test_deep_integers_are_mapped_from_their_range(case):
    file, pixel_range, expected = DEEP[case]
    got = pixels(file, pixel_range=pixel_range)
    np.testing.assert_array_equal(got, np.broadcast_to(np.rint(expected), (8, 8, 3)))


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        (deep_png(RAMP), r"from 0 to 4,095.*--range 0,4095"),
        (deep_png(COLOURS), r"from 0 to 4,095.*--range 0,4095"),
        # Dark and scaled, or not scaled at all.
        (deep_png(RAMP & ~15, 12), r"from 0 to 4,080.*--range 0,4095"),
        (deep_tiff(RAMP), r"from 0 to 4,095.*--range 0,4095"),
        (deep_tiff(COLOURS, order=">"), r"from 0 to 4,095.*--range 0,4095"),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", compression="tiff_lzw"), r"from 0 to 4,095"),
        (encoded(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF"), r"from 200 to 200.*--range 0,255"),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "PPM"), r"from 0 to 4,095.*--range 0,4095"),
    ],
)
def test_deep_integers_of_no_range_are_undecided(file, seen):
    with pytest.raises(UndecidedImageError, match=f"has more than 8 bits, with values {seen}"):
        prepare(file, recipe())


def test_bad_images_are_rejected():
    unknown = "is damaged at its beginning, or has an unknown format"
    lab = encoded(Image.new("LAB", (8, 8), (128, 200, 128)), "TIFF")
    assert prepare(lab, recipe(min_side=4)).shape == (8, 8, 3)
    for file, options, reason in [
        (b"", {}, unknown),
        (b"not an image", {}, unknown),
        (jpeg(1)[:-200], {}, "cannot be decoded.*truncated"),
        (encoded(picture(1))[:-500], {}, "cannot be decoded.*(truncated|ended)"),
        (encoded(Image.new("1", (10_000, 10_000))), {}, "10000×10000 pixels, more than the limit of 89,478,485"),
        (encoded(Image.new("1", (13_400, 13_400))), {}, "cannot be decoded: Image size .* exceeds limit"),
        (encoded(picture(1, 1, 1)), {}, "1×1 pixels, under --min-side=4"),
        (encoded(picture(1, 60, 3)), {}, "60×3 pixels, under --min-side=4"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), {}, "floating-point"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", {}, unknown),
        (lab, {"channels": 1}, "cannot be decoded: conversion from LAB"),
        *(
            (encoded(picture(1, 40, 48)), {"crop": crop}, f"crop {crop} is outside of its 40×48 pixels")
            for crop in ("center:41", "1,0,40,8", "0,41,8,8", "0,0,8,49")
        ),
    ]:
        with pytest.raises(RejectedImageError, match=reason):
            prepare(file, recipe(min_side=4, **options))


def test_damaged_images_are_rejected():
    rng = np.random.default_rng(0)
    files = [encoded(picture(1), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    files += [heic(picture(1))]
    files += [encoded(picture(1).quantize(64), "PNG", transparency=bytes(range(64)))]
    files += [encoded(picture(1).convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    outcomes = {"read": 0, "rejected": 0}
    for file in files:
        for _ in range(40):
            damaged = bytearray(file)
            for at in rng.integers(0, len(file), size=rng.integers(1, 20)):
                damaged[at] = rng.integers(256)
            try:
                assert prepare(bytes(damaged), recipe()).shape == (8, 8, 3)
                outcomes["read"] += 1
            except RejectedImageError:
                outcomes["rejected"] += 1
    assert min(outcomes.values()) > 20


def test_invalid_recipes_are_refused():
    for change, message in [
        ({"crop": "middle"}, "--crop 'middle'"),
        ({"crop": "center:0"}, "--crop 'center:0'"),
        ({"crop": "1,2,3"}, "--crop '1,2,3'"),
        ({"resize_filter": "nearest"}, "'nearest': use lanczos, bicubic, bilinear, box"),
        ({"channels": 4}, "4 channels"),
        ({"size": "96x64", "crop": "25,57,128,128"}, "25,57,128,128 is not of the shape of 96x64: use .*25,57,128,85"),
        ({"size": "64x96", "crop": "0,0,128,86"}, "not of the shape of 64x96: use center, or 0,0,57,86"),
    ]:
        with pytest.raises(BadRequestError, match=message):
            recipe(**change)


def heic(image: Image.Image, **options) -> bytes:
    """As a telephone writes it."""
    import pillow_heif

    file = BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, **options)
    return file.getvalue()


def test_heic_is_read_upright():
    image = picture(3).convert("RGB").resize((48, 32))
    whole = recipe(size=32, crop="squash", resize_filter="box")
    close = np.abs(prepare(heic(image), whole).astype(int) - prepare(encoded(image, "PNG"), whole))
    # Of its colours it has a quarter; one that is not upright differs by more than 30.
    assert close.mean() < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = prepare(heic(image, exif=exif.tobytes()), whole)
    upright = prepare(encoded(image.transpose(Image.Transpose.ROTATE_270), "PNG"), whole)
    assert np.abs(turned.astype(int) - upright).mean() < 8
