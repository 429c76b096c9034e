"""Reads the images of shards and decodes them by threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from job.data.ahead import in_order
from job.data.images import Recipe, RejectedImageError, codec_versions, decode, decode_latents, prepare
from job.data.order import Int64s
from job.data.shard_source import ShardSource
from job.data.shards import Record, image_hash
from job.exits import BadDataError

Uint8s = npt.NDArray[np.uint8]

_READ_AT_A_TIME = 32


class ImageReader:
    """Decodes the images of a `ShardSource`; thread-safe."""

    def __init__(self, source: ShardSource, threads: int | None = None, *, with_pillow: bool = False) -> None:
        """Starts `threads` decoders, by default one per processor; `with_pillow` needs no torch for packed images.

        Raises:
            BadRequestError: the crop or the filter of the index is not valid.
        """
        self.source, self.threads, index = source, threads or os.cpu_count() or 1, source.index
        self._recipe = Recipe(index.size, "center", "box", index.channels, min_side=1) if with_pillow else None
        if index.is_foreign:
            how = index.size, index.crop, index.resize_filter, index.channels
            self._recipe = Recipe(*how, min_side=1, pixel_range=index.pixel_range)
            if index.codecs != (here := codec_versions()):
                said = f"was indexed with {index.codecs}, and is read with {here}: the lowest bits may differ"
                logging.getLogger(__name__).warning(f"dataset {index.name} {said}")
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

        for _ in in_order(self._decoders, read_some, parts(), 2 * self.threads, self.source.check):
            pass

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

    def close(self) -> None:
        """Ends the threads."""
        self._decoders.shutdown(cancel_futures=True)
