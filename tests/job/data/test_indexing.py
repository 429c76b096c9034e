"""Tars of other people, written by the real `webdataset`, become a dataset where they lie."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from job.data.cache import DecodedCache, open_cache
from job.data.indexing import index_tars
from job.data.order import Order
from job.data.pack import pack
from job.data.shard_cache import ShardCache
from job.data.shards import load_index
from job.data.stream import stream_batches
from job.data.verify import verify_dataset
from job.exits import BadDataError, BadRequestError, Exit, MissingInputError, StoppedError
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, environment, refused, settings, succeeded
from tests.job.some_images import encoded, folder_of, jpeg, picture, tar_of
from tests.job.stops import stop_after

KEY = "datasets/laion-16"

Samples = list[dict[str, object]]


def samples_of(count: int = 34, kind: str = "jpg", **more: object) -> Samples:
    """As img2dataset lays them out: an image, its caption and a record, under a number; no two of one size."""
    return [
        {
            "__key__": f"{n:09d}",
            kind: jpeg(n, 30 + n, 64 - n) if kind == "jpg" else encoded(picture(n, 30 + n, 64 - n), kind),
            "txt": f"picture {n}",
            "json": json.dumps({"number": n}).encode(),
            **{name: value(n) if callable(value) else value for name, value in more.items()},
        }
        for n in range(count)
    ]


def write_tars(folder: Path, samples: Samples, per_tar: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_tar, encoder=False, verbose=0) as writer:
        for sample in samples:
            writer.write({k: v.encode() if isinstance(v, str) and k[0] != "_" else v for k, v in sample.items()})
    return folder


def indexed(bucket: Store, *words: object, **options: object):
    return index_tars(bucket, list(map(str, words)), "laion", **{"size": 16, **options})  # type: ignore[arg-type]


def pixels(bucket: Store, key: str, cache_dir: Path, budget_bytes: int = 1 << 30) -> np.ndarray:
    cache = open_cache(bucket, key, load_index(bucket, key), cache_dir=cache_dir, budget_bytes=budget_bytes)
    try:
        return cache.read(np.arange(cache.index.images))
    finally:
        cache.close()


def uploaded(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("theirs") / "laion", samples_of())


@pytest.fixture(scope="module")
def compact_tars(tmp_path_factory) -> Path:
    """Tars that take less than their images do when these are decoded at 40 pixels."""
    samples = [{"__key__": f"{n:09d}", "jpg": jpeg(n, 44, 40)} for n in range(34)]
    return write_tars(tmp_path_factory.mktemp("theirs") / "compact", samples)


@pytest.fixture
def bucket(tmp_path) -> Store:
    return open_store(str(tmp_path / "bucket"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("jpg", {}),
        ("png", {"crop": "squash", "resize_filter": "box"}),
        ("webp", {"channels": 1, "crop": "center:24"}),
    ],
)
def test_the_images_are_those_that_packing_would_have_given(tmp_path, bucket, kind, options):
    samples = samples_of(24, kind)
    tars = write_tars(tmp_path / "tars", samples)
    files = folder_of(tmp_path / "images", [(f"{s['__key__']}.{kind}", s[kind]) for s in samples])  # type: ignore[misc]
    index = indexed(bucket, tars, **options)
    packed = pack(bucket, str(files), "packed", size=16, **options)
    assert (index.images, len(index.shards), index.channels) == (24, 3, packed.channels)
    want = pixels(bucket, "datasets/packed-16", tmp_path / "cache")
    np.testing.assert_array_equal(pixels(bucket, KEY, tmp_path / "cache"), want)
    np.testing.assert_array_equal(pixels(bucket, KEY, tmp_path / "other", budget_bytes=1), want)
    assert verify_dataset(bucket, KEY) == []


def test_nothing_is_copied_and_nothing_of_theirs_is_touched(tmp_path, bucket, tars):
    before = snapshot(tars)
    index = indexed(bucket, tars)
    names = set(snapshot(tmp_path / "bucket" / KEY))
    assert names == {"index.json", *(f"shard-0000{n}.offsets" for n in range(4))}
    assert [shard.uri for shard in index.shards] == [f"{tars}/0000{n}.tar" for n in range(4)]
    pixels(bucket, KEY, tmp_path / "cache")
    succeeded(ddpm_here("data", "delete", "laion", "--yes", "--bucket", bucket.uri))
    assert not (tmp_path / "bucket" / KEY).exists()
    assert snapshot(tars) == before


def test_the_same_tars_give_the_same_dataset_wherever_they_lie_and_however_they_are_named(tmp_path, tars):
    moved = shutil.copytree(tars, tmp_path / "a folder" / "moved")
    ids = {
        indexed(open_store(str(tmp_path / str(number))), *words, threads=1 + number % 3).dataset_id
        for number, words in enumerate(
            [
                [tars],
                [f"{tars}/{{00000..00003}}.tar"],
                [f"file://{tars}/{{00000,00001}}.tar", *(f"{tars}/0000{n}.tar" for n in (2, 3))],
                [moved.parent],
            ]
        )
    }
    assert len(ids) == 1
    other = indexed(open_store(str(tmp_path / "other")), tars, crop="squash").dataset_id
    assert other not in ids


def test_tars_in_any_bucket_are_read_where_they_lie(tmp_path, tars, bucket, bucket_uri):
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


def test_a_bucket_trains_from_tars_in_another_whatever_fits_the_local_disk(tmp_path, compact_tars, gcs_bucket):
    """With room for all images, and with room for three shards, which is what a block needs: the same weights."""
    theirs, ours = f"{gcs_bucket}/theirs", f"{gcs_bucket}/ours"
    uploaded(compact_tars, theirs)
    cache = {"DDPM_CACHE": str(tmp_path / "cache")}
    out = succeeded(ddpm_here("data", "index", theirs, "laion", "--size", 40, "--bucket", ours, **cache))
    assert "34 colour, 40×40 pixels, in 4 shards" in out
    assert f"from {theirs}/00000.tar and 3 more, crop center, lanczos filter, at each reading" in out
    weights = set()
    for run, cache_gigabytes in (("decoded", "32"), ("shards", "0.000125")):
        words = ["--dataset", "laion", "--run", run, "--bucket", ours, "--epochs", 2]
        changes = {"sample__images": "1", "sample__steps": "1", "data__shuffle_block_images": "8"}
        words += settings(train__batch_size="17", data__cache_gigabytes=cache_gigabytes, **changes)
        out = succeeded(ddpm_here("train", *words, **cache))
        assert f"Run '{run}' is finished: 2 epochs, 68 images seen." in out
        store = open_store(f"{ours}/runs/{run}")
        manifest = load_manifest(store, list_checkpoints(store)[-1])
        assert manifest.images_seen == 68
        weights.add(tuple(file.sha256 for file in manifest.files))
    assert len(weights) == 1
    assert len(list((tmp_path / "cache").rglob("shards/*.tar"))) in (2, 3)
    assert " 34 " in succeeded(ddpm_here("data", "list", "--bucket", ours))
    assert "contact sheet" in succeeded(ddpm_here("data", "show", "laion", "--bucket", ours, **cache))
    assert "as it was" in succeeded(ddpm_here("data", "verify", "laion", "--bucket", ours, **cache))


def test_batches_do_not_depend_on_the_cache(tmp_path, compact_tars, gcs_bucket):
    uploaded(compact_tars, f"{gcs_bucket}/laion")
    bucket = open_store(f"{gcs_bucket}/ours")
    index = index_tars(bucket, [f"{gcs_bucket}/laion"], "laion", size=40)
    order = Order(tuple(shard.images for shard in index.shards), seed=3, block_images=8)
    shown, kinds = [], []
    for budget_bytes in (index.decoded_bytes, 125_000):
        cache_dir = tmp_path / str(budget_bytes)
        cache = open_cache(bucket, "datasets/laion-40", index, cache_dir=cache_dir, budget_bytes=budget_bytes)
        batches = stream_batches(cache, order, batch_size_images=7, first_image=0, last_image=70)
        shown.append([batch.images.numpy().tobytes() for batch in batches])
        kinds.append(type(cache))
        cache.close()
    assert kinds == [DecodedCache, ShardCache]
    assert len(shown[0]) == 10
    assert shown[0] == shown[1]


def test_classes_are_the_numbers_in_cls_files(tmp_path, bucket):
    tars = write_tars(tmp_path / "tars", samples_of(12, cls=lambda n: str(n % 3)))
    index = indexed(bucket, tars)
    assert index.classes == ("0", "1", "2")
    cache = open_cache(bucket, KEY, index, cache_dir=tmp_path / "cache", budget_bytes=1 << 30)
    assert cache.labels(np.arange(12)).tolist() == [n % 3 for n in range(12)]
    mistyped = write_tars(tmp_path / "mistyped", samples_of(12, cls=lambda n: str(n + 7 * (n == 5))))
    with pytest.raises(BadDataError, match="says class 12, of 12 images"):
        indexed(open_store(str(tmp_path / "mistyped-bucket")), mistyped)
    without = indexed(open_store(str(tmp_path / "without")), tars, classes=False)
    assert without.classes == ()
    # The dataset that packing writes is read as well, its classes with it.
    images = folder_of(tmp_path / "images", [(f"{'ab'[n % 2]}/{n}.jpg", jpeg(n)) for n in range(10)])
    pack(bucket, str(images), "packed", size=16)
    again = index_tars(bucket, [f"{bucket.uri}/datasets/packed-16"], "again", size=16)
    assert (again.images, again.classes) == (10, ("0", "1"))
    np.testing.assert_array_equal(
        pixels(bucket, "datasets/again-16", tmp_path / "cache"),
        pixels(bucket, "datasets/packed-16", tmp_path / "cache"),
    )


def test_one_sample_is_one_image(tmp_path, bucket):
    """Masks, thumbnails and captions beside it, folders, litter and dots in names."""
    names = ["a/one.mask.png", "a/one.jpg", "a/one.txt", "b/two.large.JPG", "._two.jpg", "c/.hidden/x.jpg", "read.me"]
    tar = tar_of(tmp_path / "a.tar", [(name, jpeg(number)) for number, name in enumerate(names)])
    indexed(bucket, tar)
    got = pixels(bucket, KEY, tmp_path / "cache")
    pack(bucket, str(folder_of(tmp_path / "i", [("1.jpg", jpeg(1)), ("3.jpg", jpeg(3))])), "packed", size=16)
    np.testing.assert_array_equal(got, pixels(bucket, "datasets/packed-16", tmp_path / "cache"))


@pytest.mark.parametrize("stop_at", [3, 17, 30])
def test_a_stopped_indexing_goes_on_with_the_next_tar(tmp_path, tars, stop_at):
    straight = open_store(str(tmp_path / "straight"))
    indexed(straight, tars)
    bucket, read = open_store(str(tmp_path / "bucket")), []
    with pytest.raises(StoppedError):
        indexed(bucket, tars, stop=stop_after(stop_at))
    assert not bucket.exists(f"{KEY}/index.json")
    indexed(bucket, tars, progress=lambda done, total, images: read.append((done, images)))
    assert read[0][1] == stop_at // 10 * 10 + 1
    assert snapshot(tmp_path / "bucket") == snapshot(tmp_path / "straight")


KILLED = """
import os, signal, sys
from job.data.indexing import index_tars
from job.store import open_store
def die(done, total, images):
    if images == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
index_tars(open_store(sys.argv[1]), [sys.argv[2]], "laion", size=16, progress=die)
"""


def test_a_killed_indexing_goes_on(tmp_path, tars):
    bucket = tmp_path / "bucket"
    command = [sys.executable, "-c", KILLED, str(bucket), str(tars)]
    for images in ("15", "25"):
        assert subprocess.run([*command, images], env=environment(), check=False).returncode == -signal.SIGKILL
    indexed(open_store(str(bucket)), tars)
    straight = tmp_path / "straight"
    indexed(open_store(str(straight)), tars)
    assert snapshot(bucket) == snapshot(straight)


def test_other_tars_or_parameters_begin_anew(tmp_path, tars, bucket):
    with pytest.raises(StoppedError):
        indexed(bucket, tars, stop=stop_after(25))
    index = indexed(bucket, tars / "00002.tar", crop="squash")
    assert (index.images, index.crop, len(index.shards)) == (10, "squash", 1)
    assert verify_dataset(bucket, KEY) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


@pytest.mark.parametrize("change", [flipped, shortened, Path.unlink])
@pytest.mark.parametrize("mode", ["decoded", "shards"])
def test_a_tar_that_changes_later_is_named(tmp_path, tars, bucket, change, mode):
    theirs = shutil.copytree(tars, tmp_path / "theirs")
    index = indexed(bucket, theirs)
    change(theirs / "00002.tar")
    (problem,) = verify_dataset(bucket, KEY)
    assert problem.startswith(f"{theirs}/00002.tar ")
    budget_bytes = 1 << 30 if mode == "decoded" else index.decoded_bytes - 1
    error = MissingInputError if change is Path.unlink else BadDataError
    with pytest.raises(error, match=rf"{theirs}/00002\.tar") as raised:
        pixels(bucket, KEY, tmp_path / "cache", budget_bytes)
    assert raised.value.exit_code == (Exit.MISSING_INPUT if change is Path.unlink else Exit.BAD_DATA)
    if change is not Path.unlink:
        assert "than were indexed" in str(raised.value)


def test_a_tar_in_a_bucket_that_changes_later_ends_training_with_65(tmp_path, tars, gcs_bucket):
    theirs, cache = f"{gcs_bucket}/theirs", {"DDPM_CACHE": str(tmp_path / "cache")}
    uploaded(tars, theirs)
    succeeded(ddpm_here("data", "index", theirs, "laion", "--size", 16, "--bucket", gcs_bucket))
    content = bytearray((tars / "00001.tar").read_bytes())
    content[700] ^= 1
    open_store(theirs).put("00001.tar", bytes(content))
    words = ["--dataset", "laion", "--bucket", gcs_bucket, *settings()]
    line = refused(ddpm_here("train", *words, **cache), Exit.BAD_DATA)
    assert f"{theirs}/00001.tar holds other bytes than were indexed" in line


def test_a_dataset_that_is_there_is_not_written_over(bucket, tars):
    indexed(bucket, tars)
    with pytest.raises(BadRequestError, match="is there already: 34 images"):
        indexed(bucket, tars)


def test_an_index_that_names_a_pipe_does_not_hang(tmp_path, tars, bucket):
    theirs = shutil.copytree(tars, tmp_path / "theirs")
    index = indexed(bucket, theirs)
    (theirs / "00000.tar").unlink()
    os.mkfifo(theirs / "00000.tar")
    for budget_bytes in (1 << 30, index.decoded_bytes - 1):
        with pytest.raises(MissingInputError, match=r"00000\.tar"):
            pixels(bucket, KEY, tmp_path / "cache", budget_bytes)


def test_too_little_room_for_the_images_reads_shards(tmp_path, tars, bucket):
    index = indexed(bucket, tars)
    cache = open_cache(bucket, KEY, index, cache_dir=tmp_path, budget_bytes=index.decoded_bytes - 1)
    assert isinstance(cache, ShardCache)
    cache.close()
