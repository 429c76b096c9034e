"""Checks of a dataset: a preview, in which a person sees the labels, and the verification of each object and image.

The preview has a few images, by class if there are classes. They come from the shards, as training reads them. The
choice costs a bounded number of requests for any dataset.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddpm import figures
from job.coordination.pieces import CLAIMS, RECORDS
from job.data import shards
from job.data.reading.cache import ImageCache
from job.data.reading.order import Int64s
from job.data.shards import DatasetIndex, Record, load_index
from job.exits import BadDataError
from job.progress import Progress, printable
from job.stop import NEVER, Stop, in_order
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

COLUMNS, CLASSES, IMAGES = 8, 12, 32
"""Images of each class, classes, and images of a dataset without classes."""
_SEED = 0
_SHARDS = 64
"""Shards whose tables are read; of a dataset with no more, all labels are known."""
_LONGEST_NAME = 200
_IMAGES_AHEAD = 256


def preview_png(bucket: Store, index: DatasetIndex, folder: Path | None = None, stop: Stop = NEVER) -> bytes:
    """Returns the preview of a dataset as a PNG: equal datasets give equal bytes.

    Args:
        bucket: bucket of the dataset.
        index: index of the dataset, which may not be in the bucket yet.
        folder: for the offset tables that are read; None for that of the cache.
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
        images = figures.shown(reader.read(chosen := np.concatenate(groups)))
        if index.condition_channels:
            images = figures.side_by_side(images, figures.shown(reader.conditions(chosen)))
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    hidden, title = len(index.classes) - len(names), f"{index.name}-{index.size}"
    title += f" · {hidden:,} of {len(index.classes):,} classes not shown" if hidden else ""
    title += f" · {view}" if (view := index.how_shown()) else ""
    return figures.png(figures.contact_sheet(images, labels.tolist() if names else None, names, COLUMNS, title))


def _by_class(source: ImageCache, rng: np.random.Generator, classes: int) -> list[Int64s]:
    """Returns random images of each of the first classes, as indices; fewer of a class that is rare in large data."""
    starts, all_shards = source.starts, range(len(source.index.shards))

    @cache
    def labels(shard: int) -> np.ndarray:
        return source.records(np.arange(*starts[shard : shard + 2]))["label"].copy()

    chosen = {*rng.permutation(len(all_shards))[:_SHARDS].tolist()} if classes else set()
    # Loads the tables of these shards in parallel.
    source.records(starts[sorted(chosen)])
    for number in range(classes):
        # In a dataset that is sorted by class, no random shard may have this one.
        first = bisect_left(all_shards, number, key=lambda shard: labels(shard).max())
        chosen |= {*all_shards[first : first + 2]}
    groups = []
    for number in range(classes):
        found = np.concatenate([starts[shard] + np.flatnonzero(labels(shard) == number) for shard in sorted(chosen)])
        groups.append(np.sort(rng.permutation(found)[:COLUMNS]))
    return groups


def verify_dataset(bucket: Store, key: str) -> list[str]:
    """Checks every image of the dataset at `key` (`datasets/NAME-SIZE`), with one shard on the local disk at a time.

    Args:
        bucket: bucket of the dataset.
        key: folder of the dataset.

    Returns:
        A line for each bad object with its URI and problem; none for an intact dataset.

    Raises:
        MissingInputError: the dataset does not exist.
        BadDataError: its index is corrupt.
        DiskFullError: a shard does not fit the local disk.
    """
    index = load_index(bucket, key)
    dataset = bucket.sub(key)
    hashes = {shards.REJECTS: index.rejects_sha256} if index.rejected_images else {}
    if index.encoding:
        hashes |= zip(shards.AUTOENCODER, index.encoding.hashes, strict=True)
    problems = _others(dataset, index, hashes)
    for name, sha256 in hashes.items():
        with _noting(problems, dataset.uri_of(name)), dataset.open(name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
                problems.append(f"{dataset.uri_of(name)} differs from the index: restore it, or make the dataset again")
    with (
        scratch_folder("verify") as folder,
        ThreadPoolExecutor(os.cpu_count()) as workers,
        closing(ImageCache(bucket, index, folder)) as reader,
        Progress(f"verifying {index.name}", total=index.images) as bar,
    ):
        for shard in range(len(index.shards)):
            problems += _in_shard(shard, reader, dataset, folder / "shard", workers, bar)
    return problems


def _in_shard(
    shard: int, reader: ImageCache, dataset: Store, path: Path, workers: ThreadPoolExecutor, bar: Progress
) -> list[str]:
    """Returns the problems of a shard and its table; a tar elsewhere is copied to a path."""
    packed, (store, key) = reader.index.shards[shard], reader.place(shard)
    problems, records = list[str](), list[Record]()
    with _noting(problems, dataset.uri_of(packed.offsets_name)):
        records += reader.read_table(shard).tolist()

    def opened() -> BinaryIO:
        return store.open(key) if reader.is_local else path.open("rb")

    def problem(row: int) -> str:
        try:
            with opened() as file:
                reader.read_image(shard, row, records[row], file)
        except BadDataError as error:
            return str(error)
        return ""

    with _noting(problems, uri := store.uri_of(key)):
        if not reader.is_local:
            store.download(key, path)
        with opened() as file:
            is_whole = hashlib.file_digest(file, "sha256").hexdigest() == packed.sha256  # type: ignore[arg-type]
        damaged = list[str]()
        for row, found in enumerate(in_order(workers, problem, range(len(records)), _IMAGES_AHEAD)):
            damaged += filter(None, [found])
            bar.update(int(reader.starts[shard]) + row + 1)
        if damaged and not is_whole:
            # In a truncated shard every image behind its end is damaged.
            others = f"; damaged images of this shard: {len(damaged):,}" if damaged[1:] else ""
            damaged = [damaged[0] + others]
        elif not is_whole:
            intact = ", but all its images are intact" if records else ""
            damaged = [f"{uri} differs from the index{intact}: {reader.remedy}"]
        problems += damaged
    path.unlink(missing_ok=True)
    return problems


@contextmanager
def _noting(problems: list[str], uri: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissingError:
        problems.append(f"{uri} is missing")
    except BadDataError as error:
        problems.append(str(error))


def _others(dataset: Store, index: DatasetIndex, hashes: Iterable[str]) -> list[str]:
    """Returns a problem for each object that does not belong to the dataset."""
    named = {shards.INDEX, shards.PREVIEW, *hashes}
    named |= {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
    return [
        f"{dataset.uri_of(entry.key)} does not belong to the dataset: move it elsewhere, or delete it"
        for entry in dataset.list()
        # A killed packer may leave harmless records of pieces; references of evaluations name their dataset.
        if entry.key not in named and not entry.key.startswith((f"{RECORDS}/", f"{CLAIMS}/", f"{shards.REFERENCES}/"))
    ]
