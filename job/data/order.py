"""The one order of the data: which image of the dataset is image n of a run, as a function of (seed, n) alone.

Image n is at position n mod N of epoch n div N. In each epoch the shards are permuted and laid end to end, this line is
cut into blocks, and each block is shuffled within itself. So a reader that cannot hold the dataset needs the shards of
one block at a time, and who reads what, where from and on how many machines does not enter into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

ORDER_VERSION = "feistel-1"
"""Stored with a run: another algorithm would show a resumed run some images twice and others never."""

# Fewer are enough for thousands of images; blocks of three to six show a bias below twenty.
_FEISTEL_ROUNDS = 20

Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Order:
    """The order of a run over a dataset whose shards hold `shard_images` images.

    Attributes:
        shard_images: images per shard, in the order of the dataset's index.
        seed: of the run, 64 bits.
        block_images: images that are shuffled among each other; 0 for the whole dataset.
    """

    shard_images: tuple[int, ...]
    seed: int
    block_images: int = 0

    @cached_property
    def images(self) -> int:
        """Number of images in the dataset."""
        return sum(self.shard_images)

    def indices(self, image_numbers: Int64s) -> Int64s:
        """Indices in the dataset (shard order) of the images `image_numbers` of the run, int64 [b]; any b, any order.

        Cheapest for thousands of ascending numbers at once.
        """
        numbers = np.asarray(image_numbers, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self.images)
        blocks, offsets = np.divmod(positions, self._block)
        starts = blocks * self._block
        sizes = np.minimum(self._block, self.images - starts)
        places = starts + _shuffled(offsets, sizes, _key(self.seed, epochs, blocks + 1))
        indices = np.empty_like(numbers)
        for run in _runs(epochs):
            _, ends, shifts = self._layout(int(epochs[run.start]))
            indices[run] = places[run] + shifts[np.searchsorted(ends, places[run], side="right")]
        return indices

    def block_of(self, image_number: int) -> tuple[int, int]:
        """Epoch, and block within it, of an image of the run."""
        epoch, position = divmod(image_number, self.images)
        return epoch, position // self._block

    def upcoming_shards(self, image_number: int) -> Iterator[int]:
        """Indices of the shards that the run needs from the block of `image_number` on, soonest first, without end."""
        epoch, block = self.block_of(image_number)
        place = block * self._block
        while True:
            shards, ends, _ = self._layout(epoch)
            yield from shards[np.searchsorted(ends, place, side="right") :].tolist()
            epoch, place = epoch + 1, 0

    @property
    def _block(self) -> int:
        return min(self.block_images or self.images, self.images)

    def _layout(self, epoch: int) -> tuple[Int64s, Int64s, Int64s]:
        """The shards as they lie end to end in an epoch, where each ends, and what makes a place there an index."""
        images = np.array(self.shard_images, dtype=np.int64)
        shards = np.argsort(_key(self.seed, epoch, 0, np.arange(len(images))), kind="stable")
        ends = np.cumsum(images[shards])
        return shards, ends, np.cumsum(images)[shards] - ends


def _shuffled(offsets: Int64s, sizes: Int64s, keys: UInt64s) -> Int64s:
    """Keyed permutation of `range(size)` at `offset`, elementwise.

    A Feistel network on a grid a little larger than the block, and cycle walking back into the block (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). An even number of rows lets odd permutations occur too.
    """
    rows = 2 * np.ceil(np.sqrt(sizes) / 2).astype(np.int64)
    columns = -(-sizes // rows)
    moved = _feistel(offsets, rows, columns, keys)
    (outside,) = np.nonzero(moved >= sizes)
    while outside.size:
        moved[outside] = _feistel(moved[outside], rows[outside], columns[outside], keys[outside])
        outside = outside[moved[outside] >= sizes[outside]]
    return moved


def _feistel(places: Int64s, rows: Int64s, columns: Int64s, keys: UInt64s) -> Int64s:
    """Permutation of the cells of a grid: a round turns each column, or each row, by a hash of its number."""
    row, column = (half.astype(np.uint32) for half in np.divmod(places, columns))
    row_count, column_count = rows.astype(np.uint32), columns.astype(np.uint32)
    key, step = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    for _ in range(_FEISTEL_ROUNDS // 2):
        row = _turned(row, column ^ key, row_count)
        key = key + step
        column = _turned(column, row ^ key, column_count)
        key = key + step
    return row.astype(np.int64) * columns + column


def _turned(half: UInt32s, keyed: UInt32s, count: UInt32s) -> UInt32s:
    """(half + hash) mod count without a division; below 2^31 rows or columns the sum cannot overflow."""
    turn = (_mixed32(keyed).astype(np.uint64) * count) >> np.uint64(32)
    moved = half + turn.astype(np.uint32)
    return np.minimum(moved, moved - count)


def _mixed32(x: UInt32s) -> UInt32s:
    """The bijective hash lowbias32 (C. Wellons 2018, "Prospecting for Hash Functions")."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _mixed64(x: UInt64s) -> UInt64s:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*words: Int64s | int) -> UInt64s:
    """64-bit keys that depend on all of their arguments, elementwise."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = _mixed64((key ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return key


def _runs(values: Int64s) -> Iterator[slice]:
    """Slices of equal neighbours."""
    cuts = (np.flatnonzero(np.diff(values)) + 1).tolist()
    yield from (slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True) if a < b)
