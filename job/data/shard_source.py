"""What both caches begin with: a dataset's shards, verified and on a local disk, and its images, decoded by threads."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.data.images import Recipe, RejectedImageError, codec_versions, declared_size, decode, prepared_pixels
from job.data.places import Places
from job.data.shards import INDEX, OFFSETS_DTYPE, DatasetIndex, first_damaged
from job.exits import BadDataError, BadRequestError
from job.stop import NEVER, Stop
from job.store import Store
from job.store.files import crc32c_of, os_errors, temporary_beside

Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]
T = TypeVar("T")

DOWNLOADS = 4
_RECORD_BYTES = OFFSETS_DTYPE.itemsize
_DECODE_IMAGES = 32
_POLL_SECONDS = 0.05
_log = logging.getLogger(__name__)


class ShardSource:
    """The shards of one dataset, as a node sees them; thread-safe.

    Attributes:
        index: what the dataset is.
        places: where its shards lie.
        folder: this dataset's part of the node's cache, shared by all processes of the node.
        records: offset tables of all shards, memory-mapped, OFFSETS_DTYPE [N].
        starts: index of each shard's first image, and N, int64 [shards + 1].
        threads: how many images are decoded at a time.
        stop: whether this process is to.
    """

    def __init__(
        self,
        bucket: Store,
        key: str,
        index: DatasetIndex,
        folder: Path,
        *,
        threads: int | None,
        stop: Stop = NEVER,
    ) -> None:
        self.index, self.folder, self.stop = index, folder, stop
        self.threads = threads or os.cpu_count() or 1
        self.starts: Int64s = np.cumsum([0, *(shard.images for shard in index.shards)])
        self._bucket, self._key = bucket, key
        self.places = Places(bucket, key, index)
        self._decode_image = image_decoder(index, bucket.uri_of(f"{key}/{INDEX}"))
        self._decoders = ThreadPoolExecutor(self.threads, "decode")
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.records = self._open_records()

    @property
    def _made(self) -> str:
        return "indexed" if self.index.is_foreign else "packed"

    @property
    def _anew(self) -> str:
        return "index the dataset anew" if self.index.is_foreign else "pack the dataset anew"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.index.size, self.index.size, self.index.channels

    @property
    def is_local(self) -> bool:
        """Whether the bucket is a folder, whose shards are read where they lie."""
        return self.places.is_local

    def check_stop(self) -> None:
        """Raises `StoppedError` once this process is to stop."""
        self.stop.check(f"while reading the images of {self._bucket.uri}/{self._key}, of which all that were read stay")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder against all other threads and processes of the node; a holder's death frees it.

        Raises:
            StoppedError: this process is to stop while another holds it.
        """
        path = self.folder / "lock"
        with os_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _locked(descriptor):
                self.check_stop()
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def fetch(self, shards: Iterable[int]) -> Iterator[tuple[int, Path]]:
        """Yields each shard with a verified file of its bytes, fetching a few ahead. To be called under the lock.

        From a bucket that is a folder it is the object itself; otherwise a download that the caller moves or removes.

        Raises:
            BadDataError: the bucket's shard is not the one that was packed.
        """
        incoming = self.folder / "incoming"
        # Whoever holds the lock knows that what lies here was left by a process that died.
        shutil.rmtree(incoming, ignore_errors=True)
        with os_errors(incoming):
            incoming.mkdir(exist_ok=True)
        return self._ahead(lambda shard: self._fetched(shard, incoming), shards)

    def check(self, shard: int, path: Path) -> None:
        """Compares a file with the shard's size and SHA-256 in the index.

        Raises:
            BadDataError: it is not the shard that was packed.
        """
        packed = self.index.shards[shard]
        with os_errors(path), path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes == packed.bytes and hashlib.file_digest(file, "sha256").hexdigest() == packed.sha256:
                return
        wrong = "other bytes" if size_bytes == packed.bytes else f"{size_bytes:,} bytes instead of {packed.bytes:,}"
        with path.open("rb") as file:
            damage = first_damaged(file, self.records[self.starts[shard] : self.starts[shard + 1]])
        raise BadDataError(
            f"{self.places.uri(shard)} holds {wrong} than were {self._made}; {damage}: restore it, or {self._anew}"
        )

    def is_intact(self, shard: int, path: Path) -> bool:
        """Whether a file still holds the shard that was once verified, at the speed of CRC-32C."""
        with os_errors(path), path.open("rb") as file:
            return f"{crc32c_of(file):08x}" == self.index.shards[shard].crc32c

    def encoded(self, shard: int, descriptor: int, row: int) -> bytes:
        """Image `row` (within the shard) as it lies in the shard's open file.

        Raises:
            BadDataError: it is not the image that was packed.
        """
        record = self.records[self.starts[shard] + row]
        return self.checked(shard, row, os.pread(descriptor, int(record["bytes"]), int(record["offset"])))

    def checked(self, shard: int, row: int, content: bytes) -> bytes:
        """Returns what was read of image `row` (within the shard) if it is the image that was packed.

        Raises:
            BadDataError: it is not.
        """
        record = self.records[self.starts[shard] + row]
        if google_crc32c.value(content) != record["crc32c"]:
            raise BadDataError(f"{self._image(shard, row)} is not as it was {self._made}: restore it, or {self._anew}")
        return content

    def decode(
        self, shard: int, rows: Int64s, read: Callable[[int], bytes], out: Uint8s, places: Int64s
    ) -> list[Future[None]]:
        """Begins to decode images `rows` (within the shard) into `out[places]`, uint8 [., H, W, C].

        Args:
            shard: its number.
            rows: int64 [b].
            read: gives the encoded bytes of `rows[i]` for i, in any thread.
            out: where the images go.
            places: int64 [b].

        Returns:
            Work to pass to `finish`, which raises `BadDataError` for an image that is damaged or of another size.
        """

        def decode_some(part: range) -> None:
            for i in part:
                content = read(i)
                try:
                    out[places[i]] = self._decode_image(content)
                except BadDataError as error:
                    raise BadDataError(f"{self._image(shard, rows[i])}: {error}: {self._anew}") from None

        parts = [range(len(rows))[i : i + _DECODE_IMAGES] for i in range(0, len(rows), _DECODE_IMAGES)]
        return [self._decoders.submit(decode_some, part) for part in parts]

    def finish(self, futures: list[Future[None]]) -> None:
        """Waits for decoding; at the first failure cancels what has not begun, waits for what has, and raises that.

        Raises:
            StoppedError: this process is to stop.
        """
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending:
                    self.check_stop()
        finally:
            # Nothing may write into an array that somebody uses again, or read from a descriptor that is closed.
            for future in pending:
                future.cancel()
            wait(pending)

    def close(self) -> None:
        """Ends the decoding threads."""
        self._decoders.shutdown(cancel_futures=True)

    def _ahead(self, work: Callable[[int], T], shards: Iterable[int]) -> Iterator[tuple[int, T]]:
        """Yields each shard with the result of `work`, which runs in threads a few shards ahead."""
        upcoming, pool = iter(shards), ThreadPoolExecutor(DOWNLOADS, "fetch")
        begun: deque[tuple[int, Future[T]]] = deque()
        try:
            while True:
                begun.extend([(shard, pool.submit(work, shard)) for shard in islice(upcoming, DOWNLOADS - len(begun))])
                if not begun:
                    return
                shard, future = begun.popleft()
                self.check_stop()
                while not wait([future], timeout=_POLL_SECONDS).done:
                    self.check_stop()
                yield shard, future.result()
        finally:
            # A download cannot be cut short; a process that must stop does not wait for it.
            pool.shutdown(wait=False, cancel_futures=True)

    def _image(self, shard: int, row: int) -> str:
        return f"{self.places.uri(shard)}, image {row} (at byte {self.records[self.starts[shard] + row]['offset']})"

    def _fetched(self, number: int, incoming: Path) -> Path:
        shard = self.index.shards[number]
        if self.is_local:
            path = self.places.path(number)
        else:
            path = incoming / shard.name
            store, key = self.places.of(number)
            store.download(key, path)
        self.check(number, path)
        return path

    def _open_records(self) -> np.ndarray:
        """Maps the offset tables of all shards, fetched first unless they are here and verify."""
        path, size_bytes = self.folder / "offsets", int(self.starts[-1]) * _RECORD_BYTES
        with os_errors(path):
            if path.exists() and path.stat().st_size == size_bytes:
                records = np.memmap(path, OFFSETS_DTYPE, mode="r")
                tables = (records[first:last] for first, last in pairwise(self.starts))
                if all(
                    hashlib.sha256(table.tobytes()).hexdigest() == shard.offsets_sha256
                    for shard, table in zip(self.index.shards, tables, strict=True)
                ):
                    return np.asarray(records)
            with temporary_beside(path) as (temporary, file):
                for _, table in self._ahead(self._table, range(len(self.index.shards))):
                    file.write(table)
                file.flush()
                temporary.replace(path)
            return np.asarray(np.memmap(path, OFFSETS_DTYPE, mode="r"))

    def _table(self, number: int) -> bytes:
        shard = self.index.shards[number]
        key = f"{self._key}/{shard.offsets_name}"
        data = self._bucket.read(key).data
        if hashlib.sha256(data).hexdigest() != shard.offsets_sha256 or len(data) != shard.images * _RECORD_BYTES:
            raise BadDataError(f"{self._bucket.uri_of(key)} is not the table that was {self._made}: {self._anew}")
        records = np.frombuffer(data, OFFSETS_DTYPE)
        offsets, labels = records["offset"], records["label"]
        lowest, highest = (0, len(self.index.classes) - 1) if self.index.classes else (-1, -1)
        is_inside = offsets.max() < shard.bytes and (offsets + records["bytes"]).max() <= shard.bytes
        if not is_inside or labels.min() < lowest or labels.max() > highest:
            raise BadDataError(f"{self._bucket.uri_of(key)} points beyond its shard or its classes: {self._anew}")
        return data


def image_decoder(index: DatasetIndex, where: str) -> Callable[[bytes], Uint8s]:
    """What makes an image, uint8 [H, W, C], of its encoded bytes, or raises `BadDataError`."""
    if not index.is_foreign:
        return partial(_decode_packed, index)
    try:
        recipe = Recipe(index.size, index.crop, index.resize_filter, index.channels, min_side=1)
    except BadRequestError as error:
        raise BadDataError(f"{where} is not a dataset index ({error}): index the dataset anew") from None
    if index.codecs != codec_versions():
        _log.warning(
            f"dataset {index.name} was indexed with {index.codecs}, and is read with {codec_versions()}: "
            "its images may differ in their last bits"
        )
    return partial(_decode_foreign, recipe)


def _decode_packed(index: DatasetIndex, encoded: bytes) -> Uint8s:
    # A decoder would take the memory for whatever size the image claims.
    size, (width, height) = index.size, declared_size(encoded)
    if (width, height) != (size, size):
        raise BadDataError(f"it is {width}×{height} pixels in a dataset of {size}×{size}")
    image = decode(encoded, index.channels)
    if image.shape[2] != index.channels:
        raise BadDataError(f"it has {image.shape[2]} channels in a dataset of {index.channels}")
    return image


def _decode_foreign(recipe: Recipe, encoded: bytes) -> Uint8s:
    try:
        return prepared_pixels(encoded, recipe)
    except RejectedImageError as error:
        raise BadDataError(f"it {error}") from None


def crc32c(pixels: Uint8s) -> int:
    """CRC-32C of a contiguous array, at several GB/s and without the GIL."""
    return int(google_crc32c.value(pixels.reshape(-1)))


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
