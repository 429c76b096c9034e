"""Verifying a dataset: every object against the index, every offset against the tar, every image by decoding it."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import google_crc32c
import numpy as np

from job.data.ahead import in_order
from job.data.shard_source import ShardSource
from job.data.shards import CONTACT_SHEET, INDEX, PACKING, REJECTS, DatasetIndex, load_index
from job.exits import BadDataError
from job.store import ObjectMissingError, Store
from job.store.scratch import scratch_folder

_IMAGES_AHEAD = 256


def verify_dataset(
    bucket: Store, key: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Checks the dataset at `key` (`datasets/NAME-SIZE`) down to the last image, one shard on the local disk at a time.

    Args:
        bucket: where the dataset lies.
        key: of the dataset's folder.
        progress: called with the number of images checked so far and in all.

    Returns:
        A line for each bad object: its URI and what is wrong with it. None if the dataset is as it was packed.

    Raises:
        MissingInputError: there is no such dataset.
        BadDataError: its index is not one, or rotten.
        DiskFullError: there is no space for a shard.
    """
    index = load_index(bucket, key)
    dataset = bucket.sub(key)
    problems = _others(dataset, index)
    if index.rejected_images:
        uri = dataset.uri_of(REJECTS)
        with _noting(problems, uri):
            if hashlib.sha256(dataset.read(REJECTS).data).hexdigest() != index.rejects_sha256:
                problems.append(f"{uri} is not what was packed: restore it, or pack the dataset anew")
    checked_images = 0
    with scratch_folder("verify") as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        source = ShardSource(bucket, key, index, folder)
        for number, shard in enumerate(index.shards):
            table = None
            with _noting(problems, dataset.uri_of(shard.offsets_name)):
                table = source.read_table(number)
            with _noting(problems, source.uri(number)):
                path = source.fetched(number, folder, table)
                if table is not None:
                    for done, problem in enumerate(_images(source, number, path, table, workers), start=1):
                        problems += [problem] if problem else []
                        progress(checked_images + done, index.images)
            (folder / shard.name).unlink(missing_ok=True)
            checked_images += shard.images
        source.close()
    return problems


@contextmanager
def _noting(problems: list[str], uri: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissingError:
        problems.append(f"{uri} is missing")
    except BadDataError as error:
        problems.append(str(error))


def _images(
    source: ShardSource, number: int, path: Path, table: np.ndarray, workers: ThreadPoolExecutor
) -> Iterator[str]:
    """What is wrong with each image of a shard that is whole, or nothing."""
    try:
        with tarfile.open(path, "r:") as archive:
            files = {(member.offset_data, member.size) for member in archive if member.isreg()}
    except tarfile.TarError:
        files = set()
    content = np.memmap(path, np.uint8, "r")

    def check(row: int) -> str:
        offset, size_bytes, _, checksum = table[row].tolist()
        encoded = content[offset : offset + size_bytes].tobytes()
        image = f"{source.uri(number)}: image {row}"
        if (offset, size_bytes) not in files or google_crc32c.value(encoded) != checksum:
            return f"{image} is not where its table says (at byte {offset})"
        try:
            source.decode_image(encoded)
        except BadDataError as error:
            return f"{image}: {error}"
        return ""

    return in_order(workers, check, range(len(table)), _IMAGES_AHEAD)


def _others(dataset: Store, index: DatasetIndex) -> list[str]:
    """What is wrong with the objects that the index does not name."""
    named = {INDEX, CONTACT_SHEET, *([REJECTS] if index.rejected_images else [])}
    named |= {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
    return [
        f"{dataset.uri_of(entry.key)} is no part of the dataset: move it elsewhere, or delete it"
        for entry in dataset.list()
        # What clearing-up leaves of the journal when it is killed belongs to nothing any more, and harms nobody.
        if entry.key not in named and not entry.key.startswith(f"{PACKING}/")
    ]
