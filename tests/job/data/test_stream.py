import hashlib
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from job.data.reading.cache import DecodedCache, ImageCache, ShardCache, open_cache
from job.data.reading.order import PREFETCH_BATCHES, LoadedBatch, Order, stream_batches
from job.exits import BadDataError
from tests.job.launching import eventually
from tests.job.small_dataset import FarStore, SmallDataset, write_dataset

SHARD_IMAGES = (9, 2, 11, 7, 6)
IMAGES = sum(SHARD_IMAGES)
BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SmallDataset:
    root = tmp_path_factory.mktemp("stream")
    return write_dataset(str(root / "bucket"), root, SHARD_IMAGES, size=64, grain=8)


@pytest.fixture(params=[DecodedCache, ShardCache])
def cache(request, dataset, tmp_path):
    far = FarStore(Path(dataset.bucket.uri))
    shard_bytes = sum(shard.bytes for shard in dataset.index.shards)
    budget_bytes = dataset.index.decoded_bytes if request.param is DecodedCache else shard_bytes * 19 // 20
    cache = open_cache(far, dataset.index, budget_bytes, cache_dir=tmp_path)
    assert type(cache) is request.param
    yield cache
    cache.close()


def stream(cache: ImageCache, first: int, last: int | None, rank: int = 0, world_size: int = 1, **options):
    return stream_batches(
        cache,
        Order(SHARD_IMAGES, seed=4, block_images=10),
        batch_size_images=BATCH,
        first_image=first,
        last_image=last,
        places=range(rank, BATCH, world_size),
        **options,
    )


def hashes(batches: list[LoadedBatch]) -> dict[int, str]:
    """Hash of what each image number of the run showed."""
    seen = {}
    for batch in batches:
        for number, image, label in zip(batch.image_numbers.tolist(), batch.images, batch.labels, strict=True):
            assert number not in seen
            seen[number] = hashlib.sha256(image.numpy().tobytes() + bytes([int(label)])).hexdigest()
    return seen


@pytest.fixture(scope="module")
def expected(dataset) -> dict[int, str]:
    """The first three epochs, straight from the pixels."""
    order = Order(SHARD_IMAGES, seed=4, block_images=10)
    numbers = np.arange(3 * IMAGES + BATCH)
    return {
        int(n): hashlib.sha256(dataset.pixels[i].transpose(2, 0, 1).tobytes() + bytes([dataset.labels[i]])).hexdigest()
        for n, i in zip(numbers, order.indices(numbers), strict=True)
    }


def test_any_number_of_processes_agrees(cache, expected):
    for world_size in (1, 3, 11):
        for first in (0, 5, 2 * IMAGES):
            ranks = [list(stream(cache, first, 3 * IMAGES, rank, world_size)) for rank in range(world_size)]
            seen: dict[int, str] = {}
            for together in zip(*ranks, strict=True):
                numbers = np.concatenate([batch.image_numbers for batch in together])
                assert sorted(numbers) == list(range(min(numbers), min(numbers) + BATCH))
                assert max(len(batch.images) for batch in together) <= -(-BATCH // world_size)
                for batch in together:
                    seen |= hashes([batch])
            end = first + -(-(3 * IMAGES - first) // BATCH) * BATCH
            assert seen == {number: expected[number] for number in range(first, end)}


def test_stream_ends_at_a_batch_boundary(cache):
    ends = [(0, 16, [0, 8]), (0, 17, [0, 8, 16]), (3, 12, [3, 11]), (16, 16, []), (24, 16, []), (0, 1, [0])]
    for first, last, boundaries in ends:
        batches = list(stream(cache, first, last))
        assert [batch.image_numbers[0] for batch in batches] == boundaries
        assert all(len(batch.images) == BATCH for batch in batches)
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
    """A cache that fails at the batch that holds a certain image, and counts the batches it read."""

    def __init__(self, cache: ImageCache, fails_at_batch: int | None = None) -> None:
        self.cache, self.index, self.fails_at_batch, self.batches = cache, cache.index, fails_at_batch, 0

    def read(self, indices, out=None):
        if self.batches == self.fails_at_batch:
            raise BadDataError("shard-00001.tar is rotten")
        self.batches += 1
        return self.cache.read(indices, out)

    def __getattr__(self, name):
        return getattr(self.cache, name)


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

    class Silent(Reader):
        def read(self, indices, out):
            if self.batches == 2:
                is_silent.set()
                comes.wait(60)
            return super().read(indices, out)

    batches = stream(Silent(cache), 0, None)
    next(batches)
    assert is_silent.wait(10)
    batches.close()
    assert not comes.is_set() and threads()
    comes.set()
    wait_for_the_end()


def test_errors_come_in_their_place(cache):
    reader = Reader(cache, fails_at_batch=6)
    batches, taken = stream(reader, 0, None), []
    with pytest.raises(BadDataError, match=r"shard-00001\.tar is rotten"):
        taken.extend(batch.image_numbers[0] for batch in batches)
    wait_for_the_end()
    assert taken == list(range(0, 6 * BATCH, BATCH))
