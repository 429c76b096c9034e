"""A few images of a dataset for a person to look at: read by their offsets, without fetching whole shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from job.data.shard_source import Int64s, ShardSource, Uint8s
from job.data.shards import DatasetIndex
from job.store import Store

READS = 8
"""Shards that are read from at a time."""


class ChosenImages:
    """The labels of a dataset, and any of its images."""

    def __init__(self, bucket: Store, key: str, index: DatasetIndex, cache_dir: Path) -> None:
        """Fetches the offset tables of the dataset at `key` into its part of `cache_dir`, unless they are there.

        Raises:
            BadDataError: a table is not as it was packed.
        """
        folder = cache_dir / index.dataset_id
        self._source = ShardSource(bucket, key, index, folder, threads=None)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Of all images, int32 [N]; -1 where there are no classes."""
        return np.asarray(self._source.records["label"])

    def read(self, indices: Int64s) -> Uint8s:
        """Images `indices`, int64 [n], as uint8 [n, H, W, C].

        Raises:
            BadDataError: one is not as it was packed; the message names it.
        """
        source = self._source
        out = np.empty((len(indices), *source.image_shape), np.uint8)
        shards = np.searchsorted(source.starts, indices, "right") - 1

        def read_from(shard: int) -> None:
            places = np.flatnonzero(shards == shard)
            rows = indices[places] - source.starts[shard]
            store, name = source.places.of(shard)
            contents = []
            with store.open(name) as file:
                for row in rows.tolist():
                    record = source.records[source.starts[shard] + row]
                    file.seek(int(record["offset"]))
                    contents.append(source.checked(shard, row, file.read(int(record["bytes"]))))
            source.finish(source.decode(shard, rows, contents.__getitem__, out, places))

        with ThreadPoolExecutor(READS, "read") as pool:
            list(pool.map(read_from, np.unique(shards).tolist()))
        return out
