"""What can be packed, as people download it: names and their order, classes, splits, links, and what is left out."""

import os
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from ddpm.image_size import ImageSize
from job.data.images import Recipe, found_in, prepare
from job.data.source import open_source
from job.data.source.members import Member, Source
from job.data.source.survey import Survey, survey
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.stop import in_order
from tests.job.packing import entries_of, images_of, names_of
from tests.job.some_images import folder_of, jpeg, mnist, tar_of, zip_of

# As `unzip -l` shows the archives that people download, shortened.
CELEBA = ["img_align_celeba/"] + [f"img_align_celeba/{n:06d}.jpg" for n in range(1, 7)]
LANDSCAPE = ["00000000.jpg", "00000000_(2).jpg", "00000001.jpg", "00000001_(2).jpg", "00004318.jpg"]
LITTER = ["__MACOSX/", "__MACOSX/._00000000.jpg", ".DS_Store", "Thumbs.db", "._00000001.jpg", "desktop.ini", "READ.md"]
IMAGES = [(f"b/{n}.jpg", jpeg(n)) for n in (2, 1)] + [("a/x.PNG", b"\x89PNG" * 50)]
FILES = [*IMAGES, ("notes.txt", b"no image")]
MAKERS = [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz"), (tar_of, "a"), (folder_of, "folder")]


def surveyed(names, classes: bool | None = None) -> Survey:
    return survey(Source("here", lambda: (Member(name, bytes) for name in names)), classes)


def test_archives_as_downloaded(tmp_path):
    suffixes = ["avif", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jpe", "jfif", "JPG"]
    good = [f"a/1.{suffix}" for suffix in suffixes]
    bad = ["a/.1.jpg", ".a/1.jpg", "__MACOSX/a/1.jpg", "a/Thumbs.db", "a/1.txt", "a/jpg", "a/1.jpg.part", "a/1.jpg/"]
    folders = ("", "landscape_img_folder/", "landscape_img_folder/train/", "archive/Landscape Images/")
    landscapes = [[folder + name for name in LANDSCAPE] for folder in folders]
    for names, others in [(CELEBA[1:], CELEBA[:1]), (good, bad), *((names, LITTER) for names in landscapes)]:
        files = [(name, b"" if name.endswith("/") else b"x") for name in [*others[:1], *names, *others[1:]]]
        assert list(names_of(open_source(str(zip_of(tmp_path / "a.zip", files))))) == names
        assert (surveyed(names).classes, surveyed(names).images) == ((), len(names))


def test_entries_keep_order_under_printable_names(tmp_path):
    for make, name in MAKERS[:4]:
        assert images_of(make(tmp_path / name, FILES)) == IMAGES
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
            for name, content in FILES:
                archive.writestr(name, content)
        assert images_of(tmp_path / "a.zip") == IMAGES
    long = "/".join(["./folder", "x" * 90, "y" * 90 + ".jpg"])
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as archive:
            archive.addfile(tarfile.TarInfo(long))
        assert images_of(tmp_path / "a.tar") == [(long[2:], b"")]
    mnist_file = ("train-images-idx3-ubyte", b"")
    for make, place, name, shown, more in [
        (zip_of, "a", "cats\\1.jpg", "cats/1.jpg", []),
        (zip_of, "a", "a..b/1..2.jpg", "a..b/1..2.jpg", []),
        (tar_of, "a", "gr\udcfcn/1.jpg", "gr%FCn/1.jpg", []),
        # A terminal would obey them, and a list of rejects with lines would have more of these than rejects.
        (tar_of, "a", "a\x1b[2J\n\x7f\u2028/1.jpg", "a%1B[2J%0A%7F%E2%80%A8/1.jpg", []),
        # Content decides what an archive is.
        (tar_of, "cifar-10-pngs.tar", "cats/0.png", "cats/0.png", []),
        (zip_of, "mixed.zip", "cats/0.png", "cats/0.png", [mnist_file]),
    ]:
        assert images_of(make(tmp_path / place, [(name, b"1"), *more])) == [(shown, b"1")]


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_files_become_grey_images(tmp_path, digits, gz):
    images, labels = digits
    names, folder, raw = [str(label) for label in labels], tmp_path / "mnist", tmp_path / "data/training/raw"

    def labels_in(place: Path, split: str | None) -> list[str]:
        return [one.label for one in replace(open_source(str(place)), split=split).images(labelled=True)]

    # torchvision downloads into MNIST/raw; Kaggle's zip has copies in folders.
    raw.mkdir(parents=True)
    for place, tests in ((folder, 3), (raw, 12)):
        mnist(place, "train", images, labels, gz)
        mnist(place, "t10k", images[:tests], labels[:tests], gz)
    source = open_source(str(folder))
    entries = list(entries_of(source))
    assert found_in(content for _, content in entries) == (1, 8, "")
    assert (source.note, source.other_splits, labels_in(folder, "train")) == ("", ("test",), names)
    assert [name for name, _ in entries] == [f"train/{n:02d}.pgm" for n in range(len(labels))]
    assert list(names_of(replace(source, split="test"))) == [f"test/{n}.pgm" for n in range(3)]
    recipe = Recipe(ImageSize(28, 28), "center", "lanczos", 1, 14)
    np.testing.assert_array_equal([prepare(content, recipe)[..., 0] for _, content in entries], images)
    chosen = next(folder.glob("t10k-images*"))
    source = open_source(str(chosen))
    assert (source.note, source.name, len(images_of(chosen))) == ("", chosen.name, 3)
    for split, times in (("", 2), ("train", 1), ("test", 1)):
        assert labels_in(tmp_path / "data", split) == names * times
    mnist(raw.parent, "train", images[:5], labels[:5], gz)
    assert len(images_of(tmp_path / "data")) == 5
    mnist(folder, "emnist-letters-train", images, labels, gz)
    assert open_source(str(folder)).note == "leaving out t10k-images-idx3-ubyte, train-images-idx3-ubyte"
    assert len(images_of(next(folder.glob("emnist*images*")))) == 12
    for path in {*folder.glob("emnist*"), *folder.glob("*labels*")}:
        path.unlink()
    assert next(names_of(open_source(str(folder), column=None))) == "train/00.pgm"
    with pytest.raises(BadRequestError, match="lies without its labels, train-labels-idx1-ubyte: get that file"):
        open_source(str(folder))


BESIDE, TOGETHER = "neither labels nor folders of classes that hold all", "test, train are packed together"
VAL, NONE = "`ddpm data pack --split val` would pack Val", "are not taken for classes; use --classes if"
PETS = ("cats", "dogs")
CLASSES = [
    ("cats/1 dogs/1", PETS, ""),
    ("dogs/1 cats/tabby/1 cats/2", PETS, ""),
    ("data/set/cats/1 data/set/dogs/1", PETS, ""),
    ("train/cats/1 train/dogs/1 test/dogs/2", PETS, TOGETHER),
    ("x/Train/a/cats/1 x/Val/a/dogs/1", PETS, VAL),
    ("train/cats/1 test/2", (), TOGETHER),
    ("train/cats/1 train/dogs/3 test/2", (), BESIDE),
    ("train/cats/1 train/dogs/3 test/2", (), "would pack train alone"),
    ("train/1 test/2", (), TOGETHER),
    ("train2017/1 val2017/2", (), "train2017, val2017 are packed together"),
    ("seg_train/sea/1 seg_train/ice/1 seg_test/ice/1", ("ice", "sea"), "--split train"),
    ("trainA/1 trainB/1 testA/1", (), "testA, trainA, trainB are packed together"),
    ("train/1 faces/2", (), f"the folders faces, train {NONE}"),
    ("train/1 plane/2 bus/2", ("bus", "plane", "train"), ""),
    ("2/1 10/2 0/3", ("0", "2", "10"), ""),
    ("train_mini/a/1 train_val2018/b/2 train-jpg/a/3", ("a", "b"), ""),
    ("01000/1 2000/2", (), f"the folders 01000, 2000 {NONE}"),
    ("2023-05/1 2023-06/2 2023-06/3", (), f"the folders 2023-05, 2023-06 {NONE}"),
    ("00000/img0 00001/img1", (), NONE),
    ("2023/cats/1 2024/dogs/2", ("2023", "2024"), ""),
    ("2023-05/cats/1 2023-06/dogs/2", PETS, ""),
    ("cats.zip/1 dogs.zip/2", (), f"the folders cats.zip, dogs.zip {NONE}"),
    ("cats/1 cats/2", (), "it is packed without classes"),
    ("cats/1 dogs/1 preview", (), BESIDE),
    ("cats/1 cats/young/2", (), BESIDE),
]
ASKED_FOR = [("2023/1 2024/2", ("2023", "2024")), ("train/1 test/2", ("test", "train"))]
ASKED_FOR += [("n02.tar/1 n01.tar/2", ("n01", "n02")), ("train/0/1 test/1/2", ("0", "1"))]


def test_classes_are_the_first_differing_folders():
    def images(names: str) -> list[str]:
        return [f"{name}.jpg" for name in names.split()]

    for names, classes, note in CLASSES:
        found, without = surveyed(images(names)), surveyed(images(names), classes=False)
        assert (found.images, found.classes) == (len(names.split()), classes), names
        became = f"here: {len(classes)} folders became classes that the network will learn: {', '.join(classes)}; use"
        assert (found.notes[0].startswith(became) if classes else True) and note in "".join(found.notes), names
        assert bool(found.notes) == bool(classes or note), names
        assert (without.classes, without.label(0)) == ((), -1)
        for number, name in enumerate(names.split() if classes else ()):
            assert classes[found.label(number)] in name.split("/")
    for names, classes in ASKED_FOR:
        assert surveyed(images(names), classes=True).classes == classes
    for names in ("1 2", "cats/1 cats/2", "cats/1 2"):
        with pytest.raises(BadRequestError, match="here has no classes: no image has a label"):
            surveyed(images(names), classes=True)


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_skipped_files_are_counted_by_kind(tmp_path, make, name):
    images = ["set/Train/cats/1.jpg", "set/Train/test/2.jpg", "set/test/cats/3.jpg"]
    others = ["set/Train/a.CR2", "set/Train/b.cr2", "set/test/c.txt", "set/README", "set/.DS_Store"]
    others += ["__MACOSX/._1.cr2", "__MACOSX/._1.jpg", "set/Train/cats/._1.jpg"]
    others += ["set/Train/cats/.4.jpg", "set/.thumbnails/large/5.PNG"]
    source = open_source(str(make(tmp_path / name, [(one, b"x") for one in sorted(images + others)])))
    for split, found, skipped in [
        ("", images, {".cr2": 2, ".txt": 1, "other": 1, "hidden images": 2}),
        ("train", images[:2], {".cr2": 2, "hidden images": 1}),
        ("test", images[2:], {".txt": 1}),
        ("val", [], {}),
    ]:
        part = replace(source, split=split)
        # Looked at twice, nothing counts twice.
        assert list(names_of(part)) == list(names_of(part)) == [one for one, _ in entries_of(part)] == found
        assert part.skipped == skipped


def test_folder_order_is_that_of_paths(tmp_path):
    """Links to files inside are files."""
    names = ["a-b/1.jpg", "a/2.jpg", "a/b/0.jpg", "a/b.jpg", "a0.jpg", "a.jpg", "Z.jpg", "é/1.jpg", "a b.jpg"]
    folder = folder_of(tmp_path / "in", [(name, name.encode()) for name in reversed(names)])
    (folder / "a/link.jpg").symlink_to("b/0.jpg")
    (folder / "notes.txt").symlink_to("/etc/passwd")
    expected = sorted([*((name, name.encode()) for name in names), ("a/link.jpg", b"a/b/0.jpg")])
    for path in (folder, f"file://{folder}", os.path.relpath(folder)):
        assert images_of(path) == expected
    entries = entries_of(open_source(str(folder)))
    assert next(entries)[0] == "Z.jpg"
    (folder / "a b.jpg").unlink()
    with pytest.raises(MissingInputError, match=r"entry 'a b.jpg' is not there"):
        next(entries)


def test_work_ahead_is_limited_and_ordered():
    taken, yielded, ahead = count(1), 0, []

    def items():
        for item in range(200):
            ahead.append(next(taken) - yielded)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 if item % 7 == 0 else 0)
        return item * item

    with ThreadPoolExecutor(4) as pool:
        for result in in_order(pool, work, items(), window=10):
            assert result == yielded**2
            yielded += 1
    assert (yielded, max(ahead)) == (200, 10)


def test_a_failure_ends_later_work_alone():
    """Later items would wait for the same outage once more. An earlier one, slow to begin, has its result first."""
    begun, failed = list[int](), threading.Event()

    class SlowToBegin(ThreadPoolExecutor):
        def submit(self, work, *args):
            return super().submit(lambda: ((args[-1] == 0 and failed.wait(5) and time.sleep(0.05)), work(*args))[1])

    def work(item: int) -> int:
        begun.append(item)
        if item:
            failed.set()
            raise BadDataError(f"item {item}")
        return item

    with SlowToBegin(2) as pool:
        results = in_order(pool, work, range(6), window=6)
        assert next(results) == 0
        with pytest.raises(BadDataError, match="item 1"):
            next(results)
    assert begun == [1, 0]
