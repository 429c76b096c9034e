"""Verifying a dataset: every object against the index, every offset against the tar, every image by decoding it."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.data.images import decode
from job.data.journal import PACKING, REJECTS
from job.data.members import in_order
from job.data.places import Places
from job.data.shard_source import image_decoder
from job.data.shards import CONTACT_SHEET, INDEX, OFFSETS_DTYPE, DatasetIndex, Shard, first_damaged, load_index
from job.exits import BadDataError
from job.store import ObjectMissingError, Store
from job.store.scratch import scratch_folder

Table = npt.NDArray[np.void]

_BLOCK_BYTES = 1 << 20


def verify_dataset(bucket: Store, key: str, progress: Callable[[int, int], None] | None = None) -> list[str]:
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
    problems = _rejects(dataset, index) + _others(bucket, key, index)
    checked_images = 0
    with scratch_folder("verify") as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        tar = folder / "shard.tar"
        places = Places(bucket, key, index)
        for place, shard in enumerate(index.shards):
            found = _shard(dataset, *places.of(place), index, shard, tar, workers)
            for number, problem in enumerate(found, start=1):
                problems += [problem] if problem else []
                if progress is not None:
                    progress(checked_images + number, index.images)
            checked_images += shard.images
    return problems


def _shard(
    dataset: Store, store: Store, key: str, index: DatasetIndex, shard: Shard, tar: Path, workers: ThreadPoolExecutor
) -> Iterator[str]:
    """Yields what is wrong with a shard or its table; if they are whole, with each image, or nothing."""
    table = _offsets(dataset, shard)
    found = _tar(store, key, shard, tar, table)
    yield from found
    if isinstance(table, str):
        yield table
    elif not found and index.is_foreign:
        decode_foreign = image_decoder(index, dataset.uri_of(INDEX))
        yield from _foreign_images(store.uri_of(key), decode_foreign, len(index.classes), tar, table, workers)
    elif not found:
        yield from _images(dataset, index, shard, tar, table, workers)


def _tar(store: Store, key: str, shard: Shard, tar: Path, table: Table | str) -> list[str]:
    where = store.uri_of(key)
    try:
        store.download(key, tar)
    except ObjectMissingError:
        return [f"{where} is missing"]
    size, sha256, crc32c = 0, hashlib.sha256(), 0
    with tar.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            sha256.update(block)
            crc32c = google_crc32c.extend(crc32c, block)
    if size != shard.bytes:
        wrong = f"has {size} bytes instead of {shard.bytes}"
    elif sha256.hexdigest() != shard.sha256:
        wrong = f"has sha256 {sha256.hexdigest()} instead of {shard.sha256}"
    elif f"{crc32c:08x}" != shard.crc32c:
        wrong = f"has crc32c {crc32c:08x} instead of {shard.crc32c}"
    else:
        return []
    if isinstance(table, str):
        return [f"{where} {wrong}"]
    with tar.open("rb") as file:
        return [f"{where} {wrong}; {first_damaged(file, table)}"]


def _offsets(dataset: Store, shard: Shard) -> Table | str:
    """The offset table, or what is wrong with it."""
    where = dataset.uri_of(shard.offsets_name)
    try:
        offsets = dataset.read(shard.offsets_name).data
    except ObjectMissingError:
        return f"{where} is missing"
    if len(offsets) != shard.images * OFFSETS_DTYPE.itemsize:
        return f"{where} has {len(offsets)} bytes instead of {shard.images * OFFSETS_DTYPE.itemsize}"
    if (sha256 := hashlib.sha256(offsets).hexdigest()) != shard.offsets_sha256:
        return f"{where} has sha256 {sha256} instead of {shard.offsets_sha256}"
    return np.frombuffer(offsets, OFFSETS_DTYPE)


def _images(
    dataset: Store, index: DatasetIndex, shard: Shard, tar: Path, table: Table, workers: ThreadPoolExecutor
) -> Iterator[str]:
    """Compares the offset table with the tar's own headers, then yields what is wrong with each image, or nothing."""
    if not np.array_equal(table, _table_of(tar)):
        yield f"{dataset.uri_of(shard.offsets_name)} does not say where the images of {shard.name} lie"
        return
    shape = (index.size, index.size, index.channels)
    classes = len(index.classes)
    content = np.memmap(tar, np.uint8, "r")

    def check(number: int) -> str:
        offset, size, label, _ = (int(value) for value in table[number])
        where = f"{dataset.uri_of(shard.name)}: image {number}"
        try:
            decoded = decode(content[offset : offset + size].tobytes(), index.channels).shape
        except BadDataError as error:
            return f"{where}: {error}"
        if decoded != shape:
            return f"{where} has the shape {decoded} instead of {shape}"
        return "" if (label in range(classes) if classes else label == -1) else f"{where} has the class {label}"

    yield from in_order(workers, check, range(len(table)), window=256)


def _foreign_images(
    where: str,
    decode_foreign: Callable[[bytes], object],
    classes: int,
    tar: Path,
    table: Table,
    workers: ThreadPoolExecutor,
) -> Iterator[str]:
    """As `_images`, of a tar that was indexed in place, which may hold more than the images of its table."""
    with tarfile.open(tar, "r:") as archive:
        files = {(member.offset_data, member.size) for member in archive if member.isreg()}
    content = np.memmap(tar, np.uint8, "r")

    def check(number: int) -> str:
        offset, size, label, checksum = (int(value) for value in table[number])
        encoded = content[offset : offset + size].tobytes()
        if (offset, size) not in files or google_crc32c.value(encoded) != checksum:
            return f"{where}: image {number} is not where its table says (at byte {offset})"
        try:
            decode_foreign(encoded)
        except BadDataError as error:
            return f"{where}: image {number}: {error}"
        is_known = label in range(classes) if classes else label == -1
        return "" if is_known else f"{where}: image {number} has the class {label}"

    yield from in_order(workers, check, range(len(table)), window=256)


def _table_of(tar: Path) -> np.ndarray:
    """The offset table as the tar's own headers have it; empty if it is no tar."""
    rows: list[tuple[int, int, int, int]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is None:
                    continue
                if member.name.endswith(".cls") and rows:
                    rows[-1] = (*rows[-1][:2], int(file.read()), rows[-1][3])
                else:
                    rows.append((member.offset_data, member.size, -1, google_crc32c.value(file.read())))
    except (tarfile.TarError, ValueError):
        return np.empty(0, OFFSETS_DTYPE)
    return np.array(rows, OFFSETS_DTYPE)


def _rejects(dataset: Store, index: DatasetIndex) -> list[str]:
    if not index.rejected_images:
        return []
    try:
        sha256 = hashlib.sha256(dataset.read(REJECTS).data).hexdigest()
    except ObjectMissingError:
        return [f"{dataset.uri_of(REJECTS)} is missing"]
    if sha256 != index.rejects_sha256:
        return [f"{dataset.uri_of(REJECTS)} has sha256 {sha256} instead of {index.rejects_sha256}"]
    return []


def _others(bucket: Store, key: str, index: DatasetIndex) -> list[str]:
    """What is wrong with the objects that the index does not name."""
    dataset, problems = bucket.sub(key), []
    named = {INDEX, CONTACT_SHEET, *([REJECTS] if index.rejected_images else [])}
    named |= {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
    for entry in dataset.list():
        # What clearing-up leaves of the journal when it is killed belongs to nothing any more, and harms nobody.
        if entry.key not in named and not entry.key.startswith(f"{PACKING}/"):
            problems.append(f"{dataset.uri_of(entry.key)} is no part of the dataset: move it elsewhere, or delete it")
    return problems
