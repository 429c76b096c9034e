"""Tables that cannot be packed, or are damaged and forged in any way: a dataset, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from base64 import b64encode
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from pyarrow import parquet
from pyarrow.parquet import encryption

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.source import open_source
from job.data.source.survey import survey
from job.exits import BadDataError, BadRequestError, Exit, JobError, StoppedError
from job.progress import printable
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.some_images import png, zip_of
from tests.job.some_tables import IMAGE, arrow_bytes, contents_of, image_chunks, parquet_bytes, table


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
        (pa.table({"image_url": text}), BadDataError, "and has image_url. A row has one"),
        (
            pa.table({"image": number}),
            BadDataError,
            "and has image. A row has one",
        ),
        (
            pa.table({"images": pa.array([image.to_pylist()])}),
            BadDataError,
            "and has images. A row has one",
        ),
        (
            pa.table({"text": text, "n": number}),
            BadDataError,
            "without a column of images, and has text, n. A",
        ),
        (pa.table({"left": image, "right": image}), BadRequestError, "several columns of images: left, right: write"),
        (table(1, pa.array([2])), BadDataError, "a.parquet has the label 2, and 2 classes: get it again"),
        (table(1).replace_schema_metadata({"huggingface": twice}), BadDataError, "has two classes of one name"),
        (pa.table({"image": pa.array([], IMAGE)}), BadDataError, "holds no images"),
        (pa.table({"image": pa.nulls(100_000, IMAGE)}), BadDataError, "promises 100,000 rows, and has 100,000 rows in"),
    ]:
        parquet.write_table(content, path)
        with pytest.raises(error) as caught:
            survey(open_source(str(path)))
            contents_of(path)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    # An array of `datasets` is an extension of lists.
    features = datasets.Features({"image": datasets.Array3D((2, 2, 3), "uint8")})
    datasets.Dataset.from_list([{"image": np.zeros((2, 2, 3), np.uint8)}], features=features).to_parquet(path)
    assert "and no pixels as numbers or lists: write it by `datasets`" in refusal(path)


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
    assert "b.parquet has other classes in the column 'label' than others" in refusal(tmp_path)
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(table(2).select(["label"])))
    assert "b.parquet lacks the column 'image' of images of other files" in refusal(tmp_path)


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
        assert "crypt" in refusal(path)


def test_replaced_table_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(table(40)))
    source = open_source(str(path))
    list(source.images(labelled=True))
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
            BadRequestError,
            match=rf"{name} is {kind}, which needs more than is installed .*pyarrow.* pip install .*\[parquet\]",
        ):
            open_source(str(tmp_path / name))


def test_unreachable_bytes_are_no_damage(tmp_path, monkeypatch):
    """What a bucket says while pyarrow reads from it is not about the file; a file in a zip stands for one there."""
    path = zip_of(tmp_path / "a.zip", [("a.parquet", parquet_bytes(table(20)))])
    source = open_source(str(path))

    def away(*_: object) -> bytes:
        raise StoppedError("stopped")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", away)
    with pytest.raises(StoppedError):
        list(source.images(labelled=True))


def test_large_images_are_refused(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"image": pa.array([png(1), bytes(2000)])}), tmp_path / "a.parquet")
    monkeypatch.setattr("job.data.source.members.ENTRY_BYTES", 1500)
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
