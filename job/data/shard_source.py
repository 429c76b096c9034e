"""The shards of a dataset: where they lie, and copies on this node, verified."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from job.data.ahead import STOP_POLL_SECONDS, in_order
from job.data.order import Int64s
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, first_damaged
from job.exits import BadDataError, JobError
from job.stop import NEVER, Stop
from job.store import Store, open_to_read, split_uri
from job.store.files import os_errors, temporary_beside

Fetched = TypeVar("Fetched")

DOWNLOADS = 4


class ShardSource:
    """The shards of one dataset, as a node sees them; thread-safe.

    They lie beside the index or, of tars that were indexed in place, where these were.

    Attributes:
        index: what the dataset is.
        folder: this dataset's part of the node's cache, shared by all processes of the node.
        starts: index of each shard's first image, and N, int64 [shards + 1].
        is_local: whether all shards are files of this machine, which are read where they lie.
        stop: whether this process is to stop.
        made: how the dataset came to be, for messages.
        mend: what a person does about one that is damaged.
    """

    def __init__(self, bucket: Store, key: str, index: DatasetIndex, folder: Path, stop: Stop = NEVER) -> None:
        """Opens the stores of the shards of the dataset at `key`, and touches none of them.

        Raises:
            BadRequestError: a URI that no store speaks.
            NoPermissionError: no credentials for its bucket were found, as far as that is known before asking it.
        """
        self.index, self.folder, self.stop = index, folder, stop
        self.starts: Int64s = np.cumsum([0, *(shard.images for shard in index.shards)])
        self._bucket, self._key = bucket, key
        retry, folders = bucket.retry.elsewhere(), {split_uri(shard.uri)[0] for shard in index.shards if shard.uri}
        self._foreign = {folder: open_to_read(folder, retry) for folder in folders}
        self.is_local = all(store.uri.startswith("/") for store in self._foreign.values() or [bucket])
        self.made = "indexed" if index.is_foreign else "packed"
        self.mend = f"restore it, or {'index' if index.is_foreign else 'pack'} the dataset anew"
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raises `StoppedError` if this process is to stop."""
        self.stop.check(f"while reading the images of {self._bucket.uri}/{self._key}; what has been read is kept")

    @cached_property
    def records(self) -> np.ndarray:
        """Offset tables of all shards, memory-mapped, OFFSETS_DTYPE [N]; fetched first unless they are here.

        Raises:
            BadDataError: one in the bucket is not as it was packed.
        """
        path, hashes = self.folder / "offsets", [shard.offsets_sha256 for shard in self.index.shards]
        with os_errors(path):
            # A file that is too short for them cannot be mapped.
            with suppress(FileNotFoundError, ValueError):
                records = np.memmap(path, OFFSETS_DTYPE, "r", shape=(self.index.images,))
                tables = (records[first:last] for first, last in pairwise(self.starts))
                if [hashlib.sha256(table.tobytes()).hexdigest() for table in tables] == hashes:
                    return np.asarray(records)
            with temporary_beside(path) as (temporary, file):
                for table in self._ahead(self.read_table, range(len(hashes))):
                    file.write(table.tobytes())
                file.flush()
                temporary.replace(path)
            return np.asarray(np.memmap(path, OFFSETS_DTYPE, "r"))

    def read_table(self, shard: int) -> np.ndarray:
        """The offset table of a shard as it lies in the bucket, OFFSETS_DTYPE [images].

        Raises:
            BadDataError: it is not as it was packed.
        """
        packed = self.index.shards[shard]
        key = f"{self._key}/{packed.offsets_name}"
        uri, data = self._bucket.uri_of(key), self._bucket.read(key).data
        is_whole = len(data) == packed.images * OFFSETS_DTYPE.itemsize
        if not is_whole or hashlib.sha256(data).hexdigest() != packed.offsets_sha256:
            raise BadDataError(f"{uri} is not the table that was {self.made}: {self.mend}")
        table, classes = np.frombuffer(data, OFFSETS_DTYPE), len(self.index.classes)
        # An index may vouch for any table.
        are_classes = not classes or 0 <= table["label"].min() <= table["label"].max() < classes
        if not are_classes or table["offset"].max() >= packed.bytes:
            raise BadDataError(f"{uri} points beyond its shard or its classes: {self.mend}")
        return table

    def place(self, shard: int) -> tuple[Store, str]:
        """The store that holds a shard's tar, and its key there."""
        packed = self.index.shards[shard]
        if not packed.uri:
            return self._bucket, f"{self._key}/{packed.name}"
        folder, name = split_uri(packed.uri)
        return self._foreign[folder], name

    def uri(self, shard: int) -> str:
        """Where a shard's tar lies."""
        store, key = self.place(shard)
        return store.uri_of(key)

    def open_there(self, shard: int) -> BinaryIO:
        """A stream over a shard's tar where it lies, of which nothing is verified."""
        store, key = self.place(shard)
        return store.open(key)

    def fetch(self, shards: Iterable[int]) -> Iterator[tuple[int, Path]]:
        """Yields each shard with a verified file of its bytes, fetching a few ahead. To be called under the lock.

        Raises:
            BadDataError: the bucket's shard is not the one that was packed.
        """
        incoming = self.folder / "incoming"
        # Whoever holds the lock knows that what lies here was left by a process that died.
        shutil.rmtree(incoming, ignore_errors=True)
        with os_errors(incoming):
            incoming.mkdir(exist_ok=True)
        return self._ahead(lambda shard: (shard, self.verified(shard, incoming)), shards)

    def verified(self, shard: int, incoming: Path) -> Path:
        """A file whose SHA-256 is that of the shard in the index.

        It is the shard itself if that is a file of this machine, else a download to `incoming`, which is the caller's.

        Raises:
            BadDataError: it is not the shard that was packed; the first damaged image is named, if its table is there.
            ObjectMissingError: it is not there.
        """
        packed, (store, key) = self.index.shards[shard], self.place(shard)
        if self.is_local:
            # An index is written by anybody: a pipe that it names would be waited for in vain.
            self.open_there(shard).close()
            path = Path(store.uri_of(key))
        else:
            path = incoming / packed.name
            store.download(key, path)
        with os_errors(path), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == packed.sha256:
                return path
            damage = ""
            with suppress(JobError):
                damage = f"; {first_damaged(file, self.read_table(shard))}"
        raise BadDataError(f"{store.uri_of(key)} holds other bytes than were {self.made}{damage}: {self.mend}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder against all other threads and processes of the node; a holder's death frees it.

        Raises:
            StoppedError: this process is to stop while another holds it.
        """
        path = self.folder / "lock"
        with os_errors(path):
            try:
                held = FileLock(path, poll_interval=STOP_POLL_SECONDS).acquire(cancel_check=self.stop)
            except Timeout:
                self.check()
                raise
        with held:
            yield

    def _ahead(self, work: Callable[[int], Fetched], shards: Iterable[int]) -> Iterator[Fetched]:
        pool = ThreadPoolExecutor(DOWNLOADS, "fetch")
        try:
            yield from in_order(pool, work, shards, DOWNLOADS, self.check)
        finally:
            # A download cannot be cut short; a process that must stop does not wait for it.
            pool.shutdown(wait=False, cancel_futures=True)
