"""A node's cache of a dataset: all images decoded, if they fit the budget, else the encoded shards that are due.

Both caches give the same images for the same indices. They store images in files that all processes of the node share,
so their memory does not grow with the dataset.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.data.ahead import in_order
from job.data.images import Recipe, RejectedImageError, codec_versions, decode, decode_latents, prepare
from job.data.order import Int64s, Order
from job.data.shard_source import DOWNLOADS, ShardSource
from job.data.shards import DatasetIndex, Record, image_hash
from job.exits import BadConfigError, BadDataError, BadRequestError, DiskFullError, MissingInputError
from job.stop import NEVER, Stop
from job.store import Store
from job.store.files import os_errors

Uint8s = npt.NDArray[np.uint8]

_READ_AT_A_TIME = 32
_IS_DECODED = 1 << 32
_UNCACHED_THREADS = 8
"""Number of shards from which a few images are read at a time: the threads wait for the bucket, not for a processor."""


def default_cache_dir() -> Path:
    """Returns `$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: neither variable is set, and the user has no home.
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
    """Opens a node's cache of the dataset at `key`; all processes of the node share its files and the work.

    Returns after all images are decoded, if they fit the budget; at once otherwise.

    Args:
        bucket: bucket of the dataset.
        key: folder of the dataset, `datasets/NAME-SIZE`.
        index: index of the dataset.
        cache_dir: folder on a local disk; the dataset's part of it is named after `index.dataset_id`.
        budget_bytes: size limit of the images on that disk.
        progress: called with the number of images decoded so far, and of all.
        stop: asked many times a second.

    Raises:
        StoppedError: this process has to stop; the images decoded so far are kept.
        DiskFullError: the images fit the budget but not the disk.
        BadDataError: a shard in the bucket is corrupt.
    """
    source = ShardSource(bucket, key, index, cache_dir / index.dataset_id, stop=stop)
    if index.decoded_bytes <= budget_bytes:
        return DecodedCache(source, progress)
    return ShardCache(source, budget_bytes)


class ImageCache:
    """Images of a dataset by index, read from the bucket each time; the subclasses keep them on a disk."""

    def __init__(self, source: ShardSource, threads: int | None = None, *, with_pillow: bool = False) -> None:
        """Starts `threads` that decode, by default one per processor; `with_pillow` needs no torch for packed images.

        The offset tables are fetched when they are needed.

        Raises:
            BadRequestError: the crop or the filter of the index is not valid.
        """
        self.source, self.threads = source, threads or os.cpu_count() or 1
        self.index = index = source.index
        self._recipe = Recipe(index.size, "center", "box", index.channels, min_side=1) if with_pillow else None
        if index.is_foreign:
            how = index.size, index.crop, index.resize_filter, index.channels
            self._recipe = Recipe(*how, min_side=1, pixel_range=index.pixel_range)
            if index.codecs != (here := codec_versions()):
                said = f"was indexed with {index.codecs}, and is read with {here}: the lowest bits may differ"
                logging.getLogger(__name__).warning(f"dataset {index.name} {said}")
        self._decoders = ThreadPoolExecutor(self.threads, "decode")

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Returns images `indices`, uint8 [b, H, W, C], or latents as `decode_latents`; fastest into a reused `out`.

        Raises:
            BadDataError: a shard in the bucket is corrupt, or one of its images is damaged.
        """
        if out is None:
            out = np.empty((len(indices), *self.index.image_shape), np.uint8)
        self._read(indices, out)
        return out

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        self.read_into(out, indices, self.source.open_shard)

    def read_into(
        self, out: Uint8s, indices: Int64s, open_shard: Callable[[int], AbstractContextManager[BinaryIO]]
    ) -> None:
        """Reads images `indices` and decodes them, a few at a time in each thread.

        Args:
            out: uint8 [b, H, W, C].
            indices: int64 [b].
            open_shard: opens the file of a shard; called in the threads.

        Raises:
            BadDataError: an image differs from the index, is damaged, or has another size.
            StoppedError: this process has to stop.
        """
        shards = np.searchsorted(self.source.starts, indices, side="right") - 1
        rows, records = (indices - self.source.starts[shards]).tolist(), self.source.records(indices).tolist()

        def read_some(places: list[int]) -> None:
            shard = int(shards[places[0]])
            with open_shard(shard) as file:
                for place in places:
                    out[place] = self.read_image(shard, rows[place], records[place], file)

        def parts() -> Iterator[list[int]]:
            for shard in np.unique(shards):
                places = np.flatnonzero(shards == shard).tolist()
                yield from (places[at : at + _READ_AT_A_TIME] for at in range(0, len(places), _READ_AT_A_TIME))

        deque(in_order(self._decoders, read_some, parts(), 2 * self.threads, self.source.check), maxlen=0)

    def read_image(self, shard: int, row: int, record: Record, file: BinaryIO) -> Uint8s:
        """Returns image `row` of a shard from its place `record` in `file`; raises as `read_into`."""
        offset, size_bytes, _, sha256 = record
        file.seek(offset)
        encoded, problem = file.read(size_bytes), "it differs from the index"
        try:
            if image_hash(encoded) == sha256:
                if self._recipe is not None:
                    return prepare(encoded, self._recipe)
                decoder = decode_latents if self.source.index.encoding else decode
                return decoder(encoded, self.source.index.channels, self.source.index.size)
        except RejectedImageError as error:
            problem = f"it {error}"
        except BadDataError as error:
            problem = str(error)
        raise BadDataError(f"{self.source.uri(shard)}, image {row} (at byte {offset}): {problem}: {self.source.remedy}")

    def labels(self, indices: Int64s) -> Int64s:
        """Returns the classes of the images, int64 [b]; -1 without classes."""
        return self.source.records(indices)["label"].astype(np.int64)

    def prefetch(self, order: Order, image_number: int) -> None:
        """Announces that a run will read from `image_number` on; cheap enough for each batch."""
        return

    def close(self) -> None:
        """Ends the threads; the files stay."""
        self._decoders.shutdown(cancel_futures=True)


class DecodedCache(ImageCache):
    """All images as one memory-mapped array [N, H, W, C] in `images`, filled shard by shard.

    `checksums` holds a little-endian uint64 per image, 2^32 + its CRC-32C once it is decoded. After a kill or a power
    failure the checksums identify the images to decode again. Each image is also compared when it is read, which takes
    about a microsecond: training never sees what another program writes into the cache.
    """

    def __init__(self, source: ShardSource, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Verifies all images and decodes the missing ones, in one process of the node. Raises as `open_cache`."""
        super().__init__(source)
        self._images_path, self._checksums_path = source.folder / "images", source.folder / "checksums"
        try:
            if self._missing():
                with source.lock():
                    _allocate(self._images_path, self.index.decoded_bytes)
                    _allocate(self._checksums_path, 8 * self.index.images)
                    self._fill(self._missing(), progress)
        except BaseException:
            self.close()
            raise
        # A stop does not interrupt a batch: see `ShardCache`.
        source.stop, self._is_damaged = NEVER, False
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

    def _missing(self) -> list[int]:
        """Maps the files, and returns the shards whose images are missing or damaged."""
        shards, threads = range(len(self.index.shards)), self.threads
        shape = self.index.images, *self.index.image_shape
        try:
            with os_errors(self._images_path), self._images_path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._images: Uint8s = np.frombuffer(self._file, np.uint8).reshape(shape)
                self._stored_checksums = np.memmap(self._checksums_path, "<u8", "r", shape=(self.index.images,))
        # They do not exist, or have another size.
        except (MissingInputError, ValueError):
            return list(shards)

        def is_intact(shard: int) -> bool:
            stored = self._of_shard(self._stored_checksums, shard)
            return bool(stored.all()) and _checksums(self._of_shard(self._images, shard)) == stored.tolist()

        with ThreadPoolExecutor(threads) as pool:
            intact = in_order(pool, is_intact, shards, 2 * threads, self.source.check)
            return [shard for shard, is_there in zip(shards, intact, strict=True) if not is_there]

    def _of_shard(self, values: np.ndarray, shard: int) -> np.ndarray:
        """Returns the part of a shard in an array of all images or checksums."""
        return values[self.source.starts[shard] : self.source.starts[shard + 1]]

    def _fill(self, missing: list[int], progress: Callable[[int, int], None]) -> None:
        images = np.asarray(np.memmap(self._images_path, np.uint8, "r+", shape=self._images.shape))
        checksums = np.memmap(self._checksums_path, "<u8", "r+")
        done = self.index.images - int(self.index.shards.images[missing].sum())
        progress(done, self.index.images)
        for shard, opener in self._copies(missing):
            of_shard, indices = self._of_shard(images, shard), np.arange(*self.source.starts[shard : shard + 2])
            self.read_into(of_shard, indices, opener)
            self._of_shard(checksums, shard)[:] = _checksums(of_shard)
            done += len(of_shard)
            progress(done, self.index.images)

    def _copies(self, shards: list[int]) -> Iterator[tuple[int, Callable[[int], BinaryIO]]]:
        """Yields each shard with a function that opens it: on this machine where it lies, else a copy for a while."""
        if self.source.is_local:
            yield from ((shard, self.source.open_shard) for shard in shards)
            return
        for shard, path in self.source.fetch(shards):
            yield shard, lambda _, path=path: path.open("rb")  # type: ignore[misc]
            path.unlink()


class ShardCache(ImageCache):
    """Shards in the folder `shards`, the least recently used evicted first; images are decoded at each read.

    The processes of a node share the files and the budget, and change the folder under one lock. A shard is open only
    during a read, so that an evicted shard frees its disk space; a reader that has just opened it can finish. Shards of
    a local bucket are read without a copy.
    """

    def __init__(self, source: ShardSource, budget_bytes: int) -> None:
        """Keeps at most `budget_bytes` of shards, but at least one shard."""
        super().__init__(source)
        self._budget_bytes = budget_bytes
        self._folder = source.folder / "shards"
        with os_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        # A stop does not interrupt a batch: training stops between steps, where all processes agree, and saves.
        source.stop = NEVER
        self._prefetched_block: tuple[int, int] | None = None
        self._due: tuple[int, ...] = ()
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        try:
            self.read_into(out, indices, self._open)
        except BadDataError:
            # The copy on this disk may be corrupt: fetch the shards again.
            with self.source.lock():
                for shard in np.searchsorted(self.source.starts, indices, side="right") - 1:
                    self._path(shard).unlink(missing_ok=True)
            self.read_into(out, indices, self._open)

    def _open(self, shard: int) -> BinaryIO:
        """Opens a shard's file, and fetches it if necessary; the reader compares each image with its checksum."""
        if self.source.is_local:
            return self.source.open_shard(shard)
        while True:
            with suppress(MissingInputError), os_errors(path := self._path(shard)):
                file = path.open("rb", buffering=0)
                os.utime(file.fileno())
                return file
            self._fetch([shard])

    def _path(self, shard: int) -> Path:
        return self._folder / self.index.shards[shard].name

    def _fetch(self, shards: list[int]) -> None:
        with self.source.lock(), os_errors(self._folder):
            # Another process may have fetched them while this one waited.
            missing = [shard for shard in shards if not self._path(shard).exists()]
            self._make_room(missing)
            for shard, path in self.source.fetch(missing):
                path.replace(self._path(shard))

    def _make_room(self, missing: list[int]) -> None:
        """Evicts shards until `missing` fit the budget: first those not due, the least recently used before others."""
        due = {self._path(shard) for shard in self._due}
        files = sorted(self._folder.iterdir(), key=lambda path: (path in due, path.stat().st_mtime_ns))
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
        if block == self._prefetched_block or self.source.is_local:
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


def uncached_images(bucket: Store, key: str, index: DatasetIndex) -> ImageCache:
    """Opens the dataset at `key` without a cache, to read a few images: no shard is fetched for them."""
    return ImageCache(ShardSource(bucket, key, index, default_cache_dir() / index.dataset_id), _UNCACHED_THREADS)


def _allocate(path: Path, size_bytes: int) -> None:
    """Allocates a file on the disk: with a sparse file, a disk that is full later would cause SIGBUS."""
    where = f"{path} ({size_bytes:,} bytes; DDPM_CACHE moves it, data.cache_gigabytes limits it)"
    try:
        with os_errors(where), path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            os.truncate(file.fileno(), size_bytes)
    except DiskFullError:
        path.unlink(missing_ok=True)
        raise


def _checksums(images: Uint8s) -> list[int]:
    """Returns the records of images in the file `checksums`."""
    return [_IS_DECODED | google_crc32c.value(image) for image in images]
