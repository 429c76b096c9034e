"""Tars of other people, written by the real `webdataset`, become a dataset where they lie."""

import json
import os
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from job.data.checks import verify_dataset
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.reading.cache import open_cache
from job.data.shards import DatasetIndex, load_index
from job.data.source.archives import find_tars
from job.exits import BadDataError, BadRequestError, Exit, JobError, StoppedError
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, succeeded
from tests.job.damages import flip_a_bit
from tests.job.packing import KEY, packed
from tests.job.some_images import encoded, files_in, folder_of, jpeg, picture, tar_of

BOMB = encoded(Image.new("1", (10_000, 10_000)), "PNG")


def samples_of(count: int = 34, kind: str = "jpg", **more: object) -> list[dict[str, object]]:
    """As img2dataset lays them out: an image, its caption and a record, under a number; no two of one size."""
    return [
        {
            "__key__": f"{n:09d}",
            kind: jpeg(n, 30 + n, 64 - n) if kind == "jpg" else encoded(picture(n, 30 + n, 64 - n), kind),
            "txt": f"picture {n}".encode(),
            "json": json.dumps({"number": n}).encode(),
            **{name: value(n) if callable(value) else value for name, value in more.items()},
        }
        for n in range(count)
    ]


def write_tars(folder: Path, samples: list[dict[str, object]], per_tar: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_tar, encoder=False, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def indexed(bucket: Store, *words: object, **options) -> DatasetIndex:
    """Makes the tars a dataset, as `packed` does."""
    return packed(bucket.uri, "", tars=tuple(map(str, words)), shard_images=None, **options)


def pixels(bucket: Store, key: str, cache_dir: Path, budget_bytes: int = 1 << 30) -> np.ndarray:
    cache = open_cache(bucket, load_index(bucket, key), budget_bytes, cache_dir=cache_dir)
    try:
        return cache.read(np.arange(cache.index.images))
    finally:
        cache.close()


def uploaded(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("theirs") / "laion", samples_of())


@pytest.fixture
def bucket(tmp_path) -> Store:
    return open_store(str(tmp_path / "bucket"))


def test_indexed_images_equal_packed_ones(tmp_path):
    squashed, grey = {"crop": "squash", "resize_filter": "box"}, {"channels": 1, "crop": "center:24"}
    for kind, options in (("jpg", {}), ("png", squashed), ("webp", grey)):
        samples, folder, bucket = samples_of(24, kind), tmp_path / kind, open_store(str(tmp_path / kind / "bucket"))
        tars = write_tars(folder / "tars", samples)
        files = folder_of(folder / "images", [(f"{s['__key__']}.{kind}", s[kind]) for s in samples])  # type: ignore[misc]
        index = indexed(bucket, tars, **options)
        copied = pack(bucket, PackRequest(str(files), "packed", 16, **options))
        assert (index.images, len(index.shards), index.channels) == (24, 3, copied.channels)
        want = pixels(bucket, "datasets/packed-16", folder)
        np.testing.assert_array_equal(pixels(bucket, KEY, folder), want, err_msg=kind)
        np.testing.assert_array_equal(pixels(bucket, KEY, folder / "other", budget_bytes=1), want, err_msg=kind)
        assert verify_dataset(bucket, KEY) == []


def test_differently_named_tars_are_one_dataset(tmp_path, bucket, tars):
    before = files_in(tars)
    index = indexed(bucket, tars)
    names = set(files_in(tmp_path / "bucket" / KEY))
    assert names == {"index.json", "preview.png", *(f"shard-0000{n}.offsets" for n in range(4))}
    assert [shard.uri for shard in index.shards] == [f"{tars}/0000{n}.tar" for n in range(4)]
    with pytest.raises(BadRequestError, match="is there already: 34 images"):
        indexed(bucket, tars)
    moved = shutil.copytree(tars, tmp_path / "a folder" / "moved")
    patterns = [[f"{tars}/{{00000..00003}}.tar"], [f"file://{tars}/{{00000,00001}}.tar", f"{tars}/{{00002,00003}}.tar"]]
    for number, words in enumerate([*patterns, [moved.parent]]):
        assert indexed(open_store(str(tmp_path / str(number))), *words).dataset_id == index.dataset_id, words
    assert indexed(open_store(str(tmp_path / "other")), tars, crop="squash").dataset_id != index.dataset_id
    succeeded(ddpm_here("data", "delete", "small", "--yes", "--bucket", bucket.uri))
    assert not (tmp_path / "bucket" / KEY).exists()
    assert files_in(tars) == before


def test_tars_are_read_in_place(tmp_path, tars, bucket, bucket_uri):
    theirs = f"{bucket_uri}/theirs/laion"
    uploaded(tars, theirs)
    here = indexed(bucket, tars)
    there = open_store(f"{bucket_uri}/ours")
    for words in ([f"{bucket_uri}/theirs"], [f"{theirs}/{{00000..00003}}.tar"]):
        index = indexed(there, *words)
        assert index.dataset_id == here.dataset_id
        assert [shard.uri for shard in index.shards] == [f"{theirs}/0000{n}.tar" for n in range(4)]
        want = pixels(bucket, KEY, tmp_path / "cache")
        np.testing.assert_array_equal(pixels(there, KEY, tmp_path / f"cache-{len(words[0])}"), want)
        assert verify_dataset(there, KEY) == []
        for entry in list(there.list()):
            there.delete(entry.key)


def test_commands_show_an_indexed_dataset(tmp_path, tars, gcs_bucket, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    theirs, at = f"{gcs_bucket}/theirs", ("--bucket", f"{gcs_bucket}/ours")
    uploaded(tars, theirs)
    out = succeeded(ddpm_here("data", "index", theirs, "laion", "--size", 40, *at))
    assert "34 colour, 40×40 pixels, in 4 shards" in out
    assert f"from {theirs}/00000.tar and 3 more, crop center, lanczos filter, at each reading" in out
    assert " 34 " in succeeded(ddpm_here("data", "list", *at))
    assert "preview.png" in succeeded(ddpm_here("data", "show", "laion", *at))
    assert "as it was" in succeeded(ddpm_here("data", "verify", "laion", *at))


def stopped(*_: object) -> bytes:
    raise StoppedError("stopped by a test")


def test_cls_files_are_classes(tmp_path, bucket, monkeypatch):
    tars = write_tars(tmp_path / "tars", samples_of(12, cls=lambda n: b"%d" % (n % 3)))
    index = indexed(bucket, tars)
    assert index.classes == ("0", "1", "2")
    cache = open_cache(bucket, index, 1 << 30, cache_dir=tmp_path / "cache")
    assert cache.labels(np.arange(12)).tolist() == [n % 3 for n in range(12)]
    mistyped = write_tars(tmp_path / "mistyped", samples_of(12, cls=lambda n: b"%d" % (n + 7 * (n == 5))))
    with pytest.raises(BadDataError, match="says class 12, of 12 images"):
        indexed(open_store(str(tmp_path / "mistyped-bucket")), mistyped)
    # What webdataset's users write for "not known" is no reason to forget the classes of all.
    unknown = write_tars(tmp_path / "unknown", samples_of(12, cls=lambda n: b"%d" % (n % 3 - 1)))
    with pytest.raises(BadDataError, match=r"4 of 10 images have no label, such as 00000.tar/000000000.jpg, .*drop"):
        indexed(open_store(str(tmp_path / "unknown-bucket")), unknown)
    there = indexed(open_store(str(tmp_path / "drop")), unknown, unlabelled="drop")
    assert (there.images, there.unlabelled_images, there.rejected_images, there.classes) == (8, 4, 0, ("0", "1"))
    # A whole tar without labels beside one with them; the same folder after the refusal.
    beside = write_tars(tmp_path / "beside", samples_of(12, cls=lambda n: b"%d" % (-1 if n < 10 else n % 2)))
    with pytest.raises(BadDataError, match=r"10 of 12 images have no label, such as 00000.tar/000000000.jpg"):
        indexed(open_store(str(tmp_path / "mixed")), beside)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        # Before the index: the tables of the tars that are left out are not gone yet.
        patch.setattr("job.data.pack.preview_png", stopped)
        indexed(open_store(str(tmp_path / "mixed")), beside, unlabelled="drop")
    there = indexed(open_store(str(tmp_path / "mixed")), beside, unlabelled="drop")
    assert (there.images, there.unlabelled_images, there.classes, len(there.shards)) == (2, 10, ("0", "1"), 1)
    assert verify_dataset(open_store(str(tmp_path / "mixed")), KEY) == []
    lone = tar_of(tmp_path / "lone.tar", [("a.cls", b"1"), ("a.txt", b"a caption"), ("b.jpg", jpeg(1))])
    with pytest.raises(BadDataError, match=r"entry 'a.cls', which labels no image, such as a.png"):
        indexed(open_store(str(tmp_path / "lone")), lone)
    without = indexed(open_store(str(tmp_path / "without")), unknown, classes=False)
    assert (without.images, without.classes) == (12, ())
    # The dataset that packing writes is read as well, its classes with it.
    images = folder_of(tmp_path / "images", [(f"{'ab'[n % 2]}/{n}.jpg", jpeg(n)) for n in range(10)])
    pack(bucket, PackRequest(str(images), "packed", 16))
    again = pack(bucket, PackRequest("", "again", 16, tars=(f"{bucket.uri}/datasets/packed-16",)))
    assert (again.images, again.classes) == (10, ("0", "1"))
    found, want = (pixels(bucket, f"datasets/{name}-16", tmp_path / "cache") for name in ("again", "packed"))
    np.testing.assert_array_equal(found, want)


def test_sample_is_one_image(tmp_path, bucket):
    """Masks, thumbnails and captions beside it, folders, litter and dots in names."""
    names = ["a/one.mask.png", "a/one.jpg", "a/one.txt", "b/two.large.JPG", "._two.jpg", "c/.hidden/x.jpg", "read.me"]
    tar = tar_of(tmp_path / "a.tar", [(name, jpeg(number)) for number, name in enumerate(names)])
    indexed(bucket, tar)
    got = pixels(bucket, KEY, tmp_path / "cache")
    images = folder_of(tmp_path / "i", [("1.jpg", jpeg(1)), ("3.jpg", jpeg(3))])
    pack(bucket, PackRequest(str(images), "packed", 16))
    np.testing.assert_array_equal(got, pixels(bucket, "datasets/packed-16", tmp_path / "cache"))


@pytest.mark.parametrize(
    "names",
    [
        *[("IMG.1.png", "IMG.2.png"), ("a.left.png", "a.right.png"), ("a.jpg", "a.1.jpg"), ("a.1.jpg", "a.jpg")],
        *[("a.jpg", "a.jpg"), ("a.jpg", "a.png")],
    ],
)
def test_ambiguous_samples_are_refused(tmp_path, bucket, names):
    tar = tar_of(tmp_path / "a.tar", [("0.jpg", jpeg(0)), *((name, jpeg(n)) for n, name in enumerate(names))])
    with pytest.raises(BadDataError, match=r"a\.tar: '.*' and '.*' would be one sample") as error:
        indexed(bucket, tar)
    assert all(repr(name) in str(error.value) for name in names)
    assert pack(bucket, PackRequest(str(tar), "packed", 16)).images == 3


def test_stopped_indexing_resumes_at_the_tar(tmp_path, tars):
    straight = tmp_path / "straight"
    indexed(open_store(str(straight)), tars)
    for stop_at in (3, 17, 30):
        bucket, decoded = open_store(str(tmp_path / f"stopped-{stop_at}")), count()
        with pytest.raises(StoppedError):
            indexed(bucket, tars, stop_at=stop_at)
        assert not bucket.exists(f"{KEY}/index.json")
        if stop_at == 17:
            # What was begun with other tars or parameters stands in nobody's way who deletes it.
            with pytest.raises(BadRequestError, match=f"`ddpm data delete small --size 16 --bucket {bucket.uri}`"):
                indexed(bucket, tars, crop="squash")
        tars_done = len(list(bucket.list(f"{KEY}/pieces")))
        assert tars_done >= (stop_at - 1) // 10
        whole = indexed(bucket, tars, decoded=decoded)
        assert next(decoded) == whole.images - 10 * tars_done
        assert files_in(Path(bucket.uri)) == files_in(straight)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, emptied, flip_a_bit])
def test_tables_damaged_before_the_commit_are_made_again(tmp_path, tars, damage):
    straight, bucket = open_store(str(tmp_path / "straight")), open_store(str(tmp_path / "bucket"))
    indexed(straight, tars)
    with pytest.raises(StoppedError):
        indexed(bucket, tars, stop_at=30)
    damage(tmp_path / "bucket" / KEY / "shard-00001.offsets")
    with pytest.raises(BadDataError, match=r"shard-00001\.offsets is .*: the same command makes it again"):
        indexed(bucket, tars)
    assert not bucket.exists(f"{KEY}/index.json")
    decoded = count()
    indexed(bucket, tars, decoded=decoded)
    assert next(decoded) == 10
    assert files_in(Path(bucket.uri)) == files_in(Path(straight.uri))


def test_tar_changed_later_is_named(tmp_path, tars):
    def became_a_pipe(tar: Path) -> None:
        # An index is written by anybody: one that names a pipe must not hang a reader.
        tar.unlink()
        os.mkfifo(tar)

    def image_changed(tar: Path) -> None:
        flip_a_bit(tar, tar.read_bytes().index(b"\xff\xd8\xff") + 200)

    codes = {image_changed: Exit.BAD_DATA, Path.unlink: Exit.MISSING_INPUT, became_a_pipe: Exit.MISSING_INPUT}
    for change, code in codes.items():
        folder = tmp_path / change.__name__
        theirs, bucket = shutil.copytree(tars, folder / "theirs"), open_store(str(folder / "bucket"))
        index = indexed(bucket, theirs)
        change(theirs / "00002.tar")
        (problem,) = verify_dataset(bucket, KEY)
        assert problem.startswith((f"{theirs}/00002.tar ", f"{theirs}/00002.tar, image 0 "))
        for budget_bytes in (1 << 30, index.decoded_bytes - 1):
            with pytest.raises(JobError) as raised:
                pixels(bucket, KEY, folder / "cache", budget_bytes)
            assert raised.value.exit_code == code
            assert f"{theirs}/00002.tar" in str(raised.value)
            assert ("or index the dataset again" in str(raised.value)) == (code == Exit.BAD_DATA)


def test_bad_images_in_tars_are_named(tmp_path, bucket):
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
    assert "10000×10000 pixels, more than the limit" in lines[-1]["reason"]
    assert len(pixels(bucket, KEY, tmp_path / "cache")) == 26
    assert verify_dataset(bucket, KEY) == []
    with pytest.raises(BadDataError, match="none of its images can be used"):
        indexed(open_store(str(tmp_path / "none")), bad)


def test_words_without_tars_are_refused(tmp_path):
    bucket = open_store(str(tmp_path / "bucket"))
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "texts", [("read.me", b"hello")])
    tar_of(tmp_path / "a.tar.gz", [("1.jpg", jpeg(1))])
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    tar_of(tmp_path / "no-images.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    for word, code, part in [
        ("nowhere.tar", 66, "no object at"),
        ("{nowhere,a}.tar", 66, "nothing at"),
        ("nowhere", 66, "is not a folder"),
        ("empty", 66, "holds no .tar"),
        ("texts", 66, "holds no .tar"),
        ("no-images.tar", 65, "holds no images: none of its names ends in .avif"),
        ("a.tar.gz", 65, "is compressed: pack it"),
        ("{1..", 64, "{00000..00099}"),
        ("{0..999999999999}.tar", 64, "up to six digits"),
        ("{-1000000..0}.tar", 64, "up to six digits"),
        ("{" * 5000 + "}" * 5000, 64, "{00000..00099}"),
        ("{a,a}.tar", 64, "named twice"),
        ("ftp://host/a.tar", 64, "could be changed in transit"),
    ]:
        with pytest.raises(JobError) as error:
            indexed(bucket, word if "://" in word else f"{tmp_path}/{word}")
        assert (error.value.exit_code, part in str(error.value)) == (code, True), (word[:20], error.value)
        assert not any(path.is_file() for path in Path(bucket.uri).rglob("*"))


def test_pattern_costs_one_listing(tmp_path, gcs_bucket, monkeypatch):
    for number in range(4):
        open_store(gcs_bucket).create(f"a/{number:05d}.tar", bytes(number + 1))
    lists, kind = [], type(open_store(gcs_bucket))
    listed = kind.list
    monkeypatch.setattr(kind, "list", lambda self, *words: (lists.append(self.uri), listed(self, *words))[1])
    tars = find_tars([f"{gcs_bucket}/a/{{00001..00003}}.tar", f"{gcs_bucket}/a/00000.tar"])
    assert [(tar.uri, tar.bytes) for tar in tars] == [(f"{gcs_bucket}/a/0000{n}.tar", n + 1) for n in (1, 2, 3, 0)]
    assert lists == [f"{gcs_bucket}/a"]
    assert [tar.uri for tar in find_tars([gcs_bucket])] == [f"{gcs_bucket}/a/0000{n}.tar" for n in range(4)]
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    monkeypatch.chdir(tmp_path)
    for word in ("a.tar", ".", "./a.tar", f"file://{tmp_path}", f"{tmp_path}/", "./{a..a}.tar"):
        assert [tar.uri for tar in find_tars([word])] == [f"{tmp_path}/a.tar"]
