"""What a run reads of a dataset: the order of its images, the stream of its batches, and the cache of a node.

A node keeps all images decoded, or the encoded shards that are due.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from math import factorial, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from job.config import RunConfig
from job.data.reading import order as ordering
from job.data.reading.cache import DecodedCache, ImageCache, ShardCache, open_cache
from job.data.reading.order import PREFETCH_BATCHES, Order, epochs_completed_by, images_at_epoch, stream_batches
from job.data.shards import OFFSETS_DTYPE
from job.exits import BadConfigError, BadDataError, BucketAwayError, DiskFullError, Exit, StoppedError
from job.progress import Progress
from job.stop import NEVER, Stop
from job.store.files import default_cache_dir
from job.store.local import LocalStore
from tests.conftest import only_linux
from tests.job import small_dataset
from tests.job.command_line import environment
from tests.job.damages import flip_a_bit
from tests.job.launching import eventually
from tests.job.small_dataset import KEY, FarStore, SmallDataset, write_dataset

SHARD_IMAGES = (4,) * 6
SHARDS = [f"shard-{number:05d}.tar" for number in range(6)]
IMAGES = sum(SHARD_IMAGES)
IMAGE_BYTES = 64 * 64 * 3


class Node:
    """A dataset in a bucket that seems far away, and a cache of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, SHARD_IMAGES, size=64, grain=8)
        self.bucket, self.cache_dir = tmp_path / "bucket", tmp_path / "cache"
        self.far = FarStore(self.bucket)
        self.folder = self.cache_dir / self.dataset.index.dataset_id

    def opened(self, shards: int = 0, bucket=None, stop: Stop = NEVER) -> ImageCache:
        return opened(bucket or self.far, self.dataset, self.cache_dir, shards, stop)

    def assert_read(self, indices: list[int] | None = None, shards: int = 0) -> None:
        assert_equal(self.opened(shards), self.dataset, indices)

    @property
    def shards(self) -> list[int]:
        return sorted(int(path.stem[-5:]) for path in self.folder.rglob("shards/*.tar"))


@pytest.fixture
def node(tmp_path) -> Node:
    return Node(tmp_path)


def opened(bucket, dataset: SmallDataset, cache_dir: Path, shards: int = 0, stop: Stop = NEVER) -> ImageCache:
    """All images decoded, or room for so many shards, which take less."""
    budget_bytes = shards * max(shard.bytes for shard in dataset.index.shards) or dataset.index.decoded_bytes
    cache = open_cache(bucket, dataset.index, budget_bytes, stop, cache_dir=cache_dir)
    assert type(cache) is (ShardCache if shards else DecodedCache)
    return cache


def assert_equal(cache: ImageCache, dataset: SmallDataset, indices: object = None) -> None:
    indices = np.arange(dataset.index.images) if indices is None else np.asarray(indices)
    np.testing.assert_array_equal(cache.read(indices), dataset.pixels[indices])
    np.testing.assert_array_equal(cache.labels(indices), dataset.labels[indices])


def test_cache_reads_any_order_and_bucket(bucket_uri, tmp_path, monkeypatch):
    """Local shards are not copied."""
    dataset = write_dataset(bucket_uri, tmp_path, SHARD_IMAGES, size=64, grain=8)
    monkeypatch.setattr(LocalStore, "download", lambda *_: pytest.fail("copied"))
    for shards in (0, 2):
        cache = opened(dataset.bucket, dataset, tmp_path / "cache", shards)
        if bucket_uri.startswith("/"):
            cache.prefetch(Order(SHARD_IMAGES, 0), 0)
        assert_equal(cache, dataset, np.random.default_rng(0).integers(0, IMAGES, 200))
        out = np.zeros((3, 64, 64, 3), np.uint8)
        assert np.shares_memory(cache.read(np.array([7, 7, 23]), out=out), out)
        np.testing.assert_array_equal(out, dataset.pixels[[7, 7, 23]])
        assert cache.read(np.empty(0, np.int64)).shape == (0, 64, 64, 3)
        cache.close()
    assert bool(list((tmp_path / "cache").rglob("shards/*.tar"))) == ("://" in bucket_uri)


def test_decoded_images_are_kept_and_repaired(node, monkeypatch, caplog):
    progress: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, done: progress.append(done))
    node.assert_read()
    assert (sorted(node.far.downloads), progress) == (SHARDS, [*range(0, IMAGES + 1, 4)])
    # The file is allocated, and no shard stays.
    images, checksums, order = node.folder / "images", node.folder / "checksums", [5, 8, 8, 23]
    assert images.stat().st_blocks * 512 >= images.stat().st_size == node.dataset.index.decoded_bytes
    assert not list(node.folder.rglob("*.tar"))
    gone = node.bucket.rename(node.bucket.with_name("gone"))
    progress.clear()
    node.assert_read()
    assert (len(node.far.downloads), progress) == (6, [])
    gone.rename(node.bucket)

    def leave_downloads() -> None:
        checksums.unlink()
        (node.folder / "incoming" / SHARDS[0]).write_bytes(b"half of it")
        (node.folder / "incoming" / ".tmp-0123").write_bytes(b"less than half of it")

    for damage, fetched_again in (
        (lambda: flip_a_bit(images, IMAGE_BYTES * 8), SHARDS[2:3]),
        (lambda: os.truncate(images, IMAGE_BYTES * 17), SHARDS[4:]),
        (lambda: os.truncate(checksums, 8 * SHARD_IMAGES[0] + 4), SHARDS[1:]),
        (leave_downloads, SHARDS),
    ):
        damage()
        node.far.downloads.clear()
        for _ in range(2):
            node.assert_read()
            assert sorted(node.far.downloads) == fetched_again
    # Overwritten while they are read.
    cache = node.opened()
    assert_equal(cache, node.dataset, order)
    flip_a_bit(images, IMAGE_BYTES * 8)
    for _ in range(2):
        assert_equal(cache, node.dataset, order)
    cache.close()
    assert [str(images) in record.message for record in caplog.records] == [True]
    node.assert_read()


# torch_fidelity installs a package `tests` of its own, which a process that pytest does not start would import.
READ_ALL = f"""
import json, os, re, runpy, signal, sys
from pathlib import Path
import numpy as np
from job.data.reading.cache import open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from job.progress import Progress
root, key, cache_dir, budget_bytes, killed_after = Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:])
def note(key):
    with (root / "downloads").open("a") as file:
        file.write(key + "\\n")
def die(bar, done):
    if done >= killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
store = runpy.run_path({small_dataset.__file__!r})["FarStore"](root / "bucket", note)
index = load_index(store, key)
Progress.update = die
cache = open_cache(store, index, budget_bytes, cache_dir=Path(cache_dir))
order = Order(tuple(index.shards.images.tolist()), seed=5, block_images=60)
anonymous = 0
for batch in stream_batches(cache, order, batch_size_images=20, first_image=0, last_image=2 * index.images):
    anonymous = max(anonymous, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
if index.images == 80:
    np.save(root / f"{{os.getpid()}}.npy", cache.read(np.arange(index.images)))
cache.close()
print(json.dumps({{"type": type(cache).__name__, "anonymous": anonymous}}))
"""


def reading(root: Path, dataset: SmallDataset, budget_bytes: int, killed_after: int = 10**9) -> subprocess.Popen[str]:
    words = root, dataset.key, root / "cache", budget_bytes, killed_after
    command = [sys.executable, "-c", READ_ALL, *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_the_decoding(tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (4,) * 20)
    assert reading(tmp_path, dataset, 10**9, 24).wait(100) == -signal.SIGKILL
    both = [reading(tmp_path, dataset, 10**9) for _ in range(2)]
    assert [process.wait(100) for process in both] == [0, 0]
    for process in both:
        np.testing.assert_array_equal(np.load(tmp_path / f"{process.pid}.npy"), dataset.pixels)
    downloads = (tmp_path / "downloads").read_text().splitlines()
    assert len(set(downloads)) == 20
    # The killed process had at most four under way; nobody fetches what another has decoded.
    assert len(downloads) <= 20 + 4


@pytest.mark.slow
@only_linux
def test_memory_does_not_grow_with_dataset(tmp_path):
    """The larger dataset has ten times the budget."""
    roots = [tmp_path / name for name in ("small", "large")]
    for root in roots:
        root.mkdir()
    small, large = (
        write_dataset(str(root / "bucket"), root, (60,) * shards, size=64, grain=4)
        for root, shards in zip(roots, (6, 40), strict=True)
    )
    budget_bytes = 4 * max(shard.bytes for shard in large.index.shards)
    assert sum(shard.bytes for shard in large.index.shards) > 9 * budget_bytes
    assert budget_bytes < small.index.decoded_bytes
    both = [reading(root, dataset, budget_bytes) for root, dataset in zip(roots, (small, large), strict=True)]
    few, many = (json.loads(process.communicate(timeout=200)[0]) for process in both)
    assert few["type"] == many["type"] == "ShardCache"
    # Each shard comes once per epoch, but for those whose block goes on in the next, and what the end fetched ahead.
    assert len((roots[1] / "downloads").read_text().splitlines()) <= 2 * 40 + 2 * 4
    # Its images take 29 MB when they are decoded, 25 MB more than those of the small one.
    assert many["anonymous"] - few["anonymous"] < 8e6


def test_full_disk_is_found_before_decoding(small_disk, tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (100, 100), size=64)
    with pytest.raises(DiskFullError, match=r"images \(2,457,600 bytes; DDPM_CACHE moves it.*No space left") as caught:
        opened(dataset.bucket, dataset, small_disk)
    assert caught.value.exit_code == Exit.DISK_FULL
    assert not (small_disk / dataset.index.dataset_id / "images").exists()
    small = write_dataset(str(tmp_path / "other"), tmp_path)
    assert_equal(opened(small.bucket, small, small_disk), small)


def test_stop_keeps_decoded_images(node, monkeypatch):
    done: list[int] = []
    stop, asked = Stop(), Stop()

    def update(bar: Progress, images: int) -> None:
        done.append(images)
        if images == 8:
            stop.request("a test")

    monkeypatch.setattr(Progress, "update", update)
    with pytest.raises(StoppedError, match=r"the images read so far are kept; the same command goes on"):
        node.opened(stop=stop)
    assert done == [0, 4, 8]
    # While another process works, too.
    with (node.folder / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, asked.request, ["a test"]).start()
        with pytest.raises(StoppedError):
            node.opened(bucket=node.dataset.bucket, stop=asked)
    node.assert_read()
    assert done[3:] == [8, 12, 16, 20, 24]


def test_few_images_need_no_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    written, bucket = write_dataset(str(tmp_path / "bucket"), tmp_path), FarStore(tmp_path / "bucket")
    images = ImageCache(bucket, written.index)
    for indices in ([0], [21, 3, 4, 5, 3], list(range(22))):
        assert_equal(images, written, indices)
    assert bucket.downloads == []
    # Its bytes are compared by SHA-256: no other check sees a bit that flips in a range of a shard.
    shard, table = (tmp_path / "bucket" / KEY / f"shard-00002.{suffix}" for suffix in ("tar", "offsets"))
    offset, size_bytes, *_ = np.fromfile(table, OFFSETS_DTYPE)[2].tolist()
    shard.chmod(0o644)
    flip_a_bit(shard, offset + size_bytes // 2)
    with pytest.raises(BadDataError, match=r"shard-00002\.tar, image 2 .* differs from the index"):
        images.read(np.array([0, 10]))


def test_least_recently_read_shard_goes(node):
    cache = node.opened(3)
    for image in (0, 4, 8, 1, 12):
        assert_equal(cache, node.dataset, [image])
        time.sleep(0.01)
    assert node.shards == [0, 2, 3]
    assert_equal(cache, node.dataset, [0, 8, 12])
    node.assert_read([0, 8, 12], 3)
    assert len(node.far.downloads) == 4


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_budget_of_shards_is_kept(node, shards):
    sizes, seen = [shard.bytes for shard in node.dataset.index.shards], []

    def measure(key: str) -> None:
        seen.append(sum(path.stat().st_size for path in node.folder.rglob("*.tar")))

    node.far = FarStore(node.bucket, measure)
    ranks = [node.opened(shards) for _ in range(3)]

    def read(rank: int) -> None:
        random = np.random.default_rng(rank)
        for _ in range(15):
            assert_equal(ranks[rank], node.dataset, random.integers(0, IMAGES, 5))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert len(seen) > 15
    assert max(seen) + min(sizes) <= shards * max(sizes)
    assert len(node.shards) == shards


def test_coming_shards_are_fetched_ahead(node):
    order = Order(SHARD_IMAGES, 3, block_images=4)
    cache, epoch = node.opened(3), list(islice(order.upcoming_shards(0), 6))
    cache.prefetch(order, 0)
    eventually(lambda: node.shards == sorted(epoch[:3]), 30)
    for number in range(4):
        cache.prefetch(order, number)
        assert_equal(cache, node.dataset, order.indices(np.array([number])))
    assert len(node.far.downloads) == 3
    cache.prefetch(order, 4)
    # The block that is over makes room for the next but one; what is due is never evicted for it.
    eventually(lambda: node.shards == sorted(epoch[1:4]), 30)
    assert len(node.far.downloads) == 4
    cache.prefetch(order, 4 * IMAGES)
    eventually(lambda: node.shards == sorted(islice(order.upcoming_shards(4 * IMAGES), 3)), 30)
    cache.close()


def test_closing_ends_prefetch_without_its_errors(node):
    before, is_begun, go_on = set(threading.enumerate()), threading.Event(), threading.Event()

    def hold(key: str) -> None:
        is_begun.set()
        go_on.wait(10)
        raise BucketAwayError("the bucket is away")

    cache = node.opened(6, FarStore(node.bucket, hold))
    cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    assert is_begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    with pytest.raises(BucketAwayError, match="the bucket is away"):
        cache.read(np.array([0]))
    cache.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("prefetch")]
    node.assert_read(shards=6)


def test_blocks_beyond_the_budget_are_refused(node):
    cache = node.opened(4)
    with pytest.raises(BadConfigError, match=r"blocks of 24 images.*with a smaller data\.shuffle_block_images$"):
        cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    cache.prefetch(Order(SHARD_IMAGES, 0, 8), 0)
    cache.close()
    with pytest.raises(BadConfigError, match=r"data\.cache_gigabytes=0\.1,"):
        node.opened(1).prefetch(Order(SHARD_IMAGES, 0, 1), 0)


def test_the_cache_has_a_default_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = {"HOME": ("/home/us", "/home/us/.cache/ddpm"), "XDG_CACHE_HOME": ("/var/us", "/var/us/ddpm")}
    places["DDPM_CACHE"] = ("scratch", str(tmp_path / "scratch"))
    for name in places:
        monkeypatch.delenv(name, raising=False)
    for name, (value, place) in places.items():
        monkeypatch.setenv(name, value)
        assert str(default_cache_dir()) == place


# The order, and the stream of batches.
SIZES = (100, 37, 1, 250, 12)
ORDERED = sum(SIZES)


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
    for block_images in (0, 1, 2, 7, 64, 90, 399, ORDERED - 1, ORDERED, ORDERED + 1):
        order = Order(SIZES, 5, block_images)
        epochs = order.indices(np.arange(4 * ORDERED)).reshape(4, ORDERED)
        assert (np.sort(epochs) == np.arange(ORDERED)).all(), block_images
        assert len({epoch.tobytes() for epoch in epochs}) == 4
        # The numbers of an image are the inverse.
        for image in range(0, ORDERED, 3):
            numbers = order.numbers_of(image, 3).tolist()
            assert epochs.ravel()[numbers].tolist() == [image] * 3
            assert [number // ORDERED for number in numbers] == [0, 1, 2]
        # Position alone decides.
        mixed = np.random.default_rng(0).permutation(4 * ORDERED)
        assert (Order(SIZES, 5, block_images).indices(mixed) == epochs.ravel()[mixed]).all()
        assert [int(order.indices(np.array([n]))[0]) for n in mixed[:9]] == epochs.ravel()[mixed[:9]].tolist()
    assert order.indices(np.empty(0, np.int64)).shape == (0,)
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
    for block_images in (ORDERED, 30, 101):
        order = Order(SIZES, 8, block_images)
        for number in (0, 1, 150, 399, 400, 401, 1234):
            epoch, block = order.block_of(number)
            upcoming = list(islice(order.upcoming_shards(number), 2 * len(SIZES)))
            read: set[int] = set()
            for start in range(block * block_images, ORDERED, block_images):
                images = order.indices(epoch * ORDERED + np.arange(start, min(start + block_images, ORDERED)))
                read |= set(np.searchsorted(np.cumsum(SIZES), images, side="right").tolist())
                assert set(upcoming[: len(read)]) == read
            next_epoch = order.upcoming_shards((epoch + 1) * ORDERED)
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


@pytest.fixture(params=[0, 3], ids=["decoded", "shards"])
def cache(request, dataset, tmp_path):
    """Of all images, or of three shards of five."""
    with closing(opened(FarStore(Path(dataset.bucket.uri)), dataset, tmp_path, request.param)) as cache:
        yield cache


def stream(cache, first: int, last: int | None, places: range = range(BATCH)):
    numbers = {"batch_size_images": BATCH, "first_image": first, "last_image": last}
    return stream_batches(cache, FEW_ORDER, **numbers, places=places)


def test_any_number_of_processes_agrees(cache, dataset):
    for world_size in (1, 3, 11):
        for first in (0, 5, 2 * FEW_IMAGES):
            places = [range(rank, BATCH, world_size) for rank in range(world_size)]
            ranks = [list(stream(cache, first, 3 * FEW_IMAGES, some)) for some in places]
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


def test_a_few_batches_are_read_ahead_until_the_stream_ends(cache):
    reader = Reader(cache)
    batches = stream(reader, 0, None)
    assert threads() == []
    next(batches)
    # One was taken, the others are ready.
    eventually(lambda: reader.batches == 1 + PREFETCH_BATCHES, 10)
    time.sleep(0.1)
    assert reader.batches == 1 + PREFETCH_BATCHES
    batches.close()
    eventually(lambda: not threads(), 10)
    assert len(list(stream(cache, 0, 100))) == 13
    eventually(lambda: not threads(), 10)

    # Nobody waits for a batch that hangs.
    is_silent, comes = threading.Event(), threading.Event()
    batches = stream(Reader(cache, lambda number: number == 2 and (is_silent.set(), comes.wait(60))), 0, None)
    next(batches)
    assert is_silent.wait(10)
    batches.close()
    assert not comes.is_set() and threads()
    comes.set()
    eventually(lambda: not threads(), 10)

    # An error comes in its place.
    def fail(number: int) -> None:
        if number == 6:
            raise BadDataError("shard-00001.tar is rotten")

    batches, taken = stream(Reader(cache, fail), 0, None), []
    with pytest.raises(BadDataError, match=r"shard-00001\.tar is rotten"):
        taken.extend(batch.image_numbers[0] for batch in batches)
    eventually(lambda: not threads(), 10)
    assert taken == list(range(0, 6 * BATCH, BATCH))
