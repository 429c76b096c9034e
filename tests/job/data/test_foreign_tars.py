"""Tars of other people, written by the real `webdataset`, become a dataset where they lie."""

import json
import os
import re
import shutil
from contextlib import closing
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


def samples_of(count: int = 34, kind: str = "jpg", cls=None) -> list[dict[str, object]]:
    """As img2dataset lays them out: an image, its caption and a record, under a number; no two of one size."""
    samples = []
    for n in range(count):
        image = jpeg(n, 30 + n, 64 - n) if kind == "jpg" else encoded(picture(n, 30 + n, 64 - n), kind)
        about = {"txt": f"picture {n}".encode(), "json": json.dumps({"number": n}).encode()}
        samples.append({"__key__": f"{n:09d}", kind: image, **about, **({"cls": b"%d" % cls(n)} if cls else {})})
    return samples


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
    with closing(open_cache(bucket, load_index(bucket, key), budget_bytes, cache_dir=cache_dir)) as cache:
        return cache.read(np.arange(cache.index.images))


def assert_as_packed(tmp_path: Path, bucket: Store, files: list[tuple[str, bytes]], key: str = KEY, **options) -> None:
    """Compares the images, decoded and read at each time, with those of a copy."""
    copied = pack(bucket, PackRequest(str(folder_of(tmp_path / "images", files)), "packed", 16, **options))
    index, want = load_index(bucket, key), pixels(bucket, "datasets/packed-16", tmp_path)
    assert (index.images, index.channels) == (len(files), copied.channels)
    for budget_bytes in (1 << 30, 1):
        np.testing.assert_array_equal(pixels(bucket, key, tmp_path / str(budget_bytes), budget_bytes), want)
    assert verify_dataset(bucket, key) == []


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("theirs") / "laion", samples_of())


@pytest.fixture
def bucket(tmp_path) -> Store:
    return open_store(str(tmp_path / "bucket"))


SQUASHED, GREY = {"crop": "squash", "resize_filter": "box"}, {"channels": 1, "crop": "center:24"}


@pytest.mark.parametrize(("kind", "options"), [("jpg", {}), ("png", SQUASHED), ("webp", GREY)])
def test_indexed_images_equal_packed_ones(tmp_path, bucket, kind, options):
    samples = samples_of(24, kind)
    assert len(indexed(bucket, write_tars(tmp_path / "tars", samples), **options).shards) == 3
    files = [(f"{sample['__key__']}.{kind}", sample[kind]) for sample in samples]
    assert_as_packed(tmp_path, bucket, files, **options)


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


def test_tars_are_read_in_place(tmp_path, tars, bucket, bucket_uri, monkeypatch):
    theirs, ours = f"{bucket_uri}/theirs/laion", f"{bucket_uri}/ours"
    for path in sorted(tars.iterdir()):
        open_store(theirs).upload(path, path.name)
    here, there = indexed(bucket, tars), open_store(ours)
    want = pixels(bucket, KEY, tmp_path / "cache")
    for number, word in enumerate((f"{theirs}/{{00000..00003}}.tar", f"{bucket_uri}/theirs")):
        index = indexed(there, word)
        assert index.dataset_id == here.dataset_id
        assert [shard.uri for shard in index.shards] == [f"{theirs}/0000{n}.tar" for n in range(4)]
        np.testing.assert_array_equal(pixels(there, KEY, tmp_path / f"cache-{number}"), want)
        assert verify_dataset(there, KEY) == []
        for entry in list(there.list()):
            there.delete(entry.key)
    at = ("laion", "--bucket", ours)
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "own"))
    out = succeeded(ddpm_here("data", "index", theirs, *at, "--size", 40))
    assert "34 colour, 40×40 pixels, in 4 shards" in out
    assert f"from {theirs}/00000.tar and 3 more, crop center, lanczos filter, at each reading" in out
    assert " 34 " in succeeded(ddpm_here("data", "list", *at[1:]))
    assert "preview.png" in succeeded(ddpm_here("data", "show", *at))
    assert "as it was" in succeeded(ddpm_here("data", "verify", *at))


def of_two(n: int) -> int:
    return n % 3 - 1


def beside(n: int) -> int:
    """A whole tar without labels beside one with them."""
    return -1 if n < 10 else n % 2


DROP = {"unlabelled": "drop"}


@pytest.mark.parametrize(
    ("label", "options", "expected"),
    [
        (lambda n: n % 3, {}, (12, 0, 2)),
        (lambda n: n + 7 * (n == 5), {}, "says class 12, of 12 images"),
        # What webdataset's users write for "not known" is no reason to forget the classes of all.
        (of_two, {}, r"4 of 10 images have no label, such as 00000.tar/000000000.jpg, .*drop"),
        (of_two, DROP, (8, 4, 2)),
        (beside, {}, r"10 of 12 images have no label, such as 00000.tar/000000000.jpg"),
        (beside, DROP, (2, 10, 1)),
        (of_two, {"classes": False}, (12, 0, 2)),
    ],
)
def test_cls_files_are_classes(tmp_path, bucket, monkeypatch, label, options, expected):
    tars = write_tars(tmp_path / "tars", samples_of(12, cls=label))
    if isinstance(expected, str):
        with pytest.raises(BadDataError, match=expected):
            indexed(bucket, tars, **options)
        return
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        # Before the index: the tables of the tars that are left out are not gone yet.
        patch.setattr("job.data.pack.preview_png", stopped)
        indexed(bucket, tars, **options)
    index = indexed(bucket, tars, **options)
    labels = [] if "classes" in options else [label(n) for n in range(12) if label(n) >= 0]
    assert (index.images, index.unlabelled_images, len(index.shards), index.rejected_images) == (*expected, 0)
    assert index.classes == tuple(map(str, range(max(labels) + 1 if labels else 0)))
    cache = open_cache(bucket, index, 1 << 30, cache_dir=tmp_path / "cache")
    assert cache.labels(np.arange(index.images)).tolist() == (labels or [-1] * 12)
    assert verify_dataset(bucket, KEY) == []


def stopped(*_: object) -> bytes:
    raise StoppedError("stopped by a test")


def test_labels_of_other_tars(tmp_path, bucket):
    lone = tar_of(tmp_path / "lone.tar", [("a.cls", b"1"), ("a.txt", b"a caption"), ("b.jpg", jpeg(1))])
    with pytest.raises(BadDataError, match=r"entry 'a.cls', which labels no image, such as a.png"):
        indexed(bucket, lone)
    # The dataset that packing writes is read as well, its classes with it.
    files = [(f"{'ab'[n % 2]}/{n}.jpg", jpeg(n)) for n in range(10)]
    pack(bucket, PackRequest(str(folder_of(tmp_path / "images", files)), "packed", 16))
    again = pack(bucket, PackRequest("", "again", 16, tars=(f"{bucket.uri}/datasets/packed-16",)))
    assert (again.images, again.classes) == (10, ("0", "1"))
    found, want = (pixels(bucket, f"datasets/{name}-16", tmp_path / "cache") for name in ("again", "packed"))
    np.testing.assert_array_equal(found, want)


def test_sample_is_one_image(tmp_path, bucket):
    """Masks, thumbnails and captions beside it, folders, litter and dots in names."""
    names = ["a/one.mask.png", "a/one.jpg", "a/one.txt", "b/two.large.JPG", "._two.jpg", "c/.hidden/x.jpg", "read.me"]
    indexed(bucket, tar_of(tmp_path / "a.tar", [(name, jpeg(number)) for number, name in enumerate(names)]))
    assert_as_packed(tmp_path, bucket, [("1.jpg", jpeg(1)), ("3.jpg", jpeg(3))])


@pytest.mark.parametrize(
    "names",
    ["IMG.1.png IMG.2.png", "a.left.png a.right.png", "a.jpg a.1.jpg", "a.1.jpg a.jpg", "a.jpg a.jpg", "a.jpg a.png"],
)
def test_ambiguous_samples_are_refused(tmp_path, bucket, names):
    files = [("0.jpg", jpeg(0)), *((name, jpeg(n)) for n, name in enumerate(names.split()))]
    tar = tar_of(tmp_path / "a.tar", files)
    with pytest.raises(BadDataError, match=r"a\.tar: '.*' and '.*' would be one sample") as error:
        indexed(bucket, tar)
    assert all(repr(name) in str(error.value) for name in names.split())
    assert pack(bucket, PackRequest(str(tar), "packed", 16)).images == 3


def emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("stop_at", "damage"), [(3, None), (17, None), *((30, d) for d in (None, Path.unlink, emptied, flip_a_bit))]
)
def test_stopped_indexing_resumes_at_the_tar(tmp_path, tars, bucket, stop_at, damage):
    """A table that is damaged before the commit is made again."""
    straight, decoded = open_store(str(tmp_path / "straight")), count()
    indexed(straight, tars)
    with pytest.raises(StoppedError):
        indexed(bucket, tars, stop_at=stop_at)
    # What was begun with other tars or parameters stands in nobody's way who deletes it.
    if stop_at == 17:
        with pytest.raises(BadRequestError, match=f"`ddpm data delete small --size 16 --bucket {bucket.uri}`"):
            indexed(bucket, tars, crop="squash")
    missing = 34 - 10 * len(list(bucket.list(f"{KEY}/pieces")))
    assert missing <= 34 - 10 * ((stop_at - 1) // 10)
    if damage:
        damage(tmp_path / "bucket" / KEY / "shard-00001.offsets")
        with pytest.raises(BadDataError, match=r"shard-00001\.offsets is .*: the same command makes it again"):
            indexed(bucket, tars)
        missing = 10
    assert not bucket.exists(f"{KEY}/index.json")
    indexed(bucket, tars, decoded=decoded)
    assert next(decoded) == missing
    assert files_in(Path(bucket.uri)) == files_in(Path(straight.uri))


def became_a_pipe(tar: Path) -> None:
    """An index is written by anybody: one that names a pipe must not hang a reader."""
    tar.unlink()
    os.mkfifo(tar)


def image_changed(tar: Path) -> None:
    flip_a_bit(tar, tar.read_bytes().index(b"\xff\xd8\xff") + 200)


@pytest.mark.parametrize(("change", "code"), [(image_changed, 65), (Path.unlink, 66), (became_a_pipe, 66)])
def test_tar_changed_later_is_named(tmp_path, tars, bucket, change, code):
    tar = shutil.copytree(tars, tmp_path / "theirs") / "00002.tar"
    index = indexed(bucket, tar.parent)
    change(tar)
    (problem,) = verify_dataset(bucket, KEY)
    assert problem.startswith((f"{tar} ", f"{tar}, image 0 "))
    for budget_bytes in (1 << 30, index.decoded_bytes - 1):
        with pytest.raises(JobError, match=str(tar)) as raised:
            pixels(bucket, KEY, tmp_path / "cache", budget_bytes)
        is_bad = "or index the dataset again" in str(raised.value)
        assert (raised.value.exit_code, is_bad) == (code, code == Exit.BAD_DATA)


def test_bad_images_in_tars_are_named(tmp_path, bucket):
    samples = samples_of(30)
    for number, content in ((3, b"no image"), (11, jpeg(11)[:-300]), (12, encoded(picture(1, 4, 4))), (29, BOMB)):
        samples[number]["jpg"] = content
    # A tar without one good image is no shard.
    bad = write_tars(tmp_path / "bad", [{**sample, "jpg": b"no image"} for sample in samples_of(5)]) / "00000.tar"
    first, *others = sorted(write_tars(tmp_path / "tars", samples).iterdir())
    index = indexed(bucket, first, bad, *others)
    assert (index.images, index.rejected_images, len(index.shards)) == (26, 9, 3)
    lines = [json.loads(line) for line in bucket.read(f"{KEY}/rejects.jsonl").data.splitlines()]
    numbers = [(0, 3), *((0, n) for n in range(5)), (1, 11), (1, 12), (2, 29)]
    assert [line["name"] for line in lines] == [f"0000{tar}.tar/{n:09d}.jpg" for tar, n in numbers]
    assert [line["reason"].split()[0] for line in lines[-3:]] == ["cannot", "has", "has"]
    assert "10000×10000 pixels, more than the limit" in lines[-1]["reason"]
    assert (len(pixels(bucket, KEY, tmp_path / "cache")), verify_dataset(bucket, KEY)) == (26, [])
    with pytest.raises(BadDataError, match="none of its images can be used"):
        indexed(open_store(str(tmp_path / "none")), bad)


def test_words_without_tars_are_refused(tmp_path, bucket):
    folder_of(tmp_path, [("texts/read.me", b"hello")])
    (tmp_path / "empty").mkdir()
    tar_of(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    tar_of(tmp_path / "a.tar.gz", [("1.jpg", jpeg(1))])
    tar_of(tmp_path / "no-images.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    for word, code, part in (
        ("nowhere.tar", 66, "no object at"),
        ("{nowhere,a}.tar", 66, "nothing at"),
        ("nowhere", 66, "is not a folder"),
        *((folder, 66, "holds no .tar") for folder in ("texts", "empty")),
        ("no-images.tar", 65, "holds no images: none of its names ends in .avif"),
        ("a.tar.gz", 65, "is compressed: pack it"),
        ("{1..", 64, "{00000..00099}"),
        ("{0..999999999999}.tar", 64, "up to six digits"),
        ("{-1000000..0}.tar", 64, "up to six digits"),
        ("{" * 5000 + "}" * 5000, 64, "{00000..00099}"),
        ("{a,a}.tar", 64, "named twice"),
        ("ftp://host/a.tar", 64, "could be changed in transit"),
    ):
        with pytest.raises(JobError, match=re.escape(part)) as error:
            indexed(bucket, word if "://" in word else f"{tmp_path}/{word}")
        assert (error.value.exit_code, files_in(Path(bucket.uri))) == (code, {}), word


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
