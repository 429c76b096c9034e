"""What becomes of an image's pixels: crop, size, orientation, colours, range; and what the result says of them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from ddpm.image_size import ImageSize
from job.data.codecs import decode, encode
from job.data.images import Recipe, RejectedImageError, UndecidedImageError, prepare
from job.data.pack import pack
from job.data.pack_request import FIRST_IMAGES, PackRequest
from job.data.shards import DatasetIndex, load_index
from job.exits import BadDataError, BadRequestError, Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.some_images import deep_png, deep_tiff, encoded, folder_of, jpeg, picture, tar_of, zip_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def recipe(size=8, crop="center", resize_filter="lanczos", channels=3, min_side=1, pixel_range=""):
    return Recipe(ImageSize.of(size), crop, resize_filter, channels, min_side, pixel_range)


def pixels(file: bytes, channels=3, **options) -> np.ndarray:
    """Prepared, and unharmed by the way through a shard."""
    got = prepare(file, recipe(channels=channels, **options))
    np.testing.assert_array_equal(decode(encode(got), got.shape, got.dtype), got)
    return got


def flat(mode: str, color, size=8) -> Image.Image:
    return Image.new(mode, (size, size), color)


@pytest.mark.parametrize(
    ("sides", "size", "crop", "box"),
    [
        ((178, 218), "64", "center", (0, 20, 178, 198)),
        ((178, 218), "64", "center:140", (19, 39, 159, 179)),
        ((178, 218), "64", "squash", (0, 0, 178, 218)),
        # Song et al. 2020 (DDIM): 128×128 around row 121, column 89.
        ((178, 218), "64", "25,57,128,128", (89 - 64, 121 - 64, 89 + 64, 121 + 64)),
        ((178, 218), "64", "0,0,178,10", (0, 0, 178, 10)),
        ((16, 16), "16", "center", (0, 0, 16, 16)),
        # An odd rest goes to the right and the bottom.
        ((11, 8), "8", "center", (1, 0, 9, 8)),
        ((8, 13), "8", "center", (0, 2, 8, 10)),
        # 3:2 of CelebA's 178 columns, and of its 218 rows on their side.
        ((178, 218), "96x64", "center", (0, 49, 178, 168)),
        ((218, 178), "64x96", "center", (49, 0, 168, 178)),
        ((300, 100), "96x64", "center", (75, 0, 225, 100)),
        ((96, 64), "96x64", "center", (0, 0, 96, 64)),
        ((178, 218), "96x64", "center:120", (29, 69, 149, 149)),
        ((178, 218), "64x96", "center:120", (49, 49, 129, 169)),
        ((178, 218), "96x64", "squash", (0, 0, 178, 218)),
        ((178, 218), "96x64", "25,57,128,85", (25, 57, 153, 142)),
        # However flat the size is, there is a row.
        ((64, 64), "4096x1", "center", (0, 31, 64, 32)),
    ],
)
def test_crop_precedes_pillow_s_resize(sides, size, crop, box):
    image, shape = picture(1, *sides), tuple(map(int, (size.split("x") * 2)[:2]))
    for resize_filter in ("lanczos", "bicubic", "bilinear", "box"):
        expected = np.asarray(image.crop(box).resize(shape, getattr(Image.Resampling, resize_filter.upper())))
        got = pixels(encoded(image), size=size, crop=crop, resize_filter=resize_filter)
        np.testing.assert_array_equal(got, expected, err_msg=resize_filter)


def test_exif_orientation_precedes_the_crop():
    upright, turns = picture(3, 8, 12), Image.Transpose
    # How the orientations from 2 on are stored (EXIF 2.3, 4.6.4 A): the inverse of what shows them upright.
    flips = (turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM)
    turned = (turns.TRANSPOSE, turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270)
    for orientation, stored in enumerate([upright, *map(upright.transpose, flips + turned)], 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = pixels(encoded(stored, "PNG", exif=exif), size=8, crop="0,4,8,8")
        np.testing.assert_array_equal(got, np.asarray(upright)[4:], err_msg=f"orientation {orientation}")
    for broken in (b"garbage", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"):
        got = pixels(encoded(flat("RGB", (200, 40, 90)), "JPEG", quality=95, exif=b"Exif\0\0" + broken))
        assert np.abs(got.astype(int) - [200, 40, 90]).max() <= 3


RED = flat("RGB", (200, 40, 90))
CLEAR = encoded(flat("RGBA", (200, 40, 90, 0)))
WHITE = (255, 255, 255)
MODES = [
    (encoded(RED), (200, 40, 90)),
    (encoded(flat("L", 77)), (77, 77, 77)),
    (encoded(flat("1", 1)), WHITE),
    (encoded(flat("RGBA", (200, 40, 90, 255))), (200, 40, 90)),
    (CLEAR, WHITE),
    (encoded(flat("RGBA", (200, 40, 90, 51))), (244, 212, 222)),
    (encoded(flat("LA", (100, 51))), (224, 224, 224)),
    (encoded(RED.quantize(4)), (200, 40, 90)),
    (encoded(RED.quantize(4), "GIF"), (200, 40, 90)),
    (encoded(RED.quantize(4), "PNG", transparency=0), WHITE),
    (encoded(flat("L", 77), "PNG", transparency=77), WHITE),
    (encoded(flat("RGB", (7, 8, 9)), "PNG", transparency=(7, 8, 9)), WHITE),
    (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    (encoded(RED, "BMP"), (200, 40, 90)),
    (encoded(RED, "WEBP", lossless=True), (200, 40, 90)),
    # .299 R + .587 G + .114 B = 93.5
    (encoded(RED), (94,)),
    (CLEAR, (255,)),
    (encoded(flat("L", 77)), (77,)),
]


def test_every_mode_becomes_rgb_or_grey():
    for number, (file, colour) in enumerate(MODES):
        got = pixels(file, len(colour))
        assert got.shape == (8, 8, len(colour))
        assert np.abs(got.astype(int) - colour).max() <= (len(colour) == 3), number


LEVELS_16 = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
EIGHT = np.round(LEVELS_16 / 257)[..., None]
RAMP = np.linspace(0, 4095, 64).round().astype(int).reshape(8, 8)
RAMP_16 = Image.fromarray(RAMP.astype(np.uint16))
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
MASKED = np.dstack([COLOURS, np.where(RAMP < 99, 0, 65535)])
TWELVE = COLOURS * 255 / 4095
GREY = TWELVE[..., :1]
OTHERS = ((RAMP - 1000) / 2).clip(0, 255)[..., None]
LONG = encoded(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF")
SEEN = r"from 0 to 4,095.*--range 0,4095"
DEEP = [
    ("16 bits, a PNG", encoded(Image.fromarray(LEVELS_16), "PNG"), "0,65535", EIGHT),
    ("16 bits, a TIFF", encoded(Image.fromarray(LEVELS_16), "TIFF"), "0,65535", EIGHT),
    ("16 bits, a PGM", encoded(Image.fromarray(LEVELS_16), "PPM"), "0,65535", EIGHT),
    ("a PNG", deep_png(RAMP), "0,4095", GREY),
    ("a PNG of other levels", deep_png(RAMP), "1000,1510", OTHERS),
    ("its black is below 0", deep_png(RAMP), "-4095,4095", 127.5 + GREY / 2),
    ("a PNG in colour", deep_png(COLOURS), "0,4095", TWELVE),
    ("a PNG with transparency", deep_png(MASKED), "0,4095", np.where(RAMP[..., None] < 99, 255, TWELVE)),
    ("sBIT, scaled", deep_png(RAMP << 4 | RAMP >> 8, 12), "", GREY),
    ("sBIT, not scaled", deep_png(RAMP, 12), "", GREY),
    ("sBIT of colours", deep_png(COLOURS, 12), "", TWELVE),
    ("the option precedes sBIT", deep_png(RAMP, 16), "0,4095", GREY),
    ("a TIFF", deep_tiff(RAMP), "0,4095", GREY),
    ("a TIFF in colour", deep_tiff(COLOURS), "0,4095", TWELVE),
    ("another order of bytes", deep_tiff(COLOURS, order=">"), "0,4095", TWELVE),
    ("MaxSampleValue", deep_tiff(RAMP, t280=0, t281=4095), "", GREY),
    ("MinSampleValue", deep_tiff(RAMP, t280=1000, t281=1510), "", OTHERS),
    ("12 bits", deep_tiff(RAMP, bits=12), "", GREY),
    ("a TIFF of 32 bits", LONG, "0,255", np.full((8, 8, 1), 200)),
    ("Maxval", b"P5 8 8 4095\n" + RAMP.astype(">u2").tobytes(), "", GREY),
    ("Maxval of colours", b"P6 8 8 4095\n" + COLOURS.astype(">u2").tobytes(), "", TWELVE),
    ("white alone", deep_png(np.full((8, 8), 9)), "0,5", np.full((8, 8, 1), 255)),
    ("undecided PNG", deep_png(RAMP), "", SEEN),
    ("undecided PNG in colour", deep_png(COLOURS), "", SEEN),
    # Dark and scaled, or not scaled at all.
    ("undecided sBIT", deep_png(RAMP & ~15, 12), "", r"from 0 to 4,080.*--range 0,4095"),
    ("undecided TIFF", deep_tiff(RAMP), "", SEEN),
    ("undecided TIFF in colour", deep_tiff(COLOURS, order=">"), "", SEEN),
    ("undecided TIFF, compressed", encoded(RAMP_16, "TIFF", compression="tiff_lzw"), "", r"from 0 to 4,095"),
    ("undecided TIFF of 32 bits", LONG, "", r"from 200 to 200.*--range 0,255"),
    ("undecided PGM", encoded(RAMP_16, "PPM"), "", SEEN),
]
"""By what they show: a file, `--range`, and the pixels or what the refusal says."""


@pytest.mark.parametrize(("file", "pixel_range", "expected"), [row[1:] for row in DEEP], ids=[row[0] for row in DEEP])
def test_deep_integers_are_mapped_from_their_range(file, pixel_range, expected):
    if isinstance(expected, str):
        with pytest.raises(UndecidedImageError, match=f"has more than 8 bits, with values {expected}"):
            prepare(file, recipe(pixel_range=pixel_range))
        return
    for channels in {3, expected.shape[-1]}:
        got = pixels(file, channels, pixel_range=pixel_range)
        np.testing.assert_array_equal(got, np.broadcast_to(np.rint(expected), (8, 8, channels)))


UNKNOWN = "is damaged at its beginning, or has an unknown format"
LAB = encoded(Image.new("LAB", (8, 8), (128, 200, 128)), "TIFF")
OUTSIDE = ("center:41", "1,0,40,8", "0,41,8,8", "0,0,8,49")
BAD_IMAGES = [
    (b"", {}, UNKNOWN),
    (b"not an image", {}, UNKNOWN),
    (jpeg(1)[:-200], {}, "cannot be decoded.*truncated"),
    (encoded(picture(1))[:-500], {}, "cannot be decoded.*(truncated|ended)"),
    (encoded(Image.new("1", (10_000, 10_000))), {}, "10000×10000 pixels, more than the limit of 89,478,485"),
    (encoded(Image.new("1", (13_400, 13_400))), {}, "cannot be decoded: Image size .* exceeds limit"),
    (encoded(picture(1, 1, 1)), {}, "1×1 pixels, under --min-side=4"),
    (encoded(picture(1, 60, 3)), {}, "60×3 pixels, under --min-side=4"),
    (encoded(Image.new("F", (8, 8)), "TIFF"), {}, "floating-point"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", {}, UNKNOWN),
    (LAB, {"channels": 1}, "cannot be decoded: conversion from LAB"),
    *((encoded(picture(1)), {"crop": crop}, f"crop {crop} is outside of its 40×48 pixels") for crop in OUTSIDE),
]


def test_bad_images_and_recipes_are_refused():
    assert prepare(LAB, recipe(min_side=8)).shape == (8, 8, 3)
    for file, options, reason in BAD_IMAGES:
        with pytest.raises(RejectedImageError, match=reason):
            prepare(file, recipe(min_side=4, **options))
    for change, message in [
        ({"crop": "middle"}, "--crop 'middle'"),
        ({"crop": "center:0"}, "--crop 'center:0'"),
        ({"crop": "1,2,3"}, "--crop '1,2,3'"),
        ({"resize_filter": "cubic"}, "'cubic': use lanczos, bicubic, bilinear, box, nearest"),
        ({"channels": 17}, "17 channels"),
        ({"size": "96x64", "crop": "25,57,128,128"}, "25,57,128,128 is not of the shape of 96x64: use .*25,57,128,85"),
        ({"size": "64x96", "crop": "0,0,128,86"}, "not of the shape of 64x96: use center, or 0,0,57,86"),
    ]:
        with pytest.raises(BadRequestError, match=message):
            recipe(**change)


def heic(image: Image.Image, **options) -> bytes:
    """As a telephone writes it."""
    file = BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, **options)
    return file.getvalue()


def test_damaged_images_are_rejected():
    rng, read, rejected = np.random.default_rng(0), 0, 0
    files = [encoded(picture(1), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    files += [heic(picture(1)), encoded(picture(1).quantize(64), "PNG", transparency=bytes(range(64)))]
    files += [encoded(picture(1).convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    for file in files * 40:
        damaged = bytearray(file)
        for at in rng.integers(0, len(file), size=rng.integers(1, 20)):
            damaged[at] = rng.integers(256)
        try:
            assert prepare(bytes(damaged), recipe()).shape == (8, 8, 3)
            read += 1
        except RejectedImageError:
            rejected += 1
    assert min(read, rejected) > 20


def test_heic_is_read_upright():
    image, exif = picture(3).resize((48, 32)), Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_270)
    for file, upright in ((heic(image), image), (heic(image, exif=exif.tobytes()), turned)):
        found, want = (pixels(each, size=32, crop="squash", resize_filter="box") for each in (file, encoded(upright)))
        # Of its colours it has a quarter; one that is not upright differs by more than 30.
        assert np.abs(found.astype(int) - want).mean() < 8


def made(bucket: Path, source: Path, **options) -> DatasetIndex:
    """The index of a dataset that is packed, or of tars that stay in place."""
    place = {"source": str(source)} if source.suffix != ".tar" else {"source": "", "tars": (str(source),)}
    index = pack(open_store(str(bucket)), PackRequest(**place, name="x", **{"size": 8, **options}))
    assert index is not None
    return index


@pytest.mark.parametrize("command", ["pack", "index"])
def test_deep_images_need_a_range(tmp_path, command):
    files = [(f"{n}.png", deep_png(RAMP[:, ::step])) for n, step in enumerate((1, -1))]
    words = ("data", command, tar_of(tmp_path / "a.tar", files), "x", "--size", 8, "--bucket")
    line = refused(ddpm_here(*words, tmp_path / "bucket"), Exit.BAD_DATA)
    assert "0.png' has more than 8 bits, with values from 0 to 4,095" in line and "--range 0,4095" in line
    assert not (tmp_path / "bucket/datasets/x-8/index.json").exists()
    for wrong in ("4095", "5,5", "9,1", "a,b"):
        line = refused(ddpm_here(*words, tmp_path / "bucket", "--range", wrong), Exit.BAD_REQUEST)
        assert f"--range '{wrong}': use LOW,HIGH" in line
    ids = set()
    for pixel_range in ("0,4095", "0,8190", "0,8191"):
        said = succeeded(ddpm_here(*words, tmp_path / pixel_range, "--range", pixel_range))
        index = load_index(open_store(str(tmp_path / pixel_range)), "datasets/x-8")
        assert (index.pixel_range, index.channels, f"range {pixel_range}" in said) == (pixel_range, 1, True)
        ids.add(index.dataset_id)
    # What the option does not concern: the pixels are the same, and the id says which range was asked for.
    plain = tar_of(tmp_path / "plain.tar", [("0.png", encoded(picture(1, 8, 8)))])
    ids |= {made(tmp_path / f"plain{asked}", plain, pixel_range=asked).dataset_id for asked in ("", "0,9")}
    assert len(ids) == 5


MAKERS = {"der": folder_of, "zip": zip_of, "tgz": tar_of, "tar": tar_of}


@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tgz", "a.tar"])
def test_the_first_images_say_whether_a_dataset_is_grey(tmp_path, name):
    """The last is indexed in place."""

    def source(part: str, greys: int, colours: int) -> Path:
        """Of images without colours, and then some with colours."""
        (tmp_path / part).mkdir()
        pictures = [picture(n, 8, 8).convert("L" if n < greys else "RGB") for n in range(greys + colours)]
        return MAKERS[name[-3:]](
            tmp_path / part / name, [(f"{n:03d}.png", encoded(one)) for n, one in enumerate(pictures)]
        )

    late = source("late", FIRST_IMAGES, 1)
    for place, options, found in (
        (source("few", 6, 0), {}, (1, {})),
        (source("early", FIRST_IMAGES - 1, 1), {}, (3, {"grey": FIRST_IMAGES - 1})),
        (late, {"channels": 3}, (3, {"grey": FIRST_IMAGES})),
        (late, {"channels": 1}, (1, {"colour": 1})),
    ):
        index = made(tmp_path / f"bucket of {found}", place, **options)
        assert (index.channels, index.converted) == found
    with pytest.raises(BadDataError, match=r"is in colour, and the first 64 are grey: add --channels 3") as error:
        made(tmp_path / "bucket", late)
    assert error.value.exit_code == Exit.BAD_DATA


def test_the_result_says_what_was_converted(tmp_path):
    colour = picture(1, 8, 8)
    transparent = colour.copy()
    transparent.putalpha(Image.new("L", colour.size, 99))
    files = [("0.png", encoded(colour)), ("1.png", encoded(colour.convert("L"))), ("2.png", encoded(transparent))]
    files += [("3.png", encoded(colour.convert("RGBA"))), ("4.jpg", encoded(colour.convert("CMYK"), "JPEG"))]
    files += [("5.png", encoded(transparent.convert("LA"))), ("6.png", b"no image")]
    files += [("7.gif", encoded(colour.convert("L").quantize(8)))]
    at = ("--bucket", tmp_path / "bucket")
    for name, count, said in (("x", 8, ": converted images: 1 CMYK, 3 grey, 2 transparent"), ("y", 1, "")):
        archive = zip_of(tmp_path / "a.zip", files[:count])
        line, *_ = succeeded(ddpm_here("data", "pack", archive, name, "--size", 8, *at)).splitlines()
        assert line == f"dataset  {name}-8  ({tmp_path}/bucket/datasets/{name}-8){said}"
        shown = succeeded(ddpm_here("data", "show", name, *at, "-o", tmp_path / "s.png"))
        assert shown.splitlines()[0] == line
