"""A node's cache of a dataset: all images decoded, if they fit the budget, else the encoded shards that are due.

Both caches give the same images for the same indices. They store images in files that all processes of the node share,
so their memory does not grow with the dataset. No reader hashes a shard: each image has a hash of its own, and nothing
reads what lies between images. `ddpm data verify` hashes both.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from job.data.codecs import codec_versions, decode
from job.data.images import Recipe, RejectedImageError, prepare
from job.data.reading.order import Int64s, Order
from job.data.shards import DatasetIndex, Record, image_hash, offsets_dtype
from job.exits import BadConfigError, BadDataError, DiskFullError, MissingInputError
from job.platform import allocate
from job.progress import Progress
from job.stop import NEVER, STOP_POLL_SECONDS, Stop, in_order
from job.store import Store, open_to_read, split_uri
from job.store.files import default_cache_dir, os_errors

Uint8s = npt.NDArray[np.uint8]

_DOWNLOADS = 4
_READ_AT_A_TIME = 32
_IS_DECODED = 1 << 32
_THREADS = 8
"""The least number of threads that read and decode: without a cache they wait for the bucket, not for a processor."""


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


class ImageCache:
    """Images of a dataset by index, each read from the bucket, without its shard; the subclasses keep them on a disk.

    The shards lie beside the index, or at the URIs of tars that are indexed in place. Thread-safe.

    Attributes:
        index: the dataset's index.
        starts: index of each shard's first image, and N, int64 [shards + 1].
        is_local: whether all shards are files of this machine, which are read without a copy.
        remedy: how a person repairs a damaged shard, for messages.
    """

    def __init__(
        self,
        bucket: Store,
        index: DatasetIndex,
        folder: Path | None = None,
        stop: Stop = NEVER,
        *,
        with_pillow: bool = False,
    ) -> None:
        """Opens the stores of the dataset's shards, without any request.

        Args:
            bucket: bucket of the dataset.
            index: index of the dataset.
            folder: this dataset's part of the cache, shared by all processes of the node; None for the usual one.
            stop: ends reading and fetching.
            with_pillow: whether packed images are decoded without torch.

        Raises:
            BadRequestError: a shard's URI, or the crop or the filter of the index, is not valid.
            NoPermissionError: no credentials for a shard's bucket were found.
        """
        self.index, self._bucket, self._key, self._stop = index, bucket, index.key, stop
        self._folder = folder = folder or default_cache_dir() / index.dataset_id
        self.starts: Int64s = np.concatenate([[0], np.cumsum(index.shards.images)])
        retry = bucket.retry.elsewhere()
        self._foreign = {uri: open_to_read(uri, retry) for uri in {split_uri(uri)[0] for uri in index.shards.uris}}
        self.is_local = all(store.uri.startswith("/") for store in self._foreign.values() or [bucket])
        self.remedy = f"restore it, or {'index' if index.is_foreign else 'pack'} the dataset again"
        self._tables_path, self._are_loaded = folder / "offsets", np.zeros(len(index.shards), bool)
        self._dtype = offsets_dtype(len(index.vector_names))
        with os_errors(self._tables_path):
            folder.mkdir(parents=True, exist_ok=True)
            # A hundred million images have gigabytes of tables, and a batch needs a few: the rest is a hole.
            with self._tables_path.open("ab") as file:
                file.truncate(index.images * self._dtype.itemsize)
            self._tables = np.asarray(np.memmap(self._tables_path, self._dtype, "r"))
        self._recipe, how = None, {"channels": index.channels, "bits": index.bits, "min_side": 1}
        if with_pillow:
            packed_range = "0,65535" if index.bits == 16 else ""
            self._recipe = Recipe(index.size, "center", "box", pixel_range=packed_range, **how)
        if index.is_foreign:
            self._recipe = Recipe(index.size, index.crop, index.resize_filter, pixel_range=index.pixel_range, **how)
            if index.codecs != (here := codec_versions()):
                said = f"was indexed with {index.codecs}, and is read with {here}: the lowest bits may differ"
                logging.getLogger(__name__).warning(f"dataset {index.name} {said}")
        self._threads = max(_THREADS, os.cpu_count() or 1)
        self._decoders = ThreadPoolExecutor(self._threads, "decode")
        self._fetchers = ThreadPoolExecutor(_DOWNLOADS, "fetch")

    def read(self, indices: Int64s, out: Uint8s | None = None) -> npt.NDArray[Any]:
        """Returns images `indices`, uint8 or uint16 [b, H, W, C], or mean and log-variance of latents, float16.

        It is fastest into the bytes of a reused `out`, uint8 [b, *`row_shape`].

        Raises:
            BadDataError: an image differs from the index, is damaged, or has another size.
            StoppedError: this process has to stop.
        """
        if out is None:
            out = np.empty((len(indices), *self.index.row_shape), np.uint8)
        self._read(indices, out)
        return out.view(self.index.dtype)

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        """Reads images and decodes them, a few at a time in each thread."""
        shards = self.shards_of(indices)
        rows, records = (indices - self.starts[shards]).tolist(), self.records(indices).tolist()
        values = out.view(self.index.dtype)

        def read_some(places: list[int]) -> None:
            shard = int(shards[places[0]])
            with self.open_shard(shard) as file:
                for place in places:
                    values[place] = self.read_image(shard, rows[place], records[place], file)

        def parts() -> Iterator[list[int]]:
            for shard in np.unique(shards):
                places = np.flatnonzero(shards == shard).tolist()
                yield from (places[at : at + _READ_AT_A_TIME] for at in range(0, len(places), _READ_AT_A_TIME))

        deque(in_order(self._decoders, read_some, parts(), 2 * self._threads, self._check), maxlen=0)

    def read_image(self, shard: int, row: int, record: Record, file: BinaryIO) -> npt.NDArray[Any]:
        """Returns image `row` of a shard from its place `record` in `file`; raises as `read`."""
        offset, size_bytes, _, sha256, *_ = record
        file.seek(offset)
        encoded, problem = file.read(size_bytes), "it differs from the index"
        try:
            if image_hash(encoded) == sha256:
                if self._recipe is not None:
                    return prepare(encoded, self._recipe)
                found = decode(encoded, self.index.image_shape, self.index.dtype)
                if self.index.encoding is None or np.isfinite(found).all():
                    return found
                problem = "its latents are not finite"
        except RejectedImageError as error:
            problem = f"it {error}"
        except BadDataError as error:
            problem = str(error)
        store, key = self.place(shard)
        raise BadDataError(f"{store.uri_of(key)}, image {row} (at byte {offset}): {problem}: {self.remedy}")

    def labels(self, indices: Int64s) -> Int64s:
        """Returns the classes of the images, int64 [b]; -1 without classes."""
        return self.records(indices)["label"].astype(np.int64)

    def numbers(self, indices: Int64s) -> npt.NDArray[np.float32]:
        """Returns the vectors of the images as they were packed, float32 [b, k]."""
        names = self.index.vector_names
        return self.records(indices)["vector"] if names else np.empty((len(indices), 0), np.float32)

    def vectors(self, indices: Int64s) -> npt.NDArray[np.float32]:
        """Returns the vectors with mean 0 and deviation 1 of each number over the dataset, float32 [b, k]."""
        mean, std = np.array(self.index.vector_mean), np.array(self.index.vector_std)
        return ((self.numbers(indices) - mean) / std).astype(np.float32)

    def prefetch(self, order: Order, image_number: int) -> None:
        """Announces that a run will read from `image_number` on; cheap enough for each batch."""
        return

    def close(self) -> None:
        """Ends the threads; the files stay."""
        # A process that has to stop does not wait for a download, which cannot be cancelled.
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def shards_of(self, indices: Int64s) -> Int64s:
        """Returns the shards of images `indices`, int64 [b]."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def records(self, indices: Int64s) -> np.ndarray:
        """Returns the rows of images `indices` in the offset tables, `offsets_dtype` [b].

        The tables of their shards are verified first, and fetched if they are not in the cache.

        Raises:
            BadDataError: a table in the bucket is corrupt.
            DiskFullError: a table does not fit the disk.
        """
        shards = self.shards_of(indices)
        if not (are_loaded := self._are_loaded[shards]).all():
            list(
                in_order(
                    self._fetchers, self._load_table, np.unique(shards[~are_loaded]).tolist(), _DOWNLOADS, self._check
                )
            )
        return self._tables[indices]

    def _load_table(self, shard: int) -> None:
        first, last = self.starts[shard : shard + 2].tolist()
        if hashlib.sha256(self._tables[first:last].data).hexdigest() != self.index.shards[shard].offsets_sha256:
            table = self.read_table(shard)
            # Not through the map, where a full disk would cause SIGBUS.
            with os_errors(self._tables_path), self._tables_path.open("r+b") as file:
                file.seek(first * self._dtype.itemsize)
                file.write(table.tobytes())
        else:
            self._check_table(shard, self._tables[first:last])
        self._are_loaded[shard] = True

    def read_table(self, shard: int) -> np.ndarray:
        """Reads the offset table of a shard from the bucket, `offsets_dtype` [images].

        Raises:
            BadDataError: the table is corrupt.
        """
        packed = self.index.shards[shard]
        key = f"{self._key}/{packed.offsets_name}"
        data = self._bucket.read(key).data
        is_whole = len(data) == packed.images * self._dtype.itemsize
        if not is_whole or hashlib.sha256(data).hexdigest() != packed.offsets_sha256:
            raise BadDataError(f"{self._bucket.uri_of(key)} differs from the index: {self.remedy}")
        self._check_table(shard, table := np.frombuffer(data, self._dtype))
        return table

    def _check_table(self, shard: int, table: np.ndarray) -> None:
        """Raises `BadDataError` for an impossible table: a hostile index may contain the hash of any."""
        packed, classes = self.index.shards[shard], len(self.index.classes)
        # A header comes before the first image.
        are_classes = not classes or 0 <= table["label"].min() <= table["label"].max() < classes
        if not are_classes or not tarfile.BLOCKSIZE <= table["offset"].min() <= table["offset"].max() < packed.bytes:
            uri = self._bucket.uri_of(f"{self._key}/{packed.offsets_name}")
            raise BadDataError(f"{uri} points beyond its shard or its classes: {self.remedy}")

    def place(self, shard: int) -> tuple[Store, str]:
        """Returns the store that holds a shard's tar, and its key there."""
        packed = self.index.shards[shard]
        if not packed.uri:
            return self._bucket, f"{self._key}/{packed.name}"
        folder, name = split_uri(packed.uri)
        return self._foreign[folder], name

    def open_shard(self, shard: int) -> BinaryIO:
        """Opens a shard's tar, by default in its store; called in the threads."""
        store, key = self.place(shard)
        return store.open(key)

    def _copies(self, shards: Iterable[int]) -> Iterator[tuple[int, Path]]:
        """Yields each shard with a copy of it, and fetches a few ahead. The caller holds the lock."""
        folder = self._folder / "incoming"
        # Under the lock, files in this folder can only be those of a dead process.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)

        def fetched(shard: int) -> tuple[int, Path]:
            self._load_table(shard)
            (store, key), path = self.place(shard), folder / self.index.shards[shard].name
            store.download(key, path)
            return shard, path

        return in_order(self._fetchers, fetched, shards, _DOWNLOADS, self._check)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks the folder against all other threads and processes of the node; the death of a holder releases it.

        Raises:
            StoppedError: this process has to stop while another holds the lock.
        """
        try:
            lock = FileLock(self._folder / "lock", poll_interval=STOP_POLL_SECONDS).acquire(cancel_check=self._stop)
        except Timeout:
            self._check()
            raise
        with lock:
            yield

    def _check(self) -> None:
        self._stop.check(f"while reading the images of {self._bucket.uri}/{self._key}; the images read so far are kept")


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
        while (group := list(islice(missing, _DOWNLOADS))) and self._due is due:
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
