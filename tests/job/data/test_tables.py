"""Parquet and Arrow files of images, as Hugging Face's `datasets` writes them, which judges what is read of them."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from fsspec.config import conf
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from pyarrow.parquet import encryption

from job.data.formats import tables
from job.data.opening import open_source
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.shards import DatasetIndex
from job.data.survey import survey
from job.exits import BadDataError, BadRequestError, Exit, JobError, StoppedError
from job.progress import printable
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.packing import packed
from tests.job.some_images import folder_of, jpeg, png, tar_of

SAMPLE = Path(__file__).parents[3] / "job/datasets/landscape-sample.zip"
KINDS = ("summit", "coast", "forest", "unseen", "field", "dune")
"""Not in the order of the alphabet, and one of which there is no image."""
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(KINDS))})
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

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
    for split, parts in [("", ("test", "train")), ("train", ("train",)), ("test", ("test",))]:
        index = packed(tmp_path / f"bucket{split}", folder, size=64, split=split, shard_images=25)
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


def table(rows: int, labels: object = None, size: int = 16, **columns: object) -> pa.Table:
    """Rows with an image and a class, as `datasets` has them."""
    images = pa.array([{"bytes": png(number, size, size), "path": None} for number in range(rows)], IMAGE)
    kinds = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": kinds} | {name: {} for name in columns}
    labels = pa.array([number % 2 for number in range(rows)]) if labels is None else labels
    made = pa.table({"image": images, "label": labels, **columns})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet_bytes(content: pa.Table, **options: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(
        content, file, **{"row_group_size": 8, "use_dictionary": False, "compression": "none"} | options
    )
    return file.getvalue()


def arrow_bytes(content: pa.Table, new=pa.ipc.new_stream, rows: int = 8, **options: object) -> bytes:
    file = io.BytesIO()
    with new(file, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return file.getvalue()


def labels_of(source: str | Path, column: str | None = "") -> list[str]:
    return [found.label for found in open_source(str(source), column=column).labelled()]


def contents_of(source: str | Path) -> list[bytes]:
    opened = open_source(str(source))
    return [content for _, content in opened.loaded(opened.images())]


def image_chunks(content: bytes) -> list[range]:
    """Where the images of each group of rows lie in a Parquet file."""
    about = parquet.ParquetFile(io.BytesIO(content)).metadata
    chunks = [about.row_group(number).column(0) for number in range(about.num_row_groups)]
    return [range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size) for chunk in chunks]


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


def test_hub_dataset_is_read_in_parts(server, tmp_path, monkeypatch):
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
    assert "images   160 colour" in said and "classes  cat, dog" in said
    where, at = "hf://datasets/org/name", {"size": 64, "split": "train"}

    handler.asked.clear()
    assert len(labels_of(where)) == 160
    assert fetched_groups(handler.asked, train) == []
    # Another split is not opened.
    handler.content["/data/test-00000-of-00001.parquet"] = b"damaged"

    with pytest.raises(StoppedError):
        packed(tmp_path / "stopped", where, stop_at=40, **at)
    handler.asked.clear()
    index = packed(tmp_path / "stopped", where, **at)
    assert index.images == 80
    # Two shards of two groups each were whole.
    assert fetched_groups(handler.asked, train) == [*range(4, 10)]

    handler.asked.clear()
    with pytest.raises(StoppedError):
        packed(tmp_path / "shared", where, slice="1/2", stop_at=17, **at)
    # Its shards are the second, which is whole, and the fourth.
    assert {2, 3} <= set(fetched_groups(handler.asked, train)) <= {2, 3, 6, 7}


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
    monkeypatch.setattr("job.store.remote.PART_BYTES", 1 << 14)
    content, store = table(20, size=64), open_store(gcs_bucket)
    store.put("theirs/data/train-00000-of-00001.parquet", parquet_bytes(content))
    store.put("other/train/data-00000-of-00001.arrow", arrow_bytes(content))
    for folder in ("theirs", "other", "theirs/data/*.parquet"):
        assert contents_of(f"{gcs_bucket}/{folder}") == [row["bytes"] for row in content["image"].to_pylist()]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": True}])
def test_memory_does_not_grow_with_a_group(tmp_path, monkeypatch, options):
    """Of a group of many pages, and of one image and one long label that stand for all rows, by way of dictionaries."""
    noise = np.random.default_rng(0)
    images = [noise.bytes(1 << 20)] * 128 if options else [noise.bytes(1 << 20) for _ in range(64)]
    content = pa.table(
        {"image": pa.array(images), "label": pa.array(["cat" * (100_000 if options else 1)] * len(images))}
    )
    parquet.write_table(content, tmp_path / "a.parquet", row_group_size=1000, write_batch_size=1, **options)
    del content
    read, sizes = tables.BoundedFile.read, [0]

    def counted(file: tables.BoundedFile, size: int = -1) -> bytes:
        sizes.append(size)
        return read(file, size)

    monkeypatch.setattr(tables.BoundedFile, "read", counted)
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        source = open_source(str(tmp_path / "a.parquet"))
        labels = [found.label for found in source.labelled()]
        assert all(content == images[number] for number, (_, content) in enumerate(source.loaded(source.images())))
    finally:
        pa.set_memory_pool(before)
    assert len(labels) == len(images)
    assert 0 < pool.max_memory() < 24 << 20
    assert max(sizes) <= 8 << 20


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
    with pytest.raises(
        BadRequestError, match=r"has no column 'kind' of labels: choose one of genre by --labels :COLUMN"
    ):
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
    assert len(survey(source.labelled(), source.where, names=source.classes).classes) == 1000


def test_choice_of_labels_is_asked_for(tmp_path):
    kinds = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine_label": kinds, "coarse_label": kinds})
    rows = [{"img": {"bytes": png(n), "path": None}, "fine_label": n % 2, "coarse_label": 0} for n in range(4)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    words = ("data", "pack", tmp_path / "a.parquet", "x", "--size", 8, "--bucket", tmp_path / "b")
    line = refused(ddpm_here(*words), Exit.BAD_REQUEST)
    assert "a.parquet has several labels, fine_label, coarse_label: choose one, such as --labels :fine_label" in line
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
    assert labels_of(mixed) == ["", "", "cat", "dog", "cat", "dog"]


def refusal(path: Path, error: type[JobError] = BadDataError) -> str:
    with pytest.raises(error) as caught:
        contents_of(path)
    return str(caught.value)


def test_unusable_tables_are_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    text, number = pa.array(["https://example.com/1.jpg"]), pa.array([[[1, 2], [3, 4]]], pa.list_(pa.list_(pa.uint8())))
    image, names = table(1)["image"], {"names": ["a", "a"], "_type": "ClassLabel"}
    twice = json.dumps({"info": {"features": {"label": names}}})
    for content, error, said in [
        (pa.table({"image_url": text}), BadDataError, "'image_url' holds URLs or paths: img2dataset downloads"),
        (pa.table({"image": number}), BadDataError, "'image' holds pixels as lists of numbers: write the images by"),
        (pa.table({"images": pa.array([image.to_pylist()])}), BadDataError, "'images' holds lists of images"),
        (pa.table({"text": text, "n": number}), BadDataError, "is a table without a column of images"),
        (pa.table({"left": image, "right": image}), BadRequestError, "several columns of images: left, right: write"),
        (table(1, pa.array([2])), BadDataError, "a.parquet has the label 2, and 2 classes: get it again"),
        (table(1).replace_schema_metadata({"huggingface": twice}), BadDataError, "has two classes of one name"),
        (pa.table({"image": pa.array([{"bytes": None, "path": "/a.png"}], IMAGE)}), BadDataError, "at most a path"),
        (pa.table({"image": pa.array([], IMAGE)}), BadDataError, "holds no images"),
        (pa.table({"image": pa.nulls(100_000, IMAGE)}), BadDataError, "promises 100,000 rows, and has 100,000 rows in"),
    ]:
        parquet.write_table(content, path)
        with pytest.raises(error) as caught:
            survey(open_source(str(path)).labelled(), str(path))
            contents_of(path)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    # An array of `datasets` is an extension of lists.
    features = datasets.Features({"image": datasets.Array3D((2, 2, 3), "uint8")})
    datasets.Dataset.from_list([{"image": np.zeros((2, 2, 3), np.uint8)}], features=features).to_parquet(path)
    assert "'image' holds pixels as lists of numbers" in refusal(path)


def test_damaged_tables_are_one_line(tmp_path):
    path, content = tmp_path / "a.parquet", parquet_bytes(table(20))
    for damaged, said in [
        (content[:-1], "a.parquet is truncated or damaged (Parquet magic bytes not found in footer"),
        (b"", "is truncated or damaged (Parquet file size is 0 bytes"),
        (content[: image_chunks(content)[1].start] + content[image_chunks(content)[2].start :], "is truncated or dam"),
    ]:
        path.write_bytes(damaged)
        assert said in refusal(path)
    other = tmp_path / "b.arrow"
    stream = arrow_bytes(table(20))
    for damaged, said in [
        (stream[:-8], "b.arrow is truncated, or no Arrow file: its end is missing"),
        (b"", "b.arrow is truncated or damaged"),
        (arrow_bytes(table(20), pa.ipc.new_file)[:-10], "b.arrow is truncated or damaged"),
    ]:
        other.write_bytes(damaged)
        assert said in refusal(other)
    (tmp_path / "b.arrow").unlink()
    # Files that differ in their classes, or lack the images.
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(table(2).replace_schema_metadata({})))
    path.write_bytes(content)
    assert "has the entry 'b.parquet', which has other classes in the column 'label' than others" in refusal(tmp_path)
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(table(2).select(["label"])))
    assert "'b.parquet', which lacks the column 'image' of images of other files" in refusal(tmp_path)


def test_lying_row_counts_are_refused(tmp_path):
    """The file and its group of rows give their number in a varint of Thrift each, of one byte."""
    path, content = tmp_path / "a.parquet", parquet_bytes(pa.table({"image": table(20)["image"]}), row_group_size=20)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = [at for at in range(start, len(content) - 8) if content[at] == 2 * 20]
    said = []
    for two in combinations(places, 2):
        changed = bytearray(content)
        for at in two:
            changed[at] = 2 * 21
        path.write_bytes(changed)
        try:
            assert len(contents_of(path)) == 20
        except BadDataError as error:
            said.append(str(error))
    assert sum("promises 21 rows in a group, and has 20" in line for line in said) == 1
    assert any("promises 21 rows, and has 20 rows in its groups" in line for line in said)


def test_encrypted_tables_are_named(tmp_path):
    class Keys(encryption.KmsClient):
        """Hands the keys out as they are."""

        def wrap_key(self, key: bytes, _: str) -> bytes:
            return b64encode(key)

    factory = encryption.CryptoFactory(lambda _: Keys())
    for plaintext_footer in (True, False):
        how = encryption.EncryptionConfiguration(
            footer_key="footer", column_keys={"image": ["image.bytes"]}, plaintext_footer=plaintext_footer
        )
        properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
        path = tmp_path / "a.parquet"
        with parquet.ParquetWriter(path, table(1).schema, encryption_properties=properties) as writer:
            writer.write_table(table(1))
        assert "is encrypted: decrypt it, and pack the copy" in refusal(path)


def test_replaced_table_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(table(40)))
    source = open_source(str(path))
    list(source.labelled())
    path.write_bytes(parquet_bytes(table(30)))
    with pytest.raises(
        BadDataError, match=r"promises 8 rows in a group, and has 6: it is damaged|truncated or damaged"
    ):
        list(source.loaded(source.images()))


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, kind in (("a.parquet", "Parquet"), ("a.arrow", "Arrow")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(
            BadRequestError, match=rf"{name} is {kind}, which needs pyarrow: .* pip install .*\[parquet\]"
        ):
            open_source(str(tmp_path / name))


def test_unreachable_bytes_are_no_damage(tmp_path, monkeypatch):
    """What a bucket says while pyarrow reads from it is not about the file."""
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(table(20)))
    source = open_source(str(path))

    def away(*_: object) -> bytes:
        raise StoppedError("stopped")

    monkeypatch.setattr(tables.BoundedFile, "read", away)
    with pytest.raises(StoppedError):
        list(source.labelled())


def test_large_images_are_refused(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"image": pa.array([png(1), bytes(2000)])}), tmp_path / "a.parquet")
    monkeypatch.setattr("job.data.members.ENTRY_BYTES", 1500)
    assert "entry 'a.parquet/0000001.png' has 2,000 bytes, more than the 1,500" in refusal(tmp_path / "a.parquet")


def hostile_bases() -> list[tuple[str, bytes]]:
    """Small files of each kind, in the encodings and codecs that differ."""
    texts = pa.array(["cat", "dog", None] * 4)
    found = list[tuple[str, bytes]]()
    for content in (table(12, size=8), table(12, texts, 8), table(12, texts.dictionary_encode(), 8)):
        for options in (
            {"row_group_size": 5},
            {"use_dictionary": True, "compression": "snappy"},
            {"compression": "zstd", "data_page_version": "2.0"},
            {"compression": "gzip", "write_page_index": True},
        ):
            found.append((".parquet", parquet_bytes(content, **options)))
        for codec in (None, "lz4", "zstd"):
            found += [
                (".arrow", arrow_bytes(content, new, 5, compression=codec))
                for new in (pa.ipc.new_stream, pa.ipc.new_file)
            ]
    return found


FLIPS = st.lists(st.tuples(st.integers(-3000, 1 << 13), st.integers(0, 255)), min_size=1, max_size=4)
CUTS = st.none() | st.none() | st.integers(0, 1 << 13)


@examples(few=40, many=2000)
def test_hostile_table_makes_dataset_or_line(tmp_path: Path, count: int) -> None:
    bucket = tmp_path / "bucket"

    @search(count, st.sampled_from(hostile_bases()), FLIPS, CUTS)
    def check(base: tuple[str, bytes], flips: list[tuple[int, int]], cut: int | None) -> None:
        suffix, content = base
        harmed = bytearray(content[:cut])
        for at, value in flips:
            if harmed:
                harmed[at % len(harmed)] = value
        # A new file each time: Arrow's are mapped into memory.
        path = tmp_path / f"a{suffix}"
        path.unlink(missing_ok=True)
        path.write_bytes(harmed)
        shutil.rmtree(bucket, ignore_errors=True)
        try:
            index = pack(open_store(str(bucket)), PackRequest(str(path), "x", 8))
        except JobError as error:
            assert error.exit_code in (Exit.BAD_DATA, Exit.BAD_REQUEST)
            assert len(str(error).splitlines()) == 1
        else:
            assert index.images <= 12
            assert all(name == printable(name) for name in (index.source, *index.classes))
