"""Images of 16 bits and of other than three channels, from the source to samples; webdataset judges the shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import webdataset
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from job.config import method
from job.data.reading.cache import ImageCache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from job.evaluation.evaluate import features_of
from job.exits import Exit
from job.runs.records import existing_config
from job.store import open_store
from tests.job.command_line import ddpm_here, ran, refused, refuses, settings
from tests.job.some_images import deep_png, deep_tiff, encoded, picture, tar_of
from tests.job.test_train import final_state

RNG = np.random.default_rng(0)
SIZE = 32


def values(channels: int, most: int = 4095, dtype: type = np.uint16) -> np.ndarray:
    """Three images [3, H, W, C] that reach both ends: noise, one value, and a ramp."""
    noise = RNG.integers(0, most + 1, (SIZE, SIZE, channels))
    ramp = np.linspace(0, most, SIZE * SIZE * channels).round().reshape(SIZE, SIZE, channels)
    return np.stack([noise, np.full_like(noise, most // 3), ramp]).astype(dtype)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **how: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **how)
    return file.getvalue()


def files_of(images: np.ndarray, suffix: str, encode: Callable[[np.ndarray], bytes]) -> dict[str, bytes]:
    return {f"{number}.{suffix}": encode(image) for number, image in enumerate(images)}


def stated(image: np.ndarray) -> bytes:
    return deep_tiff(image, t281=4095)


def pages(image: np.ndarray) -> bytes:
    return tiff(image.transpose(2, 0, 1), photometric="minisblack")


GREY, COLOURS, FULL, FIVE = values(1), values(3), values(3, 65535), values(5)
FOUR_BYTES = values(4, 255, np.uint8)
PGM = b"P5 %d %d 4095\n" % (SIZE, SIZE)
SOURCES = {
    "12 bits in a PNG": (files_of(GREY[..., 0], "png", deep_png), GREY, "0,4095", True),
    "12 bits of colours in a PNG": (files_of(COLOURS, "png", deep_png), COLOURS, "0,4095", True),
    "16 bits in a PNG": (files_of(FULL, "png", deep_png), FULL, "0,65535", False),
    "black below 0": (files_of(GREY[..., 0], "png", deep_png), GREY, "-100,4095", True),
    "a TIFF that says its range": (files_of(GREY[..., 0], "tif", stated), GREY, "0,4095", False),
    "a PGM": (files_of(GREY, "pgm", lambda one: PGM + one.astype(">u2").tobytes()), GREY, "0,4095", False),
    "pages of a TIFF": (files_of(FIVE, "tif", pages), FIVE, "0,4095", True),
    "samples of a TIFF": (files_of(FIVE, "tif", lambda one: tiff(one, planarconfig="contig")), FIVE, "0,4095", True),
    "an array": ({"a.npy": saved(FIVE)}, FIVE, "0,4095", True),
    "an array of colours": ({"a.npy": saved(COLOURS.transpose(0, 3, 1, 2))}, COLOURS, "0,4095", True),
    "an array for each image": (files_of(FIVE, "npy", saved), FIVE, "0,4095", True),
    "four channels of 8 bits": ({"a.npy": saved(FOUR_BYTES)}, FOUR_BYTES, "", False),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_packed_and_read_without_loss(tmp_path, source):
    files, expected, levels, is_asked = SOURCES[source]
    for name, content in files.items():
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    words = ("data", "pack", tmp_path / "source", "deep", "--size", SIZE, "--bucket", tmp_path)
    if is_asked:
        # Without a range no image becomes black.
        assert "--range LOW,HIGH" in refused(ddpm_here(*words), Exit.BAD_DATA)
    said = ran(*words, *(["--range", levels] if is_asked else []))
    bits, channels = 8 * expected.itemsize, expected.shape[-1]
    assert ("16 bits" in said) == (bits == 16) and "clipped" not in said
    low, high = map(int, (levels or "0,255").split(","))
    scaled = np.rint((expected.astype(np.float64) - low) * ((2**bits - 1) / (high - low)))

    folder = tmp_path / "datasets" / f"deep-{SIZE}"
    (shard,) = folder.glob("*.tar")
    kind = "png" if channels in (1, 3) else "npy"
    samples = [*webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)]
    for sample, wanted in zip(samples, scaled, strict=True):
        content = sample[kind]
        if kind == "npy":
            found = np.load(io.BytesIO(content))
        else:
            found = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
            found = found.permute(1, 2, 0).numpy()
            Image.open(io.BytesIO(content)).verify()
        assert np.array_equal(found, wanted) and found.dtype == expected.dtype

    store = open_store(str(tmp_path))
    index = load_index(store, folder.relative_to(tmp_path).as_posix())
    assert (index.bits, index.channels, index.pixel_range) == (bits, channels, levels)
    cache = ImageCache(store, index)
    (batch,) = stream_batches(cache, Order((3,), 0), batch_size_images=3, first_image=0, last_image=3)
    order = Order((3,), 0).indices(np.arange(3))
    assert batch.images.dtype == (torch.uint16 if bits == 16 else torch.uint8)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), scaled[order])
    assert "as it was packed" in ran("data", "verify", "deep", "--bucket", tmp_path)
    ran("data", "show", "deep", "--bucket", tmp_path, "-o", tmp_path / "preview.png")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run `five` on 24 images of five channels of 12 bits, and a run `one` on grey ones."""
    folder = tmp_path_factory.mktemp("deep")
    for name, channels in (("five", 5), ("one", 1)):
        levels = RNG.integers(0, 2, (24, 1, 1, channels)) * 4095
        np.save(folder / f"{name}.npy", np.broadcast_to(levels, (24, 16, 16, channels)).astype(np.uint16))
        place = ("--bucket", folder)
        how = "--size", 16, "--range", "0,4095", "--hold-out", "25%"
        ran("data", "pack", folder / f"{name}.npy", name, *how, *place)
        ran("train", "--dataset", name, "--run", name, "--epochs", 3, *place, *settings(sample__nearest="true"))
    return folder


@pytest.mark.parametrize(("run", "kind"), [("five", "npy"), ("one", "png")])
def test_samples_have_the_values_of_the_source(bucket, run, kind):
    ran("sample", "--run", run, "--count", 16, "--bucket", bucket)
    (tar,) = (bucket / "runs" / run / "samples").glob("*-0-16-*/*.tar")
    files = [sample[kind] for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)]
    read = np.load if kind == "npy" else Image.open
    found = np.stack([np.asarray(read(io.BytesIO(file))) for file in files])
    assert found.size == 16 * 16 * 16 * (5 if kind == "npy" else 1) and found.dtype == np.uint16
    assert (found.min(), found.max()) == (0, 4095)
    # All levels occur, and not those of 8 bits alone.
    assert len(np.unique(found)) > 300
    assert ran("runs", "verify", run, "--bucket", bucket)


@pytest.mark.parametrize("run", ["five", "one"])
def test_held_out_images_and_scores_see_all_levels(bucket, run):
    """A look at images of 16 bits as if they had 8 would be off by a factor of 257."""
    _, _, rows = final_state(bucket, run)
    looks = [row for row in rows if "val_loss" in row]
    assert looks and all(0 < row["val_loss"] < 2 and 0 < row["val_bits_per_dim"] < 30 for row in looks)
    store = open_store(str(bucket))
    assert method.objective_of(existing_config(store, run)).levels == 1 << 16
    images = ImageCache(store, load_index(store, f"datasets/{run}-16")).read(np.arange(4))
    seen = features_of(lambda pixels: (pixels.flatten(1), None), images, torch.device("cpu"))["features"]
    expected = np.rint(images[..., : 3 if run == "five" else 1] / 257).transpose(0, 3, 1, 2)
    assert np.array_equal(seen.numpy(), expected.reshape(4, -1))


def test_grids_show_named_channels(bucket):
    grids = {}
    for show in ("1,2,3", "5,1,2", "4"):
        said = ran("sample", "--run", "five", "--seeds", "0-3", "--show", show, "--no-nearest", "--bucket", bucket)
        grids[show] = np.asarray(Image.open(said.split()[0]))
    # The red of the first is the green of the second.
    bottom = slice(-100, None)
    assert np.array_equal(grids["1,2,3"][bottom, :, 0], grids["5,1,2"][bottom, :, 1])
    assert not np.array_equal(grids["1,2,3"][bottom, :, 0], grids["5,1,2"][bottom, :, 0])
    assert np.array_equal(grids["4"][bottom, :, 0], grids["4"][bottom, :, 2])


def test_what_cannot_take_them_refuses(bucket, tmp_path):
    eight = tar_of(
        tmp_path / "a.tar",
        [*((f"{n:02d}.png", deep_png(FULL[n % 3])) for n in range(64)), ("z.png", encoded(picture(1)))],
    )
    refuses(
        [
            (f"export --run five --to {tmp_path}/x", 64, "'five' cannot be exported … 16 bits in 5 channels"),
            (f"export --run one --to {tmp_path}/x", 64, "'one' cannot be exported … 16 bits in 1 channels"),
            ("sample --run one --mode inpaint --image 0", 64, "--mode inpaint edits 8 bits"),
            ("sample --run five --count 2 --save png", 64, "--save png: a PNG does not hold 5 channels"),
            ("sample --run five --show 6,1,2", 78, "sample.show=(6, 1, 2): the images have 5 channels"),
            ("sample --run five --show 1,2", 64, "--show '1,2' … name one channel, or three"),
            (f"data pack {bucket}/one.npy x --size 16 --range 0,4095 --bits 12", 64, "--bits 12: use 8 or 16"),
            (
                f"data pack {eight} x --size 16",
                65,
                "'z.png' has 8 bits, and the first 64 have more: add --bits 16, or 8",
            ),
            (
                f"data pack {bucket}/five.npy x --size 16 --range 0,4095 --channels 4",
                65,
                "has 5 channels, and the dataset 4",
            ),
        ],
        "--bucket",
        bucket,
    )
    said = ran("data", "pack", eight, "y", "--size", 16, "--bits", 16, "--range", "0,9000", "--bucket", tmp_path)
    assert "64 clipped" in said and "1 8-bit" in said
