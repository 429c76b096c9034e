"""The shards of a dataset: their locations, their tables, and copies on this node.

No reader hashes a shard: each image has a hash of its own (`cache.py`), and nothing reads what lies between images.
`ddpm data verify` hashes both.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from job.data.ahead import STOP_POLL_SECONDS, in_order
from job.data.order import Int64s
from job.data.shards import OFFSETS_DTYPE, DatasetIndex
from job.exits import BadDataError
from job.stop import NEVER, Stop
from job.store import Store, open_to_read, split_uri
from job.store.files import os_errors

Fetched = TypeVar("Fetched")

DOWNLOADS = 4


class ShardSource:
    """The shards of one dataset, beside its index or at the URIs of tars that are indexed in place; thread-safe.

    Attributes:
        index: the dataset's index.
        folder: this dataset's part of the node's cache, shared by all processes of the node.
        starts: index of each shard's first image, and N, int64 [shards + 1].
        is_local: whether all shards are files of this machine, which are read without a copy.
        stop: ends reading and fetching.
        remedy: how a person repairs a damaged shard, for messages.
    """

    def __init__(self, bucket: Store, key: str, index: DatasetIndex, folder: Path, stop: Stop = NEVER) -> None:
        """Opens the stores of the shards of the dataset at `key`, without any request.

        Raises:
            BadRequestError: a shard's URI is not supported.
            NoPermissionError: no credentials for a shard's bucket were found.
        """
        self.index, self.folder, self.stop = index, folder, stop
        self.starts: Int64s = np.concatenate([[0], np.cumsum(index.shards.images)])
        self._bucket, self._key = bucket, key
        folders = {split_uri(uri)[0] for uri in index.shards.uris}
        retry = bucket.retry.elsewhere()
        self._foreign = {folder: open_to_read(folder, retry) for folder in folders}
        self.is_local = all(store.uri.startswith("/") for store in self._foreign.values() or [bucket])
        self.remedy = f"restore it, or {'index' if index.is_foreign else 'pack'} the dataset again"
        self._tables_path, self._are_loaded = folder / "offsets", np.zeros(len(index.shards), bool)
        with os_errors(self._tables_path):
            folder.mkdir(parents=True, exist_ok=True)
            # A hundred million images have gigabytes of tables, and a batch needs a few: the rest is a hole.
            with self._tables_path.open("ab") as file:
                file.truncate(index.images * OFFSETS_DTYPE.itemsize)
            self._tables = np.asarray(np.memmap(self._tables_path, OFFSETS_DTYPE, "r"))

    def check(self) -> None:
        """Raises `StoppedError` if this process has to stop."""
        self.stop.check(f"while reading the images of {self._bucket.uri}/{self._key}; the images read so far are kept")

    def records(self, indices: Int64s) -> np.ndarray:
        """Returns the rows of images `indices` in the offset tables, OFFSETS_DTYPE [b].

        The tables of their shards are verified first, and fetched if they are not in the cache.

        Raises:
            BadDataError: a table in the bucket is corrupt.
            DiskFullError: a table does not fit the disk.
        """
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        if not (are_loaded := self._are_loaded[shards]).all():
            for _ in self._ahead(self._load_table, np.unique(shards[~are_loaded]).tolist()):
                pass
        return self._tables[indices]

    def _load_table(self, shard: int) -> None:
        first, last = self.starts[shard : shard + 2].tolist()
        table = self._tables[first:last]
        if hashlib.sha256(table.data).hexdigest() == self.index.shards[shard].offsets_sha256:
            self._check_table(shard, table)
        else:
            table = self.read_table(shard)
            # Not through the map, where a full disk would cause SIGBUS.
            with os_errors(self._tables_path), self._tables_path.open("r+b") as file:
                file.seek(first * OFFSETS_DTYPE.itemsize)
                file.write(table.tobytes())
        self._are_loaded[shard] = True

    def read_table(self, shard: int) -> np.ndarray:
        """Reads the offset table of a shard from the bucket, OFFSETS_DTYPE [images].

        Raises:
            BadDataError: the table is corrupt.
        """
        packed = self.index.shards[shard]
        key = f"{self._key}/{packed.offsets_name}"
        uri, data = self._bucket.uri_of(key), self._bucket.read(key).data
        is_whole = len(data) == packed.images * OFFSETS_DTYPE.itemsize
        if not is_whole or hashlib.sha256(data).hexdigest() != packed.offsets_sha256:
            raise BadDataError(f"{uri} differs from the index: {self.remedy}")
        self._check_table(shard, table := np.frombuffer(data, OFFSETS_DTYPE))
        return table

    def _check_table(self, shard: int, table: np.ndarray) -> None:
        """Raises `BadDataError` for an impossible table: a hostile index may contain the hash of any."""
        packed, classes = self.index.shards[shard], len(self.index.classes)
        are_classes = not classes or 0 <= table["label"].min() <= table["label"].max() < classes
        # A header comes before the first image.
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

    def uri(self, shard: int) -> str:
        """Returns the URI of a shard's tar."""
        store, key = self.place(shard)
        return store.uri_of(key)

    def open_shard(self, shard: int) -> BinaryIO:
        """Opens a shard's tar in its store."""
        store, key = self.place(shard)
        return store.open(key)

    def fetch(self, shards: Iterable[int]) -> Iterator[tuple[int, Path]]:
        """Yields each shard with a copy of it, and fetches a few ahead. The caller holds the lock."""
        folder = self.folder / "incoming"
        # Under the lock, files in this folder can only be those of a dead process.
        shutil.rmtree(folder, ignore_errors=True)
        with os_errors(folder):
            folder.mkdir(exist_ok=True)

        def both(shard: int) -> tuple[int, Path]:
            self._load_table(shard)
            (store, key), path = self.place(shard), folder / self.index.shards[shard].name
            store.download(key, path)
            return shard, path

        return self._ahead(both, shards)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder against all other threads and processes of the node; the death of a holder releases it.

        Raises:
            StoppedError: this process has to stop while another holds the lock.
        """
        path = self.folder / "lock"
        with os_errors(path):
            try:
                lock = FileLock(path, poll_interval=STOP_POLL_SECONDS).acquire(cancel_check=self.stop)
            except Timeout:
                self.check()
                raise
        with lock:
            yield

    def _ahead(self, work: Callable[[int], Fetched], shards: Iterable[int]) -> Iterator[Fetched]:
        pool = ThreadPoolExecutor(DOWNLOADS, "fetch")
        try:
            yield from in_order(pool, work, shards, DOWNLOADS, self.check)
        finally:
            # A process that has to stop does not wait for a download, which cannot be cancelled.
            pool.shutdown(wait=False, cancel_futures=True)
