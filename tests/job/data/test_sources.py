import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from job.data.members import in_order

from job.data.sources import BucketFolder, open_source, survey
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.store import open_store
from tests.job.some_images import (
    digits_fixture,  # noqa: F401
    folder_of,
    jpeg,
    mnist,
    tar_of,
    zip_of,
)

# As `unzip -l` shows the archives that people download, shortened.
CELEBA = ["img_align_celeba/"] + [f"img_align_celeba/{n:06d}.jpg" for n in range(1, 7)]
LANDSCAPE = ["00000000.jpg", "00000000_(2).jpg", "00000001.jpg", "00000001_(2).jpg", "00004318.jpg"]
LITTER = [
    "__MACOSX/",
    "__MACOSX/._00000000.jpg",
    ".DS_Store",
    "Thumbs.db",
    "._00000001.jpg",
    "desktop.ini",
    "README.md",
]


def names_in_zip(path: Path, names: list[str]) -> list[str]:
    return list(open_source(str(zip_of(path, [(name, b"x" if name[-1] != "/" else b"") for name in names]))).names())


def test_celebas_archive_as_downloaded(tmp_path):
    names = names_in_zip(tmp_path / "img_align_celeba.zip", CELEBA)
    assert names == CELEBA[1:]
    assert survey(names, "celeba") == survey(names, "celeba", classes=False)
    assert survey(names, "celeba").classes == ()


@pytest.mark.parametrize(
    "folder", ["", "landscape_img_folder/", "landscape_img_folder/train/", "archive/Landscape Images/"]
)
def test_the_landscape_archive_as_downloaded_and_nested(tmp_path, folder):
    names = names_in_zip(tmp_path / "archive.zip", [folder + name for name in LANDSCAPE] + LITTER)
    assert names == [folder + name for name in LANDSCAPE]
    assert survey(names, "landscape").classes == ()
    assert survey(names, "landscape").images == 5


def test_hidden_files_litter_and_other_kinds_are_ignored(tmp_path):
    suffixes = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jpe", "jfif", "JPG", "Png"]
    good = [f"a/1.{suffix}" for suffix in suffixes]
    bad = ["a/.1.jpg", ".a/1.jpg", "__MACOSX/a/1.jpg", "a/Thumbs.db", "a/1.txt", "a/jpg", "a/1.jpg.part", "a/1.jpg/"]
    assert names_in_zip(tmp_path / "a.zip", good + bad) == good


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cats/1.jpg", "dogs/1.jpg"], ("cats", "dogs")),
        (["dogs/1.jpg", "cats/tabby/1.jpg", "cats/2.jpg"], ("cats", "dogs")),
        (["data/set/cats/1.jpg", "data/set/dogs/1.jpg"], ("cats", "dogs")),
        (["train/cats/1.jpg", "train/dogs/1.jpg"], ("cats", "dogs")),
        (["train/cats/1.jpg", "train/dogs/1.jpg", "test/dogs/2.jpg"], ("cats", "dogs")),
        (["x/Train/a/cats/1.jpg", "x/Val/a/dogs/1.jpg"], ("cats", "dogs")),
        (["train/1.jpg", "test/2.jpg"], ()),
        (["train/1.jpg", "faces/2.jpg"], ("faces", "train")),
        (["1.jpg", "2.jpg"], ()),
        (["cats/1.jpg", "cats/2.jpg"], ()),
        (["cats/1.jpg", "dogs/1.jpg", "preview.jpg"], ()),
        (["cats/1.jpg", "cats/young/2.jpg"], ()),
    ],
)
def test_classes_are_the_first_folders_that_tell_images_apart(names, classes):
    found = survey(names, "here")
    assert (found.images, found.classes) == (len(names), classes)
    assert survey(names, "here", classes=False).classes == ()
    assert survey(names, "here", classes=False).label(names[0]) == -1
    if classes:
        assert survey(names, "here", classes=True) == found
        assert all(found.classes[found.label(name)] in name.split("/") for name in names)
    else:
        with pytest.raises(BadRequestError, match="here has no classes"):
            survey(names, "here", classes=True)


def test_names_of_old_archives_make_no_classes(tmp_path):
    (tmp_path / "flat").mkdir()
    for name in (b"caf\xe9.png", b"th\xe9.png", b"fl\xfbte.png", b"a\nb.png", b"c\x1b[31m.png"):
        (tmp_path / "flat" / os.fsdecode(name)).write_bytes(b"x")
    names = list(open_source(str(tmp_path / "flat")).names())
    assert "caf%e9.png" in names
    assert survey(names, "it").classes == ()


def test_folders_that_are_not_taken_for_classes_are_told_of():
    names = ["cats/1.jpg", "dogs/1.jpg", "preview.jpg"]
    assert "some images lie beside the folders of others" in survey(names, "here").note
    assert survey(names, "here", classes=False).note == ""
    assert survey(names[:2], "here").note == survey(names[2:], "here").note == survey(names[:1], "here").note == ""


def test_no_images_is_an_error(tmp_path):
    for make, name in [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tgz"), (folder_of, "a")]:
        (tmp_path / "a").mkdir(exist_ok=True)
        for files in ([], [("readme.txt", b"x")]):
            source = open_source(str(make(tmp_path / name, files)))
            with pytest.raises(BadDataError, match=r"holds no images: none of its names ends in .bmp, .gif, .jfif"):
                survey(source.names(), source.where)


@pytest.mark.parametrize("source", ["nowhere", "nowhere.zip", "file:///nowhere/a.zip", "~/nowhere/at/all"])
def test_a_source_that_is_missing(source):
    with pytest.raises(MissingInputError, match="nothing at"):
        open_source(source)


def test_a_scheme_that_nobody_speaks():
    with pytest.raises(BadRequestError, match="ftp"):
        open_source("ftp://host/a.zip")


def test_a_folder_is_read_in_the_order_of_its_relative_paths(tmp_path):
    names = [
        "a-b/1.jpg",
        "a/2.jpg",
        "a/b/0.jpg",
        "a/b.jpg",
        "a0.jpg",
        "a.jpg",
        "Z.jpg",
        "é/1.jpg",
        "a b.jpg",
        "a_(2).jpg",
    ]
    folder_of(tmp_path / "in", [(name, name.encode()) for name in reversed(names)])
    entries = list(open_source(str(tmp_path / "in")).entries())
    assert entries == [(name, name.encode()) for name in sorted(names)]
    assert list(open_source(f"file://{tmp_path}/in").names()) == sorted(names)
    assert list(open_source(os.path.relpath(tmp_path / "in")).names()) == sorted(names)


def test_links_inside_a_folder_are_followed_to_files(tmp_path):
    folder_of(tmp_path, [("1.jpg", b"1"), ("sub/2.jpg", b"2")])
    (tmp_path / "3.jpg").symlink_to("sub/2.jpg")
    (tmp_path / "notes.txt").symlink_to("/etc/passwd")
    assert list(open_source(str(tmp_path)).entries()) == [("1.jpg", b"1"), ("3.jpg", b"2"), ("sub/2.jpg", b"2")]


def _link(target: str):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("2.jpg", _link("../outside.jpg"), "'2.jpg', which is a link that leaves the folder"),
        ("2.jpg", _link("/etc/passwd"), "'2.jpg', which is a link that leaves the folder"),
        ("sub", _link("/etc"), "'sub', which is a link that leaves the folder"),
        ("sub", _link("."), "'sub', which is a broken link, a link to a folder"),
        ("2.jpg", _link("gone.jpg"), "'2.jpg', which is a broken link"),
        ("2.jpg", os.mkfifo, "'2.jpg', which is .* no regular file"),
    ],
)
def test_links_out_of_a_folder_and_special_files_refuse_it(tmp_path, name, make, match):
    folder_of(tmp_path, [("in/1.jpg", b"1"), ("outside.jpg", b"2")])
    make(tmp_path / "in" / name)
    with pytest.raises(BadDataError, match=match):
        list(open_source(str(tmp_path / "in")).names())


def test_what_vanishes_while_it_is_read_is_missing(tmp_path):
    folder_of(tmp_path, [("1.jpg", b"1"), ("2.jpg", b"2")])
    entries = open_source(str(tmp_path)).entries()
    assert next(entries) == ("1.jpg", b"1")
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(MissingInputError, match=r"entry '2.jpg' is not there"):
        next(entries)


FILES = [(f"{kind}/{n:02d}.jpg", jpeg(n)) for kind in ("a-b", "a", "c") for n in range(12)]


def put(bucket: str, folder: Path, prefix: str) -> None:
    store = open_store(bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, f"{prefix}/{path.relative_to(folder).as_posix()}")


def test_a_bucket_gives_what_a_local_disk_gives(tmp_path, gcs_bucket, digits):
    local = tmp_path / "local"
    local.mkdir()
    zip_of(local / "a.zip", FILES)
    tar_of(local / "a.tar", FILES)
    tar_of(local / "a.tar.gz", FILES)
    folder_of(local / "images", FILES)
    mnist(local / "mnist", "train", *digits, gz=True)
    put(gcs_bucket, local, "some/where")
    for name in ("a.zip", "a.tar", "a.tar.gz", "images", "images/", "mnist", "mnist/train-images-idx3-ubyte.gz"):
        here, there = open_source(str(local / name)), open_source(f"{gcs_bucket}/some/where/{name}")
        assert (there.name, there.channels) == (here.name, here.channels)
        assert list(there.names()) == list(here.names())
        assert list(there.entries()) == list(here.entries())
    whole = tmp_path / "whole"
    shutil.copytree(local, whole / "some" / "where")
    assert list(open_source(gcs_bucket).names()) == list(open_source(str(whole)).names())
    for missing in (f"{gcs_bucket}/some/where/else", f"{gcs_bucket}/some/where/b.zip"):
        with pytest.raises(MissingInputError, match="there is nothing at gs://"):
            open_source(missing)
    with pytest.raises(MissingInputError, match="no bucket"):
        open_source("gs://no-such-bucket-here/a.zip")


def test_names_in_a_bucket_may_be_what_people_call_their_files(gcs_server, gcs_bucket):
    from google.cloud import storage

    handle = storage.Client(project="test").bucket(gcs_bucket.removeprefix("gs://"))
    for number, name in enumerate(LANDSCAPE + LITTER):
        handle.blob(f"Landscape Images/{name}").upload_from_string(f"{number}".encode())
    source = open_source(f"{gcs_bucket}/Landscape Images")
    assert list(source.entries()) == [
        ("00000000.jpg", b"0"),
        ("00000000_(2).jpg", b"1"),
        ("00000001.jpg", b"2"),
        ("00000001_(2).jpg", b"3"),
        ("00004318.jpg", b"4"),
    ]


def test_an_archive_in_a_bucket_that_was_cut_off(tmp_path, gcs_bucket):
    for path in (zip_of(tmp_path / "a.zip", FILES), tar_of(tmp_path / "a.tgz", FILES)):
        open_store(gcs_bucket).create(path.name, path.read_bytes()[:-300])
        with pytest.raises(BadDataError, match=f"gs://.*/{path.name} .*(truncated|cannot be read)"):
            list(open_source(f"{gcs_bucket}/{path.name}").names())


def test_an_object_too_large_for_an_image_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("job.data.sources.ENTRY_BYTES", 1000)
    folder_of(tmp_path, [("1.jpg", bytes(1000)), ("2.jpg", bytes(1001))])
    with pytest.raises(BadDataError, match=r"'2.jpg', which has 1001 bytes, more than the 1000"):
        list(BucketFolder(open_store(str(tmp_path))).entries())


def test_work_is_done_ahead_but_not_far_and_comes_out_in_order():
    taken, yielded, ahead = 0, 0, []
    lock = threading.Lock()

    def items():
        nonlocal taken
        for item in range(200):
            taken += 1
            ahead.append(taken - yielded)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 if item % 7 == 0 else 0)
        with lock:
            return item * item

    with ThreadPoolExecutor(4) as pool:
        for result in in_order(pool, work, items(), window=10):
            assert result == yielded**2
            yielded += 1
    assert yielded == 200
    assert max(ahead) == 10
