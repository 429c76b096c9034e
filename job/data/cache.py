"""What a node keeps of a dataset: every image decoded once where they fit, else the encoded shards that are due.

The two caches give the same images for the same indices. Neither holds memory that grows with the dataset: what they
keep lies in files, which all processes of the node share.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from job.data.ahead import in_order
from job.data.image_reader import ImageReader, Uint8s
from job.data.order import Int64s, Order
from job.data.shard_source import DOWNLOADS, ShardSource
from job.data.shards import DatasetIndex
from job.exits import BadConfigError, BadDataError, BadRequestError, DiskFullError, MissingInputError
from job.stop import NEVER, Stop
from job.store import Store
from job.store.files import os_errors

_IS_FILLED = 1 << 32
_CHOOSERS = 8
"""Shards from which a few images are read at a time: these wait for the bucket, and not for a processor."""


def default_cache_dir() -> Path:
    """`$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: none of them is set, and the user has no home.
    """
    folder = os.environ.get("DDPM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/ddpm"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:
        raise BadRequestError("this user has no home folder: set DDPM_CACHE to a folder on a local disk") from None


def open_cache(
    bucket: Store,
    key: str,
    index: DatasetIndex,
    *,
    cache_dir: Path,
    budget_bytes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Stop = NEVER,
) -> ImageCache:
    """Opens a node's cache of the dataset at `key`; processes of one node that open it share its files and the work.

    Returns when every image is decoded, if these fit the budget; at once otherwise.

    Args:
        bucket: where the dataset lies.
        key: its folder, `datasets/NAME-SIZE`.
        index: its index.
        cache_dir: folder on a local disk; the dataset's part of it is named after `index.dataset_id`.
        budget_bytes: how much of that disk images may take.
        progress: called with images decoded so far, and all.
        stop: asked many times a second.

    Raises:
        StoppedError: `stop` said so; what has been decoded is kept.
        DiskFullError: the images fit the budget but not the disk.
        BadDataError: the bucket's shards are not what was packed.
    """
    source = ShardSource(bucket, key, index, cache_dir / index.dataset_id, stop=stop)
    if index.decoded_bytes <= budget_bytes:
        return DecodedCache(source, progress)
    return ShardCache(source, budget_bytes)


class ImageCache:
    """Images of a dataset by index. Each is read where it lies in the bucket; the caches below keep them on a disk."""

    def __init__(self, source: ShardSource, threads: int | None = None) -> None:
        """Fetches the offset tables, unless they are there; decodes by so many threads, see `ImageReader`."""
        self.index, self._source, self._reader = source.index, source, ImageReader(source, threads)
        self._labels = source.records["label"]

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Images `indices`, uint8 [b, H, W, C], or latents as `decode_latents`; fastest in an `out` that is used again.

        Raises:
            BadDataError: the bucket's shard is not what was packed, or one of its images is damaged.
        """
        if out is None:
            out = np.empty((len(indices), *self.index.image_shape), np.uint8)
        self._read(indices, out)
        return out

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        self._reader.read_into(out, indices, self._source.open_there)

    def labels(self, indices: Int64s) -> Int64s:
        """Classes of the images, int64 [b]; -1 without classes."""
        return self._labels[indices].astype(np.int64)

    def prefetch(self, order: Order, image_number: int) -> None:
        """Says that a run is about to read from `image_number` on; cheap to call for each batch."""
        return

    def close(self) -> None:
        """Ends its threads; what is on disk stays."""
        self._reader.close()


class DecodedCache(ImageCache):
    """All images as one memory-mapped array [N, H, W, C] in `images`, filled shard by shard.

    `checksums` holds a little-endian uint64 per image, 2^32 + its CRC-32C once it is there. Whatever a killed process
    or a power failure leaves in the two files, the checksums find it out and it is mended. Each image that is read is
    compared as well, at about a microsecond: who else writes to the cache meanwhile costs speed, and teaches nothing.
    """

    def __init__(self, source: ShardSource, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Checks what is there and decodes what is missing; one process does, others wait. Raises as `open_cache`."""
        super().__init__(source)
        self._images_path, self._filled_path = source.folder / "images", source.folder / "checksums"
        try:
            if self._missing():
                with source.lock():
                    _allocate(self._images_path, self.index.decoded_bytes)
                    _allocate(self._filled_path, 8 * self.index.images)
                    self._fill(self._missing(), progress)
        except BaseException:
            self.close()
            raise
        # As in the other cache.
        source.stop, self._is_harmed = NEVER, False
        # From here on images are read in random order, of which reading ahead would make a multiple.
        self._file.madvise(mmap.MADV_RANDOM)

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        # "raise" would make numpy fill a buffer of its own first.
        np.take(self._images, indices, axis=0, out=out, mode="clip")
        if _checksums(out) != self._filled[indices].tolist():
            if not self._is_harmed:
                said = "is no longer what was decoded: reading such images from the bucket; the next start mends it"
                logging.getLogger(__name__).warning(f"{self._images_path} {said}")
            self._is_harmed = True
            super()._read(indices, out)

    def _missing(self) -> list[int]:
        """Maps the files and returns the shards whose images are not in them, or not intact."""
        shards, threads = range(len(self.index.shards)), self._reader.threads
        shape = self.index.images, *self.index.image_shape
        try:
            with os_errors(self._images_path), self._images_path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._images: Uint8s = np.frombuffer(self._file, np.uint8).reshape(shape)
                self._filled = np.memmap(self._filled_path, "<u8", "r", shape=(self.index.images,))
        # They are not there, or not of their size.
        except (MissingInputError, ValueError):
            return list(shards)

        def is_intact(shard: int) -> bool:
            filled = self._block(self._filled, shard)
            return bool(filled.all()) and _checksums(self._block(self._images, shard)) == filled.tolist()

        with ThreadPoolExecutor(threads) as pool:
            intact = in_order(pool, is_intact, shards, 2 * threads, self._source.check)
            return [shard for shard, is_there in zip(shards, intact, strict=True) if not is_there]

    def _block(self, images: np.ndarray, shard: int) -> np.ndarray:
        return images[self._source.starts[shard] : self._source.starts[shard + 1]]

    def _fill(self, missing: list[int], progress: Callable[[int, int], None]) -> None:
        images = np.asarray(np.memmap(self._images_path, np.uint8, "r+", shape=self._images.shape))
        filled = np.memmap(self._filled_path, "<u8", "r+")
        done = self.index.images - sum(self.index.shards[shard].images for shard in missing)
        progress(done, self.index.images)
        for shard, path in self._source.fetch(missing):
            block, indices = self._block(images, shard), np.arange(*self._source.starts[shard : shard + 2])
            self._reader.read_into(block, indices, lambda _, path=path: _shard_file(path))  # type: ignore[misc]
            self._block(filled, shard)[:] = _checksums(block)
            if not self._source.is_local:
                path.unlink()
            done += len(block)
            progress(done, self.index.images)


class ShardCache(ImageCache):
    """Verified shards in the folder `shards`, the least recently used evicted first; images are decoded at each read.

    The processes of a node share the files and the budget, and change what is there under one lock. None keeps a shard
    open from one read to the next, so that an evicted one gives its place on disk back, while a reader that has just
    opened it reads on. From a bucket that is a folder, shards are read where they lie, and nothing is kept.
    """

    def __init__(self, source: ShardSource, budget_bytes: int) -> None:
        """Keeps at most `budget_bytes` of shards, or one if that is less."""
        super().__init__(source)
        self._budget_bytes = budget_bytes
        self._folder = source.folder / "shards"
        with os_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        # A batch on its way is delivered, so that training stops between steps, where all processes agree, and saves.
        source.stop = NEVER
        self._verified = cache(lambda shard: source.verified(shard, self._folder))
        self._block: tuple[int, int] | None = None
        self._due: tuple[int, ...] = ()
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        try:
            self._reader.read_into(out, indices, self._open)
        except BadDataError:
            # What has rotted on this disk since it was fetched is the bucket's no longer: fetch it anew.
            with self._source.lock():
                for shard in np.searchsorted(self._source.starts, indices, side="right") - 1:
                    self._path(shard).unlink(missing_ok=True)
            self._reader.read_into(out, indices, self._open)

    def _open(self, shard: int) -> BinaryIO:
        """A shard's file, fetched if it is not here; each image that is read from it is compared with its checksum."""
        if self._source.is_local:
            return _shard_file(self._verified(shard))
        while True:
            with suppress(MissingInputError):
                file = _shard_file(self._path(shard))
                os.utime(file.fileno())
                return file
            self._fetch([shard])

    def _path(self, shard: int) -> Path:
        return self._folder / self.index.shards[shard].name

    def _fetch(self, shards: list[int]) -> None:
        with self._source.lock(), os_errors(self._folder):
            # Another process may have fetched them while this one waited.
            missing = [shard for shard in shards if not self._path(shard).exists()]
            self._make_room(missing)
            for shard, path in self._source.fetch(missing):
                path.replace(self._path(shard))

    def _make_room(self, missing: list[int]) -> None:
        """Evicts shards, those that are not due and were not read for longest first, until `missing` fit the budget."""
        due = {self._path(shard) for shard in self._due}
        files = sorted(self._folder.iterdir(), key=lambda path: (path in due, path.stat().st_mtime_ns))
        excess_bytes = sum(path.stat().st_size for path in files) - self._budget_bytes
        excess_bytes += sum(self.index.shards[shard].bytes for shard in missing)
        for path in files:
            if excess_bytes <= 0:
                break
            excess_bytes -= path.stat().st_size
            path.unlink()

    def prefetch(self, order: Order, image_number: int) -> None:
        """Fetches in the background, soonest needed first, as many of the coming shards as the budget holds.

        Raises:
            BadConfigError: the shards of one block are more than the budget holds, so that nearly every image would
                cost the transfer of a shard.
        """
        block = order.block_of(image_number)
        if block == self._block or self._source.is_local:
            return
        if self._block is None:
            self._check_fits(order)
        # The rest of an epoch and the next one name all shards.
        upcoming = dict.fromkeys(islice(order.upcoming_shards(image_number), 2 * len(self.index.shards)))
        sums_bytes = accumulate(self.index.shards[shard].bytes for shard in upcoming)
        fitting = [sum_bytes for sum_bytes in sums_bytes if sum_bytes <= self._budget_bytes]
        self._block, self._due = block, tuple(islice(upcoming, len(fitting)))
        self._prefetcher.submit(self._prefetch, self._due)

    def _prefetch(self, due: tuple[int, ...]) -> None:
        # An error ends up unread in the future: whoever needs the shard meets it again, and reports it.
        missing = (shard for shard in due if not self._path(shard).exists())
        while (group := list(islice(missing, DOWNLOADS))) and self._due is due:
            self._fetch(group)

    def _check_fits(self, order: Order) -> None:
        sizes = [shard.bytes for shard in self.index.shards]
        total_bytes, block_images = sum(sizes), order.block_images or self.index.images
        # A block begins and ends within a shard.
        block_bytes = min(total_bytes, total_bytes * block_images // self.index.images + 2 * max(sizes))
        if block_bytes > self._budget_bytes:
            raise BadConfigError(
                f"dataset {self.index.name} is shuffled in blocks of {block_images:,} images, more than it caches: set "
                f"data.cache_gigabytes={np.ceil(block_bytes / 1e8) / 10:g}, or begin a run with a smaller "
                "data.shuffle_block_images"
            )

    def close(self) -> None:
        """Ends its threads; a download that is under way is waited for."""
        self._due = ()
        self._prefetcher.shutdown(cancel_futures=True)
        super().close()


def chosen_images(bucket: Store, key: str, index: DatasetIndex) -> ImageCache:
    """For a few images that a person wants to see: no shard of the dataset at `key` is fetched for them."""
    return ImageCache(ShardSource(bucket, key, index, default_cache_dir() / index.dataset_id), _CHOOSERS)


def _shard_file(path: Path) -> BinaryIO:
    with os_errors(path):
        return path.open("rb", buffering=0)


def _allocate(path: Path, size_bytes: int) -> None:
    """Makes a file take its place on disk now: one with holes is SIGBUS when the disk is full later."""
    where = f"{path} ({size_bytes:,} bytes; DDPM_CACHE moves it, data.cache_gigabytes limits it)"
    try:
        with os_errors(where), path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            os.truncate(file.fileno(), size_bytes)
    except DiskFullError:
        path.unlink(missing_ok=True)
        raise


def _checksums(images: Uint8s) -> list[int]:
    """What is noted of them."""
    return [_IS_FILLED | google_crc32c.value(image) for image in images]
