"""The preview of a dataset: a few of its images, by class if it has classes, so that a person sees the labels.

The images come from the shards, as training reads them. The choice costs a bounded number of requests for any dataset.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np

from ddpm import figures
from job.data.reading.cache import ImageCache
from job.data.reading.order import Int64s
from job.data.shards import DatasetIndex
from job.progress import printable
from job.stop import NEVER, Stop
from job.store import Store

COLUMNS, CLASSES, IMAGES = 8, 12, 32
"""Images of each class, classes, and images of a dataset without classes."""
_SEED = 0
_SHARDS = 64
"""Shards whose tables are read; of a dataset with no more, all labels are known."""
_LONGEST_NAME = 200


def preview_png(bucket: Store, index: DatasetIndex, folder: Path, stop: Stop = NEVER) -> bytes:
    """Returns the preview of a dataset as a PNG: equal datasets give equal bytes.

    Args:
        bucket: bucket of the dataset.
        index: index of the dataset, which may not be in the bucket yet.
        folder: for the offset tables that are read.
        stop: ends the reading.

    Raises:
        BadDataError: an offset table or an image in the bucket is damaged.
        StoppedError: this process has to stop.
    """
    rng = np.random.default_rng(_SEED)
    # A hostile index has line breaks, which cannot be drawn, and names whose width takes minutes to measure.
    names = [printable(name[:_LONGEST_NAME]) for name in index.classes[:CLASSES]]
    with closing(ImageCache(bucket, index, folder, stop, with_pillow=True)) as reader:
        groups = _by_class(reader, rng, len(names))
        if not any(map(len, groups)):
            names, groups = [], [np.sort(rng.choice(index.images, min(IMAGES, index.images), replace=False))]
        images = reader.read(np.concatenate(groups))
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    hidden, title = len(index.classes) - len(names), f"{index.name}-{index.size}"
    title += f" · {hidden:,} of {len(index.classes):,} classes not shown" if hidden else ""
    return figures.png(figures.contact_sheet(images, labels.tolist() if names else None, names, COLUMNS, title))


def _by_class(source: ImageCache, rng: np.random.Generator, classes: int) -> list[Int64s]:
    """Returns random images of each of the first classes, as indices; fewer of a class that is rare in large data."""
    starts, shards = source.starts, range(len(source.index.shards))

    @cache
    def labels(shard: int) -> np.ndarray:
        return source.records(np.arange(*starts[shard : shard + 2]))["label"].copy()

    chosen = {*rng.permutation(len(shards))[:_SHARDS].tolist()} if classes else set()
    # Loads the tables of these shards in parallel.
    source.records(starts[sorted(chosen)])
    for number in range(classes):
        # In a dataset that is sorted by class, no random shard may have this one.
        first = bisect_left(shards, number, key=lambda shard: labels(shard).max())
        chosen |= {*shards[first : first + 2]}
    groups = []
    for number in range(classes):
        found = np.concatenate([starts[shard] + np.flatnonzero(labels(shard) == number) for shard in sorted(chosen)])
        groups.append(np.sort(rng.permutation(found)[:COLUMNS]))
    return groups
