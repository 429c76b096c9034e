"""CIFAR's binary files: the images, labels and order that torchvision reads from the pickles of the same arrays."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from job.exits import Exit
from tests.job.command_line import ddpm_here, succeeded
from tests.job.data.formats.reading import labels_of, line_of, opened, pixels_of
from tests.job.packing import images_of
from tests.job.some_images import folder_of, tar_of, zip_of

TEN = [f"class{number}" for number in (3, 1, 2, 0, 4, 9, 8, 7, 6, 5)]
FINE = [f"fine{number}" for number in range(100, 0, -1)]
COARSE = [f"coarse{number}" for number in range(20, 0, -1)]
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def batches(names: tuple[str, ...], images: int = 7) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random images [N, 3072] and two labels for each."""
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.integers(0, 256, (images, 3072), np.uint8),
            rng.integers(0, 10 if len(names) > 2 else 100, images, np.uint8),
            rng.integers(0, 20, images, np.uint8),
        )
        for name in names
    }


def ten_files() -> list[tuple[str, bytes]]:
    """CIFAR-10 as the binary archive has it."""
    files = [("batches.meta.txt", "\n".join([*TEN, "", ""]).encode())]
    for name, (images, labels, _) in batches(BATCHES).items():
        files.append((f"{name}.bin", np.column_stack([labels, images]).tobytes()))
    return files


def hundred_files() -> list[tuple[str, bytes]]:
    """CIFAR-100 as the binary archive has it."""
    files = [("fine_label_names.txt", "\n".join(FINE).encode()), ("coarse_label_names.txt", "\n".join(COARSE).encode())]
    for name, (images, fine, coarse) in batches(("train", "test")).items():
        files.append((f"{name}.bin", np.column_stack([coarse, fine, images]).tobytes()))
    return files


def ten_as_pickles(root: Path) -> None:
    """CIFAR-10 as torchvision reads it."""
    (folder := root / "cifar-10-batches-py").mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": TEN}))
    for name, (images, labels, _) in batches(BATCHES).items():
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": labels.tolist()}))


def hundred_as_pickles(root: Path) -> None:
    """CIFAR-100 as torchvision reads it."""
    (folder := root / "cifar-100-python").mkdir()
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE}))
    for name, (images, fine, coarse) in batches(("train", "test")).items():
        content = {"data": images, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))


def judged(kind: str, root: Path, train: bool) -> tuple[np.ndarray, list[str]]:
    """Images [N, 32, 32, 3] and names of their classes, as torchvision reads them; without its check of the content."""
    from torchvision import datasets

    known = getattr(datasets, kind)
    lists = {name: [(file, None) for file, _ in getattr(known, name)] for name in ("train_list", "test_list")}
    unchecked = type(kind, (known,), {**lists, "meta": {**known.meta, "md5": None}})
    dataset = unchecked(root, train=train)
    return dataset.data, [dataset.classes[number] for number in dataset.targets]


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_both_are_read_as_by_torchvision(tmp_path: Path, kind: str) -> None:
    files, name = (ten_files(), "cifar-10-batches-bin") if kind == "CIFAR10" else (hundred_files(), "cifar-100-binary")
    (ten_as_pickles if kind == "CIFAR10" else hundred_as_pickles)(tmp_path)
    folder = folder_of(tmp_path / name, sorted(files))
    # The names of the classes come behind the images.
    files.sort(key=lambda file: file[0].endswith(".txt"))
    archive = tar_of(tmp_path / "a.tar.gz", [(f"{name}/{file}", content) for file, content in files])
    for place in (folder, archive):
        source = opened(place)
        assert source.other_splits == ("test",)
        assert source.classes == tuple(TEN if kind == "CIFAR10" else FINE)
        for split in ("train", "test"):
            images, labels = judged(kind, tmp_path, split == "train")
            part = opened(place, split)
            np.testing.assert_array_equal(pixels_of(part), images)
            assert labels_of(part) == labels


def test_coarse_labels_and_single_files_can_be_chosen(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "renamed", hundred_files())
    coarse = opened(folder, column="coarse")
    assert coarse.classes == tuple(COARSE)
    assert labels_of(coarse) == [COARSE[number] for number in batches(("train", "test"))["train"][2]]
    test = opened(folder / "test.bin")
    assert test.split == ""
    assert labels_of(test) == [FINE[number] for number in batches(("train", "test"))["test"][1]]
    said = line_of(folder, Exit.BAD_REQUEST, column="colour")
    assert "has no label 'colour', but coarse, fine: choose one with --labels :NAME" in said
    ten = folder_of(tmp_path / "ten", ten_files())
    assert "has no label 'coarse', but label" in line_of(ten, Exit.BAD_REQUEST, column="coarse")
    assert opened(ten, column=None).classes == ()
    said = succeeded(ddpm_here("data", "pack", folder, "c", "--size", 32, "--labels", ":coarse", "--bucket", tmp_path))
    assert "images   7 colour" in said and "classes  coarse20, coarse19" in said


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    ten_as_pickles(tmp_path)
    hundred_as_pickles(tmp_path)
    for folder, archive in [("cifar-10-batches-py", "cifar-10"), ("cifar-100-python", "cifar-100")]:
        files = [(path.name, path.read_bytes()) for path in sorted((tmp_path / folder).iterdir())]
        tar = tar_of(tmp_path / f"{folder}.tar.gz", [(f"{folder}/{name}", content) for name, content in files])
        for place in (tar, tmp_path / folder):
            assert f"holds pickles, which are programs: get {archive}-binary.tar.gz" in line_of(place)
    folder = folder_of(tmp_path / "damaged", ten_files())
    (folder / "data_batch_3.bin").write_bytes(bytes(3074))
    assert "'data_batch_3.bin', which does not hold whole images of 3,073 bytes" in line_of(folder)
    (folder / "data_batch_3.bin").write_bytes(b"\x0a" + bytes(3072))
    assert "'data_batch_3.bin', which has an image of class 10, of 10" in line_of(folder)
    (folder / "batches.meta.txt").write_bytes(b"cat dog")
    assert "'batches.meta.txt', which does not name 10 classes" in line_of(folder)
    (folder / "batches.meta.txt").unlink()
    folder_of(folder, ten_files()[1:])
    assert opened(folder).classes == tuple("0123456789")
    # An archive beside them is not CIFAR.
    assert images_of(zip_of(folder / "photos.zip", [("1.png", b"1")])) == [("1.png", b"1")]
