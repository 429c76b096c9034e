"""Verifies a dataset: compares every object with the index, and decodes every image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from job.coordination.pieces import CLAIMS, RECORDS
from job.data import shards
from job.data.ahead import in_order
from job.data.cache import ImageCache
from job.data.shard_source import ShardSource
from job.data.shards import DatasetIndex, Record, load_index
from job.exits import BadDataError
from job.store import ObjectMissingError, Store
from job.store.files import scratch_folder

_IMAGES_AHEAD = 256


def verify_dataset(
    bucket: Store, key: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Checks every image of the dataset at `key` (`datasets/NAME-SIZE`), with one shard on the local disk at a time.

    Args:
        bucket: bucket of the dataset.
        key: folder of the dataset.
        progress: called with the number of images checked so far, and of all.

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
    with scratch_folder("verify") as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        source = ShardSource(bucket, key, index, folder)
        reader = ImageCache(source)
        for number, shard in enumerate(index.shards):
            images: list[tuple[int, Record]] = []
            with _noting(problems, dataset.uri_of(shard.offsets_name)):
                images += enumerate(source.read_table(number).tolist())
            with _noting(problems, uri := source.uri(number)):
                is_whole, opener = _compared(source, number, folder / shard.name)
                check, damaged = partial(_problem, reader, number, opener), list[str]()
                for (row, _), found in zip(images, in_order(workers, check, images, _IMAGES_AHEAD), strict=True):
                    damaged += filter(None, [found])
                    progress(int(source.starts[number]) + row + 1, index.images)
                between = f"{uri} differs from the index{', but all its images are intact' if images else ''}"
                # Of a truncated shard that is every image behind its end.
                problems += damaged if is_whole else damaged[:1] or [f"{between}: {source.remedy}"]
            (folder / shard.name).unlink(missing_ok=True)
        reader.close()
    return problems


@contextmanager
def _noting(problems: list[str], uri: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissingError:
        problems.append(f"{uri} is missing")
    except BadDataError as error:
        problems.append(str(error))


def _compared(source: ShardSource, shard: int, path: Path) -> tuple[bool, Callable[[], BinaryIO]]:
    """Returns whether a shard has the hash of the index, and opens it; one elsewhere is copied to a path."""
    store, key = source.place(shard)
    opener: Callable[[], BinaryIO] = partial(store.open, key)
    if source.is_local:
        with opener() as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    else:
        sha256, opener = store.download(key, path), lambda: path.open("rb")
    return sha256 == source.index.shards[shard].sha256, opener


def _problem(reader: ImageCache, shard: int, opener: Callable[[], BinaryIO], image: tuple[int, Record]) -> str:
    """Returns what is wrong with an image; empty if it is intact."""
    try:
        with opener() as file:
            reader.read_image(shard, *image, file)
    except BadDataError as error:
        return str(error)
    return ""


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
