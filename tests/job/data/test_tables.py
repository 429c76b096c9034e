"""Parquet and Arrow files of images, as Hugging Face's `datasets` writes them, which judges what is read of them."""

from __future__ import annotations

import gc
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from fsspec.config import conf
from PIL import Image
from pyarrow import parquet

from job.data.shards import DatasetIndex
from job.data.source import open_source
from job.data.source.survey import survey
from job.exits import BadDataError, BadRequestError, Exit, StoppedError
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.packing import packed
from tests.job.some_images import folder_of, jpeg, png, tar_of, zip_of
from tests.job.some_tables import IMAGE, arrow_bytes, contents_of, image_chunks, labels_of, parquet_bytes, table

SAMPLE = Path(__file__).parents[3] / "job/datasets/landscape-sample.zip"
KINDS = ("summit", "coast", "forest", "unseen", "field", "dune")
"""Not in the order of the alphabet, and one of which there is no image."""
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(KINDS))})

datasets.disable_progress_bars()


def photographs() -> datasets.DatasetDict:
    """Real tiles of landscapes, of which two have no class."""
    with zipfile.ZipFile(SAMPLE) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][::5]
        rows = [{"image": {"bytes": archive.read(name), "path": name}} for name in names]
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        kind = name.partition("/")[0]
        row["label"] = -1 if number == 7 else None if number == 11 else KINDS.index(kind) if kind in KINDS else 0
    train, test = rows[:40], rows[40:]
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part, features=FEATURES) for name, part in [("train", train), ("test", test)]}
    )


def as_parquet(splits: datasets.DatasetDict, folder: Path) -> Path:
    """As `push_to_hub` lays a dataset out."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for number in range(2):
            path = folder / f"data/{split}-{number:05d}-of-00002.parquet"
            rows.shard(2, number, contiguous=True).to_parquet(path, batch_size=7)
    (folder / "README.md").write_text("---\ndataset_info: {}\n---\n")
    return folder


def on_disk(splits: datasets.DatasetDict, folder: Path) -> Path:
    """As `save_to_disk` does, with what a later `map` leaves beside it."""
    splits.save_to_disk(folder, num_shards={"train": 2, "test": 1})
    (folder / "train/cache-1234.arrow").write_bytes(b"of another function")
    return folder


def read_back(index: DatasetIndex, bucket: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Pixels and names of classes in the shards, by Pillow."""
    for shard in index.shards:
        with tarfile.open(bucket / "datasets/small-64" / shard.name) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in sorted(name for name in files if name.endswith(".png")):
            number = int(files[name.replace(".png", ".cls")])
            yield np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")), index.classes[number]


@pytest.mark.parametrize("write", [as_parquet, on_disk])
def test_tables_are_packed_as_datasets_reads_them(tmp_path, write):
    folder = write(photographs(), tmp_path / "tiles")
    if write is as_parquet:
        files = {split: sorted(map(str, folder.glob(f"data/{split}-*"))) for split in ("train", "test")}
        judge = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    else:
        judge = datasets.load_from_disk(str(folder))
    names = judge["train"].features["label"].names
    for split, parts in [("", ("train",)), ("train", ("train",)), ("test", ("test",))]:
        index = packed(tmp_path / f"bucket{split}", folder, size=64, split=split, shard_images=25, unlabelled="drop")
        expected = [
            (np.asarray(row["image"].convert("RGB")), names[row["label"]])
            for part in parts
            for row in judge[part]
            if row["label"] not in (-1, None)
        ]
        found = list(read_back(index, tmp_path / f"bucket{split}"))
        assert index.classes == KINDS == tuple(names) and index.classes_from == "labels"
        assert index.splits == (parts if len(parts) > 1 else ())
        assert index.unlabelled_images == (2 if "train" in parts else 0)
        assert [label for _, label in found] == [label for _, label in expected]
        np.testing.assert_array_equal([pixels for pixels, _ in found], [pixels for pixels, _ in expected])


def fetched_groups(asked: list[tuple[str, str]], content: bytes) -> list[int]:
    """Which groups of images these requests have fetched bytes of; the footer with its kilobytes left out."""
    ranges = [
        tuple(map(int, match.groups())) for _, said in asked if (match := re.fullmatch(r"bytes=(\d+)-(\d+)", said))
    ]
    parts = [range(first, last + 1) for first, last in ranges if last + 1 < len(content)]
    chunks = image_chunks(content)
    return sorted(
        {
            number
            for number, chunk in enumerate(chunks)
            for part in parts
            if part.start < chunk.stop and chunk.start < part.stop
        }
    )


def test_hub_dataset_is_read_in_parts(server, tmp_path, monkeypatch, caplog):
    """Labels alone are read of all rows, and images of no more groups than a stopped or shared packing needs."""
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    train, test = (parquet_bytes(table(80, size=64)) for _ in range(2))
    # Seen as a reader of the page sees them: a picture of the README is no image of the dataset.
    handler.content = {
        "/README.md": b"---\n---\n",
        "/assets/banner.png": png(1),
        "/data/train-00000-of-00001.parquet": train,
        "/data/test-00000-of-00001.parquet": test,
    }
    said = succeeded(
        ddpm_here("data", "pack", "hf://datasets/org/name", "all", "--size", 64, "--bucket", tmp_path / "all")
    )
    assert "images   80 colour" in said and "classes  cat, dog" in said
    assert "packing its split train; --split test would pack another" in caplog.text
    where, at = "hf://datasets/org/name", {"size": 64, "split": "train"}

    handler.asked.clear()
    assert len(labels_of(where)) == 80
    assert fetched_groups(handler.asked, train) == []
    # Another split is not opened.
    handler.content["/data/test-00000-of-00001.parquet"] = b"damaged"

    with pytest.raises(StoppedError):
        packed(tmp_path / "stopped", where, stop_at=40, **at)
    handler.asked.clear()
    index = packed(tmp_path / "stopped", where, **at)
    assert index.images == 80
    # Two shards of two groups each were whole; the first image says that the dataset is in colour.
    assert fetched_groups(handler.asked, train) == [0, *range(4, 10)]

    handler.asked.clear()
    with pytest.raises(StoppedError):
        packed(tmp_path / "shared", where, slice="1/2", stop_at=17, **at)
    # Its shards are the second, which is whole, and the fourth.
    assert {2, 3} <= set(fetched_groups(handler.asked, train)) <= {0, 2, 3, 6, 7}


def test_files_elsewhere_are_streamed(server, tmp_path):
    handler, url = server
    content = table(20)
    expected = [row["bytes"] for row in content["image"].to_pylist()]
    handler.content = {
        "/a.parquet": parquet_bytes(content),
        "/b.arrow": arrow_bytes(content),
        "/c.arrow": arrow_bytes(content, pa.ipc.new_file),
    }
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert labels_of(f"{url}/{name}") == ["cat", "dog"] * 10
        assert contents_of(f"{url}/{name}") == expected
    # Inside a zip there is no way back to an earlier byte but from the beginning.
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/train-00000-of-00001.parquet", handler.content["/a.parquet"])
    assert contents_of(tmp_path / "kaggle.zip") == expected


def test_tables_in_a_bucket(gcs_bucket, monkeypatch):
    """A group of which several requests at a time fetch parts."""
    monkeypatch.setattr("job.store.remote.RANGE_BYTES", 1 << 14)
    content, store = table(20, size=64), open_store(gcs_bucket)
    store.put("theirs/data/train-00000-of-00001.parquet", parquet_bytes(content))
    store.put("other/train/data-00000-of-00001.arrow", arrow_bytes(content))
    for folder in ("theirs", "other", "theirs/data/*.parquet"):
        assert contents_of(f"{gcs_bucket}/{folder}") == [row["bytes"] for row in content["image"].to_pylist()]


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": True}])
def test_memory_does_not_grow_with_a_group(tmp_path, monkeypatch, options, is_zipped):
    """Of a group of many pages, and of one image and one long label that stand for all rows, by way of dictionaries.

    A file in a zip stands for one in a bucket, of which more is read at a time.
    """
    noise = np.random.default_rng(0)
    images = [noise.bytes(1 << 20)] * 128 if options else [noise.bytes(1 << 20) for _ in range(64)]
    content = pa.table(
        {"image": pa.array(images), "label": pa.array(["cat" * (100_000 if options else 1)] * len(images))}
    )
    parquet.write_table(content, tmp_path / "a.parquet", row_group_size=1000, write_batch_size=1, **options)
    del content
    path = tmp_path / "a.parquet"
    if is_zipped:
        path = zip_of(tmp_path / "a.zip", [("a.parquet", path.read_bytes())])
    read, sizes = zipfile.ZipExtFile.read, [0]

    def counted(file: zipfile.ZipExtFile, size: int = -1) -> bytes:
        sizes.append(size)
        return read(file, size)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        source = open_source(str(path))
        if options:
            with pytest.raises(BadDataError, match="has a label of 300,000 characters, which names no class"):
                list(source.images(labelled=True))
            source = open_source(str(path), column=None)
        labels = [found.label for found in source.images(labelled=True)]
        assert all(content == images[number] for number, (_, content) in enumerate(source.loaded(source.images())))
    finally:
        # What an error's traceback still holds must not outlive the pool.
        gc.collect()
        pa.set_memory_pool(before)
    assert len(labels) == len(images)
    assert 0 < pool.max_memory() < 24 << 20
    assert max(sizes) <= 32 << 20


def test_columns_are_found_by_types_and_features(tmp_path):
    path, kinds = tmp_path / "a.parquet", pa.array(["cat", "dog", None])

    def written(content: pa.Table) -> Path:
        parquet.write_table(content, path)
        return path

    plain = pa.table({"image": table(3)["image"]})
    for column, labels in [
        (pa.array([3, -1, None]), ["3", "", ""]),
        (kinds, ["cat", "dog", ""]),
        (kinds.dictionary_encode(), ["cat", "dog", ""]),
        (pa.array([1.0, 2.0, None]), ["1", "2", ""]),
        (pa.array([True, False, None]), ["true", "false", ""]),
    ]:
        assert labels_of(written(plain.append_column("label", column))) == labels
        assert labels_of(path, None) == ["", "", ""]
    assert labels_of(written(plain.append_column("genre", kinds))) == ["", "", ""]
    assert labels_of(path, "genre") == ["cat", "dog", ""]
    with pytest.raises(BadRequestError, match=r"has no label 'kind', but genre: choose one with --labels :NAME"):
        open_source(str(path), column="kind")
    # img2dataset names the column by the codec, and a sound is a struct of bytes as well.
    images = pa.array([jpeg(number) for number in range(3)])
    assert contents_of(written(pa.table({"url": kinds, "jpg": images, "key": kinds}))) == images.to_pylist()
    sound = json.dumps({"info": {"features": {"a": {"_type": "Audio"}, "b": {"_type": "Image"}}}})
    content = pa.table({"a": pa.array([{"bytes": b"RIFF", "path": None}], IMAGE), "b": table(1)["image"]})
    assert contents_of(written(content.replace_schema_metadata({"huggingface": sound}))) == [png(0)]
    # A row without an image, in a struct that is there or not.
    odd = pa.array([{"bytes": png(1), "path": None}, {"bytes": None, "path": "2.png"}, None], IMAGE)
    assert contents_of(written(pa.table({"image": odd}))) == [png(1), b"", b""]


def test_names_of_a_long_list_of_classes_are_no_labels_of_single_images(tmp_path):
    names = [str(number) for number in range(1000)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"image": {"bytes": png(1), "path": None}, "label": number} for number in range(150)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert len(survey(source).classes) == 1000


def test_choice_of_labels_is_asked_for(tmp_path):
    kinds = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine_label": kinds, "coarse_label": kinds})
    rows = [{"img": {"bytes": png(n), "path": None}, "fine_label": n % 2, "coarse_label": 0} for n in range(4)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    words = ("data", "pack", tmp_path / "a.parquet", "x", "--size", 8, "--bucket", tmp_path / "b")
    line = refused(ddpm_here(*words), Exit.BAD_REQUEST)
    assert "a.parquet has several labels: fine_label, coarse_label: choose one with --labels :NAME, or use" in line
    assert "classes  a, b" in succeeded(ddpm_here(*words, "--labels", ":fine_label"))
    assert "classes" not in succeeded(ddpm_here(*words[:3], "y", *words[4:], "--no-classes"))


def test_tables_beside_other_files(tmp_path, caplog):
    # img2dataset describes each tar in a table of its own.
    about = parquet_bytes(pa.table({"url": ["https://example.com/1.jpg"], "key": ["0"]}))
    for number in range(2):
        tar_of(tmp_path / f"tars/{number:05d}.tar", [(f"{number}.png", png(number))]) if number else folder_of(
            tmp_path / "tars", [("00000.parquet", about), ("00001.parquet", about)]
        )
    tar_of(tmp_path / "tars/00000.tar", [("0.png", png(0))])
    assert contents_of(tmp_path / "tars") == [png(0), png(1)]
    # A clone of a dataset has pictures for its page, and an imagefolder may have a table of what is in it.
    shard = parquet_bytes(table(4))
    clone = folder_of(tmp_path / "clone", [("a.png", png(9)), ("data/train-00001-of-00003.parquet", shard)])
    source = open_source(str(clone))
    assert labels_of(clone) == ["cat", "dog"] * 2
    assert "1 of the 3 files data/train-*-of-00003.parquet are there: get the others" in source.note
    assert "leaving out the images beside its tables" in source.note
    images = folder_of(tmp_path / "images", [("a.png", png(9)), ("metadata.parquet", about)])
    assert contents_of(images) == [png(9)]
    folder_of(tmp_path / "configs", [("small/train-0.parquet", shard), ("large/train-0.parquet", shard)])
    assert "tables of 2 folders (large, small) are packed together" in open_source(str(tmp_path / "configs")).note
    # Test images often have no labels.
    unlabelled = parquet_bytes(table(2).select(["image"]))
    mixed = folder_of(tmp_path / "mixed", [("test-0.parquet", unlabelled), ("train-0.parquet", shard)])
    assert labels_of(mixed) == ["cat", "dog", "cat", "dog"]
    both = replace(open_source(str(mixed)), split="")
    assert [one.label for one in both.images(labelled=True)] == ["", "", "cat", "dog", "cat", "dog"]
