"""Verifying a dataset: every object against the index, every offset against the tar, every image by decoding it."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from job.data.images import decode
from job.data.journal import REJECTS
from job.data.members import in_order
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, Shard, load_index
from job.exits import BadDataError
from job.store import ObjectMissingError, Store
from job.store.files import os_errors

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
        BadDataError: its index is not one.
        DiskFullError: there is no space for a shard.
    """
    index = load_index(bucket, key)
    dataset = bucket.sub(key)
    problems = _rejects(dataset, index)
    checked_images = 0
    with os_errors("the folder for temporary files (TMPDIR)"):
        folder = tempfile.TemporaryDirectory(prefix="ddpm-verify-")
    with folder as path, ThreadPoolExecutor(os.cpu_count()) as workers:
        tar = Path(path) / "shard.tar"
        for shard in index.shards:
            found = _shard(dataset, shard, tar) + _offsets(dataset, shard)
            # What differs from its hash is bad as a whole; the images of all others are looked at.
            for number, problem in enumerate(found or _images(dataset, index, shard, tar, workers), start=1):
                problems += [problem] if problem else []
                if progress is not None:
                    progress(checked_images + number, index.images)
            checked_images += shard.images
    return problems


def _shard(dataset: Store, shard: Shard, tar: Path) -> list[str]:
    where = dataset.uri_of(shard.name)
    try:
        dataset.download(shard.name, tar)
    except ObjectMissingError:
        return [f"{where} is missing"]
    size, sha256, crc32c = 0, hashlib.sha256(), 0
    with tar.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            sha256.update(block)
            crc32c = google_crc32c.extend(crc32c, block)
    if size != shard.bytes:
        return [f"{where} has {size} bytes instead of {shard.bytes}"]
    if sha256.hexdigest() != shard.sha256:
        return [f"{where} has sha256 {sha256.hexdigest()} instead of {shard.sha256}"]
    if f"{crc32c:08x}" != shard.crc32c:
        return [f"{where} has crc32c {crc32c:08x} instead of {shard.crc32c}"]
    return []


def _offsets(dataset: Store, shard: Shard) -> list[str]:
    where = dataset.uri_of(shard.offsets_name)
    try:
        offsets = dataset.read(shard.offsets_name).data
    except ObjectMissingError:
        return [f"{where} is missing"]
    if len(offsets) != shard.images * OFFSETS_DTYPE.itemsize:
        return [f"{where} has {len(offsets)} bytes instead of {shard.images * OFFSETS_DTYPE.itemsize}"]
    if (sha256 := hashlib.sha256(offsets).hexdigest()) != shard.offsets_sha256:
        return [f"{where} has sha256 {sha256} instead of {shard.offsets_sha256}"]
    return []


def _images(dataset: Store, index: DatasetIndex, shard: Shard, tar: Path, workers: ThreadPoolExecutor) -> Iterator[str]:
    """Compares the offset table with the tar's own headers, then yields what is wrong with each image, or nothing."""
    table = np.frombuffer(dataset.read(shard.offsets_name).data, OFFSETS_DTYPE)
    if not np.array_equal(table, _table_of(tar)):
        yield f"{dataset.uri_of(shard.offsets_name)} does not say where the images of {shard.name} lie"
        return
    shape = (index.size, index.size, index.channels)
    classes = len(index.classes)
    content = np.memmap(tar, np.uint8, "r")

    def check(number: int) -> str:
        offset, size, label = (int(value) for value in table[number])
        where = f"{dataset.uri_of(shard.name)}: image {number}"
        try:
            decoded = decode(content[offset : offset + size].tobytes(), index.channels).shape
        except BadDataError as error:
            return f"{where}: {error}"
        if decoded != shape:
            return f"{where} has the shape {decoded} instead of {shape}"
        return "" if (label in range(classes) if classes else label == -1) else f"{where} has the class {label}"

    yield from in_order(workers, check, range(len(table)), window=256)


def _table_of(tar: Path) -> np.ndarray:
    """The offset table as the tar's own headers have it; empty if it is no tar."""
    rows: list[tuple[int, int, int]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.name.endswith(".cls") and rows and (label := archive.extractfile(member)):
                    rows[-1] = (*rows[-1][:2], int(label.read()))
                else:
                    rows.append((member.offset_data, member.size, -1))
    except (tarfile.TarError, ValueError):
        return np.empty(0, OFFSETS_DTYPE)
    return np.array(rows, OFFSETS_DTYPE)


def _rejects(dataset: Store, index: DatasetIndex) -> list[str]:
    if not index.rejected_images:
        return []
    try:
        lines = dataset.read(REJECTS).data.count(b"\n")
    except ObjectMissingError:
        return [f"{dataset.uri_of(REJECTS)} is missing"]
    if lines != index.rejected_images:
        return [f"{dataset.uri_of(REJECTS)} names {lines} images instead of {index.rejected_images}"]
    return []
