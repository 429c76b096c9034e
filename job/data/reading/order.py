"""The order of a run, which image of the dataset is image n of the run, and the batches, read ahead.

`Order` maps image n to an image of the dataset, as a function of (seed, n) alone. Image n is at position n mod N of
epoch n div N. In each epoch the shards are permuted and concatenated, the sequence is cut into blocks, and each block
is shuffled. A reader that cannot hold the dataset needs the shards of one block at a time. The number of machines,
their caches and the batch size do not change the order.

A run's `data.order` names this algorithm: another one would show a resumed run some images twice and others never.

Batches straddle epochs, without dropping or repeating an image. So an epoch may end inside a batch, and work "after an
epoch" is done at the first batch boundary at or after its last image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from job.exits import StoppedError
from job.stop import NEVER, Stop

if TYPE_CHECKING:
    import torch

    from job.config import RunConfig
    from job.data.shards import DatasetIndex

PREFETCH_BATCHES = 4
"""Number of batches that are read ahead."""
_CHUNK_IMAGES = 8192
_LOOK_SECONDS = 0.5
_LAST_BATCH_SECONDS = 2.0
# Fewer rounds suffice for thousands of images, but blocks of three to six show a bias.
_FEISTEL_ROUNDS = 20

Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Order:
    """The order of a run over a dataset whose shards hold `shard_images` images.

    Attributes:
        shard_images: images per shard, in the order of the dataset's index.
        seed: the run's seed, 64 bits.
        block_images: size of a block; 0 for the whole dataset.
    """

    shard_images: tuple[int, ...]
    seed: int
    block_images: int = 0

    @cached_property
    def images(self) -> int:
        """Returns the number of images in the dataset."""
        return sum(self.shard_images)

    def indices(self, image_numbers: Int64s) -> Int64s:
        """Returns the indices in the dataset (shard order) of the run's images `image_numbers`, int64 [b].

        The numbers may have any order; thousands of ascending ones at once are fastest.
        """
        numbers = np.asarray(image_numbers, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self.images)
        blocks, offsets = np.divmod(positions, self._block_size)
        starts = blocks * self._block_size
        sizes = np.minimum(self._block_size, self.images - starts)
        places = starts + _shuffled(offsets, sizes, _key(self.seed, epochs, blocks + 1))
        indices = np.empty_like(numbers)
        for same_epoch in filter(len, np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(epochs)) + 1)):
            _, ends, shifts = self._layout(int(epochs[same_epoch[0]]))
            indices[same_epoch] = places[same_epoch] + shifts[np.searchsorted(ends, places[same_epoch], side="right")]
        return indices

    def numbers_of(self, index: int, epochs: int) -> Int64s:
        """Returns the number at which a run sees image `index` in each of its first epochs: the inverse of `indices`.

        Returns:
            int64 [epochs], ascending.
        """
        numbers, shard = np.arange(epochs), np.searchsorted(np.cumsum(self.shard_images), index, side="right")
        shifts = [shifts[shards == shard] for shards, _, shifts in map(self._layout, range(epochs))]
        places = index - np.array(shifts, dtype=np.int64).reshape(epochs)
        starts = places // self._block_size * self._block_size
        sizes = np.minimum(self._block_size, self.images - starts)
        keys = _key(self.seed, numbers, places // self._block_size + 1)
        return numbers * self.images + starts + _shuffled(places - starts, sizes, keys, backwards=True)

    def block_of(self, image_number: int) -> tuple[int, int]:
        """Returns the epoch of an image of the run, and its block within the epoch."""
        epoch, position = divmod(image_number, self.images)
        return epoch, position // self._block_size

    def upcoming_shards(self, image_number: int) -> Iterator[int]:
        """Yields the shards that the run needs from the block of `image_number` on, in order, without end."""
        epoch, block = self.block_of(image_number)
        place = block * self._block_size
        while True:
            shards, ends, _ = self._layout(epoch)
            yield from shards[np.searchsorted(ends, place, side="right") :].tolist()
            epoch, place = epoch + 1, 0

    @property
    def _block_size(self) -> int:
        return min(self.block_images or self.images, self.images)

    def _layout(self, epoch: int) -> tuple[Int64s, Int64s, Int64s]:
        """Returns an epoch's order of shards, the end of each, and the shift from a place there to an index."""
        images = np.array(self.shard_images, dtype=np.int64)
        shards = np.argsort(_key(self.seed, epoch, 0, np.arange(len(images))), kind="stable")
        ends = np.cumsum(images[shards])
        return shards, ends, np.cumsum(images)[shards] - ends


def order_of(index: DatasetIndex, config: RunConfig) -> Order:
    """Returns the order in which a run of this configuration sees the images of its dataset."""
    return Order(tuple(index.shards.images.tolist()), config.train.seed, config.data.shuffle_block_images)


def images_at_epoch(epoch: int, dataset_images: int, batch_size_images: int) -> int:
    """Returns `images_seen` at the first batch boundary at or after `epoch` passes over the dataset."""
    return -(-epoch * dataset_images // batch_size_images) * batch_size_images


def epochs_completed_by(images_seen: int, dataset_images: int, batch_size_images: int) -> range:
    """Returns the epochs that the batch ending at `images_seen` completed; a batch may be larger than the dataset."""
    before = max(0, images_seen - batch_size_images)
    return range(before // dataset_images + 1, images_seen // dataset_images + 1)


def crosses(images_seen: int, batch_size_images: int, every_images: int) -> bool:
    """Returns whether the batch ending at `images_seen` reached or passed a multiple of `every_images`."""
    return images_seen // every_images > max(0, images_seen - batch_size_images) // every_images


class Images(Protocol):
    """The images of a dataset, as `job.data.reading.cache.ImageCache` reads them."""

    index: DatasetIndex

    def read(self, indices: Int64s, out: npt.NDArray[np.uint8]) -> object:
        """Reads images `indices` into `out`, uint8 [b, H, W, C]."""

    def labels(self, indices: Int64s) -> Int64s:
        """Returns their classes, int64 [b]."""

    def prefetch(self, order: Order, image_number: int) -> None:
        """Announces that a run will read from `image_number` on."""


class LoadedBatch(NamedTuple):
    """This process's part of one global batch.

    Attributes:
        image_numbers: int64 [b].
        images: uint8 [b, C, H, W], or float16 [b, 2 C, h, w] of latents; channels_last in memory.
        labels: int64 [b], or None without classes.
        conditions: uint8 [b, Cc, H, W], or None.
        vectors: float32 [b, k], or None.
    """

    image_numbers: Int64s
    images: torch.Tensor
    labels: torch.Tensor | None
    conditions: torch.Tensor | None = None
    vectors: torch.Tensor | None = None


def stream_batches(
    images: Images,
    order: Order,
    *,
    batch_size_images: int,
    first_image: int,
    last_image: int | None,
    places: range | None = None,
    pin_memory: bool = False,
    with_labels: bool = True,
    stop: Stop = NEVER,
) -> BatchStream:
    """Yields this process's images of each global batch, read ahead in one thread.

    Global batches are full, also across epochs: the k-th covers `batch_size_images` images of the run from
    `first_image + k * batch_size_images` on. They end where `last_image` is reached; without it, never.

    An error in the thread is raised at its place in the sequence.

    Args:
        images: the dataset.
        order: order of the images.
        batch_size_images: size of the global batch, over all processes.
        first_image: number of the first image, on any batch boundary of the run.
        last_image: how many images of the run are needed at least, or None for no end.
        places: this process's places in each global batch; None: all.
        pin_memory: whether batches are page-locked, so that a GPU copies them in the background.
        with_labels: whether batches have the dataset's classes, as the network has.
        stop: polled during the wait for a batch, as a heartbeat, also while the bucket of a shard is away.
    """
    import torch

    def batches() -> Iterator[LoadedBatch]:
        own = range(batch_size_images) if places is None else places
        for first, indices, numbers in _parts(order, batch_size_images, first_image, last_image, own):
            images.prefetch(order, first)
            batch = torch.empty((len(indices), *images.index.image_shape), dtype=torch.uint8, pin_memory=pin_memory)
            images.read(indices, out=batch.numpy())
            batch = batch.view(torch.float16) if images.index.encoding else batch
            labels = torch.from_numpy(images.labels(indices)) if with_labels and images.index.classes else None
            if labels is not None and pin_memory:
                labels = labels.pin_memory()
            yield LoadedBatch(numbers, batch.permute(0, 3, 1, 2), labels)

    return BatchStream(batches(), stop)


class BatchStream(Iterator[LoadedBatch]):
    """Batches that a thread reads ahead, from the first call until they end or `close` is called."""

    def __init__(self, batches: Iterator[LoadedBatch], stop: Stop) -> None:
        """Takes its arguments from `stream_batches`."""
        self._batches, self._stop = batches, stop
        self._reader = ThreadPoolExecutor(1, "batches")
        self._coming: deque[Future[LoadedBatch | None]] = deque()
        self._is_closed = False

    def __next__(self) -> LoadedBatch:
        """Waits for the next batch and returns it."""
        self._read_ahead(PREFETCH_BATCHES + 1)
        if not self._coming:
            raise StopIteration
        coming = self._coming.popleft()
        while not coming.done() and not wait([coming], _LOOK_SECONDS).done:
            self._stop()
        if coming.exception() is None and (batch := coming.result()) is not None:
            return batch
        self.close()
        raise coming.exception() or StopIteration

    def holds(self, count: int) -> bool:
        """Returns at once whether the next `count` batches are read, or all that remain; not if a stop ended a read."""
        self._read_ahead(PREFETCH_BATCHES)
        coming = islice(self._coming, count)
        return all(batch.done() and not isinstance(batch.exception(), StoppedError) for batch in coming)

    def close(self) -> None:
        """Ends the thread, and waits at most `_LAST_BATCH_SECONDS` for its current batch."""
        self._is_closed = True
        self._reader.shutdown(wait=False, cancel_futures=True)
        wait([batch for batch in self._coming if not batch.cancelled()], _LAST_BATCH_SECONDS)
        self._coming.clear()

    def _read_ahead(self, count: int) -> None:
        while len(self._coming) < count and not self._is_closed:
            self._coming.append(self._reader.submit(next, self._batches, None))


def _parts(
    order: Order, batch_size: int, first: int, last: int | None, places: range
) -> Iterator[tuple[int, Int64s, Int64s]]:
    """Yields each batch's first image, and the indices and numbers at these places, computed for thousands at once."""
    chunk_batches = max(1, _CHUNK_IMAGES // batch_size)
    while last is None or first < last:
        batches = chunk_batches if last is None else min(chunk_batches, -(-(last - first) // batch_size))
        firsts = first + batch_size * np.arange(batches)
        numbers = firsts[:, None] + np.arange(places.start, places.stop, places.step)
        yield from zip(firsts.tolist(), order.indices(numbers.ravel()).reshape(numbers.shape), numbers, strict=True)
        first += batches * batch_size


def _shuffled(offsets: Int64s, sizes: Int64s, keys: UInt64s, *, backwards: bool = False) -> Int64s:
    """Evaluates a keyed permutation of `range(size)`, or its inverse, at `offset`, elementwise.

    A Feistel network permutes a grid a little larger than the block, and cycle walking leads back into the block (Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). An even number of rows lets odd permutations occur too.
    """
    rows = 2 * np.ceil(np.sqrt(sizes) / 2).astype(np.int64)
    columns = -(-sizes // rows)
    moved = _feistel(offsets, rows, columns, keys, backwards)
    (outside,) = np.nonzero(moved >= sizes)
    while outside.size:
        moved[outside] = _feistel(moved[outside], rows[outside], columns[outside], keys[outside], backwards)
        outside = outside[moved[outside] >= sizes[outside]]
    return moved


def _feistel(places: Int64s, rows: Int64s, columns: Int64s, keys: UInt64s, backwards: bool) -> Int64s:
    """Permutes the cells of a grid: a round rotates each column, or each row, by a hash of its number."""
    row, column = (half.astype(np.uint32) for half in np.divmod(places, columns))
    row_count, column_count = rows.astype(np.uint32), columns.astype(np.uint32)
    key, step = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    for number in range(_FEISTEL_ROUNDS)[:: -1 if backwards else 1]:
        of_round = key + step * np.uint32(number)
        if number % 2:
            column = _turned(column, row ^ of_round, column_count, backwards)
        else:
            row = _turned(row, column ^ of_round, row_count, backwards)
    return row.astype(np.int64) * columns + column


def _turned(half: UInt32s, keyed: UInt32s, count: UInt32s, backwards: bool) -> UInt32s:
    """Returns (half ± hash) mod count without a division; below 2^31 rows or columns the sum cannot overflow."""
    turn = ((_mixed32(keyed).astype(np.uint64) * count) >> np.uint64(32)).astype(np.uint32)
    moved = half + (count - turn if backwards else turn)
    return np.minimum(moved, moved - count)


def _mixed32(x: UInt32s) -> UInt32s:
    """Returns the bijective hash lowbias32 (C. Wellons 2018, "Prospecting for Hash Functions")."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _mixed64(x: UInt64s) -> UInt64s:
    """Returns the finaliser of SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*words: Int64s | int) -> UInt64s:
    """Returns 64-bit keys that depend on all arguments, elementwise."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = _mixed64((key ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return key
