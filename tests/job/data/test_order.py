from itertools import islice
from math import factorial, sqrt

import numpy as np
import pytest

from job.config import RunConfig
from job.data.reading.stream import Order

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
    for images in (1, 2, 3, 4, 5, 63, 64, 65, 1000, 65_537, 300_007):
        assert (np.sort(epochs_of(images, 2)) == np.arange(images)).all(), images


def test_position_alone_decides():
    order = Order(SHARDS, 5, 90)
    numbers = np.arange(3 * IMAGES)
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


def test_seeds_and_epochs_give_unrelated_orders():
    # Keys that are mixed too late make epoch e of seed s the same as epoch s of seed e.
    orders = [epochs_of(512, 8, seed)[epoch] for seed in range(8) for epoch in range(8)]
    same_places = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    # Two random permutations agree in Poisson(1) places.
    assert len(same_places) == 2016
    assert abs(np.mean(same_places) - 1) < 4 / sqrt(2016)
    assert max(same_places) < 10
    assert (Order((512,), 2**63).indices(np.arange(512)) != Order((512,), 0).indices(np.arange(512))).mean() > 0.9


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


def test_large_blocks_show_no_pattern():
    first, second = epochs_of(100_000, 2)
    for other in (np.arange(100_000), second, np.roll(first, 1), np.roll(first, 256)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / sqrt(100_000)


def test_block_has_few_permuted_shards():
    order = Order((10,) * 50, 3, 20)
    shards = order.indices(np.arange(3 * 500)).reshape(3, 25, 20) // 10
    for epoch in shards:
        assert all(len(set(block)) == 2 for block in epoch)
    assert len({tuple(sorted(set(block.tolist()))) for block in shards.reshape(-1, 20)}) > 60


def test_upcoming_shards_come_soonest_first():
    for block_images in (IMAGES, 30, 101):
        order = Order(SHARDS, 8, block_images)
        for number in (0, 1, 150, 399, 400, 401, 1234):
            epoch, block = order.block_of(number)
            upcoming = list(islice(order.upcoming_shards(number), 2 * len(SHARDS)))
            read: set[int] = set()
            for start in range(block * block_images, IMAGES, block_images):
                places = np.arange(start, min(start + block_images, IMAGES))
                images = order.indices(epoch * IMAGES + places)
                read |= set(np.searchsorted(np.cumsum(SHARDS), images, side="right").tolist())
                assert set(upcoming[: len(read)]) == read
            next_epoch = order.upcoming_shards((epoch + 1) * IMAGES)
            assert upcoming[len(read) :] == list(islice(next_epoch, len(upcoming) - len(read)))


def test_numbers_of_an_image_are_the_inverse():
    for block_images in (0, 1, 7, 64, IMAGES - 1):
        order = Order(SHARDS, 5, block_images)
        indices = order.indices(np.arange(3 * IMAGES)).tolist()
        for image in range(IMAGES):
            numbers = order.numbers_of(image, 3).tolist()
            assert [indices[number] for number in numbers] == [image] * 3
            assert [number // IMAGES for number in numbers] == [0, 1, 2]
    assert Order((10**9, 10**9), 2**63 - 1).numbers_of(1453315465, 501)[500] == 10**12
