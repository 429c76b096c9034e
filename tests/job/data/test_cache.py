import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from job.data.cache import DecodedCache, default_cache_dir, open_cache
from job.data.shard_source import ChosenImages, ShardSource
from job.data.shards import OFFSETS_DTYPE, SHARD_BYTES
from job.exits import BadDataError, BucketAwayError, DiskFullError, Exit, MissingInputError, StoppedError
from job.stop import Stop
from tests.job.small_dataset import KEY, FarStore, SmallDataset, write_dataset

SHARDS = ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar", "shard-00003.tar", "shard-00004.tar"]


@pytest.fixture
def dataset(tmp_path) -> SmallDataset:
    return write_dataset(str(tmp_path / "bucket"), tmp_path)


@pytest.fixture
def far(dataset, tmp_path) -> FarStore:
    return FarStore(tmp_path / "bucket")


def opened(bucket, dataset: SmallDataset, cache_dir: Path, **options) -> DecodedCache:
    cache = open_cache(bucket, KEY, dataset.index, cache_dir=cache_dir, budget_bytes=SHARD_BYTES, **options)
    assert isinstance(cache, DecodedCache)
    return cache


def assert_equal(cache, dataset: SmallDataset) -> None:
    everything = np.arange(dataset.index.images)
    np.testing.assert_array_equal(cache.read(everything), dataset.pixels)
    np.testing.assert_array_equal(cache.labels(everything), dataset.labels)


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("channels", "classes"), [(3, ("cat", "dog")), (1, ())])
def test_images_and_labels_come_back_from_any_bucket(bucket_uri, tmp_path, channels, classes):
    dataset = write_dataset(bucket_uri, tmp_path, channels=channels, classes=classes)
    cache = opened(dataset.bucket, dataset, tmp_path / "cache")
    indices = np.random.default_rng(1).integers(0, dataset.index.images, 100)
    out = np.empty((100, 8, 8, channels), np.uint8)
    assert cache.read(indices, out=out) is out
    np.testing.assert_array_equal(out, dataset.pixels[indices])
    labels = cache.labels(indices)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, dataset.labels[indices])
    assert cache.read(np.empty(0, np.int64)).shape == (0, 8, 8, channels)
    for wrong in (-1, dataset.index.images):
        with pytest.raises(IndexError):
            cache.read(np.array([0, wrong]))
    cache.close()


def test_the_second_opening_fetches_and_decodes_nothing(dataset, far, tmp_path):
    progress: list[tuple[int, int]] = []
    assert_equal(opened(far, dataset, tmp_path / "cache", progress=lambda *done: progress.append(done)), dataset)
    assert sorted(far.downloads) == SHARDS
    assert progress == [(0, 22), (5, 22), (8, 22), (15, 22), (16, 22), (22, 22)]
    # The file is allocated, and no shard stays.
    folder = tmp_path / "cache" / dataset.index.dataset_id
    status = (folder / "images").stat()
    assert status.st_blocks * 512 >= status.st_size == dataset.index.decoded_bytes
    assert not list(folder.rglob("*.tar"))
    (tmp_path / "bucket").rename(tmp_path / "gone")
    progress.clear()
    assert_equal(opened(far, dataset, tmp_path / "cache", progress=lambda *done: progress.append(done)), dataset)
    assert (len(far.downloads), progress) == (5, [])


def test_a_folder_is_read_where_it_lies(dataset, far, tmp_path):
    far.uri = str(tmp_path / "bucket")
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
    assert far.downloads == []
    assert {path.name for path in (tmp_path / "bucket" / KEY).glob("*.tar")} == set(SHARDS)


def leave_downloads(folder: Path) -> None:
    (folder / "filled").unlink()
    (folder / "incoming").mkdir(exist_ok=True)
    (folder / "incoming" / SHARDS[0]).write_bytes(b"half of it")
    (folder / "incoming" / ".tmp-0123").write_bytes(b"less than half of it")


def test_whatever_is_damaged_is_made_anew_and_nothing_else(dataset, far, tmp_path):
    folder = tmp_path / "cache" / dataset.index.dataset_id
    for name, damage, fetched_again in [
        ("no record", lambda: (folder / "filled").unlink(), SHARDS),
        ("a short record", lambda: os.truncate(folder / "filled", 13), SHARDS[1:]),
        ("a record of noise", lambda: (folder / "filled").write_bytes(os.urandom(40)), SHARDS),
        ("short images", lambda: os.truncate(folder / "images", 100), SHARDS),
        ("long images", lambda: os.truncate(folder / "images", 1_000_000), SHARDS),
        (
            "a hole",
            lambda: (folder / "images").write_bytes(bytes(1000) + (folder / "images").read_bytes()[1000:]),
            SHARDS[:2],
        ),
        ("a bit of an image", lambda: flip_a_bit(folder / "images", 8 * 8 * 3 * 8), SHARDS[2:3]),
        ("a bit of the offsets", lambda: flip_a_bit(folder / "offsets", 3), []),
        ("short offsets", lambda: os.truncate(folder / "offsets", 100), []),
        ("downloads that were left", lambda: leave_downloads(folder), SHARDS),
    ]:
        opened(far, dataset, tmp_path / "cache")
        damage()
        far.downloads.clear()
        for _ in range(2):
            assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
            assert sorted(far.downloads) == fetched_again, name


OPEN_AND_SAVE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from job.data.cache import open_cache
from job.data.shards import load_index
from tests.job.small_dataset import KEY, FarStore
root, killed_after = Path(sys.argv[1]), int(sys.argv[2])
def note(key):
    with (root / "downloads").open("a") as file:
        file.write(key + "\\n")
def die(done, total):
    if done >= killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
store = FarStore(root / "bucket", note)
index = load_index(store, KEY)
print("ready", flush=True)
sys.stdin.readline()
cache = open_cache(store, KEY, index, cache_dir=root / "cache", budget_bytes=10**9, progress=die)
np.save(root / f"{os.getpid()}.npy", cache.read(np.arange(index.images)))
"""


def test_processes_share_the_work_and_go_on_where_one_was_killed(tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (4,) * 20)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_SAVE, str(tmp_path), str(killed_after)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for killed_after in (24, 10**6, 10**6)
    ]
    log = tmp_path / "downloads"

    def go(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        first, *others = processes
        go(first)
        while first.poll() is None and not log.exists():
            time.sleep(0.001)
        for process in others:
            go(process)
        assert [process.wait(60) for process in processes] == [-signal.SIGKILL, 0, 0]
    finally:
        for process in processes:
            process.kill()
    saved = [np.load(path) for path in tmp_path.glob("*.npy")]
    assert len(saved) == 2
    for pixels in saved:
        np.testing.assert_array_equal(pixels, dataset.pixels)
    downloads = log.read_text().splitlines()
    assert len(set(downloads)) == 20
    # The killed process had at most four under way; nobody fetches what another has decoded.
    assert len(downloads) <= 20 + 4


def test_a_full_disk_is_found_before_anything_is_decoded(small_disk, tmp_path):
    dataset = write_dataset(str(tmp_path / "bucket"), tmp_path, (100, 100), size=64)
    assert dataset.index.decoded_bytes > 2 << 20
    with pytest.raises(DiskFullError, match=r"images \(2,457,600 bytes; DDPM_CACHE moves it.*No space left") as caught:
        opened(dataset.bucket, dataset, small_disk)
    assert caught.value.exit_code == Exit.DISK_FULL
    assert not (small_disk / dataset.index.dataset_id / "images").exists()
    small = write_dataset(str(tmp_path / "other"), tmp_path)
    assert_equal(opened(small.bucket, small, small_disk), small)


def test_a_rotten_shard_in_the_bucket_is_named(dataset, far, tmp_path):
    path = tmp_path / "bucket" / KEY / SHARDS[2]
    flip_a_bit(path, 600)
    for bucket, uri in ((dataset.bucket, str(path)), (far, f"far://bucket/{KEY}/{SHARDS[2]}")):
        with pytest.raises(BadDataError, match=f"{uri} holds other bytes than were packed"):
            opened(bucket, dataset, tmp_path / "cache")
    os.truncate(path, 512)
    with pytest.raises(BadDataError, match=r"shard-00002\.tar holds 512 bytes instead of [\d,]+ than were packed"):
        opened(far, dataset, tmp_path / "cache")
    # What was decoded before is kept, and the rest follows once the shard is restored.
    path.write_bytes((tmp_path / SHARDS[2]).read_bytes())
    far.downloads.clear()
    assert_equal(opened(far, dataset, tmp_path / "cache"), dataset)
    assert sorted(far.downloads) == SHARDS[2:]


def test_what_is_missing_or_was_packed_wrong_is_named(dataset, tmp_path):
    offsets = tmp_path / "bucket" / KEY / "shard-00001.offsets"
    good = offsets.read_bytes()
    offsets.unlink()
    with pytest.raises(MissingInputError, match=r"shard-00001\.offsets"):
        opened(dataset.bucket, dataset, tmp_path / "cache")
    offsets.write_bytes(good)
    (tmp_path / "bucket" / KEY / SHARDS[1]).unlink()
    with pytest.raises(MissingInputError, match=r"shard-00001\.tar"):
        opened(dataset.bucket, dataset, tmp_path / "cache")
    encoded = iter([b"no image", *[b"never read"] * 21])
    broken = write_dataset(str(tmp_path / "broken"), tmp_path, encode=lambda pixels: next(encoded))
    with pytest.raises(BadDataError, match=r"shard-00000\.tar, image 0 \(at byte 512\): .*pack the dataset anew"):
        opened(broken.bucket, broken, tmp_path / "cache")
    small = write_dataset(str(tmp_path / "small"), tmp_path, size=8)
    index = small.index.model_copy(update={"size": 16})
    with pytest.raises(BadDataError, match=r"image \d.* is 8×8 pixels in a dataset of 16×16"):
        open_cache(small.bucket, KEY, index, cache_dir=tmp_path / "cache", budget_bytes=10**9)


def test_a_stop_is_obeyed_and_keeps_what_is_done(dataset, far, tmp_path):
    done: list[int] = []
    stop = Stop()

    def progress(images: int, total: int) -> None:
        done.append(images)
        if images >= 8:
            stop.request("a test")

    with pytest.raises(StoppedError, match=r"what has been read is kept; the same command goes on"):
        opened(far, dataset, tmp_path / "cache", progress=progress, stop=stop)
    assert done[-1] == 8
    # While another process works, too.
    holder = ShardSource(dataset.bucket, KEY, dataset.index, tmp_path / "cache" / dataset.index.dataset_id)
    asked = Stop()
    with holder.lock():
        threading.Timer(0.2, asked.request, ["a test"]).start()
        begun = time.monotonic()
        with pytest.raises(StoppedError):
            opened(dataset.bucket, dataset, tmp_path / "cache", stop=asked)
        assert time.monotonic() - begun < 5
    assert_equal(opened(far, dataset, tmp_path / "cache", progress=lambda images, total: done.append(images)), dataset)
    assert done[3:] == [8, 15, 16, 22]


def test_an_error_of_the_bucket_passes_through(dataset, tmp_path):
    def refuse(key: str) -> None:
        raise BucketAwayError(f"{key} is away")

    with pytest.raises(BucketAwayError, match="is away"):
        opened(FarStore(tmp_path / "bucket", refuse), dataset, tmp_path / "cache")


@pytest.mark.parametrize("scheme", ["local", "gs"])
def test_a_few_images_are_read_without_fetching_a_shard(scheme, tmp_path, request):
    written = write_dataset(
        str(tmp_path / "bucket") if scheme == "local" else request.getfixturevalue("gcs_bucket"), tmp_path
    )
    bucket = FarStore(tmp_path / "bucket") if scheme == "local" else written.bucket
    images = ChosenImages(bucket, KEY, written.index, tmp_path / "cache")
    np.testing.assert_array_equal(images.labels, written.labels)
    for indices in ([0], [21, 3, 4, 5, 3], list(range(22))):
        np.testing.assert_array_equal(images.read(np.array(indices)), written.pixels[indices])
    assert not [*tmp_path.glob("cache/**/*.tar")]
    if scheme == "local":
        assert bucket.downloads == []
        shard, table = (tmp_path / "bucket" / KEY / f"shard-00002.{suffix}" for suffix in ("tar", "offsets"))
        shard.chmod(0o644)
        flip_a_bit(shard, int(np.fromfile(table, OFFSETS_DTYPE)[2]["offset"]) + 20)
        with pytest.raises(BadDataError, match=r"shard-00002\.tar, image 2 .* is not as it was packed"):
            images.read(np.array([0, 10]))


def test_the_cache_has_a_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.delenv("DDPM_CACHE", raising=False)
    assert default_cache_dir() == Path("/home/somebody/.cache/ddpm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/somebody")
    assert default_cache_dir() == Path("/var/cache/somebody/ddpm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_CACHE", "scratch")
    assert default_cache_dir() == tmp_path / "scratch"
