"""NumPy's files as people download them; numpy itself is the judge of what they hold."""

from __future__ import annotations

import io
import resource
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf

import job
from job.data.images import are_grey
from job.data.source import members
from job.exits import Exit
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.data.formats.reading import labels_of, line_of, opened, pixels_of
from tests.job.packing import entries_of, packed
from tests.job.some_images import folder_of, png, tar_of, zip_of

RNG = np.random.default_rng(0)


def colours(count: int, side: int = 8) -> np.ndarray:
    """uint8 [N, side, side, 3]."""
    return RNG.integers(0, 256, (count, side, side, 3), np.uint8)


def greys(count: int, side: int = 8) -> np.ndarray:
    """uint8 [N, side, side]."""
    return RNG.integers(0, 256, (count, side, side), np.uint8)


def numbers(count: int, dtype: object = np.int64) -> np.ndarray:
    """Labels from 1 to 12."""
    return RNG.integers(1, 13, count).astype(dtype)


def saved(path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    """An .npz of these arrays."""
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def npy(array: np.ndarray) -> bytes:
    """The array as an .npy."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def assert_read(place: Path | str, images: np.ndarray, labels: np.ndarray | None, split: str | None = None) -> None:
    """Compares what is read with arrays [N, H, W(, 3)] and labels that numpy loaded."""
    source = opened(place, split)
    np.testing.assert_array_equal(pixels_of(source), images)
    assert labels_of(source) == ([""] * len(images) if labels is None else [str(one) for one in labels.reshape(-1)])
    assert are_grey(content for _, content in entries_of(source)) == (images.ndim == 3)


@pytest.mark.parametrize("compressed", [False, True])
def test_sets_of_splits_are_read_as_by_numpy(tmp_path: Path, compressed: bool) -> None:
    keras = {"x_train": greys(12), "y_train": numbers(12, np.uint8), "x_test": greys(3), "y_test": numbers(3, np.uint8)}
    medmnist = {}
    for number, split in enumerate(("train", "val", "test"), 3):
        medmnist |= {f"{split}_images": colours(number), f"{split}_labels": numbers(number, np.uint8)[:, None]}
    for name, arrays, form in [("mnist", keras, "{}_{}"), ("pathmnist", medmnist, "{1}_{0}")]:
        path = saved(tmp_path / f"{name}.npz", compressed, **arrays)
        x, y = ("x", "y") if name == "mnist" else ("images", "labels")
        loaded = np.load(path)
        splits = ("train", "test") if name == "mnist" else ("train", "val", "test")
        for split in splits:
            assert_read(path, loaded[form.format(x, split)], loaded[form.format(y, split)], split)
        assert opened(path).split == "train"
        assert opened(path).other_splits == tuple(sorted(splits[1:]))
    folder = folder_of(tmp_path / "keras", [(f"{name}.npy", npy(array)) for name, array in keras.items()])
    inner = zip_of(tmp_path / "k.zip", [(f"k/{name}.npy", npy(array)) for name, array in keras.items()])
    for place in (folder, inner):
        for split in ("train", "test"):
            assert_read(place, keras[f"x_{split}"], keras[f"y_{split}"], split)
    # One that is chosen has its own labels, and leaves out no split.
    assert opened(f"zip://k/x_test.npy::{inner}").other_splits == ()
    assert_read(folder / "x_test.npy", keras["x_test"], keras["y_test"])


def test_samples_and_batches_are_read_as_by_numpy(tmp_path: Path) -> None:
    samples = saved(tmp_path / "samples_5x8x8x3.npz", arr_0=colours(5), arr_1=numbers(5))
    assert_read(samples, np.load(samples)["arr_0"], np.load(samples)["arr_1"])
    folder = tmp_path / "Imagenet8_train"
    folder.mkdir()
    for number in (1, 2):
        data = RNG.integers(0, 256, (7, 192), np.uint8)
        mean = data.mean(axis=0)
        saved(folder / f"train_data_batch_{number}.npz", True, data=data, labels=numbers(7), mean=mean)
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
        shown = [str(value).lower() if dtype is bool else str(int(value)) for value in values]
        folder = folder_of(tmp_path / "typed", [("x.npy", npy(images)), ("y.npy", npy(values))])
        assert labels_of(opened(folder)) == shown, dtype
    parts = [(f"{kind}_{n}.npy", npy(array)) for n in (0, 1) for kind, array in [("x", colours(3)), ("y", numbers(3))]]
    split = folder_of(tmp_path / "parts", parts)
    assert labels_of(opened(split)) == [str(n) for i in (0, 1) for n in np.load(split / f"y_{i}.npy")]
    # Quick, Draw! has a file for each class.
    drawings = folder_of(
        tmp_path / "drawings", [(f"{kind}.npy", npy(greys(2).reshape(2, 64))) for kind in ("ant", "bee")]
    )
    said = succeeded(ddpm_here("data", "pack", drawings, "d", "--size", 8, "--classes", "--bucket", tmp_path))
    assert "images   4 grey, 8×8" in said and "classes  ant, bee" in said


def test_one_of_several_labels_is_chosen(tmp_path: Path) -> None:
    arrays = {"images": colours(5), "fine_labels": numbers(5), "coarse_labels": numbers(5), "ids": np.arange(5)}
    path = saved(tmp_path / "a.npz", **arrays)
    said = line_of(path, Exit.BAD_REQUEST)
    assert "has several labels: fine_labels, coarse_labels: choose one with --labels :NAME, or use --no-classes" in said
    for column in ("fine_labels", "coarse_labels", "ids"):
        assert labels_of(opened(path, column=column)) == [str(one) for one in arrays[column]]
    assert labels_of(opened(path, column=None)) == [""] * 5
    assert "has no label 'colour', but fine_labels" in line_of(path, Exit.BAD_REQUEST, column="colour")
    masked = saved(tmp_path / "b.npz", images=arrays["images"], masks=greys(5), labels=numbers(5))
    assert "leaving out b.npz/masks.npy" in opened(masked).note
    assert_read(masked, arrays["images"], np.load(masked)["labels"])
    hot = saved(tmp_path / "c.npz", x=arrays["images"], y=np.eye(5))
    said = line_of(hot, Exit.BAD_REQUEST)
    assert "c.npz/y.npy is float64 [5, 5], and not one label for each of 5 images" in said and "argmax" in said


def test_other_arrays_are_refused_by_name_type_and_shape(tmp_path: Path) -> None:
    for array, shown in [
        (np.zeros((2, 8, 8, 3), np.float32), "a.npy is float32 [2, 8, 8, 3]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "a.npy is uint8 [2, 8, 8, 4]"),
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
            assert shown in said and "save it as uint8 [images, height, width, 1 or 3] in C order" in said
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
    outer = zip_of(tmp_path / "outer.zip", [("a.npz", saved(tmp_path / "a.npz", x=greys(2)).read_bytes())])
    assert "a.npz is a zip in a zip: unzip the outer one" in line_of(outer)
    damaged = bytearray(saved(tmp_path / "a.npz", x=greys(9)).read_bytes())
    damaged[600] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    assert "is truncated or damaged (Bad CRC-32 for file 'x.npy')" in line_of(tmp_path / "a.npz")
    mixed = saved(tmp_path / "m.npz", x=greys(9), y=numbers(8))
    assert "y.npy is int64 [8], and not one label for each of 9 images" in line_of(mixed, Exit.BAD_REQUEST)


def test_large_arrays_are_not_loaded(tmp_path: Path) -> None:
    """500 MB, of which the disk has a few blocks."""
    header = npy(np.zeros((1, 64, 64, 3), np.uint8))[:128].replace(b"(1, 64, 64, 3), }     ", b"(40000, 64, 64, 3), } ")
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(header)
        file.seek(128 + 30_000 * 12_288)
        file.write(b"\7" * 12_288)
        file.truncate(128 + 40_000 * 12_288)
    before = peak_bytes()
    source = opened(tmp_path / "x.npy")
    assert sum(1 for _ in source.images(labelled=True)) == 40_000
    ((name, content),) = source.loaded(islice(source.images(), 30_000, 30_001))
    assert name == "x.npy/30000.ppm" and content.endswith(b"\7" * 12_288)
    assert peak_bytes() - before < 64 << 20


def test_remote_arrays_are_read_by_ranges(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, url = server
    monkeypatch.setitem(conf, "hf", {"endpoint": url})
    images, labels = colours(400, 64), numbers(400)
    zipped = saved(tmp_path / "a.npz", True, images=images[:5], labels=labels[:5]).read_bytes()
    handler.content = {"/set/images.npy": npy(images), "/set/labels.npy": npy(labels), "/zipped/a.npz": zipped}
    handler.content["/alone.npz"] = zipped
    source = opened("hf://datasets/org/name/set")
    handler.asked.clear()
    assert labels_of(source) == [str(one) for one in labels]
    # The labels, and what is read ahead of the images: not 4.9 MB.
    assert len([asked for command, asked in handler.asked if command == "GET" and asked]) <= 2
    np.testing.assert_array_equal(pixels_of(source), images)
    for place in ("hf://datasets/org/name/zipped", "hf://datasets/org/name/alone.npz", f"{url}/alone.npz"):
        assert_read(place, images[:5], labels[:5])


def test_photographs_in_an_array_become_the_dataset_of_their_files(tmp_path: Path) -> None:
    """The real images that come with the program, in folders of their class, and as Keras ships a set."""
    zipped = Path(job.__file__).with_name("datasets") / "landscape-sample.zip"
    files, source = packed(tmp_path / "a", zipped, size=64, shard_images=None), opened(zipped)
    folders = np.array([found.name.partition("/")[0] for found in source.images(labelled=True)])
    images = np.stack(pixels_of(source))
    npz = saved(
        tmp_path / "landscape.npz", True, x_train=images, y_train=folders, x_test=images[:9], y_test=folders[:9]
    )
    array = packed(tmp_path / "b", npz, size=64, shard_images=None)
    assert (array.images, array.classes, array.classes_from) == (299, files.classes, "labels")
    shards = [(tmp_path / bucket / "datasets/small-64/shard-00000.tar").read_bytes() for bucket in "ab"]
    assert len(shards[0]) > 1_000_000 and shards[0] == shards[1]


def test_a_set_is_packed_by_split(tmp_path: Path) -> None:
    path = saved(tmp_path / "mnist.npz", x_train=greys(12), y_train=numbers(12), x_test=greys(3), y_test=numbers(3))
    at = ("--size", 8, "--bucket", tmp_path / "b")
    assert "images   12 grey, 8×8" in succeeded(ddpm_here("data", "pack", path, "train", *at))
    assert "images   3 grey, 8×8" in succeeded(ddpm_here("data", "pack", path, "test", "--split", "test", *at))
    assert "holds no images" in refused(ddpm_here("data", "pack", path, "val", "--split", "val", *at), Exit.BAD_DATA)
