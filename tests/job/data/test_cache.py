"""What a node keeps of a dataset: all images decoded, or the encoded shards that are due."""

import fcntl
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
from job.stop import Stop
from job.store.files import default_cache_dir
from tests.job.damages import flip_a_bit
from tests.job.launching import eventually
from tests.job.small_dataset import KEY, FarStore, SmallDataset, write_dataset

SHARD_IMAGES = (4,) * 6
SHARDS = [f"shard-{number:05d}.tar" for number in range(6)]
IMAGES = sum(SHARD_IMAGES)


@pytest.fixture
def dataset(tmp_path) -> SmallDataset:
    return write_dataset(str(tmp_path / "bucket"), tmp_path, SHARD_IMAGES, size=64, grain=8)


@pytest.fixture
def far(dataset, tmp_path) -> FarStore:
    return FarStore(tmp_path / "bucket")


def opened(bucket, dataset: SmallDataset, cache_dir: Path, shards: int = 0, **options) -> ImageCache:
    """All images decoded, or room for so many shards, which take less."""
    budget_bytes = shards * max(shard.bytes for shard in dataset.index.shards) or dataset.index.decoded_bytes
    cache = open_cache(bucket, dataset.index, budget_bytes, cache_dir=cache_dir, **options)
    assert type(cache) is (ShardCache if shards else DecodedCache)
    return cache


def shards_in(cache_dir: Path) -> list[int]:
    return sorted(int(path.stem[-5:]) for path in cache_dir.rglob("shards/*.tar"))


def wait_for_shards(cache_dir: Path, shards: list[int]) -> None:
    eventually(lambda: shards_in(cache_dir) == sorted(shards), 10)


def assert_equal(cache: ImageCache, dataset: SmallDataset, indices: np.ndarray | None = None) -> None:
    indices = np.arange(dataset.index.images) if indices is None else np.asarray(indices)
    np.testing.assert_array_equal(cache.read(indices), dataset.pixels[indices])
    np.testing.assert_array_equal(cache.labels(indices), dataset.labels[indices])


def test_cache_reads_any_order_and_bucket(bucket_uri, tmp_path):
    dataset = write_dataset(bucket_uri, tmp_path, SHARD_IMAGES, size=64, grain=8)
    for shards in (0, 2):
        cache = opened(dataset.bucket, dataset, tmp_path / "cache", shards)
        assert_equal(cache, dataset, np.random.default_rng(0).integers(0, IMAGES, 200))
        out = np.zeros((3, 64, 64, 3), np.uint8)
        assert cache.read(np.array([7, 7, 23]), out=out) is out
        np.testing.assert_array_equal(out, dataset.pixels[[7, 7, 23]])
        assert cache.read(np.empty(0, np.int64)).shape == (0, 64, 64, 3)
        cache.close()


def test_second_opening_fetches_nothing(dataset, far, tmp_path, monkeypatch):
    progress: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, done: progress.append(done))
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
    assert sorted(far.downloads) == SHARDS
    assert progress == [*range(0, IMAGES + 1, 4)]
    # The file is allocated, and no shard stays.
    folder = tmp_path / "cache" / dataset.index.dataset_id
    status = (folder / "images").stat()
    assert status.st_blocks * 512 >= status.st_size == dataset.index.decoded_bytes
    assert not list(folder.rglob("*.tar"))
    (tmp_path / "bucket").rename(tmp_path / "gone")
    progress.clear()
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
    assert (len(far.downloads), progress) == (6, [])


def test_local_shards_are_not_copied(dataset, far, tmp_path):
    far.uri = str(tmp_path / "bucket")
    for shards in (0, 1):
        cache = opened(far, dataset, tmp_path / "cache", shards)
        cache.prefetch(Order(SHARD_IMAGES, 0), 0)
        assert_equal(cache, dataset)
        assert (far.downloads, shards_in(tmp_path / "cache")) == ([], [])
        assert {path.name for path in (tmp_path / "bucket" / dataset.key).glob("*.tar")} == set(SHARDS)


def test_damaged_cache_is_repaired(dataset, far, tmp_path):
    folder = tmp_path / "cache" / dataset.index.dataset_id

    def leave_downloads() -> None:
        (folder / "checksums").unlink()
        (folder / "incoming" / SHARDS[0]).write_bytes(b"half of it")
        (folder / "incoming" / ".tmp-0123").write_bytes(b"less than half of it")

    for name, damage, fetched_again in [
        ("a bit of an image", lambda: flip_a_bit(folder / "images", 64 * 64 * 3 * 8), SHARDS[2:3]),
        ("images that end early", lambda: os.truncate(folder / "images", 64 * 64 * 3 * 17), SHARDS[4:]),
        ("a short record", lambda: os.truncate(folder / "checksums", 8 * SHARD_IMAGES[0] + 4), SHARDS[1:]),
        ("downloads that were left", leave_downloads, SHARDS),
    ]:
        opened(far, dataset, tmp_path / "cache")
        damage()
        far.downloads.clear()
        for _ in range(2):
            assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
            assert sorted(far.downloads) == fetched_again, name


def test_overwritten_cache_is_not_used(dataset, far, tmp_path, caplog):
    images, order = tmp_path / "cache" / dataset.index.dataset_id / "images", [5, 8, 8, 23]
    cache = opened(far, dataset, tmp_path / "cache")
    assert_equal(cache, dataset, order)
    flip_a_bit(images, 64 * 64 * 3 * 8)
    for _ in range(2):
        assert_equal(cache, dataset, order)
    cache.close()
    assert [str(images) in record.message for record in caplog.records] == [True]
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)


OPEN_AND_SAVE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from job.data.reading.cache import open_cache
from job.data.shards import load_index
from job.progress import Progress
from tests.job.small_dataset import KEY, FarStore
root, killed_after = Path(sys.argv[1]), int(sys.argv[2])
def note(key):
    with (root / "downloads").open("a") as file:
        file.write(key + "\\n")
def die(bar, done):
    if done >= killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
store = FarStore(root / "bucket", note)
index = load_index(store, KEY)
Progress.update = die
cache = open_cache(store, index, 10**9, cache_dir=root / "cache")
np.save(root / f"{os.getpid()}.npy", cache.read(np.arange(index.images)))
"""


@pytest.mark.slow
def test_processes_share_the_decoding(tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (4,) * 20)

    def opening(killed_after: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", OPEN_AND_SAVE, str(tmp_path), str(killed_after)])

    assert opening(24).wait(60) == -signal.SIGKILL
    assert [process.wait(60) for process in (opening(10**6), opening(10**6))] == [0, 0]
    saved = [np.load(path) for path in tmp_path.glob("*.npy")]
    assert len(saved) == 2
    for pixels in saved:
        np.testing.assert_array_equal(pixels, dataset.pixels)
    downloads = (tmp_path / "downloads").read_text().splitlines()
    assert len(set(downloads)) == 20
    # The killed process had at most four under way; nobody fetches what another has decoded.
    assert len(downloads) <= 20 + 4


def test_full_disk_is_found_before_decoding(small_disk, tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (100, 100), size=64)
    with pytest.raises(DiskFullError, match=r"images \(2,457,600 bytes; DDPM_CACHE moves it.*No space left") as caught:
        opened(dataset.bucket, dataset, small_disk)
    assert caught.value.exit_code == Exit.DISK_FULL
    assert not (small_disk / dataset.index.dataset_id / "images").exists()
    small = write_dataset(str(tmp_path / "other"), tmp_path)
    assert_equal(opened(small.bucket, small, small_disk), small)


def test_stop_keeps_decoded_images(dataset, far, tmp_path, monkeypatch):
    done: list[int] = []
    stop = Stop()

    def update(bar: Progress, images: int) -> None:
        done.append(images)
        if images == 8:
            stop.request("a test")

    monkeypatch.setattr(Progress, "update", update)
    with pytest.raises(StoppedError, match=r"the images read so far are kept; the same command goes on"):
        opened(far, dataset, tmp_path / "cache", stop=stop)
    assert done == [0, 4, 8]
    # While another process works, too.
    asked = Stop()
    with (tmp_path / "cache" / dataset.index.dataset_id / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, asked.request, ["a test"]).start()
        with pytest.raises(StoppedError):
            opened(dataset.bucket, dataset, tmp_path / "cache", stop=asked)
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
    assert done[3:] == [8, 12, 16, 20, 24]


def test_few_images_need_no_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    written = write_dataset(str(tmp_path / "bucket"), tmp_path)
    bucket = FarStore(tmp_path / "bucket")
    images = ImageCache(bucket, written.index)
    np.testing.assert_array_equal(images.labels(np.arange(22)), written.labels)
    for indices in ([0], [21, 3, 4, 5, 3], list(range(22))):
        np.testing.assert_array_equal(images.read(np.array(indices)), written.pixels[indices])
    assert bucket.downloads == []
    shard, table = (tmp_path / "bucket" / KEY / f"shard-00002.{suffix}" for suffix in ("tar", "offsets"))
    shard.chmod(0o644)
    flip_a_bit(shard, int(np.fromfile(table, OFFSETS_DTYPE)[2]["offset"]) + 20)
    with pytest.raises(BadDataError, match=r"shard-00002\.tar, image 2 .* differs from the index"):
        images.read(np.array([0, 10]))


@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_ranges_are_verified_by_a_hash(remote_bucket, proxy, tmp_path, monkeypatch):
    """The proxy adds a multiple of the polynomial to an image, so that its CRC-32C stays the same."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    written = write_dataset(remote_bucket, tmp_path, size=64)
    tar, table = tmp_path / "shard-00002.tar", written.bucket.read(f"{written.key}/shard-00002.offsets").data
    offset, size_bytes, *_ = np.frombuffer(table, OFFSETS_DTYPE)[2].tolist()
    image = tar.read_bytes()[offset : offset + size_bytes]
    flips = int(f"{0x11EDC6F41:033b}"[::-1], 2) << 8 * (size_bytes // 2)
    forged = (int.from_bytes(image, "little") ^ flips).to_bytes(size_bytes, "little")
    assert forged != image and google_crc32c.value(forged) == google_crc32c.value(image)
    proxy.received = lambda body: body.replace(image, forged)
    images = ImageCache(written.bucket, written.index)
    np.testing.assert_array_equal(images.read(np.array([0, 21])), written.pixels[[0, 21]])
    with pytest.raises(BadDataError, match=r"shard-00002\.tar, image 2 .* differs from the index"):
        images.read(np.array([0, 10]))


def test_least_recently_read_shard_goes(dataset, far, tmp_path):
    cache = opened(far, dataset, tmp_path / "cache", 3)
    for image in (0, 4, 8, 1, 12):
        assert_equal(cache, dataset, [image])
        time.sleep(0.01)
    assert shards_in(tmp_path / "cache") == [0, 2, 3]
    assert_equal(cache, dataset, [0, 8, 12])
    assert_equal(opened(far, dataset, tmp_path / "cache", 3), dataset, [0, 8, 12])
    assert len(far.downloads) == 4


def test_budget_of_shards_is_kept(dataset, tmp_path):
    sizes = [shard.bytes for shard in dataset.index.shards]
    for shards in (1, 2, 5):
        folder, seen = tmp_path / f"cache-{shards}", []

        def measure(key: str, folder=folder, seen=seen) -> None:
            seen.append(sum(path.stat().st_size for path in folder.rglob("*.tar")))

        far = FarStore(tmp_path / "bucket", measure)
        ranks = [opened(far, dataset, folder, shards) for _ in range(3)]

        def read(rank: int, ranks=ranks) -> None:
            random = np.random.default_rng(rank)
            for _ in range(15):
                assert_equal(ranks[rank], dataset, random.integers(0, IMAGES, 5))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(read, range(3)))
        assert len(seen) > 15
        assert max(seen) + min(sizes) <= shards * max(sizes)
        assert len(shards_in(folder)) == shards


def test_coming_shards_are_fetched_ahead(dataset, far, tmp_path):
    order, folder = Order(SHARD_IMAGES, 3, block_images=4), tmp_path / "cache"
    cache = opened(far, dataset, folder, 3)
    first_epoch = list(islice(order.upcoming_shards(0), 6))
    cache.prefetch(order, 0)
    wait_for_shards(folder, first_epoch[:3])
    for number in range(4):
        cache.prefetch(order, number)
        assert_equal(cache, dataset, order.indices(np.array([number])))
    assert len(far.downloads) == 3
    cache.prefetch(order, 4)
    # The block that is over makes room for the next but one; what is due is never evicted for it.
    wait_for_shards(folder, first_epoch[1:4])
    assert len(far.downloads) == 4
    cache.prefetch(order, 4 * IMAGES)
    wait_for_shards(folder, list(islice(order.upcoming_shards(4 * IMAGES), 3)))
    cache.close()


def test_closing_ends_prefetch_without_its_errors(dataset, tmp_path):
    before, begun, go_on = set(threading.enumerate()), threading.Event(), threading.Event()

    def hold(key: str) -> None:
        begun.set()
        go_on.wait(10)
        raise BucketAwayError("the bucket is away")

    far = FarStore(tmp_path / "bucket", hold)
    cache = opened(far, dataset, tmp_path / "cache", 6)
    cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    assert begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    with pytest.raises(BucketAwayError, match="the bucket is away"):
        cache.read(np.array([0]))
    cache.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("prefetch")]
    assert_equal(opened(dataset.bucket, dataset, tmp_path / "cache", 6), dataset)


def test_blocks_beyond_the_budget_are_refused(dataset, far, tmp_path):
    cache = opened(far, dataset, tmp_path / "cache", 4)
    with pytest.raises(BadConfigError, match=r"blocks of 24 images.*with a smaller data\.shuffle_block_images$"):
        cache.prefetch(Order(SHARD_IMAGES, 0), 0)
    cache.prefetch(Order(SHARD_IMAGES, 0, 8), 0)
    cache.close()
    small = opened(far, dataset, tmp_path / "cache", 1)
    with pytest.raises(BadConfigError, match=r"data\.cache_gigabytes=0\.1,"):
        small.prefetch(Order(SHARD_IMAGES, 0, 1), 0)


def test_the_cache_has_a_default_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = {"HOME": ("/home/us", "/home/us/.cache/ddpm"), "XDG_CACHE_HOME": ("/var/us", "/var/us/ddpm")}
    places["DDPM_CACHE"] = ("scratch", str(tmp_path / "scratch"))
    for name in places:
        monkeypatch.delenv(name, raising=False)
    for name, (value, place) in places.items():
        monkeypatch.setenv(name, value)
        assert str(default_cache_dir()) == place
