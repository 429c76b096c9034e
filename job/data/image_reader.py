"""Images of shards, read and decoded by threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.data.ahead import in_order
from job.data.images import Recipe, RejectedImageError, codec_versions, decode, decode_latents, prepare
from job.data.order import Int64s
from job.data.shard_source import ShardSource
from job.data.shards import DatasetIndex, Record
from job.exits import BadDataError

Uint8s = npt.NDArray[np.uint8]

_READ_AT_A_TIME = 32


class ImageReader:
    """Decodes the images of a `ShardSource`; thread-safe."""

    def __init__(self, source: ShardSource, threads: int | None = None) -> None:
        """Decodes so many images at a time: one per processor, if `threads` does not say it.

        Raises:
            BadRequestError: a recipe that makes no sense.
        """
        self.source, self.threads = source, threads or os.cpu_count() or 1
        self._recipe = _recipe(source.index) if source.index.is_foreign else None
        self._decoders = ThreadPoolExecutor(self.threads, "decode")

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
        shards = np.searchsorted(self.source.starts, indices, side="right") - 1
        rows, records = (indices - self.source.starts[shards]).tolist(), self.source.records[indices].tolist()

        def read_some(places: list[int]) -> None:
            shard = int(shards[places[0]])
            with open_shard(shard) as file:
                for place in places:
                    out[place] = self.read_image(shard, rows[place], records[place], file)

        def parts() -> Iterator[list[int]]:
            for shard in np.unique(shards):
                places = np.flatnonzero(shards == shard).tolist()
                yield from (places[at : at + _READ_AT_A_TIME] for at in range(0, len(places), _READ_AT_A_TIME))

        for _ in in_order(self._decoders, read_some, parts(), 2 * self.threads, self.source.check):
            pass

    def read_image(self, shard: int, row: int, record: Record, file: BinaryIO) -> Uint8s:
        """Image `row` of a shard, of which `record` says where in `file` it lies; raises as `read_into`."""
        offset, size_bytes, _, checksum = record
        file.seek(offset)
        encoded, wrong = file.read(size_bytes), f"it is not as it was {self.source.made}"
        try:
            if google_crc32c.value(encoded) == checksum:
                if self._recipe is not None:
                    return prepare(encoded, self._recipe)
                decoder = decode_latents if self.source.index.encoding else decode
                return decoder(encoded, self.source.index.channels, self.source.index.size)
        except RejectedImageError as error:
            wrong = f"it {error}"
        except BadDataError as error:
            wrong = str(error)
        raise BadDataError(f"{self.source.uri(shard)}, image {row} (at byte {offset}): {wrong}: {self.source.mend}")

    def close(self) -> None:
        """Ends the threads."""
        self._decoders.shutdown(cancel_futures=True)


def _recipe(index: DatasetIndex) -> Recipe:
    """What is done to each image of tars that were indexed in place."""
    if index.codecs != codec_versions():
        logging.getLogger(__name__).warning(
            f"dataset {index.name} was indexed with {index.codecs}, and not {codec_versions()}: last bits may differ"
        )
    return Recipe(index.size, index.crop, index.resize_filter, index.channels, min_side=1)
