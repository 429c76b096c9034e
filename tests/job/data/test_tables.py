"""Parquet and Arrow files of images, as Hugging Face's `datasets` writes them, which judges what is read of them."""

from __future__ import annotations

import gc
import json
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import webdataset
from fsspec.config import conf
from pyarrow import parquet

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
    parts = {"train": rows[:40], "test": rows[40:]}
    return datasets.DatasetDict({k: datasets.Dataset.from_list(part, features=FEATURES) for k, part in parts.items()})


def as_parquet(splits: datasets.DatasetDict, folder: Path) -> datasets.DatasetDict:
    """As `push_to_hub` lays a dataset out."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for number in range(2):
            path = folder / f"data/{split}-{number:05d}-of-00002.parquet"
            rows.shard(2, number, contiguous=True).to_parquet(path, batch_size=7)
    (folder / "README.md").write_text("---\ndataset_info: {}\n---\n")
    files = {split: sorted(map(str, folder.glob(f"data/{split}-*"))) for split in ("train", "test")}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder.parent / "cache"))


def on_disk(splits: datasets.DatasetDict, folder: Path) -> datasets.DatasetDict:
    """As `save_to_disk` does, with what a later `map` leaves beside it."""
    splits.save_to_disk(folder, num_shards={"train": 2, "test": 1})
    (folder / "train/cache-1234.arrow").write_bytes(b"of another function")
    return datasets.load_from_disk(str(folder))


@pytest.mark.parametrize("write", [as_parquet, on_disk])
def test_tables_are_packed_as_datasets_reads_them(tmp_path, write):
    folder = tmp_path / "tiles"
    judge = write(photographs(), folder)
    names = judge["train"].features["label"].names
    for split, part in [("", "train"), ("train", "train"), ("test", "test")]:
        bucket = tmp_path / f"bucket{split}"
        index = packed(bucket, folder, size=64, split=split, shard_images=25, unlabelled="drop")
        rows = [row for row in judge[part] if row["label"] not in (-1, None)]
        urls = [str(bucket / "datasets/small-64" / shard.name) for shard in index.shards]
        found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        assert index.classes == KINDS == tuple(names) and index.classes_from == "labels"
        assert (index.splits, index.unlabelled_images) == ((), 2 if part == "train" else 0)
        assert [index.classes[one["cls"]] for one in found] == [names[row["label"]] for row in rows]
        expected = [np.asarray(row["image"].convert("RGB")) for row in rows]
        np.testing.assert_array_equal([one["png"] for one in found], expected)


def fetched_groups(asked: list[tuple[str, str]], content: bytes) -> set[int]:
    """Which groups of images these requests have fetched bytes of; the footer with its kilobytes left out."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", said) for _, said in asked]
    ranges = [(int(match[1]), int(match[2])) for match in found if match and int(match[2]) + 1 < len(content)]
    groups = enumerate(image_chunks(content))
    return {n for n, chunk in groups for first, last in ranges if first < chunk.stop and chunk.start <= last}


def test_hub_dataset_is_read_in_parts(server, tmp_path, monkeypatch, caplog):
    """Labels alone are read of all rows, and images of no more groups than a stopped or shared packing needs."""
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    train = parquet_bytes(table(80, size=64))
    # Seen as a reader of the page sees them: a picture of the README is no image of the dataset.
    handler.content = {"/README.md": b"---\n---\n", "/assets/banner.png": png(1)}
    handler.content |= {f"/data/{split}-00000-of-00001.parquet": train for split in ("train", "test")}
    where, at = "hf://datasets/org/name", {"size": 64, "split": "train"}
    said = succeeded(ddpm_here("data", "pack", where, "all", "--size", 64, "--bucket", tmp_path / "all"))
    assert "images   80 colour" in said and "classes  cat, dog" in said
    assert "packing its split train; --split test would pack another" in caplog.text

    handler.asked.clear()
    assert (len(labels_of(where)), fetched_groups(handler.asked, train)) == (80, set())
    # Another split is not opened.
    handler.content["/data/test-00000-of-00001.parquet"] = b"damaged"
    with pytest.raises(StoppedError):
        packed(tmp_path / "stopped", where, stop_at=40, **at)
    handler.asked.clear()
    assert packed(tmp_path / "stopped", where, **at).images == 80
    # Two shards of two groups each were whole; the first image says that the dataset is in colour.
    assert fetched_groups(handler.asked, train) == {0, *range(4, 10)}

    handler.asked.clear()
    with pytest.raises(StoppedError):
        packed(tmp_path / "shared", where, slice="1/2", stop_at=17, **at)
    # Its shards are the second, which is whole, and the fourth.
    assert {2, 3} <= fetched_groups(handler.asked, train) <= {0, 2, 3, 6, 7}


def test_files_elsewhere_are_streamed(server, tmp_path, gcs_bucket, monkeypatch):
    handler, url = server
    content, whole, stream = table(20, size=64), parquet_bytes(table(20, size=64)), arrow_bytes(table(20, size=64))
    handler.content = {"/a.parquet": whole, "/b.arrow": stream, "/c.arrow": arrow_bytes(content, pa.ipc.new_file)}
    # Inside a zip there is no way back to an earlier byte but from the beginning.
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/train-00000-of-00001.parquet", whole)
    # In a bucket, several requests at a time fetch parts of a group.
    monkeypatch.setattr("job.store.remote.RANGE_BYTES", 1 << 14)
    open_store(gcs_bucket).put("theirs/data/train-00000-of-00001.parquet", whole)
    open_store(gcs_bucket).put("other/train/data-00000-of-00001.arrow", stream)
    in_bucket = [f"{gcs_bucket}/{folder}" for folder in ("theirs", "other", "theirs/data/*.parquet")]
    for source in (*(f"{url}{name}" for name in handler.content), tmp_path / "kaggle.zip", *in_bucket):
        assert labels_of(source) == ["cat", "dog"] * 10
        assert contents_of(source) == [row["bytes"] for row in content["image"].to_pylist()]


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": True}])
def test_memory_does_not_grow_with_a_group(tmp_path, monkeypatch, options, is_zipped):
    """Of a group of many pages, and of one image and one long label that stand for all rows, by way of dictionaries.

    A file in a zip stands for one in a bucket, of which more is read at a time.
    """
    noise, path = np.random.default_rng(0), tmp_path / "a.parquet"
    images = [noise.bytes(1 << 20)] * 128 if options else [noise.bytes(1 << 20) for _ in range(64)]
    labels = pa.array(["cat" * (100_000 if options else 1)] * len(images))
    content = pa.table({"image": pa.array(images), "label": labels})
    parquet.write_table(content, path, row_group_size=1000, write_batch_size=1, **options)
    del content, labels
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
    path, kinds, plain = tmp_path / "a.parquet", pa.array(["cat", "dog", None]), table(3).select(["image"])
    plain = pa.table({"image": plain["image"]})

    def written(content: pa.Table) -> Path:
        parquet.write_table(content, path)
        return path

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


def test_choice_of_labels_is_asked_for(tmp_path):
    def written(name: str, kinds: list[str], rows: list[dict[str, int]]) -> Path:
        labels = dict.fromkeys(rows[0], datasets.ClassLabel(names=kinds))
        images = [{"img": {"bytes": png(n), "path": None}, **row} for n, row in enumerate(rows)]
        features = datasets.Features({"img": datasets.Image(), **labels})
        datasets.Dataset.from_list(images, features=features).to_parquet(tmp_path / name)
        return tmp_path / name

    two = written("a.parquet", ["a", "b"], [{"fine_label": n % 2, "coarse_label": 0} for n in range(4)])
    words = ("data", "pack", two, "--size", 8, "--bucket", tmp_path / "b")
    line = refused(ddpm_here(*words, "x"), Exit.BAD_REQUEST)
    assert "a.parquet has several labels: fine_label, coarse_label: choose one with --labels :NAME, or use" in line
    assert "classes  a, b" in succeeded(ddpm_here(*words, "x", "--labels", ":fine_label"))
    assert "classes" not in succeeded(ddpm_here(*words, "y", "--no-classes"))
    # Names of a long list of classes are no labels of single images.
    many = written("b.parquet", [str(number) for number in range(1000)], [{"label": n} for n in range(150)])
    assert len(survey(open_source(str(many))).classes) == 1000


def test_tables_beside_other_files(tmp_path):
    # img2dataset describes each tar in a table of its own.
    about = parquet_bytes(pa.table({"url": ["https://example.com/1.jpg"], "key": ["0"]}))
    folder_of(tmp_path / "tars", [(f"0000{number}.parquet", about) for number in range(2)])
    for number in range(2):
        tar_of(tmp_path / f"tars/{number:05d}.tar", [(f"{number}.png", png(number))])
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


def test_troubles_while_a_table_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(table(40)))
    source = open_source(str(path))
    list(source.images(labelled=True))
    path.write_bytes(parquet_bytes(table(30)))
    said = r"promises 8 rows in a group, and has 6: it is damaged|truncated or damaged"
    with pytest.raises(BadDataError, match=said):
        list(source.loaded(source.images()))

    # Unreachable bytes are no damage of the file; one in a zip stands for one in a bucket.
    source = open_source(str(zip_of(tmp_path / "a.zip", [("a.parquet", parquet_bytes(table(20)))])))

    def away(*_: object) -> bytes:
        raise StoppedError("stopped")

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(zipfile.ZipExtFile, "read", away)
        list(source.images(labelled=True))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, kind in (("a.parquet", "Parquet"), ("a.arrow", "Arrow")):
        (tmp_path / name).write_bytes(b"")
        said = rf"{name} is {kind}, which needs more than is installed .*pyarrow.* pip install .*\[parquet\]"
        with pytest.raises(BadRequestError, match=said):
            open_source(str(tmp_path / name))
