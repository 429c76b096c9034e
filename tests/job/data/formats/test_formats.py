"""Files of many images as people download them, judged by the library that wrote them.

NumPy says what its arrays hold, torchvision reads CIFAR's pickles of the same arrays, and the packages tfrecord and
lmdb write what the tests themselves have put there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
import resource
import struct
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import pytest
from fsspec.config import conf
from PIL import Image
from tfrecord import TFRecordWriter

from job.data.images import found_in
from job.data.shards import load_index
from job.data.source import members, open_source
from job.data.source.members import Source
from job.exits import BadRequestError, Exit, JobError
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import flip_a_bit
from tests.job.packing import entries_of, images_of, names_of, packed
from tests.job.some_images import encoded, folder_of, jpeg, picture, png, tar_of, zip_of

RNG = np.random.default_rng(0)


def opened(path: Path | str, split: str | None = None, **options: object) -> Source:
    """The source at a path, and one split of it."""
    source = open_source(str(path), **options)
    return source if split is None else replace(source, split=split)


def pixels_of(source: Source) -> list[np.ndarray]:
    """The images as arrays, in order."""
    return [np.asarray(Image.open(io.BytesIO(content))) for _, content in entries_of(source)]


def labels_of(source: Source) -> list[str]:
    """The labels of the images, in order."""
    return [found.label for found in source.images(labelled=True)]


def line_of(path: Path | str, exit_code: Exit = Exit.BAD_DATA, **options: object) -> str:
    """The one line that refuses a source, be it when it is opened or when it is read."""
    with pytest.raises(JobError) as caught:
        source = open_source(str(path), **options)
        list(source.images(labelled=True))
        list(entries_of(source))
    assert caught.value.exit_code == exit_code, caught.value
    (line,) = str(caught.value).splitlines()
    return line


def assert_read(place: Path | str, images: np.ndarray | list[bytes], labels: object, split: str | None = None) -> None:
    """Compares what is read with arrays [N, H, W(, 3)] or the files of images, and with their labels."""
    source = opened(place, split)
    contents = [content for _, content in entries_of(source)]
    if isinstance(images, list):
        assert contents == images, place
    else:
        np.testing.assert_array_equal(pixels_of(source), images)
        assert found_in(iter(contents)).channels == (1 if images.ndim == 3 else 3)
    expected = [""] * len(images) if labels is None else [str(label) for label in np.asarray(labels).reshape(-1)]
    assert labels_of(source) == expected, place


def colours(count: int, side: int = 8) -> np.ndarray:
    """uint8 [N, side, side, 3]."""
    return RNG.integers(0, 256, (count, side, side, 3), np.uint8)


def greys(count: int) -> np.ndarray:
    """uint8 [N, 8, 8]."""
    return RNG.integers(0, 256, (count, 8, 8), np.uint8)


def numbers(count: int, dtype: object = np.int64) -> np.ndarray:
    """Labels from 1 to 12."""
    return RNG.integers(1, 13, count).astype(dtype)


def saved(path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    """An .npz of these arrays."""
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def npy(array: np.ndarray) -> bytes:
    """The array as an .npy."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_sets_of_splits_are_read_as_by_numpy(tmp_path: Path) -> None:
    keras = {"x_train": greys(12), "y_train": numbers(12, np.uint8), "x_test": greys(3), "y_test": numbers(3, np.uint8)}
    medmnist = {}
    for number, split in enumerate(("train", "val", "test"), 3):
        medmnist |= {f"{split}_images": colours(number), f"{split}_labels": numbers(number, np.uint8)[:, None]}
    for arrays, x, y, splits in [
        (keras, "x_{}", "y_{}", ("train", "test")),
        (medmnist, "{}_images", "{}_labels", ("train", "val", "test")),
    ]:
        for compressed in (False, True):
            loaded = np.load(path := saved(tmp_path / "a.npz", compressed, **arrays))
            for split in splits:
                assert_read(path, loaded[x.format(split)], loaded[y.format(split)], split)
            assert (opened(path).split, opened(path).other_splits) == ("train", tuple(sorted(splits[1:])))
    folder = folder_of(tmp_path / "keras", [(f"{name}.npy", npy(array)) for name, array in keras.items()])
    inner = zip_of(tmp_path / "k.zip", [(f"k/{name}.npy", npy(array)) for name, array in keras.items()])
    for place in (folder, inner):
        for split in ("train", "test"):
            assert_read(place, keras[f"x_{split}"], keras[f"y_{split}"], split)
    # One that is chosen has its own labels, and leaves out no split.
    assert opened(f"zip://k/x_test.npy::{inner}").other_splits == ()
    assert_read(folder / "x_test.npy", keras["x_test"], keras["y_test"])
    at = ("data", "pack", saved(tmp_path / "mnist.npz", **keras), "x", "--size", 8, "--bucket")
    assert "images   12 grey, 8×8" in succeeded(ddpm_here(*at, tmp_path / "train"))
    assert "images   3 grey, 8×8" in succeeded(ddpm_here(*at, tmp_path / "test", "--split", "test"))
    assert "holds no images" in refused(ddpm_here(*at, tmp_path / "val", "--split", "val"), Exit.BAD_DATA)


def test_samples_and_batches_are_read_as_by_numpy(tmp_path: Path) -> None:
    samples = saved(tmp_path / "samples_5x8x8x3.npz", arr_0=colours(5), arr_1=numbers(5))
    assert_read(samples, np.load(samples)["arr_0"], np.load(samples)["arr_1"])
    (folder := tmp_path / "Imagenet8_train").mkdir()
    for number in (1, 2):
        data = RNG.integers(0, 256, (7, 192), np.uint8)
        name = f"train_data_batch_{number}.npz"
        saved(folder / name, True, data=data, labels=numbers(7), mean=data.mean(axis=0))
    saved(folder / "val_data.npz", data=data, labels=numbers(7, np.int32))
    loaded = [np.load(folder / f"train_data_batch_{number}.npz") for number in (1, 2)]
    # The authors' reader: channel by channel (image_ddpm.py of the dataset's repository).
    images = np.concatenate([batch["data"].reshape(-1, 3, 8, 8).transpose(0, 2, 3, 1) for batch in loaded])
    assert_read(folder, images, np.concatenate([batch["labels"] for batch in loaded]))
    assert opened(folder).other_splits == ("val",)


def test_plain_arrays_of_any_layout_are_read(tmp_path: Path) -> None:
    images, labels = colours(6), np.array(["cat", "dog", "cat", "bird", "", "dog"])
    for name, array, shown in [
        ("hwc", images, images),
        ("chw", np.ascontiguousarray(images.transpose(0, 3, 1, 2)), images),
        ("grey", images[..., 0].copy(), images[..., 0]),
        ("one", images[..., :1].copy(), images[..., 0]),
        ("flat", images[..., 0].reshape(6, 64), images[..., 0]),
    ]:
        folder = folder_of(tmp_path / name, [("images.npy", npy(array)), ("labels.npy", npy(labels))])
        assert_read(folder, shown, labels)
        assert_read(folder / "images.npy", shown, labels)
        (folder / "labels.npy").unlink()
        assert_read(folder, shown, None)
    for dtype in ("<f4", ">i2", "S4", ">U3", bool):
        values = np.array([1, 0, 1, 0, 1, 1]).astype(dtype)
        folder = folder_of(tmp_path / "typed", [("x.npy", npy(images)), ("y.npy", npy(values))])
        shown = [str(value).lower() if dtype is bool else str(int(value)) for value in values]
        assert labels_of(opened(folder)) == shown, dtype
    parts = [(f"{kind}_{n}.npy", npy(array)) for n in (0, 1) for kind, array in [("x", colours(3)), ("y", numbers(3))]]
    split = folder_of(tmp_path / "parts", parts)
    assert labels_of(opened(split)) == [str(n) for i in (0, 1) for n in np.load(split / f"y_{i}.npy")]
    # Quick, Draw! has a file for each class.
    drawings = [(f"{kind}.npy", npy(greys(2).reshape(2, 64))) for kind in ("ant", "bee")]
    words = ("d", "--size", 8, "--classes", "--bucket", tmp_path)
    said = succeeded(ddpm_here("data", "pack", folder_of(tmp_path / "drawings", drawings), *words))
    assert "images   4 grey, 8×8" in said and "classes  ant, bee" in said


def test_one_of_several_labels_is_chosen(tmp_path: Path) -> None:
    arrays = {"images": colours(5), "fine_labels": numbers(5), "coarse_labels": numbers(5), "ids": np.arange(5)}
    path = saved(tmp_path / "a.npz", **arrays)
    for column in ("fine_labels", "coarse_labels", "ids"):
        assert labels_of(opened(path, column=column)) == [str(one) for one in arrays[column]]
    assert labels_of(opened(path, column=None)) == [""] * 5
    masked = saved(tmp_path / "b.npz", images=arrays["images"], masks=greys(5), labels=numbers(5))
    assert "leaving out b.npz/masks.npy" in opened(masked).note
    assert_read(masked, arrays["images"], np.load(masked)["labels"])
    # The labels of the left images are not those of the right ones, though there are as many.
    pairs = {"left_images": colours(5), "left_labels": numbers(5), "right_images": colours(5)}
    assert labels_of(opened(saved(tmp_path / "two.npz", **pairs))) == [*map(str, pairs["left_labels"]), *[""] * 5]
    choose = "has several labels: fine_labels, coarse_labels: choose one with --labels :NAME, or use --no-classes"
    for column, more, *lines in [
        ("", arrays, choose),
        ("colour", arrays, "has no label 'colour', but fine_labels"),
        ("", {"x": greys(5), "y": np.eye(5)}, "y.npy is float64 [5, 5], and not one label for each of 5", "argmax"),
        ("", {"x": greys(9), "y": numbers(8)}, "y.npy is int64 [8], and not one label for each of 9 images"),
    ]:
        said = line_of(saved(tmp_path / "c.npz", **more), Exit.BAD_REQUEST, column=column)
        assert all(line in said for line in lines), said


def test_other_arrays_are_refused_by_name_type_and_shape(tmp_path: Path) -> None:
    for array, shown in [
        (np.zeros((2, 8, 8, 3), np.float32), "a.npy is float32 [2, 8, 8, 3]"),
        (np.zeros((2, 8, 8, 17), np.uint8), "a.npy is uint8 [2, 8, 8, 17]"),
        (np.zeros((8, 8, 3), np.uint8), "a.npy is uint8 [8, 8, 3]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.npy is uint8 [0, 8, 8, 3]"),
        (np.zeros((2, 8, 8), np.int64), "a.npy is int64 [2, 8, 8]"),
        (np.asfortranarray(colours(2)), "a.npy is uint8 [2, 8, 8, 3] in Fortran order"),
        (np.array([{}, 3], object), "a.npy is object [2]: pickles, which are programs"),
    ]:
        (tmp_path / "a.npy").write_bytes(npy(array))
        saved(tmp_path / "a.npz", a=array)
        for place in ("a.npy", "a.npz", "."):
            said = line_of(tmp_path / place)
            assert shown in said and "save it as uint8 or uint16 [images, height, width, channels] in C order" in said
    # Statistics beside archives are no images, and forbid none.
    folder = folder_of(tmp_path / "both", [("mu.npy", npy(np.zeros(2048)))])
    zip_of(folder / "photos.zip", [("1.png", png(1))])
    assert [name for name, _ in entries_of(opened(folder))] == ["1.png"]
    tar = tar_of(tmp_path / "a.tar", [("set/a.npy", npy(colours(2)))])
    said = refused(ddpm_here("data", "pack", tar, "a", "--size", 8, "--bucket", tmp_path / "b"), Exit.BAD_DATA)
    assert "it holds files of many images: unpack it, and pack the folder" in said


def test_headers_that_lie_and_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = npy(greys(9)), tmp_path / "x.npy"
    for content, said in [
        (whole[:-1], "which has 703 bytes, and promises 704: get it again"),
        (whole + b"\0", "which has 705 bytes, and promises 704"),
        (whole.replace(b"(9, 8, 8)", b"(9<<60, 8)"), "which is damaged, or not an array"),
        (whole.replace(b"(9, 8, 8), ", b"(9" + b"0" * 8 + b",8,8)"), "and promises 57,600,000,128"),
        (whole.replace(b"(9, 8, 8), ", b"(-9, 8, 8),"), "holds no array of images: x.npy is uint8 [-9, 8, 8]"),
        (whole.replace(b"(9, 8, 8)", b"(True,8,8)"), "which has 705 bytes, and promises 192"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + b"-" * 9000, "which is damaged, or not an array"),
        (b"", "which is damaged, or not an array"),
    ]:
        path.write_bytes(content)
        assert said in line_of(path), said
    monkeypatch.setattr(members, "ENTRY_BYTES", 1 << 20)
    bomb = saved(tmp_path / "bomb.npz", True, x=np.zeros((40_000, 8, 8), np.uint8))
    assert "bomb.npz unpacks to more than 200 times its size: do not trust this archive" in line_of(bomb)
    inner = saved(tmp_path / "a.npz", x=greys(9))
    outer = zip_of(tmp_path / "outer.zip", [("a.npz", inner.read_bytes())])
    assert "a.npz is a zip in a zip: unzip the outer one" in line_of(outer)
    assert "is truncated or damaged (Bad CRC-32 for file 'x.npy')" in line_of(flip_a_bit(inner, 600))


def test_large_arrays_are_not_loaded(tmp_path: Path) -> None:
    """500 MB, of which the disk has a few blocks."""
    header = npy(np.zeros((1, 64, 64, 3), np.uint8))[:128].replace(b"(1, 64, 64, 3), }     ", b"(40000, 64, 64, 3), } ")
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(header)
        file.seek(128 + 30_000 * 12_288)
        file.write(b"\7" * 12_288)
        file.truncate(128 + 40_000 * 12_288)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = opened(tmp_path / "x.npy")
    assert sum(1 for _ in source.images(labelled=True)) == 40_000
    ((name, content),) = source.loaded(islice(source.images(), 30_000, 30_001))
    assert name == "x.npy/30000.ppm" and content.endswith(b"\7" * 12_288)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_remote_files_are_read(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays by ranges; archives and records whole."""
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    images, labels = colours(400, 64), numbers(400)
    zipped = saved(tmp_path / "a.npz", True, images=images[:5], labels=labels[:5]).read_bytes()
    examples = [small(number) for number in range(5)]
    records = written(tmp_path / "plain/a.tfrecords", examples)
    handler.content = {"/set/images.npy": npy(images), "/set/labels.npy": npy(labels), "/zipped/a.npz": zipped}
    handler.content |= {"/a.npz": zipped} | dict.fromkeys(("/a.tfrecords", "/r/a.tfrecords"), records.read_bytes())
    hub = "hf://datasets/org/name"
    source = opened(f"{hub}/set")
    handler.asked.clear()
    assert labels_of(source) == [str(one) for one in labels]
    # The labels, and what is read ahead of the images: not 4.9 MB.
    assert len([asked for command, asked in handler.asked if command == "GET" and asked]) <= 2
    np.testing.assert_array_equal(pixels_of(source), images)
    for place in (f"{hub}/zipped", f"{hub}/a.npz", f"{url}/a.npz"):
        assert_read(place, images[:5], labels[:5])
    # And the same records gzipped, and in a zip.
    inner = zip_of(tmp_path / "a.zip", [("a.tfrecords", records.read_bytes())])
    gzipped = written(tmp_path / "a.tfrecords.gz", examples)
    for place in (f"{hub}/r", f"{url}/a.tfrecords", records, gzipped, inner):
        assert_read(place, [png(number) for number in range(5)], [0, 1, 0, 1, 0])


# CIFAR.
TEN = [f"class{number}" for number in (3, 1, 2, 0, 4, 9, 8, 7, 6, 5)]
FINE = [f"fine{number}" for number in range(100, 0, -1)]
COARSE = [f"coarse{number}" for number in range(20, 0, -1)]
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def batches(names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random images [7, 3072] and two labels for each."""
    rng, most = np.random.default_rng(0), 10 if len(names) > 2 else 100
    kinds = ((0, 256, (7, 3072)), (0, most, 7), (0, 20, 7))
    return {name: tuple(rng.integers(*kind, dtype=np.uint8) for kind in kinds) for name in names}


def ten_files() -> list[tuple[str, bytes]]:
    """CIFAR-10 as the binary archive has it."""
    parts = {name: np.column_stack([labels, images]) for name, (images, labels, _) in batches(BATCHES).items()}
    names = "\n".join([*TEN, "", ""]).encode()
    return [("batches.meta.txt", names), *((f"{name}.bin", part.tobytes()) for name, part in parts.items())]


def hundred_files() -> list[tuple[str, bytes]]:
    """CIFAR-100 as the binary archive has it."""
    parts = {name: np.column_stack([coarse, fine, x]) for name, (x, fine, coarse) in batches(("train", "test")).items()}
    files = [("fine_label_names.txt", "\n".join(FINE).encode()), ("coarse_label_names.txt", "\n".join(COARSE).encode())]
    return [*files, *((f"{name}.bin", part.tobytes()) for name, part in parts.items())]


def as_pickles(root: Path) -> None:
    """CIFAR-10 and CIFAR-100 as torchvision reads them."""
    ten = {name: {"data": x, "labels": y.tolist()} for name, (x, y, _) in batches(BATCHES).items()}
    ten |= {"batches.meta": {"label_names": TEN}}
    hundred = {"meta": {"fine_label_names": FINE}}
    for name, (images, fine, coarse) in batches(("train", "test")).items():
        hundred[name] = {"data": images, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
    for folder, contents in (("cifar-10-batches-py", ten), ("cifar-100-python", hundred)):
        folder_of(root / folder, [(name, pickle.dumps(content)) for name, content in contents.items()])


def judged(kind: str, root: Path, train: bool) -> tuple[np.ndarray, list[str]]:
    """Images [N, 32, 32, 3] and names of their classes, as torchvision reads them; without its check of the content."""
    from torchvision import datasets

    known = getattr(datasets, kind)
    lists = {name: [(file, None) for file, _ in getattr(known, name)] for name in ("train_list", "test_list")}
    unchecked = type(kind, (known,), {**lists, "meta": {**known.meta, "md5": None}})
    dataset = unchecked(root, train=train)
    return dataset.data, [dataset.classes[number] for number in dataset.targets]


@pytest.mark.parametrize(
    ("kind", "files", "name", "classes"),
    [("CIFAR10", ten_files, "cifar-10-batches-bin", TEN), ("CIFAR100", hundred_files, "cifar-100-binary", FINE)],
)
def test_cifar_is_read_as_by_torchvision(tmp_path: Path, kind: str, files, name: str, classes: list[str]) -> None:
    as_pickles(tmp_path)
    folder = folder_of(tmp_path / name, sorted(files()))
    # The names of the classes come behind the images.
    last = sorted(files(), key=lambda file: file[0].endswith(".txt"))
    archive = tar_of(tmp_path / "a.tar.gz", [(f"{name}/{file}", content) for file, content in last])
    for place in (folder, archive):
        assert (opened(place).other_splits, opened(place).classes) == (("test",), tuple(classes))
        for split in ("train", "test"):
            assert_read(place, *judged(kind, tmp_path, split == "train"), split)


def test_coarse_labels_and_single_files_can_be_chosen(tmp_path: Path) -> None:
    folder, sets = folder_of(tmp_path / "renamed", hundred_files()), batches(("train", "test"))
    coarse = opened(folder, column="coarse")
    assert coarse.classes == tuple(COARSE)
    assert labels_of(coarse) == [COARSE[number] for number in sets["train"][2]]
    test = opened(folder / "test.bin")
    assert (test.split, labels_of(test)) == ("", [FINE[number] for number in sets["test"][1]])
    said = line_of(folder, Exit.BAD_REQUEST, column="colour")
    assert "has no label 'colour', but coarse, fine: choose one with --labels :NAME" in said
    ten = folder_of(tmp_path / "ten", ten_files())
    assert "has no label 'coarse', but label" in line_of(ten, Exit.BAD_REQUEST, column="coarse")
    assert opened(ten, column=None).classes == ()
    said = succeeded(ddpm_here("data", "pack", folder, "c", "--size", 32, "--labels", ":coarse", "--bucket", tmp_path))
    assert "images   7 colour" in said and "classes  coarse20, coarse19" in said


def test_pickles_and_damaged_files_of_cifar_are_refused(tmp_path: Path) -> None:
    as_pickles(tmp_path)
    for folder, archive in [("cifar-10-batches-py", "cifar-10"), ("cifar-100-python", "cifar-100")]:
        files = [(f"{folder}/{path.name}", path.read_bytes()) for path in sorted((tmp_path / folder).iterdir())]
        for place in (tar_of(tmp_path / f"{folder}.tar.gz", files), tmp_path / folder):
            assert f"holds pickles, which are programs: get {archive}-binary.tar.gz" in line_of(place)
    folder = folder_of(tmp_path / "damaged", ten_files())
    for name, content, said in [
        ("data_batch_3.bin", bytes(3074), "does not hold whole images of 3,073 bytes"),
        ("data_batch_3.bin", b"\x0a" + bytes(3072), "has an image of class 10, of 10"),
        ("batches.meta.txt", b"cat dog", "does not name 10 classes"),
    ]:
        (folder / name).write_bytes(content)
        assert f"'{name}', which {said}" in line_of(folder)
    (folder / "batches.meta.txt").unlink()
    folder_of(folder, ten_files()[1:])
    assert opened(folder).classes == tuple("0123456789")
    # An archive beside them is not CIFAR.
    assert images_of(zip_of(folder / "photos.zip", [("1.png", b"1")])) == [("1.png", b"1")]


# TFRecords.
Features = dict[str, tuple[object, str]]


def written(path: Path, examples: list[Features]) -> Path:
    """A TFRecord file of these features, which are values and their kind: byte, int or float."""
    path.parent.mkdir(exist_ok=True)
    writer = TFRecordWriter(str(path))
    for example in examples:
        writer.write(example)
    writer.close()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
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
    # A shard may be empty.
    for shard, count in enumerate((3, 3, 0)):
        written(tmp_path / f"in/train-{shard:05d}-of-00003", [imagenet(3 * shard + n) for n in range(count)])
    only = written(tmp_path / "in/validation-00000-of-00001", [imagenet(9)])
    assert_read(tmp_path / "in", [jpeg(number) for number in range(6)], range(1, 7))
    source = opened(tmp_path / "in")
    assert next(entries_of(source))[0] == "train-00000-of-00003/00000000.jpg"
    assert (source.split, source.other_splits) == ("train", ("val",))
    assert labels_of(opened(tmp_path / "in", "val")) == labels_of(opened(only)) == ["10"]
    texts = tuple(f"kind {number}" for number in range(6))
    assert labels_of(opened(tmp_path / "in", column="image/class/text")) == [*texts]
    assert packed(tmp_path / "b", tmp_path / "in", labels=":image/class/text").classes == texts
    with pytest.raises(BadRequestError, match=r"none of its images has a label 'colour'.*; there are :image/"):
        packed(tmp_path / "c", tmp_path / "in", labels=":colour", shard_images=None)


def test_tensorflow_datasets_are_read_with_their_names(tmp_path: Path) -> None:
    more = {"coarse": ([1], "int"), "id": (b"x", "byte")}
    for split in ("train", "test"):
        path = tmp_path / f"cifar/set-{split}.tfrecord-00000-of-00001"
        written(path, [small(number, **more) for number in range(4)])
    (tmp_path / "cifar/label.labels.txt").write_bytes(b"zebra\nant\n")
    assert opened(tmp_path / "cifar").classes == ("zebra", "ant")
    assert_read(tmp_path / "cifar", [png(number) for number in range(4)], ["zebra", "ant", "zebra", "ant"])
    said = succeeded(ddpm_here("data", "pack", tmp_path / "cifar", "a", "--size", 16, "--bucket", tmp_path / "b"))
    assert "images   4 colour, 16×16" in said and "classes  zebra, ant" in said
    assert load_index(open_store(str(tmp_path / "b")), "datasets/a-16").source == "cifar"
    (tmp_path / "cifar/label.labels.txt").write_bytes(b"zebra\n")
    assert "has the label 1, and 1 classes: get it again" in line_of(tmp_path / "cifar")


def test_stylegan_and_other_raw_images(tmp_path: Path) -> None:
    pixels = colours(4, 16)
    for level, step in [(2, 4), (3, 2), (4, 1)]:
        reduced = np.ascontiguousarray(pixels[:, ::step, ::step].transpose(0, 3, 1, 2))
        examples = [{"shape": (each.shape, "int"), "data": (each.tobytes(), "byte")} for each in reduced]
        written(tmp_path / f"faces/faces-r{level:02d}.tfrecords", examples)
    np.testing.assert_array_equal(pixels_of(opened(tmp_path / "faces")), pixels)
    assert "packing faces-r04.tfrecords and not the others" in opened(tmp_path / "faces").note
    np.testing.assert_array_equal(pixels_of(opened(tmp_path / "faces/faces-r02.tfrecords")), pixels[:, ::4, ::4])
    sides = {"height": (16, "int"), "width": (8, "int"), "depth": (1, "int")}
    grey = {"image_raw": (bytes(range(128)), "byte"), **sides}
    shown = np.arange(128, dtype=np.uint8).reshape(1, 16, 8)
    assert_read(written(tmp_path / "grey.tfrecord", [grey]), shown, None)
    said = line_of(written(tmp_path / "bad.tfrecord", [grey, {"image_raw": (bytes(99), "byte"), **sides}]))
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


# LSUN's LMDB.
PAGE_BYTES = 4096


def webp(seed: int) -> bytes:
    """A picture as LSUN has it: lossy, with a shorter side of 256 pixels there."""
    return encoded(picture(seed), "WEBP", quality=75)


def sha1(number: int) -> bytes:
    """The key of an image."""
    return hashlib.sha1(b"%d" % number).hexdigest().encode()


def lmdb_of(path: Path, files: Iterable[tuple[bytes, bytes]], **options: object) -> Path:
    """LMDB of these values, beside those that are there; one of None is deleted."""
    environment = lmdb.open(str(path), map_size=1 << 30, sync=False, **options)
    with environment, environment.begin(write=True) as transaction:
        for key, value in files:
            assert transaction.delete(key) if value is None else transaction.put(key, value)
    return path


def lsun(folder: Path, images: int = 300, value=png) -> Path:
    """A category as LSUN's scripts store it, below SHA-1 keys, in an order of its own."""
    folder.mkdir(parents=True)
    return lmdb_of(folder, [(sha1(number), value(number)) for number in range(images)])


def test_lsun_is_read_as_it_was_written(tmp_path: Path) -> None:
    """One of several levels of pages, of which images were deleted, with values in leaves and on pages of their own."""
    folder = lsun(tmp_path / "church_outdoor_train_lmdb", 1000, lambda number: webp(number % 50))
    expected = {sha1(number).decode(): webp(number % 50) for number in range(1000) if number % 7}
    expected |= {"0tiny": b"RIFF\0\0\0\0WEBP", "1large": webp(1) + bytes(1 << 20)}
    lmdb_of(folder, [(sha1(number), None) for number in range(0, 1000, 7)])
    lmdb_of(folder, [(key.encode(), expected[key]) for key in ("0tiny", "1large")])
    with lmdb.open(str(folder), readonly=True) as environment:
        assert environment.stat()["depth"] > 1
    source, there = opened(folder), sorted(expected.items())
    assert [(f"{key}.webp", value) for key, value in there] == list(entries_of(source))
    assert [found.size_bytes for found in source.images(labelled=True)] == [len(value) for _, value in there]
    chosen = opened(folder / "data.mdb")
    assert list(names_of(chosen)) == [f"{key}.webp" for key in sorted(expected)]
    # Without the list of free pages: their space is lost, and nothing else.
    whole = bytearray((folder / "data.mdb").read_bytes())
    for meta in (0, PAGE_BYTES):
        assert struct.unpack_from("<Q", whole, meta + 16 + 24 + 40)[0] != 2**64 - 1
        struct.pack_into("<H4QQ", whole, meta + 16 + 24 + 6, 0, 0, 0, 0, 0, 2**64 - 1)
    (folder / "data.mdb").write_bytes(whole)
    assert list(names_of(opened(folder))) == list(names_of(chosen))


def test_categories_and_splits_are_told_by_their_folders(tmp_path: Path) -> None:
    for name, images in [("church_outdoor_train_lmdb", 5), ("church_outdoor_val_lmdb", 3)]:
        lsun(tmp_path / "lsun" / name, images)
    source = opened(tmp_path / "lsun")
    assert (source.split, source.other_splits, labels_of(source)) == ("train", ("val",), [""] * 5)
    folders = [name.split("/")[0] for name in names_of(opened(tmp_path / "lsun", "val"))]
    assert folders == ["church_outdoor_val_lmdb"] * 3
    lmdb_of(tmp_path / "faces.lmdb", [(struct.pack(">I", 7), jpeg(7))], subdir=False)
    assert list(entries_of(opened(tmp_path / "faces.lmdb"))) == [("faces.lmdb/00000007.webp", jpeg(7))]


def test_the_preset_packs_what_lsun_ships(tmp_path: Path) -> None:
    """WebP with a shorter side of 256 pixels, of which the centre is taken."""
    folder = lsun(tmp_path / "bedroom_val_lmdb", 3, lambda seed: encoded(picture(seed, 384, 256), "WEBP", quality=75))
    said = succeeded(ddpm_here("data", "pack", folder, "lsun-256", "--bucket", tmp_path / "b"))
    assert "images   3 colour, 256×256" in said and "from bedroom_val_lmdb, crop center" in said
    assert "classes" not in said
    made = pixels_of(opened(tmp_path / "b/datasets/lsun-256-256/shard-00000.tar"))
    np.testing.assert_array_equal(made, [whole[:, 64:320] for whole in pixels_of(opened(folder))])


def test_what_is_not_lsun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lsun(tmp_path / "in", 10)
    whole = (folder / "data.mdb").read_bytes()
    archive = zip_of(tmp_path / "church_outdoor_train_lmdb.zip", [("church_outdoor_train_lmdb/data.mdb", whole)])
    said = line_of(archive, Exit.BAD_REQUEST)
    assert "holds LMDB: copy or unzip its folder to a disk, and pack that" in said
    lsun(tmp_path / "pickles", value=lambda number: pickle.dumps({"image": number}))
    lsun(tmp_path / "empty", 0)
    several = lmdb.open(str(tmp_path / "several"), max_dbs=2)
    with several, several.begin(write=True) as transaction:
        transaction.put(b"key", png(1), db=several.open_db(b"images", transaction))
    for place, code, part, more in [
        ("in", Exit.BAD_REQUEST, "none of its images has a label 'x'", ("--labels", ":x")),
        ("pickles", Exit.BAD_DATA, "more than --max-bad=100 images cannot be used: ", ()),
        ("empty", Exit.BAD_DATA, "holds no images", ()),
        ("several", Exit.BAD_DATA, "several: none of its images can be used: 'images.webp' is damaged at its begi", ()),
    ]:
        words = ("data", "pack", tmp_path / place, "x", "--size", 8, "--bucket", tmp_path / "b", *more)
        assert part in refused(ddpm_here(*words), code)
    for content, part in [
        (bytes(8192), "is damaged, or not LMDB of a 64-bit machine ("),
        (b"Standard Jet DB", "is damaged, or not LMDB"),
        (whole.replace(struct.pack("<QI", 1 << 30, PAGE_BYTES), struct.pack("<QI", 1 << 30, 0)), "is damaged"),
    ]:
        (folder / "data.mdb").write_bytes(content)
        assert part in line_of(folder)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    missing = r"in is LMDB, which needs more than is installed .*lmdb.* pip install .*\[lsun\]"
    assert re.search(missing, line_of(folder, Exit.BAD_REQUEST))


def test_truncated_and_forged_trees_are_refused(tmp_path: Path) -> None:
    path = lsun(tmp_path / "in", 400, value=lambda number: webp(number % 9)) / "data.mdb"
    whole = path.read_bytes()
    for cut in (0, 15, 4095, 4096, 8191, len(whole) // 3, len(whole) // 2, len(whole) - 40 * PAGE_BYTES):
        path.write_bytes(whole[:cut])
        assert "data.mdb" in line_of(path), cut
    # The newer meta page of the two, and its root.
    meta = max((0, PAGE_BYTES), key=lambda at: struct.unpack_from("<Q", whole, at + 16 + 128)[0])
    root_at, entries_at = meta + 16 + 24 + 48 + 40, meta + 16 + 24 + 48 + 32
    (root,) = struct.unpack_from("<Q", whole, root_at)
    page = root * PAGE_BYTES
    (node,) = struct.unpack_from("<H", whole, page + 16)
    for at, value, said in [
        (root_at, struct.pack("<Q", 1 << 50), "is damaged"),
        (entries_at, struct.pack("<Q", 401), "walked 400 entries, record says 401"),
        # A branch that is its own first child.
        (page + node, struct.pack("<HHH", root & 0xFFFF, root >> 16, 0), "is damaged"),
        (page + 16, struct.pack("<H", 4095), "is damaged"),
        (page + 12, struct.pack("<H", 9), "is damaged"),
        # Numbers as keys have another order.
        (entries_at - 28, struct.pack("<H", 8), "is damaged"),
    ]:
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        assert said in line_of(path), said
    path.write_bytes(whole)
    expected = [webp(number % 9) for number in sorted(range(400), key=sha1)]
    assert [content for _, content in entries_of(opened(path))] == expected
