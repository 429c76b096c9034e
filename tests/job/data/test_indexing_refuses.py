"""Tars of strangers that are damaged, unsafe or no datasets, and images in them that cannot be used."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from job.data.verify import verify_dataset
from job.exits import BadDataError
from job.store import Store, open_store
from tests.job.data.test_indexing import KEY, indexed, pixels, samples_of, write_tars
from tests.job.some_images import encoded, jpeg, picture, tar_of

BOMB = encoded(picture(0).resize((1, 1)).resize((10_000, 10_000)).convert("1"), "PNG")


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("theirs") / "laion", samples_of())


@pytest.fixture
def bucket(tmp_path) -> Store:
    return open_store(str(tmp_path / "bucket"))


def test_bad_images_are_named_left_out_and_bounded(tmp_path, bucket):
    samples = samples_of(30)
    for number, content in ((3, b"no image"), (11, jpeg(11)[:-300]), (12, encoded(picture(1, 4, 4))), (29, BOMB)):
        samples[number]["jpg"] = content
    # A tar without one good image is no shard.
    bad = write_tars(tmp_path / "bad", [{**sample, "jpg": b"no image"} for sample in samples_of(5)]) / "00000.tar"
    tars = write_tars(tmp_path / "tars", samples)
    words = [tars / "00000.tar", bad, tars / "00001.tar", tars / "00002.tar"]
    index = indexed(bucket, *words)
    assert (index.images, index.rejected_images, len(index.shards)) == (26, 9, 3)
    lines = [json.loads(line) for line in bucket.read(f"{KEY}/rejects.jsonl").data.splitlines()]
    assert [line["name"] for line in lines] == [
        "00000.tar/000000003.jpg",
        *(f"00000.tar/00000000{n}.jpg" for n in range(5)),
        "00001.tar/000000011.jpg",
        "00001.tar/000000012.jpg",
        "00002.tar/000000029.jpg",
    ]
    assert [line["reason"].split()[0] for line in lines[-3:]] == ["cannot", "has", "has"]
    assert "100000000 pixels, more than the limit" in lines[-1]["reason"].replace("10000×10000", "100000000")
    assert len(pixels(bucket, KEY, tmp_path / "cache")) == 26
    assert verify_dataset(bucket, KEY) == []
    small = open_store(str(tmp_path / "small"))
    with pytest.raises(BadDataError, match=r"more than --max-bad=8 .*'00000.tar/000000003.jpg' .*and 6 more: see to"):
        indexed(small, *words, max_bad=8)
    with pytest.raises(BadDataError, match="none of their images can be used"):
        indexed(small, bad)


@pytest.mark.parametrize(
    ("name", "match"),
    [("../up.jpg", "leads out of it, '../up.jpg'"), ("/etc/x.jpg", "leads out"), ("a/../../x.jpg", "leads out")],
)
def test_tars_of_strangers_are_refused_as_in_packing(tmp_path, bucket, name, match):
    tar = tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1)), (name, jpeg(2))])
    with pytest.raises(BadDataError, match=match):
        indexed(bucket, tar)
    assert not bucket.exists(f"{KEY}/index.json")


def test_two_files_of_one_name_are_refused(tmp_path, bucket):
    tar = tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2)), ("./1.jpg", jpeg(3))])
    with pytest.raises(BadDataError, match=r"a\.tar has the entry '1\.jpg' more than once"):
        indexed(bucket, tar)


def test_names_that_do_not_tell_samples_apart_are_refused(tmp_path, bucket):
    tar = tar_of(tmp_path / "a.tar", [(f"clip.{n:04d}.jpg", jpeg(n, 20, 20)) for n in range(20)])
    with pytest.raises(BadDataError, match=r"'clip\.0016\.jpg' is one of more than 16 images of sample 'clip'"):
        indexed(bucket, tar)


def test_a_tar_without_images_is_refused(tmp_path, bucket):
    with pytest.raises(BadDataError, match=r"there are no images in it: no name ends in \.bmp"):
        indexed(bucket, tar_of(tmp_path / "notes.tar", [("a.txt", b"x"), ("a.json", b"{}")]))


@pytest.mark.parametrize("cut", [511, 700, 20_000])
def test_a_truncated_tar_is_refused(tmp_path, tars, bucket, cut):
    path = tmp_path / "cut.tar"
    path.write_bytes((tars / "00000.tar").read_bytes()[:cut])
    with pytest.raises(BadDataError, match=r"cut\.tar"):
        indexed(bucket, path)


def test_links_in_a_tar_are_refused(tmp_path, bucket):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size = len(jpeg(1))
        archive.addfile(info, io.BytesIO(jpeg(1)))
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(BadDataError, match=r"'2\.jpg', which is a link or a device"):
        indexed(bucket, tmp_path / "a.tar")
