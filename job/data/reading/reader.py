"""Reads the images of a dataset by index, with their classes, conditions and vectors, from the shards in a bucket.

No reader hashes a shard: each image has a hash of its own, and nothing reads what lies between images. `ddpm data
verify` hashes both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from job.data.codecs import codec_versions, decode, decode_npy
from job.data.images import Recipe, RejectedImageError, prepare
from job.data.reading.order import Int64s, Order
from job.data.shards import DatasetIndex, Record, image_hash, offsets_dtype
from job.exits import BadDataError
from job.stop import NEVER, STOP_POLL_SECONDS, Stop, in_order
from job.store import Store, open_to_read, split_uri
from job.store.files import default_cache_dir, os_errors

Uint8s = npt.NDArray[np.uint8]

DOWNLOADS = 4
"""Number of shards or tables that are fetched at a time."""
_READ_AT_A_TIME = 32
_THREADS = 8
"""The least number of threads that read and decode: without a cache they wait for the bucket, not for a processor."""


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
        self._dtype = offsets_dtype(len(index.vector_names), index.condition_channels > 0)
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
        self._fetchers = ThreadPoolExecutor(DOWNLOADS, "fetch")

    def read(self, indices: Int64s, out: Uint8s | None = None) -> npt.NDArray[Any]:
        """Returns images `indices`, uint8 or uint16 [b, H, W, C], or mean and log-variance of latents, float16.

        It is fastest into the bytes of a reused `out`, uint8 [b, *`row_shape`], which have the conditions, too.

        Raises:
            BadDataError: an image differs from the index, is damaged, or has another size.
            StoppedError: this process has to stop.
        """
        return self._rows(indices, out)[..., : self.index.image_shape[2]]

    def conditions(self, indices: Int64s) -> npt.NDArray[Any]:
        """Returns the conditions of images, of the same dtype [b, H, W, Cc]; raises as `read`."""
        return self._rows(indices)[..., self.index.image_shape[2] :]

    def _rows(self, indices: Int64s, out: Uint8s | None = None) -> npt.NDArray[Any]:
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
        """Returns image `row` of a shard from its place `record` in `file`, and its condition behind its channels.

        Raises as `read`.
        """
        (offset, size_bytes, _, sha256, *more), channels = record, self.index.condition_channels
        # Behind the image come the rest of its block and the header of the condition.
        between_bytes = -size_bytes % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
        file.seek(offset)
        content = file.read(size_bytes + between_bytes + more[0] if channels else size_bytes)
        problem = "it differs from the index"
        encoded, condition = content[:size_bytes], content[size_bytes + between_bytes :]
        try:
            if image_hash(encoded + condition) == sha256:
                found = self._decoded(encoded, self.index.image_shape[2])
                if self.index.encoding is None or np.isfinite(found).all():
                    return np.concatenate([found, self._decoded(condition, channels)], axis=2) if channels else found
                problem = "its latents are not finite"
        except RejectedImageError as error:
            problem = f"it {error}"
        except BadDataError as error:
            problem = str(error)
        store, key = self.place(shard)
        raise BadDataError(f"{store.uri_of(key)}, image {row} (at byte {offset}): {problem}: {self.remedy}")

    def _decoded(self, encoded: bytes, channels: int) -> npt.NDArray[Any]:
        if self._recipe is not None:
            return prepare(encoded, replace(self._recipe, channels=channels))
        if self.index.encoding:
            return decode_npy(encoded, (channels, *self.index.size.shape), self.index.dtype).transpose(1, 2, 0)
        return decode(encoded, (*self.index.size.shape, channels), self.index.dtype)

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
                    self._fetchers, self._load_table, np.unique(shards[~are_loaded]).tolist(), DOWNLOADS, self._check
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
        are_classes &= not self.index.vector_names or bool(np.isfinite(table["vector"]).all())
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

        return in_order(self._fetchers, fetched, shards, DOWNLOADS, self._check)

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
