"""The order in which a run sees the images of its dataset, its epochs, and the stream of its batches."""

import threading
import time
from contextlib import closing
from itertools import islice
from math import factorial, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from job.config import RunConfig
from job.data.reading import order as ordering
from job.data.reading.cache import DecodedCache, ShardCache, open_cache
from job.data.reading.order import PREFETCH_BATCHES, Order, epochs_completed_by, images_at_epoch, stream_batches
from job.exits import BadDataError
from tests.job.launching import eventually
from tests.job.small_dataset import FarStore, write_dataset

SHARDS = (100, 37, 1, 250, 12)
IMAGES = sum(SHARDS)


def epochs_of(images: int, epochs: int, seed: int = 0) -> np.ndarray:
    """Orders of a one-shard dataset, int64 [epochs, images]."""
    return Order((images,), seed).indices(np.arange(epochs * images)).reshape(epochs, images)


def deviations(observed: np.ndarray, expected: float, degrees: int, scale: float = 1.0) -> float:
    """How many standard deviations chi-square is above its mean."""
    chi_square = float(((observed - expected) ** 2 / expected).sum()) * scale
    return (chi_square - degrees) / sqrt(2 * degrees)


def table(places: np.ndarray) -> np.ndarray:
    """How often column i held value j, [n, n]."""
    n = places.shape[1]
    return np.stack([np.bincount(column, minlength=n) for column in places.T])


def test_every_epoch_has_every_image_once():
    for block_images in (0, 1, 2, 7, 64, 399, IMAGES - 1, IMAGES, IMAGES + 1):
        order = Order(SHARDS, 5, block_images)
        epochs = order.indices(np.arange(4 * IMAGES)).reshape(4, IMAGES)
        assert (np.sort(epochs) == np.arange(IMAGES)).all(), block_images
        assert len({epoch.tobytes() for epoch in epochs}) == 4
        # The numbers of an image are the inverse.
        for image in range(0, IMAGES, 3):
            numbers = order.numbers_of(image, 3).tolist()
            assert epochs.ravel()[numbers].tolist() == [image] * 3
            assert [number // IMAGES for number in numbers] == [0, 1, 2]
    for images in (1, 2, 3, 4, 5, 63, 64, 65, 1000, 65_537, 300_007):
        assert (np.sort(epochs_of(images, 2)) == np.arange(images)).all(), images


@pytest.mark.slow
def test_order_is_statistically_random():
    for images in (2, 3, 5, 7, 9, 16, 33, 63, 64, 100):
        orders = epochs_of(images, max(4000, 40 * images))
        epochs, degrees, scale = len(orders), (images - 1) ** 2, (images - 1) / images
        moved = np.take_along_axis(np.argsort(orders, axis=1)[1:], orders[:-1], axis=1)
        assert abs(deviations(table(orders), epochs / images, degrees, scale)) < 4, images
        assert abs(deviations(table(moved), (epochs - 1) / images, degrees, scale)) < 4, images
        # Distance between neighbours, which a network with too few rounds would keep.
        steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % images).ravel(), minlength=images)[1:]
        assert abs(steps / steps.mean() - 1).max() < 6 / sqrt(steps.mean()), images
    # Every permutation of a few is equally likely.
    for images in (3, 4, 5):
        numbers = epochs_of(images, 200 * factorial(images)) @ images ** np.arange(images)
        _, counts = np.unique(numbers, return_counts=True)
        assert len(counts) == factorial(images)
        assert abs(deviations(counts, 200, factorial(images) - 1)) < 4


def test_position_alone_decides():
    order, numbers = Order(SHARDS, 5, 90), np.arange(3 * IMAGES)
    expected = order.indices(numbers)
    assert [int(order.indices(np.array([n]))[0]) for n in range(0, 3 * IMAGES, 41)] == expected[::41].tolist()
    mixed = np.random.default_rng(0).permutation(numbers)
    assert (Order(SHARDS, 5, 90).indices(mixed) == expected[mixed]).all()
    assert order.indices(np.empty(0, np.int64)).shape == (0,)


def test_stored_version_names_this_order():
    assert RunConfig().data.order == "feistel-1"
    far = 10**12
    few, many = Order((10, 20, 30), 1234, 25), Order((10**9, 10**9), 2**63 - 1)
    assert few.indices(np.arange(8)).tolist() == [47, 54, 53, 51, 41, 42, 32, 37]
    assert many.indices(np.arange(far, far + 4)).tolist() == [1453315465, 1513096590, 1764632745, 1539939160]
    assert many.numbers_of(1453315465, 501)[500] == far


def test_orders_are_unrelated():
    # Keys that are mixed too late make epoch e of seed s the same as epoch s of seed e.
    orders = [epochs_of(512, 8, seed)[epoch] for seed in range(8) for epoch in range(8)]
    same_places = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    # Two random permutations agree in Poisson(1) places.
    assert len(same_places) == 2016
    assert abs(np.mean(same_places) - 1) < 4 / sqrt(2016)
    assert max(same_places) < 10
    assert (epochs_of(512, 1, 2**63) != epochs_of(512, 1)).mean() > 0.9
    first, second = epochs_of(100_000, 2)
    for other in (np.arange(100_000), second, np.roll(first, 1), np.roll(first, 256)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / sqrt(100_000)


def test_block_has_few_permuted_shards():
    order = Order((10,) * 50, 3, 20)
    shards = order.indices(np.arange(3 * 500)).reshape(3, 25, 20) // 10
    assert all(len(set(block)) == 2 for epoch in shards for block in epoch)
    assert len({tuple(sorted(set(block.tolist()))) for block in shards.reshape(-1, 20)}) > 60


def test_upcoming_shards_come_soonest_first():
    for block_images in (IMAGES, 30, 101):
        order = Order(SHARDS, 8, block_images)
        for number in (0, 1, 150, 399, 400, 401, 1234):
            epoch, block = order.block_of(number)
            upcoming = list(islice(order.upcoming_shards(number), 2 * len(SHARDS)))
            read: set[int] = set()
            for start in range(block * block_images, IMAGES, block_images):
                images = order.indices(epoch * IMAGES + np.arange(start, min(start + block_images, IMAGES)))
                read |= set(np.searchsorted(np.cumsum(SHARDS), images, side="right").tolist())
                assert set(upcoming[: len(read)]) == read
            next_epoch = order.upcoming_shards((epoch + 1) * IMAGES)
            assert upcoming[len(read) :] == list(islice(next_epoch, len(upcoming) - len(read)))


def test_epochs_end_at_batch_boundaries():
    ends = [images_at_epoch(*case) for case in ((1, 299, 8), (2, 299, 8), (8, 299, 8), (3, 5, 16))]
    assert ends == [304, 600, 8 * 299, 16]
    for dataset_images, batch in [(299, 8), (5, 16), (16, 4), (7, 7), (10, 3)]:
        assert not epochs_completed_by(0, dataset_images, batch)
        numbers = range(batch, 40 * dataset_images, batch)
        completed = [epoch for images in numbers for epoch in epochs_completed_by(images, dataset_images, batch)]
        assert completed == list(range(1, len(completed) + 1))
        for epoch in completed:
            boundary = images_at_epoch(epoch, dataset_images, batch)
            assert epoch in epochs_completed_by(boundary, dataset_images, batch)
    assert [images for images in range(8, 401, 8) if ordering.crosses(images, 8, 100)] == [104, 200, 304, 400]


FEW, BATCH = (9, 2, 11, 7, 6), 8
FEW_IMAGES, FEW_ORDER = sum(FEW), Order(FEW, seed=4, block_images=10)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    return write_dataset(str(root / "bucket"), root, FEW, size=64, grain=8)


@pytest.fixture(params=[DecodedCache, ShardCache])
def cache(request, dataset, tmp_path):
    far, shard_bytes = FarStore(Path(dataset.bucket.uri)), sum(shard.bytes for shard in dataset.index.shards)
    budget_bytes = dataset.index.decoded_bytes if request.param is DecodedCache else shard_bytes * 19 // 20
    with closing(open_cache(far, dataset.index, budget_bytes, cache_dir=tmp_path)) as cache:
        assert type(cache) is request.param
        yield cache


def stream(cache, first: int, last: int | None, places: range = range(BATCH)):
    numbers = {"batch_size_images": BATCH, "first_image": first, "last_image": last}
    return stream_batches(cache, FEW_ORDER, **numbers, places=places)


def test_any_number_of_processes_agrees(cache, dataset):
    for world_size in (1, 3, 11):
        for first in (0, 5, 2 * FEW_IMAGES):
            ranks = [
                list(stream(cache, first, 3 * FEW_IMAGES, range(rank, BATCH, world_size))) for rank in range(world_size)
            ]
            assert len(ranks[0]) == -(-(3 * FEW_IMAGES - first) // BATCH)
            for number, together in enumerate(zip(*ranks, strict=True)):
                numbers = np.concatenate([batch.image_numbers for batch in together])
                assert sorted(numbers) == list(range(first + number * BATCH, first + (number + 1) * BATCH))
                assert max(len(batch.images) for batch in together) <= -(-BATCH // world_size)
                indices = FEW_ORDER.indices(numbers)
                images = np.concatenate([batch.images.numpy() for batch in together])
                np.testing.assert_array_equal(images, dataset.pixels[indices].transpose(0, 3, 1, 2))
                labels = np.concatenate([batch.labels.numpy() for batch in together])
                np.testing.assert_array_equal(labels, dataset.labels[indices])


def test_stream_ends_at_a_batch_boundary(cache):
    ends = [(0, 16, [0, 8]), (0, 17, [0, 8, 16]), (3, 12, [3, 11]), (16, 16, []), (24, 16, []), (0, 1, [0])]
    for first, last, boundaries in ends:
        batches = list(stream(cache, first, last))
        assert [(batch.image_numbers[0], len(batch.images)) for batch in batches] == [(at, BATCH) for at in boundaries]
    with closing(stream(cache, 3, None)) as endless:
        # More than are dealt out at a time; a cache of shards fetches each of them again.
        batches = 1500 if isinstance(cache, DecodedCache) else 20
        numbers = np.concatenate([batch.image_numbers for batch in islice(endless, batches)])
    assert (numbers == 3 + np.arange(batches * BATCH)).all()


def test_batches_are_channels_last(cache, tmp_path):
    (batch,) = stream(cache, 0, BATCH)
    assert (batch.images.shape, batch.images.dtype) == ((BATCH, 3, 64, 64), torch.uint8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.labels.dtype, batch.image_numbers.dtype) == (torch.int64, np.int64)
    plain = write_dataset(str(tmp_path / "bucket"), tmp_path, (4, 4), classes=(), channels=1)
    grey = open_cache(plain.bucket, plain.index, 10**9, cache_dir=tmp_path)
    (batch,) = stream_batches(grey, Order((4, 4), 0), batch_size_images=8, first_image=0, last_image=8)
    assert (batch.labels, batch.images.shape) == (None, (8, 1, 8, 8))


class Reader:
    """A cache that counts the batches it reads, and calls `before` with the number of each."""

    def __init__(self, cache, before=lambda number: None) -> None:
        self.cache, self.index, self.before, self.batches = cache, cache.index, before, 0
        self.labels, self.prefetch = cache.labels, cache.prefetch

    def read(self, indices, out):
        self.before(self.batches)
        self.batches += 1
        return self.cache.read(indices, out)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def wait_for_the_end() -> None:
    eventually(lambda: not threads(), 10)


def test_stream_reads_a_few_batches_ahead(cache):
    reader = Reader(cache)
    batches = stream(reader, 0, None)
    assert threads() == []
    next(batches)
    # One was taken, the others are ready.
    eventually(lambda: reader.batches == 1 + PREFETCH_BATCHES, 10)
    time.sleep(0.1)
    assert reader.batches == 1 + PREFETCH_BATCHES
    batches.close()
    wait_for_the_end()
    assert len(list(stream(cache, 0, 100))) == 13
    wait_for_the_end()


def test_close_does_not_wait_for_batches(cache):
    is_silent, comes = threading.Event(), threading.Event()
    batches = stream(Reader(cache, lambda number: number == 2 and (is_silent.set(), comes.wait(60))), 0, None)
    next(batches)
    assert is_silent.wait(10)
    batches.close()
    assert not comes.is_set() and threads()
    comes.set()
    wait_for_the_end()


def test_errors_come_in_their_place(cache):
    def fail(number: int) -> None:
        if number == 6:
            raise BadDataError("shard-00001.tar is rotten")

    batches, taken = stream(Reader(cache, fail), 0, None), []
    with pytest.raises(BadDataError, match=r"shard-00001\.tar is rotten"):
        taken.extend(batch.image_numbers[0] for batch in batches)
    wait_for_the_end()
    assert taken == list(range(0, 6 * BATCH, BATCH))
