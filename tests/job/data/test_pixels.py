"""What becomes of pixels while they are packed: their range, their colours, and what the result says of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from job.data.pack import pack
from job.data.pack_request import FIRST_IMAGES, PackRequest
from job.data.shards import DatasetIndex, load_index
from job.exits import BadDataError, Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.some_images import deep_png, encoded, folder_of, picture, tar_of, zip_of

SIDE = 8
LEVELS = np.linspace(0, 4095, SIDE * SIDE).round().astype(int).reshape(SIDE, SIDE)


def made(bucket: Path, source: Path, **options) -> DatasetIndex:
    """The index of a dataset that is packed, or of tars that stay in place."""
    place = {"source": str(source)} if source.suffix != ".tar" else {"source": "", "tars": (str(source),)}
    index = pack(open_store(str(bucket)), PackRequest(**place, name="x", **{"size": SIDE, **options}))
    assert index is not None
    return index


@pytest.mark.parametrize("command", ["pack", "index"])
def test_deep_images_need_a_range(tmp_path, command):
    files = [(f"{n}.png", deep_png(LEVELS[:, ::step])) for n, step in enumerate((1, -1))]
    bucket, tar = tmp_path / "bucket", tar_of(tmp_path / "a.tar", files)
    words = ("data", command, tar, "x", "--size", SIDE, "--bucket", bucket)
    line = refused(ddpm_here(*words), Exit.BAD_DATA)
    assert "0.png' has more than 8 bits, with values from 0 to 4,095" in line and "--range 0,4095" in line
    assert not (bucket / "datasets/x-8/index.json").exists()
    for wrong in ("4095", "5,5", "9,1", "a,b"):
        assert f"--range '{wrong}': use LOW,HIGH" in refused(ddpm_here(*words, "--range", wrong), Exit.BAD_REQUEST)
    ids = set()
    for pixel_range in ("0,4095", "0,8190", "0,8191"):
        words = ("data", command, tar, "x", "--size", SIDE, "--bucket", tmp_path / pixel_range)
        assert f"range {pixel_range}" in succeeded(ddpm_here(*words, "--range", pixel_range))
        index = load_index(open_store(str(tmp_path / pixel_range)), "datasets/x-8")
        assert (index.pixel_range, index.channels) == (pixel_range, 1)
        ids.add(index.dataset_id)
    assert len(ids) == 3
    # What the option does not concern: the pixels are the same, and the id says which range was asked for.
    plain = tar_of(tmp_path / "plain.tar", [("0.png", encoded(picture(1, SIDE, SIDE)))])
    assert len({made(tmp_path / f"plain{r}", plain, pixel_range=r).dataset_id for r in ("", "0,9")}) == 2


def greys(count: int, colours: int = 0) -> list[tuple[str, bytes]]:
    """PNGs without colours, and then some with colours."""
    pictures = [picture(n, SIDE, SIDE).convert("L" if n < count else "RGB") for n in range(count + colours)]
    return [(f"{n:03d}.png", encoded(image)) for n, image in enumerate(pictures)]


def parquet_of(path: Path, files: list[tuple[str, bytes]]) -> Path:
    parquet.write_table(pa.table({"image": [{"bytes": content, "path": name} for name, content in files]}), path)
    return path


def arrays_of(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """An .npz for each number of channels."""
    arrays = [np.asarray(Image.open(io.BytesIO(content))) for _, content in files]
    path.mkdir()
    np.savez(path / "a.npz", images=np.stack([array for array in arrays if array.ndim == 2]))
    if colours := [array for array in arrays if array.ndim == 3]:
        np.savez(path / "b.npz", images=np.stack(colours))
    return path


MAKERS: dict[str, Callable[[Path, list[tuple[str, bytes]]], Path]] = {
    "folder": folder_of,
    "a.zip": zip_of,
    "a.tgz": tar_of,
    # Indexed in place.
    "a.tar": tar_of,
    "a.parquet": parquet_of,
    "arrays": arrays_of,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_first_images_say_whether_a_dataset_is_grey(tmp_path, name):
    make = MAKERS[name]
    assert made(tmp_path / "grey", make(tmp_path / name, greys(6))).channels == 1
    for part in ("early", "late"):
        (tmp_path / part).mkdir()
    index = made(tmp_path / "mixed", make(tmp_path / "early" / name, greys(FIRST_IMAGES - 1, colours=1)))
    assert (index.channels, index.converted) == (3, {"grey": FIRST_IMAGES - 1})
    late = make(tmp_path / "late" / name, greys(FIRST_IMAGES, colours=1))
    with pytest.raises(BadDataError, match=r"is in colour, and the first 64 are grey: add --channels 3") as error:
        made(tmp_path / "bucket", late)
    assert error.value.exit_code == Exit.BAD_DATA
    for channels, converted in ((3, {"grey": FIRST_IMAGES}), (1, {"colour": 1})):
        index = made(tmp_path / f"{channels}", late, channels=channels)
        assert (index.channels, index.converted) == (channels, converted)


def test_the_result_says_what_was_converted(tmp_path):
    colour = picture(1, SIDE, SIDE)
    transparent = colour.copy()
    transparent.putalpha(Image.new("L", colour.size, 99))
    opaque = colour.convert("RGBA")
    files = [("0.png", encoded(colour)), ("1.png", encoded(colour.convert("L"))), ("2.png", encoded(transparent))]
    files += [("3.png", encoded(opaque)), ("4.jpg", encoded(colour.convert("CMYK"), "JPEG"))]
    files += [("5.png", encoded(transparent.convert("LA"))), ("6.png", b"no image")]
    files += [("7.gif", encoded(colour.convert("L").quantize(8)))]
    words = ("data", "pack", zip_of(tmp_path / "a.zip", files), "x", "--size", SIDE, "--bucket", tmp_path / "bucket")
    first, *_ = succeeded(ddpm_here(*words)).splitlines()
    assert first == f"dataset  x-8  ({tmp_path}/bucket/datasets/x-8): converted images: 1 CMYK, 3 grey, 2 transparent"
    shown = succeeded(ddpm_here("data", "show", "x", "--bucket", tmp_path / "bucket", "-o", tmp_path / "s.png"))
    assert shown.splitlines()[0] == first
    plain = (
        "data",
        "pack",
        zip_of(tmp_path / "b.zip", files[:1]),
        "y",
        "--size",
        SIDE,
        "--bucket",
        tmp_path / "bucket",
    )
    assert succeeded(ddpm_here(*plain)).splitlines()[0] == f"dataset  y-8  ({tmp_path}/bucket/datasets/y-8)"
