"""A dataset as a reader sees it: its shards, verified and on a local disk, and its images, decoded by threads."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.data.ahead import STOP_POLL_SECONDS, in_order
from job.data.images import Recipe, RejectedImageError, codec_versions, decode, prepare
from job.data.order import Int64s
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, Record, first_damaged, split_uri
from job.exits import BadDataError, JobError
from job.stop import NEVER, Stop
from job.store import Store, open_store
from job.store.files import os_errors, temporary_beside

Uint8s = npt.NDArray[np.uint8]
Fetched = TypeVar("Fetched")

DOWNLOADS = 4
_READ_AT_A_TIME = 32


class ShardSource:
    """The shards of one dataset, as a node sees them; thread-safe.

    They lie beside the index or, of tars that were indexed in place, where these were.

    Attributes:
        index: what the dataset is.
        folder: this dataset's part of the node's cache, shared by all processes of the node.
        starts: index of each shard's first image, and N, int64 [shards + 1].
        is_local: whether all shards are files of this machine, which are read where they lie.
        threads: how many images are decoded at a time.
        stop: whether this process is to stop.
    """

    def __init__(
        self, bucket: Store, key: str, index: DatasetIndex, folder: Path, threads: int | None = None, stop: Stop = NEVER
    ) -> None:
        """Opens the stores of the shards of the dataset at `key`, and touches none of them.

        Raises:
            BadDataError: the index says of its images what cannot be.
            BadRequestError: a URI that no store speaks.
            NoPermissionError: no credentials for its bucket were found.
        """
        self.index, self.folder, self.stop = index, folder, stop
        self.threads = threads or os.cpu_count() or 1
        self.starts: Int64s = np.cumsum([0, *(shard.images for shard in index.shards)])
        self._bucket, self._key = bucket, key
        retry, folders = bucket.retry.elsewhere(), {split_uri(shard.uri)[0] for shard in index.shards if shard.uri}
        self._foreign = {folder: open_store(folder, retry) for folder in folders}
        self.is_local = all(store.uri.startswith("/") for store in self._foreign.values() or [bucket])
        self._recipe = _recipe(index) if index.is_foreign else None
        self._decoders = ThreadPoolExecutor(self.threads, "decode")
        self._made = "indexed" if index.is_foreign else "packed"
        self._anew = "index the dataset anew" if index.is_foreign else "pack the dataset anew"
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
        path, shards = self.folder / "offsets", self.index.shards
        with os_errors(path):
            # A file that is too short for them cannot be mapped.
            with suppress(FileNotFoundError, ValueError):
                records = np.memmap(path, OFFSETS_DTYPE, "r", shape=(self.index.images,))
                tables = (records[first:last] for first, last in pairwise(self.starts))
                if [hashlib.sha256(table.tobytes()).hexdigest() for table in tables] == [
                    s.offsets_sha256 for s in shards
                ]:
                    return np.asarray(records)
            with temporary_beside(path) as (temporary, file):
                for table in self._ahead(self.read_table, range(len(shards))):
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
            raise BadDataError(f"{uri} is not the table that was {self._made}: {self._anew}")
        table, classes = np.frombuffer(data, OFFSETS_DTYPE), len(self.index.classes)
        lowest, highest = (0, classes - 1) if classes else (-1, -1)
        # An index may vouch for any table.
        labels_are_classes = lowest <= table["label"].min() and table["label"].max() <= highest
        if not labels_are_classes or table["offset"].max() >= packed.bytes:
            raise BadDataError(f"{uri} points beyond its shard or its classes: {self._anew}")
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
            store.open(key).close()
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
        raise BadDataError(
            f"{store.uri_of(key)} holds other bytes than were {self._made}{damage}: restore it, or {self._anew}"
        )

    def read_into(
        self, out: Uint8s, indices: Int64s, open_shard: Callable[[int], AbstractContextManager[BinaryIO]]
    ) -> None:
        """Reads images `indices` and decodes them, a few at a time in each thread.

        Args:
            out: uint8 [b, H, W, C].
            indices: int64 [b].
            open_shard: opens the file of a shard; called in the threads.

        Raises:
            BadDataError: an image is not the one that was packed, or damaged, or of another size.
            StoppedError: this process is to stop.
        """
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows, records = (indices - self.starts[shards]).tolist(), self.records[indices].tolist()

        def read_some(places: list[int]) -> None:
            shard = int(shards[places[0]])
            with open_shard(shard) as file:
                for place in places:
                    out[place] = self.read_image(shard, rows[place], records[place], file)

        def parts() -> Iterator[list[int]]:
            for shard in np.unique(shards):
                places = np.flatnonzero(shards == shard).tolist()
                yield from (places[at : at + _READ_AT_A_TIME] for at in range(0, len(places), _READ_AT_A_TIME))

        for _ in in_order(self._decoders, read_some, parts(), 2 * self.threads, self.check):
            pass

    def read_image(self, shard: int, row: int, record: Record, file: BinaryIO) -> Uint8s:
        """Image `row` of a shard, of which `record` says where in `file` it lies; raises as `read_into`."""
        offset, size_bytes, _, checksum = record
        file.seek(offset)
        encoded, wrong = file.read(size_bytes), f"it is not as it was {self._made}"
        try:
            if google_crc32c.value(encoded) == checksum:
                if self._recipe is not None:
                    return prepare(encoded, self._recipe)
                return decode(encoded, self.index.channels, self.index.size)
        except RejectedImageError as error:
            wrong = f"it {error}"
        except BadDataError as error:
            wrong = str(error)
        raise BadDataError(f"{self.uri(shard)}, image {row} (at byte {offset}): {wrong}: restore it, or {self._anew}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder against all other threads and processes of the node; a holder's death frees it.

        Raises:
            StoppedError: this process is to stop while another holds it.
        """
        path = self.folder / "lock"
        with os_errors(path):
            file = path.open("ab")
        with file:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                self.check()
                time.sleep(STOP_POLL_SECONDS)
            yield

    def close(self) -> None:
        """Ends the decoding threads."""
        self._decoders.shutdown(cancel_futures=True)

    def _ahead(self, work: Callable[[int], Fetched], shards: Iterable[int]) -> Iterator[Fetched]:
        pool = ThreadPoolExecutor(DOWNLOADS, "fetch")
        try:
            yield from in_order(pool, work, shards, DOWNLOADS, self.check)
        finally:
            # A download cannot be cut short; a process that must stop does not wait for it.
            pool.shutdown(wait=False, cancel_futures=True)


def _recipe(index: DatasetIndex) -> Recipe:
    """What is done to each image of tars that were indexed in place."""
    if index.codecs != codec_versions():
        logging.getLogger(__name__).warning(
            f"dataset {index.name} was indexed with {index.codecs}, and is read with {codec_versions()}: "
            "its images may differ in their last bits"
        )
    return Recipe(index.size, index.crop, index.resize_filter, index.channels, min_side=1)
