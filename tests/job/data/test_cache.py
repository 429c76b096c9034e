"""What a node keeps of a dataset: all images decoded, or the encoded shards that are due."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from job.data.reading.cache import DecodedCache, ImageCache, ShardCache, open_cache
from job.data.reading.order import Order
from job.data.shards import OFFSETS_DTYPE
from job.exits import BadConfigError, BadDataError, BucketAwayError, DiskFullError, Exit, StoppedError
from job.progress import Progress
from job.stop import NEVER, Stop
from job.store.files import default_cache_dir
from job.store.local import LocalStore
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
        assert cache.read(np.array([7, 7, 23]), out=out) is out
        np.testing.assert_array_equal(out, dataset.pixels[[7, 7, 23]])
        assert cache.read(np.empty(0, np.int64)).shape == (0, 64, 64, 3)
        cache.close()
    assert bool(list((tmp_path / "cache").rglob("shards/*.tar"))) == ("://" in bucket_uri)


def leave_downloads(folder: Path) -> None:
    (folder / "checksums").unlink()
    (folder / "incoming" / SHARDS[0]).write_bytes(b"half of it")
    (folder / "incoming" / ".tmp-0123").write_bytes(b"less than half of it")


DAMAGED = {
    "a bit of an image": (lambda folder: flip_a_bit(folder / "images", IMAGE_BYTES * 8), SHARDS[2:3]),
    "images that end early": (lambda folder: os.truncate(folder / "images", IMAGE_BYTES * 17), SHARDS[4:]),
    "a short record": (lambda folder: os.truncate(folder / "checksums", 8 * SHARD_IMAGES[0] + 4), SHARDS[1:]),
    "downloads that were left": (leave_downloads, SHARDS),
}


def test_decoded_images_are_kept_and_repaired(node, monkeypatch, caplog):
    progress: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, done: progress.append(done))
    node.assert_read()
    assert (sorted(node.far.downloads), progress) == (SHARDS, [*range(0, IMAGES + 1, 4)])
    # The file is allocated, and no shard stays.
    images, order = node.folder / "images", [5, 8, 8, 23]
    assert images.stat().st_blocks * 512 >= images.stat().st_size == node.dataset.index.decoded_bytes
    assert not list(node.folder.rglob("*.tar"))
    gone = node.bucket.rename(node.bucket.with_name("gone"))
    progress.clear()
    node.assert_read()
    assert (len(node.far.downloads), progress) == (6, [])
    gone.rename(node.bucket)
    for name, (damage, fetched_again) in DAMAGED.items():
        damage(node.folder)
        node.far.downloads.clear()
        for _ in range(2):
            node.assert_read()
            assert sorted(node.far.downloads) == fetched_again, name
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
FAR_STORE = f"""
import json, os, re, runpy, signal, sys
from pathlib import Path
import numpy as np
from job.data.reading.cache import open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from job.progress import Progress
FarStore = runpy.run_path({small_dataset.__file__!r})["FarStore"]
"""
OPEN_AND_SAVE = """
root, killed_after = Path(sys.argv[1]), int(sys.argv[2])
def note(key):
    with (root / "downloads").open("a") as file:
        file.write(key + "\\n")
def die(bar, done):
    if done >= killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
store = FarStore(root / "bucket", note)
index = load_index(store, "datasets/random-8")
Progress.update = die
cache = open_cache(store, index, 10**9, cache_dir=root / "cache")
np.save(root / f"{os.getpid()}.npy", cache.read(np.arange(index.images)))
"""
READ_ALL = """
store, cache_dir, budget_bytes = FarStore(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
index = load_index(store, "datasets/random-64")
cache = open_cache(store, index, budget_bytes, cache_dir=cache_dir)
order = Order(tuple(index.shards.images.tolist()), seed=5, block_images=60)
anonymous = 0
for batch in stream_batches(cache, order, batch_size_images=20, first_image=0, last_image=2 * index.images):
    status = Path("/proc/self/status").read_text()
    anonymous = max(anonymous, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
cache.close()
print(json.dumps({"type": type(cache).__name__, "downloads": len(store.downloads), "anonymous": anonymous}))
"""


def begun(script: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FAR_STORE + script, *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_the_decoding(tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (4,) * 20)
    assert begun(OPEN_AND_SAVE, tmp_path, 24).wait(100) == -signal.SIGKILL
    both = [begun(OPEN_AND_SAVE, tmp_path, 10**6) for _ in range(2)]
    assert [process.wait(100) for process in both] == [0, 0]
    for process in both:
        np.testing.assert_array_equal(np.load(tmp_path / f"{process.pid}.npy"), dataset.pixels)
    downloads = (tmp_path / "downloads").read_text().splitlines()
    assert len(set(downloads)) == 20
    # The killed process had at most four under way; nobody fetches what another has decoded.
    assert len(downloads) <= 20 + 4


@pytest.mark.slow
def test_memory_does_not_grow_with_dataset(tmp_path):
    """The larger dataset has ten times the budget."""
    small, large = (
        write_dataset(str(tmp_path / str(shards)), tmp_path, (60,) * shards, size=64, grain=4) for shards in (6, 40)
    )
    budget_bytes = 4 * max(shard.bytes for shard in large.index.shards)
    assert sum(shard.bytes for shard in large.index.shards) > 9 * budget_bytes
    assert budget_bytes < small.index.decoded_bytes
    both = [begun(READ_ALL, tmp_path / name, tmp_path / f"cache{name}", budget_bytes) for name in ("6", "40")]
    few, many = (json.loads(process.communicate(timeout=200)[0]) for process in both)
    assert few["type"] == many["type"] == "ShardCache"
    # Each shard comes once per epoch, but for those whose block goes on in the next, and what the end fetched ahead.
    assert many["downloads"] <= 2 * 40 + 2 * 4
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
    np.testing.assert_array_equal(images.labels(np.arange(22)), written.labels)
    for indices in ([0], [21, 3, 4, 5, 3], list(range(22))):
        assert_equal(images, written, indices)
    assert bucket.downloads == []
    # A multiple of the polynomial is added to an image, so that its CRC-32C stays the same.
    shard, table = (tmp_path / "bucket" / KEY / f"shard-00002.{suffix}" for suffix in ("tar", "offsets"))
    offset, size_bytes, *_ = np.fromfile(table, OFFSETS_DTYPE)[2].tolist()
    image = shard.read_bytes()[offset : offset + size_bytes]
    flips = int(f"{0x11EDC6F41:033b}"[::-1], 2) << 8 * (size_bytes // 2)
    forged = (int.from_bytes(image, "little") ^ flips).to_bytes(size_bytes, "little")
    assert forged != image and google_crc32c.value(forged) == google_crc32c.value(image)
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes().replace(image, forged))
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
