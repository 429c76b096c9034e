"""Numbers of each image, from tables and formats to normalised batches; webdataset judges the shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset

from job.data.reading.cache import ImageCache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from job.store import open_store
from tests.job.command_line import ran, refuses
from tests.job.some_images import folder_of, png, tar_of

COUNT = 12
NAMES = [f"{number:02d}.png" for number in range(COUNT)]
IMAGES = [(name, png(number)) for number, name in enumerate(NAMES)]
VALUES = np.stack([20 + 5.5 * np.arange(COUNT), np.cos(np.arange(COUNT))], axis=1).astype(np.float32)
PAIRS = [{"age": float(age), "angle": float(angle)} for age, angle in VALUES]


def csv_of(rows: list[object]) -> bytes:
    lines = [f"{name},{row['age']},{row['angle']},7" for name, row in zip(NAMES, rows, strict=True)]
    return "\n".join(["file,age,angle,seven", *lines]).encode()


def table(folder: Path) -> tuple[object, ...]:
    folder_of(folder / "in", [*IMAGES, ("ages.csv", csv_of(PAIRS))])
    return folder / "in", "--vector", "ages.csv:age,angle"


def edm(folder: Path) -> tuple[object, ...]:
    labels = [[name, list(row.values())] for name, row in zip(NAMES, PAIRS, strict=True)]
    folder_of(folder / "in", [*IMAGES, ("dataset.json", json.dumps({"labels": labels}).encode())])
    return folder / "in", "--vector", "dataset.json", "--no-classes"


def tar(folder: Path) -> tuple[object, ...]:
    jsons = [(name.replace("png", "json"), json.dumps(row).encode()) for name, row in zip(NAMES, PAIRS, strict=True)]
    folder.mkdir(exist_ok=True)
    return tar_of(folder / "in.tar", sorted([*IMAGES, *jsons])), "--vector", ":age,angle"


def parquet(folder: Path) -> tuple[object, ...]:
    rows = [{"image": {"bytes": image, "path": name}, **row} for (name, image), row in zip(IMAGES, PAIRS, strict=True)]
    features = {"image": datasets.Image(), "age": datasets.Value("float32"), "angle": datasets.Value("float64")}
    (folder / "in").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / "in/a.parquet")
    return folder / "in", "--vector", ":age,angle"


@pytest.mark.parametrize("source", [table, edm, tar, parquet], ids=lambda source: source.__name__)
def test_numbers_come_with_their_images(tmp_path, source):
    place, *how = source(tmp_path)
    words = ("data", "pack", place, "x", "--size", 16, *how)
    said = ran(*words, "--bucket", tmp_path)
    store = open_store(str(tmp_path))
    index = load_index(store, "datasets/x-16")
    assert "vector" in said and index.vector_names == (("label.0", "label.1") if source is edm else ("age", "angle"))
    assert index.vector_mean == pytest.approx(VALUES.astype(float).mean(0))
    assert index.vector_std == pytest.approx(VALUES.astype(float).std(0))
    (shard,) = (tmp_path / "datasets/x-16").glob("*.tar")
    samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode()
    packed = np.array([list(sample["json"].values()) for sample in samples])
    assert np.array_equal(packed, VALUES)

    cache, order = ImageCache(store, index), Order((COUNT,), 3)
    (batch,) = stream_batches(cache, order, batch_size_images=COUNT, first_image=0, last_image=COUNT)
    expected = (VALUES.astype(float) - VALUES.astype(float).mean(0)) / VALUES.astype(float).std(0)
    np.testing.assert_allclose(batch.vectors.numpy(), expected[order.indices(np.arange(COUNT))], rtol=1e-5, atol=1e-6)
    assert "as it was packed" in ran("data", "verify", "x", "--bucket", tmp_path)
    # A second packing of our own shard, on two machines, has the same bytes.
    for number in (1, 0):
        again = ("data", "pack", shard, "x", "--size", 16, "--filter", "box", "--slice", f"{number}/2", "--no-classes")
        ran(*again, "--vector", ":" + ",".join(index.vector_names), "--bucket", tmp_path / "again")
    assert (tmp_path / "again/datasets/x-16" / shard.name).read_bytes() == shard.read_bytes()


def test_held_out_images_have_the_scale_of_the_learnt_ones(tmp_path):
    place, *how = table(tmp_path)
    ran("data", "pack", place, "x", "--size", 16, *how, "--hold-out", "30%", "--bucket", tmp_path)
    store = open_store(str(tmp_path))
    both = [load_index(store, f"datasets/{name}-16") for name in ("x", "x-held-out")]
    assert both[0].vector_mean == both[1].vector_mean and both[0].images + both[1].images == COUNT
    caches = [ImageCache(store, index).numbers(np.arange(index.images)) for index in both]
    assert sorted(np.concatenate(caches)[:, 0].tolist()) == VALUES[:, 0].tolist()
    refuses([(f"data ensure x --source {place} --size 16", 64, "x-16")], "--bucket", tmp_path)


HOSTILE = [
    ({"age": "nan"}, "ages.csv:age", 65, "which is not finite in float32"),
    ({"age": "inf"}, "ages.csv:age", 65, "which is not finite"),
    ({"age": "1e39"}, "ages.csv:age", 65, "which is not finite"),
    ({"age": "old"}, "ages.csv:age", 65, "has 'old', which cannot be a number"),
    ({"age": ""}, "ages.csv:age,angle", 65, "'05.png' has no 'age'"),
    ({}, "ages.csv:size", 64, "has no column 'size'"),
    ({}, "ages.csv:seven", 64, "'seven' is 7 for all images"),
    ({}, "ages.csv", 64, "has several columns"),
    ({}, "none.csv:age", 66, "there is nothing at none.csv"),
    ({}, ":age", 65, "'00.png' has no 'age'"),
]


@pytest.mark.parametrize(("change", "option", "code", "said"), HOSTILE)
def test_hostile_numbers_are_refused(tmp_path, change, option, code, said):
    rows = [row | change if number == 5 else row for number, row in enumerate(PAIRS)]
    folder_of(tmp_path / "in", [*IMAGES, ("ages.csv", csv_of(rows))])
    refuses([(f"data pack {tmp_path}/in x --size 16 --vector {option}", code, said)], "--bucket", tmp_path)
    assert not (tmp_path / "datasets").exists()


def test_vectors_of_another_length_are_refused(tmp_path):
    place, *how = edm(tmp_path)
    found = json.loads((place / "dataset.json").read_bytes())
    found["labels"][7][1] = [1.0]
    (place / "dataset.json").write_text(json.dumps(found))
    line = "'07.png' has 1 numbers 'label', and others 2"
    refuses([(["data", "pack", place, "x", "--size", "16", *how], 65, line)], "--bucket", tmp_path)
    shutil.rmtree(place)
