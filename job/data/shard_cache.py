"""A node's cache of a dataset that is too large to keep decoded: the encoded shards that are due, within a budget."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from job.data.order import Order
from job.data.shard_source import DOWNLOADS, Int64s, ShardSource, Uint8s
from job.exits import BadConfigError, BadDataError, MissingInputError
from job.stop import NEVER
from job.store.files import os_errors


class ShardCache:
    """Verified shards in the folder `shards`, the least recently used evicted first; images are decoded at each read.

    The processes of a node share the files and the budget, and change what is there under one lock. None keeps a shard
    open from one read to the next, so that an evicted one gives its place on disk back, while a reader that has just
    opened it reads on. From a bucket that is a folder, shards are read where they lie, and nothing is kept.
    """

    def __init__(self, source: ShardSource, budget_bytes: int) -> None:
        """Keeps at most `budget_bytes` of shards, or one if that is less."""
        self.index = source.index
        self._source = source
        self._budget_bytes = budget_bytes
        self._folder = source.folder / "shards"
        with os_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        # A batch on its way is delivered, so that training stops between steps, where all processes agree, and saves.
        source.stop = NEVER
        self._verified: set[int] = set()
        self._block: tuple[int, int] | None = None
        self._due: tuple[int, ...] = ()
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Images `indices`, uint8 [b, H, W, C], in `out` if that is given.

        Raises:
            IndexError: there is no such image.
            BadDataError: the bucket's shard is not what was packed, or one of its images is damaged.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.index.images:
            raise IndexError(f"the dataset has images 0 to {self.index.images - 1}")
        if out is None:
            out = np.empty((len(indices), *self._source.image_shape), np.uint8)
        shards = np.searchsorted(self._source.starts, indices, side="right") - 1
        try:
            self._read(indices, shards, out)
        except BadDataError:
            # A shard that has rotted on this disk since it was verified is the bucket's no longer: fetch it anew.
            if not [shard for shard in np.unique(shards).tolist() if self._drop_if_rotten(shard)]:
                raise
            self._read(indices, shards, out)
        return out

    def labels(self, indices: Int64s) -> npt.NDArray[np.int32]:
        """Classes of the images, int32 [b]; -1 without classes."""
        return self._source.records["label"][indices]

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
        self._block, self._due = block, tuple(self._within_budget(order.upcoming_shards(image_number)))
        self._prefetcher.submit(self._prefetch, self._due)

    def close(self) -> None:
        """Ends its threads; a download that is under way is waited for."""
        self._due = ()
        self._prefetcher.shutdown(cancel_futures=True)
        self._source.close()

    def _read(self, indices: Int64s, shards: Int64s, out: Uint8s) -> None:
        futures: list[Future[None]] = []
        try:
            for shard in np.unique(shards).tolist():
                (places,) = np.nonzero(shards == shard)
                rows = indices[places] - self._source.starts[shard]
                encoded = self._encoded(shard, rows)
                futures += self._source.decode(shard, rows, encoded.__getitem__, out, places)
        finally:
            self._source.finish(futures)

    def _encoded(self, shard: int, rows: Int64s) -> list[bytes]:
        with self._open(shard) as file:
            return [self._source.encoded(shard, file.fileno(), row) for row in rows.tolist()]

    def _open(self, shard: int) -> BinaryIO:
        """A shard's file, fetched if it is not here; checked by each process before it first reads from it."""
        if self._source.is_local:
            path = self._source.places.path(shard)
            if shard not in self._verified:
                self._source.check(shard, path)
        else:
            path = self._path(shard)
            if shard not in self._verified:
                self._drop_if_rotten(shard)
        with os_errors(path):
            while True:
                try:
                    file = path.open("rb", buffering=0)
                except FileNotFoundError:
                    if self._source.is_local:
                        raise
                    self._fetch([shard])
                    continue
                self._verified.add(shard)
                if not self._source.is_local:
                    os.utime(file.fileno())
                return file

    def _drop_if_rotten(self, shard: int) -> bool:
        if self._source.is_local or self._is_intact(shard):
            return False
        with self._source.lock():
            # Another process may have put a good one in its place.
            if not self._is_intact(shard):
                self._path(shard).unlink()
        return True

    def _is_intact(self, shard: int) -> bool:
        # One that is not there is not rotten; it may be evicted at any time.
        with suppress(MissingInputError):
            return self._source.is_intact(shard, self._path(shard))
        return True

    def _path(self, shard: int) -> Path:
        return self._folder / self.index.shards[shard].name

    def _fetch(self, shards: list[int]) -> None:
        with self._source.lock(), os_errors(self._folder):
            # Another process may have fetched them while this one waited.
            missing = [shard for shard in shards if not self._path(shard).exists()]
            if missing:
                self._make_room(missing)
                for shard, path in self._source.fetch(missing):
                    path.replace(self._path(shard))
                    self._verified.add(shard)

    def _make_room(self, missing: list[int]) -> None:
        """Evicts shards, those that are not due and were not read for longest first, until `missing` fit the budget."""
        due = {self._path(shard) for shard in self._due}
        files = [
            (path in due, (stat := path.stat()).st_mtime_ns, stat.st_size, path) for path in self._folder.iterdir()
        ]
        excess_bytes = sum(size for _, _, size, _ in files) - self._budget_bytes
        excess_bytes += sum(self.index.shards[shard].bytes for shard in missing)
        for _, _, size, path in sorted(files):
            if excess_bytes <= 0:
                break
            path.unlink()
            excess_bytes -= size

    def _prefetch(self, due: tuple[int, ...]) -> None:
        # An error ends up unread in the future: whoever needs the shard meets it again, and reports it.
        missing = (shard for shard in due if not self._path(shard).exists())
        while (group := list(islice(missing, DOWNLOADS))) and self._due is due:
            self._fetch(group)

    def _within_budget(self, upcoming: Iterator[int]) -> Iterator[int]:
        """The first shards, each once, that fit the budget; the rest of an epoch and the next one name all."""
        seen: set[int] = set()
        room_bytes = self._budget_bytes
        for shard in islice(upcoming, 2 * len(self.index.shards)):
            if shard not in seen:
                seen.add(shard)
                room_bytes -= self.index.shards[shard].bytes
                if room_bytes < 0:
                    return
                yield shard

    def _check_fits(self, order: Order) -> None:
        sizes = [shard.bytes for shard in self.index.shards]
        total_bytes, block_images = sum(sizes), order.block_images or self.index.images
        # A block begins and ends within a shard.
        block_bytes = min(total_bytes, total_bytes * block_images // self.index.images + 2 * max(sizes))
        if block_bytes > self._budget_bytes:
            fitting_images = (self._budget_bytes - 2 * max(sizes)) * self.index.images // total_bytes
            begin = f", or begin a run with data.shuffle_block_images={fitting_images}" if fitting_images > 0 else ""
            raise BadConfigError(
                f"dataset {self.index.name} is shuffled in blocks of {block_images:,} images, whose shards take "
                f"{block_bytes:,} bytes, and data.cache_gigabytes allows {self._budget_bytes:,}: "
                f"set data.cache_gigabytes={np.ceil(block_bytes / 1e8) / 10:g}{begin}"
            )
