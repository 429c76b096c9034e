"""A node's cache of a dataset: all images decoded, if they fit the budget, else the encoded shards that are due.

Both caches give the same images for the same indices. They store images in files that all processes of the node share,
so their memory does not grow with the dataset.
"""

from __future__ import annotations

import logging
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, repeat
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from job.data.reading.order import Int64s, Order
from job.data.reading.reader import DOWNLOADS, ImageCache, Uint8s
from job.data.shards import DatasetIndex
from job.exits import BadConfigError, BadDataError, DiskFullError, MissingInputError
from job.platform import allocate
from job.progress import Progress
from job.stop import NEVER, Stop, in_order
from job.store import Store
from job.store.files import os_errors

_IS_DECODED = 1 << 32


def open_cache(
    bucket: Store, index: DatasetIndex, budget_bytes: float, stop: Stop = NEVER, *, cache_dir: Path | None = None
) -> ImageCache:
    """Opens a node's cache of a dataset; all processes of the node share its files and the work.

    Returns after all images are decoded, if they fit the budget; at once otherwise.

    Args:
        bucket: bucket of the dataset.
        index: index of the dataset.
        budget_bytes: size limit of the images on the disk of the cache.
        stop: asked many times a second.
        cache_dir: folder on a local disk; None for the usual one. The dataset's part of it is `index.dataset_id`.

    Raises:
        StoppedError: this process has to stop; the images decoded so far are kept.
        DiskFullError: the images fit the budget but not the disk.
        BadDataError: a shard in the bucket is corrupt.
    """
    folder = cache_dir and cache_dir / index.dataset_id
    if index.decoded_bytes <= budget_bytes:
        return DecodedCache(bucket, index, folder, stop)
    return ShardCache(bucket, index, folder, budget_bytes)


class DecodedCache(ImageCache):
    """All images as one memory-mapped array of bytes in `images`, filled shard by shard.

    `checksums` holds a little-endian uint64 per image, 2^32 + its CRC-32C once it is decoded. After a kill or a power
    failure the checksums identify the images to decode again. Each image is also compared when it is read, which takes
    about a microsecond: training never sees what another program writes into the cache.
    """

    def __init__(self, bucket: Store, index: DatasetIndex, folder: Path | None, stop: Stop) -> None:
        """Verifies all images and decodes the missing ones, in one process of the node. Raises as `open_cache`."""
        super().__init__(bucket, index, folder, stop)
        self._images_path, self._checksums_path = self._folder / "images", self._folder / "checksums"
        self._copy: Path | None = None
        """That of the shard which is being decoded."""
        try:
            with Progress("reading images", total=index.images) as bar:
                if self._missing():
                    with self._locked():
                        _allocate(self._images_path, index.decoded_bytes)
                        _allocate(self._checksums_path, 8 * index.images)
                        self._fill(self._missing(), bar)
        except BaseException:
            self.close()
            raise
        # A stop does not interrupt a batch: see `ShardCache`.
        self._stop, self._is_damaged = NEVER, False
        # Images are read in random order from now on, and read-ahead would multiply the bytes.
        self._file.madvise(mmap.MADV_RANDOM)

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        # With mode "raise" numpy would fill a temporary buffer first.
        np.take(self._images, indices, axis=0, out=out, mode="clip")
        if _checksums(out) != self._stored_checksums[indices].tolist():
            if not self._is_damaged:
                remedy = "reading the damaged images from the bucket; the next start repairs it"
                logging.getLogger(__name__).warning(f"{self._images_path} has changed since it was decoded: {remedy}")
            self._is_damaged = True
            super()._read(indices, out)

    def open_shard(self, shard: int) -> BinaryIO:
        """Opens the copy of the shard that is being decoded, else a shard in its store."""
        return self._copy.open("rb") if self._copy else super().open_shard(shard)

    def _missing(self) -> list[int]:
        """Maps the files, and returns the shards whose images are missing or damaged."""
        shards, shape = range(len(self.index.shards)), (self.index.images, *self.index.row_shape)
        try:
            with os_errors(self._images_path), self._images_path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._images: Uint8s = np.frombuffer(self._file, np.uint8).reshape(shape)
                self._stored_checksums = np.memmap(self._checksums_path, "<u8", "r", shape=(self.index.images,))
        # They do not exist, or have another size.
        except (MissingInputError, ValueError):
            return list(shards)

        def is_intact(shard: int) -> bool:
            place = slice(*self.starts[shard : shard + 2])
            stored = self._stored_checksums[place]
            return bool(stored.all()) and _checksums(self._images[place]) == stored.tolist()

        intact = in_order(self._decoders, is_intact, shards, 2 * self._threads, self._check)
        return [shard for shard, is_there in zip(shards, intact, strict=True) if not is_there]

    def _fill(self, missing: list[int], bar: Progress) -> None:
        images = np.asarray(np.memmap(self._images_path, np.uint8, "r+", shape=self._images.shape))
        checksums = np.memmap(self._checksums_path, "<u8", "r+")
        done = self.index.images - int(self.index.shards.images[missing].sum())
        bar.update(done)
        for shard, copy in zip(missing, repeat(None)) if self.is_local else self._copies(missing):
            self._copy = copy
            first, last = self.starts[shard : shard + 2].tolist()
            super()._read(np.arange(first, last), images[first:last])
            checksums[first:last] = _checksums(images[first:last])
            if copy:
                copy.unlink()
            done += last - first
            bar.update(done)
        self._copy = None


class ShardCache(ImageCache):
    """Shards in the folder `shards`, the least recently used evicted first; images are decoded at each read.

    The processes of a node share the files and the budget, and change the folder under one lock. A shard is open only
    during a read, so that an evicted shard frees its disk space; a reader that has just opened it can finish. Shards of
    a local bucket are read without a copy.
    """

    def __init__(self, bucket: Store, index: DatasetIndex, folder: Path | None, budget_bytes: float) -> None:
        """Keeps at most `budget_bytes` of shards, but at least one shard."""
        # A stop does not interrupt a batch: training stops between steps, where all processes agree, and saves.
        super().__init__(bucket, index, folder)
        self._budget_bytes, self._shards_folder = budget_bytes, self._folder / "shards"
        self._shards_folder.mkdir(exist_ok=True)
        self._prefetched_block: tuple[int, int] | None = None
        self._due: tuple[int, ...] = ()
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        try:
            super()._read(indices, out)
        except BadDataError:
            # The copy on this disk may be corrupt: fetch the shards again.
            with self._locked():
                for shard in self.shards_of(indices):
                    self._path(shard).unlink(missing_ok=True)
            super()._read(indices, out)

    def open_shard(self, shard: int) -> BinaryIO:
        """Opens a shard's file, and fetches it if necessary; the reader compares each image with its hash."""
        if self.is_local:
            return super().open_shard(shard)
        while True:
            with suppress(MissingInputError), os_errors(path := self._path(shard)):
                file = path.open("rb", buffering=0)
                os.utime(file.fileno())
                return file
            self._fetch([shard])

    def _path(self, shard: int) -> Path:
        return self._shards_folder / self.index.shards[shard].name

    def _fetch(self, shards: list[int]) -> None:
        with self._locked(), os_errors(self._shards_folder):
            # Another process may have fetched them while this one waited.
            missing = [shard for shard in shards if not self._path(shard).exists()]
            self._make_room(missing)
            for shard, path in self._copies(missing):
                path.replace(self._path(shard))

    def _make_room(self, missing: list[int]) -> None:
        """Evicts shards until `missing` fit the budget: first those not due, the least recently used before others."""
        due = {self._path(shard) for shard in self._due}
        files = sorted(self._shards_folder.iterdir(), key=lambda path: (path in due, path.stat().st_mtime_ns))
        excess_bytes = sum(path.stat().st_size for path in files) - self._budget_bytes
        excess_bytes += int(self.index.shards.bytes[missing].sum())
        for path in files:
            if excess_bytes <= 0:
                break
            excess_bytes -= path.stat().st_size
            path.unlink()

    def prefetch(self, order: Order, image_number: int) -> None:
        """Fetches the next shards in the background, in the order of their use, as far as the budget permits.

        Raises:
            BadConfigError: the shards of one block exceed the budget, so that nearly every image would cost the
                transfer of a shard.
        """
        block = order.block_of(image_number)
        if block == self._prefetched_block or self.is_local:
            return
        if self._prefetched_block is None:
            self._check_fits(order)
        # The rest of an epoch and the next epoch contain all shards.
        upcoming = np.fromiter(islice(order.upcoming_shards(image_number), 2 * len(self.index.shards)), np.int64)
        upcoming = upcoming[np.sort(np.unique(upcoming, return_index=True)[1])]
        fitting = np.cumsum(self.index.shards.bytes[upcoming]) <= self._budget_bytes
        self._prefetched_block, self._due = block, tuple(upcoming[fitting].tolist())
        self._prefetcher.submit(self._prefetch, self._due)

    def _prefetch(self, due: tuple[int, ...]) -> None:
        # An error is ignored here: the read of the shard raises it again.
        missing = (shard for shard in due if not self._path(shard).exists())
        while (group := list(islice(missing, DOWNLOADS))) and self._due is due:
            self._fetch(group)

    def _check_fits(self, order: Order) -> None:
        sizes = self.index.shards.bytes
        total_bytes, block_images = int(sizes.sum()), order.block_images or self.index.images
        # A block begins and ends within a shard.
        block_bytes = min(total_bytes, total_bytes * block_images // self.index.images + 2 * int(sizes.max()))
        if block_bytes > self._budget_bytes:
            raise BadConfigError(
                f"dataset {self.index.name} is shuffled in blocks of {block_images:,} images, more than it caches: set "
                f"data.cache_gigabytes={np.ceil(block_bytes / 1e8) / 10:g}, or begin a run with a smaller "
                "data.shuffle_block_images"
            )

    def close(self) -> None:
        """Ends the threads, after the current download."""
        self._due = ()
        self._prefetcher.shutdown(cancel_futures=True)
        super().close()


def _allocate(path: Path, size_bytes: int) -> None:
    """Allocates a file on the disk: with a sparse file, a disk that is full later would cause SIGBUS."""
    where = f"{path} ({size_bytes:,} bytes; DDPM_CACHE moves it, data.cache_gigabytes limits it)"
    try:
        with os_errors(where), path.open("ab") as file:
            allocate(file.fileno(), size_bytes)
            os.truncate(file.fileno(), size_bytes)
    except DiskFullError:
        path.unlink(missing_ok=True)
        raise


def _checksums(images: Uint8s) -> list[int]:
    """Returns the records of images in the file `checksums`."""
    return [_IS_DECODED | google_crc32c.value(image) for image in images]
