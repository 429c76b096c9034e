"""A dataset of random pixels in any bucket, and a folder that behaves like a bucket far away."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from job.data.shards import INDEX, DatasetIndex, Shards, ShardWriter, shard_name
from job.store import Store, open_store
from job.store.local import LocalStore

KEY = "datasets/random-8"


@dataclass(frozen=True)
class SmallDataset:
    """What was written, and what a reader must give back."""

    bucket: Store
    key: str
    index: DatasetIndex
    pixels: np.ndarray
    labels: np.ndarray


class FarStore(LocalStore):
    """A folder without a path: its shards have to be downloaded. Remembers which, and calls `before_download`."""

    def __init__(self, root: Path, before_download: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(root)
        self.uri = "far://bucket"
        self.downloads: list[str] = []
        self._before_download = before_download
        self._lock = threading.Lock()

    def download(self, key: str, path: Path) -> str:
        with self._lock:
            self.downloads.append(key.rpartition("/")[2])
            self._before_download(key)
        return super().download(key, path)


def png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, C]."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def write_dataset(
    bucket_uri: str,
    folder: Path,
    shard_images: tuple[int, ...] = (5, 3, 7, 1, 6),
    *,
    size: int = 8,
    grain: int = 1,
    channels: int = 3,
    classes: tuple[str, ...] = ("cat", "dog", "hen"),
    encode: Callable[[np.ndarray], bytes] = png,
) -> SmallDataset:
    """Writes a dataset of squares of `grain` pixels, of size 8 below `KEY`; `folder` is for temporary files."""
    bucket, key = open_store(bucket_uri), f"datasets/random-{size}"
    images = sum(shard_images)
    squares = (images, size // grain, size // grain, channels)
    pixels = np.random.default_rng(0).integers(0, 256, squares, dtype=np.uint8).repeat(grain, 1).repeat(grain, 2)
    labels = np.arange(images, dtype=np.int32) % len(classes) if classes else np.full(images, -1, np.int32)
    shards, image = [], 0
    for number, count in enumerate(shard_images):
        writer = ShardWriter(folder / shard_name(number))
        for _ in range(count):
            writer.add(f"{image:08d}", encode(pixels[image]), int(labels[image]))
            image += 1
        shard, offsets = writer.finish()
        bucket.upload(writer.path, f"{key}/{shard.name}")
        bucket.create(f"{key}/{shard.offsets_name}", offsets)
        shards.append(shard)
    index = DatasetIndex(
        name="random",
        size=size,
        channels=channels,
        classes=classes,
        crop="center",
        resize_filter="lanczos",
        source="rng",
        shards=Shards.of(shards),
    )
    bucket.create(f"{key}/{INDEX}", index.to_json())
    return SmallDataset(bucket, key, index, pixels, labels)
