"""Pairs of images: from every kind of source into one shard and one row of the cache; Pillow and webdataset judge."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, ran, refuses
from tests.job.some_images import encoded, folder_of, picture, tar_of, zip_of

COUNT = 6
LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
PHOTOS = [picture(number) for number in range(COUNT)]
SMALL = [photo.resize((20, 24)) for photo in PHOTOS]
CLASSES = np.random.default_rng(0).integers(0, 5, (COUNT, 48, 40), np.uint8)
FILES = [(f"{number}.jpg", encoded(photo, "PNG")) for number, photo in enumerate(PHOTOS)]
OTHERS = [(f"{number}.png", encoded(photo)) for number, photo in enumerate(SMALL)]


def mask(classes: np.ndarray) -> Image.Image:
    """A palette of greys that are classes times 50."""
    image = Image.fromarray(classes, "P")
    image.putpalette([value for grey in range(256) for value in [grey * 50 % 256] * 3])
    return image


MASKS = [(f"{number}.png", encoded(mask(classes))) for number, classes in enumerate(CLASSES)]


def folders(place: Path) -> list[object]:
    return [folder_of(place / "in", FILES), "--condition", folder_of(place / "other", OTHERS)]


def archives(place: Path) -> list[object]:
    return [zip_of(place / "in.zip", FILES), "--condition", tar_of(place / "other.tar.gz", OTHERS)]


def beside(place: Path) -> list[object]:
    both = [*FILES, *((name.replace(".png", ".cond.png"), content) for name, content in OTHERS)]
    both += [(f"{number}.json", b'{"age": %d}' % number) for number in range(COUNT)]
    return [tar_of(place / "in.tar", sorted(both)), "--condition", ":cond", "--vector", ":age"]


def columns(place: Path) -> list[object]:
    both = zip(FILES, OTHERS, strict=True)
    rows = [{"image": {"bytes": a, "path": ""}, "low": {"bytes": b, "path": ""}} for (_, a), (_, b) in both]
    features = datasets.Features({"image": datasets.Image(), "low": datasets.Image()})
    (place / "in").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(place / "in/a.parquet")
    return [place / "in", "--condition", ":low"]


@pytest.mark.parametrize("source", [folders, archives, beside, columns], ids=lambda source: source.__name__)
def test_pairs_lie_in_one_shard_and_one_row(tmp_path, source):
    place, *how = source(tmp_path)
    assert "pairs" in ran("data", "pack", place, "x", *how, "--size", 16, "--bucket", tmp_path)
    store = open_store(str(tmp_path))
    index = load_index(store, "datasets/x-16")
    assert (index.images, index.channels, index.condition_channels, bool(index.condition_from)) == (COUNT, 3, 3, True)
    # The middle square of 40×48, and of half of that.
    ours = np.stack([np.asarray(photo.crop((0, 4, 40, 44)).resize((16, 16), LANCZOS)) for photo in PHOTOS])
    theirs = np.stack([np.asarray(photo.resize((16, 16), LANCZOS, (0, 2, 20, 22))) for photo in SMALL])
    (shard,) = (tmp_path / "datasets/x-16").glob("*.tar")
    samples = [*webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("rgb8")]
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), ours)
    assert np.array_equal(np.stack([sample["cond.png"] for sample in samples]), theirs)

    order = Order((COUNT,), 5)
    for budget_bytes in (1 << 30, 1):
        cache = open_cache(store, index, budget_bytes, cache_dir=tmp_path / f"cache{budget_bytes}")
        (batch,) = stream_batches(cache, order, batch_size_images=COUNT, first_image=0, last_image=COUNT)
        numbers = order.indices(np.arange(COUNT))
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), ours[numbers])
        assert np.array_equal(batch.conditions.permute(0, 2, 3, 1).numpy(), theirs[numbers])
        assert batch.vectors is None or np.array_equal(cache.numbers(numbers)[:, 0], numbers)
        assert np.array_equal(cache.read(numbers), ours[numbers])
        assert np.array_equal(cache.conditions(numbers), theirs[numbers])
        cache.close()
    ran("data", "show", "x", "--bucket", tmp_path, "-o", tmp_path / "preview.png")
    assert Image.open(tmp_path / "preview.png").width > 8 * 16 * 2
    assert "as it was packed" in ran("data", "verify", "x", "--bucket", tmp_path)
    # A damaged condition is found, though its image is whole.
    content = bytearray(shard.read_bytes())
    content[content.rindex(b"IEND") - 20] ^= 1
    shard.write_bytes(content)
    refuses([("data verify x", 65, "image 5 … differs from the index")], "--bucket", tmp_path)


def test_masks_keep_their_values(tmp_path):
    source = folder_of(tmp_path / "in", FILES), "--condition", folder_of(tmp_path / "masks", MASKS)
    for words, expected in (((), NEAREST), (("--condition-filter", "box"), Image.Resampling.BOX)):
        place = tmp_path / str(len(words))
        ran("data", "pack", source[0], "x", *source[1:], *words, "--size", 16, "--bucket", place)
        store = open_store(str(place))
        index = load_index(store, "datasets/x-16")
        found = ImageCache(store, index).conditions(np.arange(COUNT))
        greys = [Image.fromarray(classes * 50).resize((16, 16), expected, (0, 4, 40, 44)) for classes in CLASSES]
        assert index.condition_channels == 1 and np.array_equal(found[..., 0], np.stack([*map(np.asarray, greys)]))
        again = ("data", "ensure", "x", "--source", *source, "--bucket", place)
        assert ran(*again, *words) == ""
        assert ddpm_here(*again, "--condition-filter", "bilinear").returncode == Exit.BAD_REQUEST


def test_images_without_a_condition_are_named(tmp_path, caplog):
    source = folder_of(tmp_path / "in", FILES), "--condition", folder_of(tmp_path / "other", OTHERS[1:4])
    for number in (1, 0):
        words = ("data", "pack", source[0], "x", *source[1:], "--size", 16, "--slice", f"{number}/2")
        said = ran(*words, "--bucket", tmp_path)
    assert "3 pairs, 3 images without a condition: named in the rejects" in caplog.text and "3 colour" in said
    rejects = [json.loads(line) for line in (tmp_path / "datasets/x-16/rejects.jsonl").read_text().splitlines()]
    assert [reject["name"] for reject in rejects] == ["0.jpg", "4.jpg", "5.jpg"]


def test_hostile_pairs_are_refused(tmp_path):
    def source(others: list[tuple[str, bytes]], name: str) -> str:
        return f"{folder_of(tmp_path / 'in', FILES)} x --size 16 --condition {folder_of(tmp_path / name, others)}"

    tall = [(name, encoded(photo.resize((20, 40)))) for (name, _), photo in zip(OTHERS, SMALL, strict=True)]
    broken = [(name, content[:99]) for name, content in OTHERS]
    twice = [*OTHERS, ("1.webp", OTHERS[1][1])]
    refuses(
        [
            (f"data pack {source(tall, 'tall')}", 65, "'0.jpg' has 40×48 pixels, and its condition 20×40"),
            (f"data pack {source(broken, 'broken')}", 65, "none of its images can be used … '0.jpg'"),
            (f"data pack {source([('a.png', OTHERS[0][1])], 'strange')}", 64, "has no image '0', but 'a'"),
            (f"data pack {source(twice, 'twice')}", 64, "there are several images '1'"),
            (f"data pack {source([], 'none')}", 66, "none"),
            (f"data pack {tmp_path / 'in'} x --size 16 --condition :cond", 64, "has no image '0'"),
            (f"data pack {source(OTHERS, 'other')} --condition-filter blur", 64, "unknown resize filter 'blur'"),
        ],
        "--bucket",
        tmp_path,
    )


def test_conditions_of_sixteen_bits_and_five_channels(tmp_path):
    deep = np.random.default_rng(1).integers(0, 4096, (COUNT, 32, 32, 5), np.uint16)
    for name, array in (("in", deep[..., :1]), ("other", deep)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(array):
            np.save(tmp_path / name / f"{number}.npy", image)
    source = tmp_path / "in", "x", "--condition", tmp_path / "other", "--range", "0,4095", "--size", 32
    ran("data", "pack", *source, "--bucket", tmp_path)
    store = open_store(str(tmp_path))
    cache = ImageCache(store, load_index(store, "datasets/x-32"))
    scaled = np.rint(deep * (65535 / 4095))
    assert np.array_equal(cache.conditions(np.arange(COUNT)), scaled)
    assert np.array_equal(cache.read(np.arange(COUNT)), scaled[..., :1])
    (shard,) = (tmp_path / "datasets/x-32").glob("*.tar")
    sample = next(iter(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)))
    assert np.array_equal(np.load(io.BytesIO(sample["cond.npy"])), scaled[0])
