"""What can be packed, as people download it; and archives of strangers, which are refused as a whole."""

import gzip
import os
import struct
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm.image_size import ImageSize
from job.data.images import Recipe, are_grey, prepare
from job.data.source import members, open_source
from job.data.source.members import Member, Source
from job.data.source.survey import Survey, survey
from job.exits import BadDataError, BadRequestError, JobError, MissingInputError
from job.stop import in_order
from tests.job.damages import flip_a_bit
from tests.job.packing import entries_of, images_of, names_of
from tests.job.some_images import folder_of, idx, jpeg, mnist, tar_of, zip_of

# As `unzip -l` shows the archives that people download, shortened.
CELEBA = ["img_align_celeba/"] + [f"img_align_celeba/{n:06d}.jpg" for n in range(1, 7)]
LANDSCAPE = ["00000000.jpg", "00000000_(2).jpg", "00000001.jpg", "00000001_(2).jpg", "00004318.jpg"]
LITTER = ["__MACOSX/", "__MACOSX/._00000000.jpg", ".DS_Store", "Thumbs.db", "._00000001.jpg", "desktop.ini", "READ.md"]
IMAGES = [(f"b/{n}.jpg", jpeg(n)) for n in (2, 1)] + [("a/x.PNG", b"\x89PNG" * 50)]
FILES = [*IMAGES, ("notes.txt", b"no image")]
LEADS_OUT = ["../1.jpg", "a/../../1.jpg", "/etc/1.jpg", "..", "..\\1.jpg", "C:\\1.jpg", "\\\\h\\1.jpg", "../x.txt"]
ARCHIVES = [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz")]


def refusal(path: Path | str, error: type[JobError] = BadDataError) -> str:
    with pytest.raises(error) as caught:
        images_of(path)
    return str(caught.value)


def surveyed(names, classes: bool | None = None) -> Survey:
    return survey(Source("here", lambda: (Member(name, bytes) for name in names)), classes)


def test_archives_as_downloaded(tmp_path):
    def names_in_zip(names: list[str]) -> list[str]:
        files = [(name, b"x" if name[-1] != "/" else b"") for name in names]
        return list(names_of(open_source(str(zip_of(tmp_path / "a.zip", files)))))

    assert names_in_zip(CELEBA) == CELEBA[1:]
    assert surveyed(CELEBA[1:]).classes == ()
    for folder in ("", "landscape_img_folder/", "landscape_img_folder/train/", "archive/Landscape Images/"):
        names = names_in_zip([folder + name for name in LANDSCAPE] + LITTER)
        assert names == [folder + name for name in LANDSCAPE]
        assert (surveyed(names).classes, surveyed(names).images) == ((), 5)
    suffixes = ["avif", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jpe", "jfif", "JPG"]
    good = [f"a/1.{suffix}" for suffix in suffixes]
    bad = ["a/.1.jpg", ".a/1.jpg", "__MACOSX/a/1.jpg", "a/Thumbs.db", "a/1.txt", "a/jpg", "a/1.jpg.part", "a/1.jpg/"]
    assert names_in_zip(good + bad) == good


def test_entries_keep_order_under_printable_names(tmp_path):
    for make, name in [*ARCHIVES, (tar_of, "a")]:
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
    for make, name, shown in [
        (zip_of, "cats\\1.jpg", "cats/1.jpg"),
        (zip_of, "a..b/1..2.jpg", "a..b/1..2.jpg"),
        (tar_of, "gr\udcfcn/1.jpg", "gr%FCn/1.jpg"),
        # A terminal would obey them, and a list of rejects with lines would have more of these than rejects.
        (tar_of, "a\x1b[2J\n\x7f\u2028/1.jpg", "a%1B[2J%0A%7F%E2%80%A8/1.jpg"),
    ]:
        assert images_of(make(tmp_path / "named", [(name, b"1")])) == [(shown, b"1")]


@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_entries_that_lead_outside_are_refused(tmp_path, make, name):
    for entry in LEADS_OUT:
        said = refusal(make(tmp_path / name, [("1.jpg", jpeg(1)), (entry, b"x")]))
        assert f"leads out of it, {entry!r}" in said
    bomb = deflated(tmp_path / "bomb", 3, 30 << 20).read_bytes()
    inner = tar_of(tmp_path / "inner.tar.gz", [("../up.jpg", b"x")]).read_bytes()
    path = make(tmp_path / name, [("bomb.zip", bomb), ("inner.tar.gz", inner), ("inner.png", inner), *IMAGES])
    assert images_of(path) == [("inner.png", inner), *IMAGES]


def test_links_and_encryption_are_refused(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
        entry = tarfile.TarInfo("innocent.jpg")
        entry.type, entry.linkname = kind, "/etc/passwd"
        (tmp_path / "a.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert "'innocent.jpg', which is a link or a device" in refusal(tmp_path / "a.tar")
    data = bytearray(zip_of(tmp_path / "a.zip", [("secret.jpg", b"1")]).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert "is encrypted, password required" in refusal(tmp_path / "a.zip")


def deflated(path: Path, entries: int, entry_bytes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(entries):
            archive.writestr(f"{number}.png", bytes(entry_bytes))
    return path


def test_bombs_do_not_go_off(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "ENTRY_BYTES", limit := 1 << 20)
    for make, name in [*ARCHIVES[:2], (folder_of, "a")]:
        path = make(tmp_path / name, [("small.png", bytes(limit)), ("large.png", bytes(limit + 1))])
        assert f"entry 'large.png' has {limit + 1:,} bytes, more than the {limit:,}" in refusal(path)
    # What is not read may be as large as it likes.
    beside = deflated(tmp_path / "beside.zip", 1, 100)
    with zipfile.ZipFile(beside, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("masks.npy", bytes(8 << 20))
    assert list(names_of(open_source(str(beside)))) == ["0.png"]
    # One whose directory is honest, and one of whom nothing is known before it is unpacked.
    tar = tar_of(tmp_path / "a.tgz", [("1.jpg", jpeg(1)), ("zeros.bin", bytes(8 << 20))])
    for path in (deflated(tmp_path / "b.zip", 10, limit), tar):
        assert f"{path} unpacks to more than 200 times its size: do not trust" in refusal(path)


def test_no_header_is_believed(tmp_path):
    data = bytearray(deflated(tmp_path / "a.zip", 1, 100_000).read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 1000)
    (tmp_path / "a.zip").write_bytes(data)
    assert "'0.png' is truncated or damaged (Bad CRC-32" in refusal(tmp_path / "a.zip")
    first, long, back = tarfile.TarInfo("1.jpg"), tarfile.TarInfo("././@LongLink"), tarfile.TarInfo("2.jpg")
    long.type, long.size, back.size = tarfile.GNUTYPE_LONGNAME, 8 << 30, -1024
    text, far, cut = tarfile.TarInfo("x.txt"), tarfile.TarInfo("pax"), tarfile.TarInfo("sparse.jpg")
    text.size, far.size, far.type, cut.type = -1, -(2**70), tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE
    for header, part in [
        (long, "a block of 8,589,934,592 bytes"),
        (back, "a size of -1,024 bytes"),
        (text, "'x.txt', which has a size of -1 bytes"),
        (far, f"a block of {-(2**70):,} bytes"),
    ]:
        blocks = first.tobuf(tarfile.GNU_FORMAT) + header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(blocks + bytes(4096))
        assert part in refusal(tmp_path / "a.tar")
    sparse = bytearray(cut.tobuf(tarfile.GNU_FORMAT))
    sparse[482], sparse[148:156] = 1, b"%06o\0 " % (sum(sparse) + 1 + 8 * 32 - sum(sparse[148:156]))
    (tmp_path / "a.tar").write_bytes(sparse)
    assert "is truncated or damaged" in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_truncated_archives_are_refused(tmp_path, make, name):
    path = make(tmp_path / name, FILES)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    # A tar is whole with its first end block; Python pads it to 10 KiB.
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 if name == "a.tar" else len(whole) - 1
    for cut in [*range(1, end, 97), *range(0, end, 512), end]:
        path.write_bytes(whole[:cut])
        assert str(path) in refusal(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), size=rng.integers(1, 12)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            images_of(path)
        except JobError as error:
            refused += 1
            assert error.exit_code in (64, 65), error
    assert refused > 50


def test_damaged_entries_are_named(tmp_path):
    archive = zip_of(tmp_path / "a.zip", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    flip_a_bit(archive, archive.read_bytes().index(jpeg(2)) + 300)
    assert "a.zip: entry '2.jpg' is truncated or damaged (Bad CRC-32" in refusal(archive)
    # Behind the last entry.
    assert "CRC check failed" in refusal(flip_a_bit(tar_of(tmp_path / "a.tgz", FILES), -6))
    for content in (b"", b"hello", bytes(100), b"\x89PNG\r\n\x1a\n" * 200, gzip.compress(b"a,b\n" * 999)):
        (tmp_path / "a").write_bytes(content)
        assert "a is damaged, or not a .zip" in refusal(tmp_path / "a"), content[:20]
    first, second = (tar_of(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"1")]).read_bytes() for name in "ab")
    (tmp_path / "joined.tar").write_bytes(first + second)
    assert "holds more behind its end mark" in refusal(tmp_path / "joined.tar")
    (tmp_path / "zeros.tar").write_bytes(first + bytes(100_000))
    assert images_of(tmp_path / "zeros.tar") == [("a.jpg", b"1")]


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_files_become_grey_images(tmp_path, digits, gz):
    images, labels = digits
    mnist(tmp_path / "mnist", "train", images, labels, gz)
    mnist(tmp_path / "mnist", "t10k", images[:3], labels[:3], gz)
    source = open_source(str(tmp_path / "mnist"))
    assert are_grey(content for _, content in entries_of(source))
    assert (source.note, source.other_splits) == ("", ("test",))
    entries = list(entries_of(source))
    assert [name for name, _ in entries] == [f"train/{n:02d}.pgm" for n in range(len(labels))]
    assert list(names_of(replace(source, split="test"))) == [f"test/{n}.pgm" for n in range(3)]
    assert [one.label for one in source.images(labelled=True)] == [str(label) for label in labels]
    recipe = Recipe(ImageSize(28, 28), "center", "lanczos", 1, 14)
    np.testing.assert_array_equal([prepare(content, recipe)[..., 0] for _, content in entries], images)
    chosen = next((tmp_path / "mnist").glob("t10k-images*"))
    source = open_source(str(chosen))
    assert (source.note, source.name, len(list(entries_of(source)))) == ("", chosen.name, 3)
    # torchvision downloads into MNIST/raw; Kaggle's zip has copies in folders.
    (tmp_path / "data/training/raw").mkdir(parents=True)
    for split in ("train", "t10k"):
        mnist(tmp_path / "data/training/raw", split, images, labels, gz)
    for split, count in (("", 24), ("train", 12), ("test", 12)):
        nested = replace(open_source(str(tmp_path / "data")), split=split)
        assert [one.label for one in nested.images(labelled=True)] == [str(label) for label in labels] * (count // 12)
    mnist(tmp_path / "data/training", "train", images[:5], labels[:5], gz)
    assert len(list(entries_of(open_source(str(tmp_path / "data"))))) == 5
    mnist(tmp_path / "mnist", "emnist-letters-train", images, labels, gz)
    emnist = "emnist-letters-train-images-idx3-ubyte"
    assert open_source(str(tmp_path / "mnist")).note == "leaving out t10k-images-idx3-ubyte, train-images-idx3-ubyte"
    assert len(list(entries_of(open_source(f"{tmp_path}/mnist/{emnist}{'.gz' if gz else ''}")))) == 12
    for path in (tmp_path / "mnist").glob("emnist*"):
        path.unlink()
    for path in (tmp_path / "mnist").glob("*labels*"):
        path.unlink()
    assert next(names_of(open_source(str(tmp_path / "mnist"), column=None))) == "train/00.pgm"
    with pytest.raises(BadRequestError, match="lies without its labels, train-labels-idx1-ubyte: get that file"):
        open_source(str(tmp_path / "mnist"))
    file = tmp_path / f"train-images-idx3-ubyte{'.gz' if gz else ''}"
    for content, its_labels, part in [
        (idx(images)[:-1], labels, "has 783 bytes where 784 were promised"),
        (idx(images)[:10], labels, "has 10 bytes where 16 were promised"),
        (b"\0\0\x08\x03" + b"\xff" * 400, labels, "is not a complete MNIST image file"),
        (idx(images[:0]), labels[:0], "is not a complete MNIST image file"),
        (idx(images), labels[:-1], "does not go with its labels"),
        (idx(images) + b"0", labels, "holds more than the"),
    ]:
        mnist(tmp_path, "train", images, its_labels, gz)
        file.write_bytes(gzip.compress(content) if gz else content)
        assert part in refusal(tmp_path), part


def test_classes_are_the_first_differing_folders():
    lie_beside, together = "neither labels nor folders of classes that hold all", "test, train are packed together"
    val, no_classes = "`ddpm data pack --split val` would pack Val", "are not taken for classes; use --classes if"
    for names, classes, note in [
        (["cats/1.jpg", "dogs/1.jpg"], ("cats", "dogs"), ""),
        (["dogs/1.jpg", "cats/tabby/1.jpg", "cats/2.jpg"], ("cats", "dogs"), ""),
        (["data/set/cats/1.jpg", "data/set/dogs/1.jpg"], ("cats", "dogs"), ""),
        (["train/cats/1.jpg", "train/dogs/1.jpg", "test/dogs/2.jpg"], ("cats", "dogs"), together),
        (["x/Train/a/cats/1.jpg", "x/Val/a/dogs/1.jpg"], ("cats", "dogs"), val),
        (["train/cats/1.jpg", "test/2.jpg"], (), together),
        (["train/cats/1.jpg", "train/dogs/3.jpg", "test/2.jpg"], (), lie_beside),
        (["train/cats/1.jpg", "train/dogs/3.jpg", "test/2.jpg"], (), "would pack train alone"),
        (["train/1.jpg", "test/2.jpg"], (), together),
        (["train2017/1.jpg", "val2017/2.jpg"], (), "train2017, val2017 are packed together"),
        (["seg_train/sea/1.jpg", "seg_train/ice/1.jpg", "seg_test/ice/1.jpg"], ("ice", "sea"), "--split train"),
        (["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg"], (), "testA, trainA, trainB are packed together"),
        (["train/1.jpg", "faces/2.jpg"], (), f"the folders faces, train {no_classes}"),
        (["train/1.jpg", "plane/2.jpg", "bus/2.jpg"], ("bus", "plane", "train"), ""),
        (["2/1.jpg", "10/2.jpg", "0/3.jpg"], ("0", "2", "10"), ""),
        (["train_mini/a/1.jpg", "train_val2018/b/2.jpg", "train-jpg/a/3.jpg"], ("a", "b"), ""),
        (["01000/1.jpg", "2000/2.jpg"], (), f"the folders 01000, 2000 {no_classes}"),
        (["2023-05/1.jpg", "2023-06/2.jpg", "2023-06/3.jpg"], (), f"the folders 2023-05, 2023-06 {no_classes}"),
        (["00000/img0.png", "00001/img1.png"], (), no_classes),
        (["2023/cats/1.jpg", "2024/dogs/2.jpg"], ("2023", "2024"), ""),
        (["2023-05/cats/1.jpg", "2023-06/dogs/2.jpg"], ("cats", "dogs"), ""),
        (["cats.zip/1.jpg", "dogs.zip/2.jpg"], (), f"the folders cats.zip, dogs.zip {no_classes}"),
        (["cats/1.jpg", "cats/2.jpg"], (), "it is packed without classes"),
        (["cats/1.jpg", "dogs/1.jpg", "preview.jpg"], (), lie_beside),
        (["cats/1.jpg", "cats/young/2.jpg"], (), lie_beside),
    ]:
        found, without = surveyed(names), surveyed(names, classes=False)
        assert (found.images, found.classes) == (len(names), classes), names
        became = f"here: {len(classes)} folders became classes that the network will learn: {', '.join(classes)}; use"
        assert (found.notes[0].startswith(became) if classes else True) and note in "".join(found.notes), names
        assert bool(found.notes) == bool(classes or note), names
        assert (without.classes, without.label(0)) == ((), -1)
        labels = [found.label(number) for number in range(len(names))]
        assert all(classes[label] in name.split("/") for name, label in zip(names, labels, strict=True) if classes)
    for names, classes in [
        (["2023/1.jpg", "2024/2.jpg"], ("2023", "2024")),
        (["train/1.jpg", "test/2.jpg"], ("test", "train")),
        (["n02.tar/1.jpg", "n01.tar/2.jpg"], ("n01", "n02")),
        (["train/0/1.jpg", "test/1/2.jpg"], ("0", "1")),
    ]:
        assert surveyed(names, classes=True).classes == classes
    for names in (["1.jpg", "2.jpg"], ["cats/1.jpg", "cats/2.jpg"], ["cats/1.jpg", "2.jpg"]):
        with pytest.raises(BadRequestError, match="here has no classes: no image has a label"):
            surveyed(names, classes=True)


@pytest.mark.parametrize(("make", "name"), [*ARCHIVES, (folder_of, "a")])
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


def test_empty_and_missing_sources_are_errors(tmp_path):
    (tmp_path / "a").mkdir()
    for make, name in [*ARCHIVES, (folder_of, "a")]:
        for files, said in [
            ([], "none of its names ends in .avif, .bmp, .gif"),
            ([("readme.txt", b"x")], "tables and texts hold names, not images"),
        ]:
            source = open_source(str(make(tmp_path / name, files)))
            with pytest.raises(BadDataError, match=f"holds no images: {said}"):
                survey(source)
    for missing in ("nowhere", "nowhere.zip", "file:///nowhere/a.zip", "~/nowhere/at/all"):
        assert "nothing at" in refusal(missing, MissingInputError)
    assert "ftp" in refusal("ftp://host/a.zip", BadRequestError)


def test_folder_order_is_that_of_paths(tmp_path):
    names = ["a-b/1.jpg", "a/2.jpg", "a/b/0.jpg", "a/b.jpg", "a0.jpg", "a.jpg", "Z.jpg", "é/1.jpg", "a b.jpg"]
    folder_of(tmp_path / "in", [(name, name.encode()) for name in reversed(names)])
    for path in (f"{tmp_path}/in", f"file://{tmp_path}/in", os.path.relpath(tmp_path / "in")):
        assert images_of(path) == [(name, name.encode()) for name in sorted(names)]
    entries = entries_of(open_source(str(tmp_path / "in")))
    assert next(entries)[0] == "Z.jpg"
    (tmp_path / "in" / "a b.jpg").unlink()
    with pytest.raises(MissingInputError, match=r"entry 'a b.jpg' is not there"):
        next(entries)


def test_links_of_a_folder(tmp_path):
    folder = folder_of(tmp_path / "in", [("1.jpg", b"1"), ("sub/2.jpg", b"2")])
    (tmp_path / "outside.jpg").write_bytes(b"2")
    (folder / "3.jpg").symlink_to("sub/2.jpg")
    (folder / "notes.txt").symlink_to("/etc/passwd")
    assert images_of(folder) == [("1.jpg", b"1"), ("3.jpg", b"2"), ("sub/2.jpg", b"2")]
    for name, target in [("4.jpg", "../outside.jpg"), ("other", "/etc"), ("other", "."), ("4.jpg", "gone.jpg")]:
        (folder / name).symlink_to(target)
        assert f"{name!r}, which is not a file, or links to a folder or outside" in refusal(folder)
        (folder / name).unlink()
    os.mkfifo(folder / "4.jpg")
    assert "'4.jpg', which is" in refusal(folder)


def test_work_ahead_is_limited_and_ordered():
    taken, yielded, ahead = 0, 0, []

    def items():
        nonlocal taken
        for item in range(200):
            taken += 1
            ahead.append(taken - yielded)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 if item % 7 == 0 else 0)
        return item * item

    with ThreadPoolExecutor(4) as pool:
        for result in in_order(pool, work, items(), window=10):
            assert result == yielded**2
            yielded += 1
    assert (yielded, max(ahead)) == (200, 10)


def test_nothing_is_begun_after_a_failure():
    """Each item would wait for the same outage once more."""
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.05)
        raise BadDataError(f"item {item}")

    with ThreadPoolExecutor(2) as pool, pytest.raises(BadDataError, match="item 0"):
        list(in_order(pool, work, range(6), window=6))
    assert sorted(begun) == [0, 1]


def test_later_failure_cancels_no_earlier_item():
    """Its thread may be slow to begin, and its result comes first."""
    failed = threading.Event()

    class SlowToBegin(ThreadPoolExecutor):
        def submit(self, work, *args):
            return super().submit(lambda: ((args[-1] == 0 and failed.wait(5) and time.sleep(0.05)), work(*args))[1])

    def work(item: int) -> int:
        if item:
            failed.set()
            raise BadDataError(f"item {item}")
        return item

    with SlowToBegin(2) as pool:
        results = in_order(pool, work, range(2), window=2)
        assert next(results) == 0
        with pytest.raises(BadDataError, match="item 1"):
            next(results)
