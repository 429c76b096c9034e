"""What a node keeps of a dataset: every image decoded once where they fit, else the encoded shards that are due.

Both give the same images for the same indices. Neither holds memory that grows with the dataset: what they keep lies in
files, which all processes of the node share.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from job.data.order import Order
from job.data.shard_cache import ShardCache
from job.data.shard_source import Int64s, ShardSource, Uint8s, crc32c
from job.data.shards import DatasetIndex
from job.exits import BadRequestError, DiskFullError
from job.stop import NEVER, Stop, beat
from job.store import Store
from job.store.files import os_errors

_IS_FILLED = 1 << 32


class ImageCache(Protocol):
    """Images of a dataset by index, on a local disk. `close` ends its threads."""

    index: DatasetIndex

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Images `indices`, uint8 [b, H, W, C], in `out` if that is given."""

    def labels(self, indices: Int64s) -> npt.NDArray[np.int32]:
        """Classes of the images, int32 [b]; -1 without classes."""

    def prefetch(self, order: Order, image_number: int) -> None:
        """Says that a run is about to read from `image_number` on; cheap to call for each batch."""

    def close(self) -> None:
        """Ends its threads; what is on disk stays."""


def default_cache_dir() -> Path:
    """`$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: none of them means anything, as for a user without a home.
    """
    if folder := os.environ.get("DDPM_CACHE"):
        return Path(folder).absolute()
    # A relative XDG_CACHE_HOME is to be ignored (XDG Base Directory Specification).
    if (folder := os.environ.get("XDG_CACHE_HOME", "")).startswith("/"):
        return Path(folder) / "ddpm"
    try:
        return Path.home() / ".cache" / "ddpm"
    except RuntimeError:
        raise BadRequestError("this user has no home folder: set DDPM_CACHE to a folder on a local disk") from None


def open_cache(
    bucket: Store,
    key: str,
    index: DatasetIndex,
    *,
    cache_dir: Path,
    budget_bytes: int,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        threads: images decoded at a time; all cores if not given.
        progress: called with images decoded so far, and all.
        stop: asked many times a second.

    Raises:
        StoppedError: `stop` said so; what has been decoded is kept.
        DiskFullError: the images fit the budget but not the disk.
        BadDataError: the bucket's shards are not what was packed.
    """
    source = ShardSource(bucket, key, index, cache_dir / index.dataset_id, threads=threads, stop=stop)
    if index.decoded_bytes <= budget_bytes:
        return DecodedCache(source, progress)
    return ShardCache(source, budget_bytes)


class DecodedCache:
    """All images as one memory-mapped array [N, H, W, C] in `images`, filled shard by shard.

    `filled` holds a little-endian uint64 per shard, 2^32 + CRC-32C of its images once they are there. Whatever a killed
    process or a power failure leaves in the two files, the checksums find it out and it is mended.
    """

    def __init__(self, source: ShardSource, progress: Callable[[int, int], None] | None = None) -> None:
        """Checks what is there and decodes what is missing; one process does, others wait. Raises as `open_cache`."""
        self.index = source.index
        self._source = source
        self._images_path, self._filled_path = source.folder / "images", source.folder / "filled"
        try:
            if self._missing():
                with source.lock():
                    if missing := self._missing():
                        self._fill(missing, progress or (lambda done, total: None))
                        self._map()
        finally:
            source.close()
        # From here on images are read in random order, of which reading ahead would make a multiple.
        self._file.madvise(mmap.MADV_RANDOM)

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Images `indices`, uint8 [b, H, W, C]; fastest with an `out` that is used again.

        Raises:
            IndexError: there is no such image.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self._images):
            raise IndexError(f"the dataset has images 0 to {len(self._images) - 1}")
        # "raise" would make numpy fill a buffer of its own first.
        return np.take(self._images, indices, axis=0, out=out, mode="clip")

    def labels(self, indices: Int64s) -> npt.NDArray[np.int32]:
        """Classes of the images, int32 [b]; -1 without classes."""
        return self._source.records["label"][indices]

    def prefetch(self, order: Order, image_number: int) -> None:
        """Everything is here."""

    def close(self) -> None:
        """There are none by now."""

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (self.index.images, *self._source.image_shape)

    def _map(self) -> None:
        with os_errors(self._images_path), self._images_path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), self.index.decoded_bytes, prot=mmap.PROT_READ)
        self._images: Uint8s = np.frombuffer(self._file, np.uint8).reshape(self._shape)

    def _missing(self) -> list[int]:
        """Maps the file and returns the shards whose images are not in it, or not intact."""
        shards = range(len(self.index.shards))
        if not self._has_whole_file():
            return list(shards)
        self._map()
        with os_errors(self._filled_path):
            filled = np.fromfile(self._filled_path, "<u8") if self._filled_path.exists() else np.empty(0, "<u8")
        filled = np.pad(filled, (0, max(0, len(shards) - len(filled))))
        intact: dict[int, bool] = {}

        def check(shard: int) -> None:
            beat()
            if not self._source.stop():
                intact[shard] = int(filled[shard]) == _IS_FILLED | crc32c(self._block(self._images, shard))

        with ThreadPoolExecutor(self._source.threads) as pool:
            for _ in pool.map(check, np.flatnonzero(filled).tolist()):
                pass
        self._source.check_stop()
        return [shard for shard in shards if not intact.get(shard)]

    def _has_whole_file(self) -> bool:
        # A map that is longer than its file is SIGBUS.
        path = self._images_path
        return path.exists() and path.stat().st_size == self.index.decoded_bytes

    def _block(self, images: Uint8s, shard: int) -> Uint8s:
        return images[self._source.starts[shard] : self._source.starts[shard + 1]]

    def _fill(self, missing: list[int], progress: Callable[[int, int], None]) -> None:
        self._allocate()
        images: Uint8s = np.asarray(np.memmap(self._images_path, np.uint8, mode="r+", shape=self._shape))
        done = self.index.images - sum(self.index.shards[shard].images for shard in missing)
        progress(done, self.index.images)
        with os_errors(self._filled_path):
            filled = os.open(self._filled_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for shard, path in self._source.fetch(missing):
                rows, block = np.arange(self.index.shards[shard].images), self._block(images, shard)
                with os_errors(path), path.open("rb") as file:
                    read = partial(self._source.encoded, shard, file.fileno())
                    self._source.finish(self._source.decode(shard, rows, read, block, rows))
                with os_errors(self._filled_path):
                    os.pwrite(filled, (_IS_FILLED | crc32c(block)).to_bytes(8, "little"), 8 * shard)
                if not self._source.is_local:
                    path.unlink()
                done += len(rows)
                progress(done, self.index.images)
        finally:
            os.close(filled)

    def _allocate(self) -> None:
        """Makes the file take its place on disk now: one with holes is SIGBUS when the disk is full later."""
        path, size_bytes = self._images_path, self.index.decoded_bytes
        if path.exists() and path.stat().st_size > size_bytes:
            path.unlink()
        try:
            with os_errors(f"{path} ({size_bytes:,} bytes; DDPM_CACHE moves it, data.cache_gigabytes limits it)"):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    os.posix_fallocate(descriptor, 0, size_bytes)
                finally:
                    os.close(descriptor)
        except DiskFullError:
            path.unlink(missing_ok=True)
            raise
