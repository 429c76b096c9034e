"""TFRecord files, written by the package `tfrecord`, and the images and labels that the test itself has put there."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf
from PIL import Image
from tfrecord import TFRecordWriter

from job.data.images import are_grey
from job.data.shards import load_index
from job.data.source import members
from job.exits import BadRequestError, Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, succeeded
from tests.job.damages import flip_a_bit
from tests.job.data.formats.reading import labels_of, line_of, opened, pixels_of
from tests.job.packing import entries_of, packed
from tests.job.some_images import jpeg, png, zip_of

Features = dict[str, tuple[object, str]]


def written(path: Path, examples: list[Features]) -> Path:
    """A TFRecord file of these features, which are values and their kind: byte, int or float."""
    path.parent.mkdir(exist_ok=True)
    writer = TFRecordWriter(str(path.with_suffix(".plain")))
    for example in examples:
        writer.write(example)
    writer.close()
    content = path.with_suffix(".plain").read_bytes()
    path.with_suffix(".plain").unlink()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def imagenet(number: int) -> Features:
    """An example as the scripts of TensorFlow's models write it."""
    return {
        "image/height": (48, "int"),
        "image/colorspace": (b"RGB", "byte"),
        "image/class/label": (number + 1, "int"),
        "image/class/synset": (b"n%08d" % number, "byte"),
        "image/class/text": (f"kind {number}".encode(), "byte"),
        "image/object/bbox/xmin": ([0.1, 0.2], "float"),
        "image/filename": (b"%d.JPEG" % number, "byte"),
        "image/encoded": (jpeg(number), "byte"),
    }


def small(number: int, **more: tuple[object, str]) -> Features:
    """An example as TensorFlow Datasets writes it."""
    return {"image": (png(number), "byte"), "label": (number % 2, "int"), **more}


def test_imagenet_is_read_as_it_was_written(tmp_path: Path) -> None:
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        written(tmp_path / f"in/train-{shard:05d}-of-00003", [imagenet(number) for number in numbers])
    # A shard may be empty.
    written(tmp_path / "in/train-00002-of-00003", [])
    written(tmp_path / "in/validation-00000-of-00001", [imagenet(9)])
    source = opened(tmp_path / "in")
    assert [content for _, content in entries_of(source)] == [jpeg(number) for number in range(6)]
    assert labels_of(source) == [str(number + 1) for number in range(6)]
    assert next(entries_of(source))[0] == "train-00000-of-00003/00000000.jpg"
    assert (source.split, source.other_splits) == ("train", ("val",))
    assert labels_of(opened(tmp_path / "in", "val")) == ["10"]
    texts = opened(tmp_path / "in", column="image/class/text")
    assert labels_of(texts) == [f"kind {number}" for number in range(6)]
    kinds = packed(tmp_path / "b", tmp_path / "in", labels=":image/class/text").classes
    assert kinds == tuple(f"kind {number}" for number in range(6))
    assert labels_of(opened(tmp_path / "in/validation-00000-of-00001")) == ["10"]
    with pytest.raises(BadRequestError, match=r"none of its images has a label 'colour'.*; there are :image/"):
        packed(tmp_path / "c", tmp_path / "in", labels=":colour", shard_images=None)


def test_tensorflow_datasets_are_read_with_their_names(tmp_path: Path) -> None:
    more = {"coarse": ([1], "int"), "id": (b"x", "byte")}
    for split in ("train", "test"):
        path = tmp_path / f"cifar/set-{split}.tfrecord-00000-of-00001"
        written(path, [small(number, **more) for number in range(4)])
    (tmp_path / "cifar/label.labels.txt").write_bytes(b"zebra\nant\n")
    source = opened(tmp_path / "cifar")
    assert (source.classes, labels_of(source)) == (("zebra", "ant"), ["zebra", "ant", "zebra", "ant"])
    np.testing.assert_array_equal(pixels_of(source)[3], np.asarray(Image.open(io.BytesIO(png(3)))))
    said = succeeded(ddpm_here("data", "pack", tmp_path / "cifar", "a", "--size", 16, "--bucket", tmp_path / "b"))
    assert "images   4 colour, 16×16" in said and "classes  zebra, ant" in said
    assert load_index(open_store(str(tmp_path / "b")), "datasets/a-16").source == "cifar"
    (tmp_path / "cifar/label.labels.txt").write_bytes(b"zebra\n")
    assert "has the label 1, and 1 classes: get it again" in line_of(tmp_path / "cifar")


def test_gzipped_zipped_and_remote_files_are_the_same(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    examples = [small(number) for number in range(5)]
    plain = written(tmp_path / "plain/a.tfrecords", examples)
    zipped = zip_of(tmp_path / "a.zip", [("a.tfrecords", plain.read_bytes())])
    handler.content = {"/set/a.tfrecords": plain.read_bytes(), "/a.tfrecords": plain.read_bytes()}
    remote = ("hf://datasets/org/name/set", f"{url}/a.tfrecords")
    for place in (plain, written(tmp_path / "a.tfrecords.gz", examples), zipped, *remote):
        source = opened(place)
        assert labels_of(source) == ["0", "1", "0", "1", "0"], place
        assert [content for _, content in entries_of(source)] == [png(number) for number in range(5)], place


def test_stylegan_and_other_raw_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for level, step in [(2, 4), (3, 2), (4, 1)]:
        reduced = np.ascontiguousarray(pixels[:, ::step, ::step].transpose(0, 3, 1, 2))
        examples = [{"shape": (each.shape, "int"), "data": (each.tobytes(), "byte")} for each in reduced]
        written(tmp_path / f"faces/faces-r{level:02d}.tfrecords", examples)
    source = opened(tmp_path / "faces")
    np.testing.assert_array_equal(pixels_of(source), pixels)
    assert "packing faces-r04.tfrecords and not the others" in source.note
    np.testing.assert_array_equal(pixels_of(opened(tmp_path / "faces/faces-r02.tfrecords")), pixels[:, ::4, ::4])
    sides = {"height": (16, "int"), "width": (8, "int")}
    grey = [{"image_raw": (bytes(range(128)), "byte"), "depth": (1, "int"), **sides}]
    source = opened(written(tmp_path / "grey.tfrecord", grey))
    assert are_grey(content for _, content in entries_of(source))
    assert pixels_of(source)[0].tobytes() == bytes(range(128))
    bad = [*grey, {"image_raw": (bytes(99), "byte"), "depth": (1, "int"), **sides}]
    said = line_of(written(tmp_path / "bad.tfrecord", bad))
    assert "has 99 bytes of pixels, whose shape is [16, 8, 1]: write its images into a folder" in said


def test_other_examples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    labels = {f"label/{name}": (1, "int") for name in ("young", "smiling")}
    image = {"image": (png(0), "byte")}
    for example, exit_code, said in [
        (image | labels, Exit.BAD_REQUEST, "has several labels: label/"),
        (image | {"label": ([1, 2], "int")}, Exit.BAD_DATA, "has several values of its label, and not one class"),
        ({"a": (png(0), "byte"), "b": (png(0), "byte")}, Exit.BAD_REQUEST, "has several images in a record: "),
        ({"x": (b"text", "byte")}, Exit.BAD_DATA, "such as a JPEG in image/encoded in its first record, but x: write"),
        ({}, Exit.BAD_DATA, "and is not a tf.train.Example: write its images into a folder, and pack that"),
    ]:
        assert said in line_of(written(path, [example]), exit_code), said
        assert "a.tfrecord" in line_of(path, exit_code)
    assert labels_of(opened(written(path, [image | labels]), column=None)) == [""]
    assert labels_of(opened(path, column="label/young")) == ["1"]
    assert "'a.tfrecord/00000001.jpg', which has no image, but x" in line_of(written(path, [image, {"x": (1, "int")}]))
    # One that has none, and one that says so.
    assert labels_of(opened(written(path, [small(1), image, small(1, label=(-1, "int"))]))) == ["1", "", ""]
    assert "holds no records" in line_of(written(path, []))


def test_damaged_records_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.tfrecord", [small(number) for number in range(3)])
    whole = path.read_bytes()
    for at in (3, 9, len(whole) // 2, -2):
        path.write_bytes(whole)
        assert "(a checksum differs): get it again" in line_of(flip_a_bit(path, at)), at
    for cut in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "a.tfrecord" in line_of(path), cut
    huge = struct.pack("<Q", (64 << 20) + 1)
    path.write_bytes(huge + TFRecordWriter.masked_crc(huge) + bytes(100))
    assert "has 67,108,865 bytes, more than the 67,108,864 that a record may have" in line_of(path)
    monkeypatch.setattr(members, "ENTRY_BYTES", 1 << 20)
    zeros = [{"image": (png(0), "byte"), "pad": (bytes(1 << 19), "byte")}] * 8
    said = line_of(written(tmp_path / "b.tfrecord.gz", zeros))
    assert "unpacks to more than 200 times its size: do not trust this archive" in said
