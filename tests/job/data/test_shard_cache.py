import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from job.data.cache import ShardCache, open_cache
from job.data.order import Order
from job.exits import BadConfigError, BadDataError, BucketAwayError, MissingInputError
from tests.job.small_dataset import KEY, FarStore, SmallDataset, write_dataset

SHARD_IMAGES = (4,) * 6
IMAGES = sum(SHARD_IMAGES)


@pytest.fixture
def dataset(tmp_path) -> SmallDataset:
    return write_dataset(str(tmp_path / "bucket"), tmp_path, SHARD_IMAGES, size=64, grain=8)


@pytest.fixture
def far(dataset, tmp_path) -> FarStore:
    return FarStore(tmp_path / "bucket")


def budget(dataset: SmallDataset, shards: int) -> int:
    """Room for so many shards, which is less than all images take when decoded."""
    size = max(shard.bytes for shard in dataset.index.shards)
    return shards * size


def opened(bucket, dataset: SmallDataset, cache_dir: Path, shards: int) -> ShardCache:
    budget_bytes = budget(dataset, shards)
    assert budget_bytes < dataset.index.decoded_bytes
    cache = open_cache(bucket, KEY, dataset.index, cache_dir=cache_dir, budget_bytes=budget_bytes)
    assert isinstance(cache, ShardCache)
    return cache


def shards_in(cache_dir: Path) -> list[int]:
    return sorted(int(path.stem[-5:]) for path in cache_dir.rglob("shards/*.tar"))


def wait_for_shards(cache_dir: Path, shards: list[int]) -> None:
    deadline = time.monotonic() + 10
    while shards_in(cache_dir) != shards and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shards_in(cache_dir) == shards


def assert_equal(cache: ShardCache, dataset: SmallDataset, indices: np.ndarray | None = None) -> None:
    indices = np.arange(dataset.index.images) if indices is None else indices
    np.testing.assert_array_equal(cache.read(indices), dataset.pixels[indices])
    np.testing.assert_array_equal(cache.labels(indices), dataset.labels[indices])


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_images_come_back_in_any_order_from_any_bucket(bucket_uri, tmp_path):
    dataset = write_dataset(bucket_uri, tmp_path, SHARD_IMAGES, size=64, grain=8)
    cache = opened(dataset.bucket, dataset, tmp_path / "cache", 2)
    assert_equal(cache, dataset)
    assert_equal(cache, dataset, np.random.default_rng(0).integers(0, IMAGES, 200))
    out = np.zeros((3, 64, 64, 3), np.uint8)
    assert cache.read(np.array([7, 7, 23]), out=out) is out
    np.testing.assert_array_equal(out, dataset.pixels[[7, 7, 23]])
    assert cache.read(np.empty(0, np.int64)).shape == (0, 64, 64, 3)
    for wrong in (-1, IMAGES):
        with pytest.raises(IndexError):
            cache.read(np.array([wrong]))
    cache.close()


def test_a_folder_is_read_where_it_lies(dataset, far, tmp_path):
    far.uri = str(tmp_path / "bucket")
    cache = opened(far, dataset, tmp_path / "cache", 1)
    cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    assert_equal(cache, dataset)
    assert (far.downloads, shards_in(tmp_path / "cache")) == ([], [])
    (tmp_path / "bucket" / KEY / "shard-00002.tar").unlink()
    with pytest.raises(MissingInputError, match=r"shard-00002\.tar"):
        cache.read(np.array([9]))


def test_the_least_recently_read_shard_goes_first(dataset, far, tmp_path):
    cache = opened(far, dataset, tmp_path / "cache", 3)
    for image in (0, 4, 8, 1, 12):
        assert_equal(cache, dataset, np.array([image]))
        time.sleep(0.01)
    assert shards_in(tmp_path / "cache") == [0, 2, 3]
    assert len(far.downloads) == 4
    assert_equal(cache, dataset, np.array([0, 8, 12]))
    assert len(far.downloads) == 4


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_budget_is_kept_however_images_are_read(dataset, tmp_path, shards):
    folder, smallest = tmp_path / "cache", min(shard.bytes for shard in dataset.index.shards)
    seen: list[int] = []

    def measure(key: str) -> None:
        seen.append(sum(path.stat().st_size for path in folder.rglob("*.tar")))

    far = FarStore(tmp_path / "bucket", measure)
    ranks = [opened(far, dataset, folder, shards) for _ in range(3)]

    def read(rank: int) -> None:
        random = np.random.default_rng(rank)
        for _ in range(15):
            assert_equal(ranks[rank], dataset, random.integers(0, IMAGES, 5))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert len(seen) > 15
    assert max(seen) + smallest <= budget(dataset, shards)
    assert len(shards_in(folder)) == shards


def test_what_is_there_is_not_fetched_again(dataset, far, tmp_path):
    assert_equal(opened(far, dataset, tmp_path / "cache", 6), dataset)
    assert len(far.downloads) == 6
    assert_equal(opened(far, dataset, tmp_path / "cache", 6), dataset)
    assert len(far.downloads) == 6


def test_the_shards_of_the_coming_blocks_are_fetched_ahead(dataset, far, tmp_path):
    order = Order(SHARD_IMAGES, 3, block_images=4)
    cache = opened(far, dataset, tmp_path / "cache", 3)
    first_epoch = list(islice(order.upcoming_shards(0), 6))
    cache.prefetch(order, 0)
    wait_for_shards(tmp_path / "cache", sorted(first_epoch[:3]))
    for number in range(4):
        cache.prefetch(order, number)
        assert_equal(cache, dataset, order.indices(np.array([number])))
    assert len(far.downloads) == 3
    cache.prefetch(order, 4)
    # The block that is over makes room for the next but one; what is due is never evicted for it.
    wait_for_shards(tmp_path / "cache", sorted(first_epoch[1:4]))
    assert len(far.downloads) == 4
    cache.prefetch(order, 4 * IMAGES)
    fifth_epoch = list(islice(order.upcoming_shards(4 * IMAGES), 3))
    wait_for_shards(tmp_path / "cache", sorted(fifth_epoch))
    cache.close()


def test_closing_ends_the_prefetch(dataset, tmp_path):
    before = set(threading.enumerate())
    begun, go_on = threading.Event(), threading.Event()

    def hold(key: str) -> None:
        begun.set()
        go_on.wait(10)

    far = FarStore(tmp_path / "bucket", hold)
    cache = opened(far, dataset, tmp_path / "cache", 6)
    cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    assert begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    cache.close()
    assert len(far.downloads) <= 4
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("prefetch")]


def test_an_error_of_the_prefetch_is_met_by_who_needs_the_shard(dataset, tmp_path):
    away = True

    def refuse(key: str) -> None:
        if away:
            raise BucketAwayError("the bucket is away")

    far = FarStore(tmp_path / "bucket", refuse)
    cache = opened(far, dataset, tmp_path / "cache", 6)
    cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    with pytest.raises(BucketAwayError, match="the bucket is away"):
        cache.read(np.array([0]))
    away = False
    assert_equal(cache, dataset)
    cache.close()


def test_a_shard_that_rotted_in_the_cache_is_fetched_anew(dataset, far, tmp_path):
    cache = opened(far, dataset, tmp_path / "cache", 6)
    assert_equal(cache, dataset)
    (cached,) = (tmp_path / "cache").rglob("shards/shard-00001.tar")
    size_bytes = cached.stat().st_size
    # Another process checks it before it reads; this one, which has, notices that an image is broken.
    for reader in (opened(far, dataset, tmp_path / "cache", 6), cache):
        far.downloads.clear()
        cached.write_bytes(cached.read_bytes()[:600] + bytes(size_bytes - 600))
        assert_equal(reader, dataset)
        assert far.downloads == ["shard-00001.tar"]
    os.truncate(cached, 0)
    assert_equal(cache, dataset)
    assert cached.stat().st_size == size_bytes


def test_a_shard_that_rotted_in_the_bucket_is_named(dataset, far, tmp_path):
    flip_a_bit(tmp_path / "bucket" / KEY / "shard-00003.tar", 700)
    for bucket, uri in ((dataset.bucket, f"{tmp_path}/bucket"), (far, "far://bucket")):
        cache = opened(bucket, dataset, tmp_path / "cache", 3)
        assert_equal(cache, dataset, np.arange(12))
        with pytest.raises(BadDataError, match=rf"{uri}/{KEY}/shard-00003\.tar holds other bytes than were packed"):
            cache.read(np.array([12]))
    assert 3 not in shards_in(tmp_path / "cache")


def test_an_image_that_was_packed_broken_is_named(tmp_path):
    broken = write_dataset(
        str(tmp_path / "bucket"), tmp_path, SHARD_IMAGES, size=64, encode=lambda pixels: b"no image" * 100
    )
    for bucket in (broken.bucket, FarStore(tmp_path / "bucket")):
        cache = opened(bucket, broken, tmp_path / "cache", 1)
        with pytest.raises(BadDataError, match=r"shard-00001\.tar, image 2 \(at byte \d+\): .*pack the dataset anew"):
            cache.read(np.array([6]))


def test_blocks_that_the_budget_cannot_hold_are_refused_with_the_way_out(dataset, far, tmp_path):
    cache = opened(far, dataset, tmp_path / "cache", 4)
    with pytest.raises(BadConfigError, match=r"blocks of 24 images.*or begin a run with data\.shuffle_block_images=8$"):
        cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    cache.prefetch(Order(SHARD_IMAGES, 0, 8), 0)
    cache.close()
    small = opened(far, dataset, tmp_path / "cache", 1)
    with pytest.raises(BadConfigError, match=r"data\.cache_gigabytes=0\.1$"):
        small.prefetch(Order(SHARD_IMAGES, 0, 1), 0)
