"""Verifies a dataset: compares every object with the index, and decodes every image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from job.coordination.pieces import CLAIMS, RECORDS
from job.data import shards
from job.data.reading.cache import ImageCache
from job.data.shards import DatasetIndex, Record, load_index
from job.exits import BadDataError
from job.progress import Progress
from job.stop import in_order
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

_IMAGES_AHEAD = 256


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
        between = f"{uri} differs from the index{', but all its images are intact' if records else ''}"
        # In a truncated shard every image behind its end is damaged.
        problems += damaged if is_whole else damaged[:1] or [f"{between}: {reader.remedy}"]
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
