"""Damages objects and files between two processes, as disks and networks do, and repairs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.crash_campaign.work import DATASET_KEY
from job.data.shards import OFFSETS_DTYPE, load_index
from job.runs.checkpoints import load_manifest
from job.runs.layout import CheckpointRef
from job.store import Store


def flip_checkpoint_bit(run: Store, ref: CheckpointRef) -> str:
    """Flips the middle bit of a checkpoint's averaged weights in the bucket; returns the object's URI."""
    manifest = load_manifest(run, ref)
    (record,) = (record for record in manifest.files if manifest.group_of(record) == "ema")
    data = bytearray(record.read(run))
    data[len(data) // 2] ^= 16
    run.put(record.key, bytes(data))
    return run.uri_of(record.key)


def flip_cached_byte(cache: Path) -> Path:
    """Flips a byte of the decoded images on the local disk; returns the file."""
    (path,) = cache.glob("*/images")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 255]))
    return path


class ReplacedImage:
    """Replaces an image of a shard in the bucket by another valid PNG, which only a hash can detect."""

    def __init__(self, bucket: Store) -> None:
        shard = load_index(bucket, DATASET_KEY).shards[1]
        self.bucket, self.name, self.key = bucket, shard.name, f"{DATASET_KEY}/{shard.name}"
        self._sound = bucket.read(self.key).data
        table = np.frombuffer(bucket.read(f"{DATASET_KEY}/{shard.offsets_name}").data, OFFSETS_DTYPE)
        sizes = table["bytes"].tolist()
        first, second = next((i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j])
        data, size = bytearray(self._sound), sizes[first]
        start, other = int(table[first]["offset"]), int(table[second]["offset"])
        data[start : start + size] = self._sound[other : other + size]
        bucket.put(self.key, bytes(data))

    def mend(self) -> None:
        """Restores the intact shard."""
        self.bucket.put(self.key, self._sound)
