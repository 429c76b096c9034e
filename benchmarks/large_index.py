"""Datasets of up to a billion images in a bucket: time and memory to a shuffled batch; and the requests of a run.

The dataset lies on an object server of this machine, where each shard and each table is an object with a name of its
own. The benchmark reads, verifies and decodes it like any other. Only its images are few: the server keeps its objects
as files, of which all shards are hard links to one, so that a terabyte takes ten megabytes of disk. Each measurement is
a fresh process with the cache for datasets that do not fit. Time and memory count from a program with its imports and
its connection to the server, to the first batch.

Requests are counted by a proxy, with their price, on images of noise that PNG compresses to 7.7 kB.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

import numpy as np
from PIL import Image

from benchmarks import subject
from benchmarks.measuring import ROOT, Figure, fresh
from ddpm.image_size import ImageSize
from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import (
    INDEX,
    SHARD_PIXEL_BYTES,
    DatasetIndex,
    Shards,
    ShardWriter,
    dataset_key,
    load_index,
    shard_name,
)
from job.store import open_store
from tests.faulty_proxy import FaultyProxy, Request
from tests.servers import SERVERS, fake_gcs_server, new_bucket

SHARDS = (1_100, 11_000, 110_000)
SHARD_IMAGES = 9_100
SIZE = 8
BATCH_SIZE_IMAGES = 128
BLOCK_IMAGES = 100_000
MORE_BATCHES = 50
DATASET = "large"
BUDGET_BYTES = 300_000_000
LINKS = 10_000
"""How many objects are links to one file: ext4 takes 65,000."""
_LOOK_SECONDS = 0.002
REQUESTED_SHARDS, REQUESTED_SIZE = 12, 64
LEVELS = 32
EPOCHS = 3
REQUESTED_BATCH_IMAGES = 512
FEW, MORE = 2, 12
"""Epochs, and checkpoints, of the two runs whose difference is the price of a checkpoint."""
DOLLARS = {"write": 0.005e-3, "list": 0.005e-3, "read": 0.0004e-3, "delete": 0.0}
"""The price of a request: the same on Google (single region, standard) and S3 (us-east-1, standard)."""
TINY_RUN = ("model.channels=16", "model.channel_mults=1,1", "model.layers_per_level=1", "train.batch_size=8")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Path]]:
    """Starts an object server on an empty folder; yields the URI of a bucket, and the folder of its objects."""
    objects = folder / "objects"
    with fake_gcs_server(folder, objects) as url, patch.dict(os.environ, SERVERS["gs"].variables(url)):
        bucket = new_bucket("gs", url)
        yield bucket, objects / bucket.removeprefix("gs://")


def write_dataset(
    bucket: str,
    objects: Path,
    shards: int,
    shard_images: int = SHARD_IMAGES,
    shape: tuple[int, ...] = (SIZE, SIZE),
    levels: int = 256,
) -> str:
    """Writes a dataset into a bucket whose objects lie in the folder `objects`; returns its key.

    Args:
        bucket: URI of the bucket.
        objects: the folder in which the server keeps it.
        shards: number of shards, all but a few links to others.
        shard_images: images of each.
        shape: of the images, which are noise.
        levels: number of values of their pixels, which decides how far PNG compresses them.
    """
    key, store = dataset_key(DATASET, ImageSize(*shape[:2])), open_store(bucket)
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        writer = ShardWriter(Path(name) / shard_name(0))
        pixels = np.random.default_rng(0).integers(0, levels, (256, *shape), dtype=np.uint8)
        encoded = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append(file.getvalue())
        for number in range(shard_images):
            writer.add(f"{number:09d}", encoded[number % len(encoded)], -1)
        first, offsets = writer.finish()
        for number in range(0, shards, LINKS):
            store.upload(writer.path, f"{key}/{shard_name(number)}")
            store.create(f"{key}/{table_name(number)}", offsets)
    for number in range(shards):
        if original := number % LINKS:
            for name_of in (shard_name, table_name):
                os.link(objects / key / name_of(number - original), objects / key / name_of(number))
    index = DatasetIndex(
        name=DATASET,
        size=ImageSize(*shape[:2]),
        channels=3 if len(shape) > 2 else 1,
        crop="center",
        resize_filter="box",
        source="noise",
        shards=Shards.of([first.model_copy(update={"name": shard_name(number)}) for number in range(shards)]),
    )
    store.create(f"{key}/{INDEX}", index.to_json())
    return key


def table_name(number: int) -> str:
    """Returns the key of the table of a shard, below its dataset."""
    return shard_name(number).replace(".tar", ".offsets")


def anonymous_bytes() -> int:
    """Returns the memory of this process without mapped files such as the images (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def read_dataset(bucket: str, key: str, cache_dir: Path) -> dict[str, Any]:
    """Opens the dataset in this process and takes batches; returns seconds and bytes beyond those of its imports.

    These are the imports of a training process.
    """
    store = open_store(bucket)
    assert store.exists(f"{key}/{INDEX}")
    with most_memory() as most_bytes:
        before_bytes = anonymous_bytes()
        began = time.perf_counter()
        index = load_index(store, key)
        indexed = time.perf_counter()
        cache = open_cache(store, index, BUDGET_BYTES, cache_dir=cache_dir)
        opened = time.perf_counter()
        order = Order(tuple(index.shards.images.tolist()), seed=0, block_images=BLOCK_IMAGES)
        batches = stream_batches(cache, order, batch_size_images=BATCH_SIZE_IMAGES, first_image=0, last_image=None)
        sizes = [len(next(batches).images)]
        first = time.perf_counter()
        first_peak_bytes = max(most_bytes)
        sizes += [len(next(batches).images) for _ in range(MORE_BATCHES)]
        done = time.perf_counter()
        batches.close()
        cache.close()
    assert sizes == [BATCH_SIZE_IMAGES] * (1 + MORE_BATCHES)
    return {
        "images": index.images,
        "shards": len(index.shards),
        "index_seconds": indexed - began,
        "open_seconds": opened - indexed,
        "first_batch_seconds": first - opened,
        "total_seconds": first - began,
        "next_batch_seconds": (done - first) / MORE_BATCHES,
        "program_bytes": before_bytes,
        "first_batch_bytes": first_peak_bytes - before_bytes,
        "peak_bytes": max(most_bytes) - before_bytes,
    }


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Yields a list that a thread fills with the memory of this process without mapped files, in bytes."""
    seen, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    yield seen
    done.set()
    thread.join()


def large_index(folder: Path, quick: bool) -> list[Figure]:
    """Writes datasets of several sizes; opens each for the first time and again, and takes shuffled batches."""
    figures = []
    for shards in SHARDS[:1] if quick else SHARDS:
        with TemporaryDirectory(dir=folder) as name, served(Path(name)) as (bucket, objects):
            key = write_dataset(bucket, objects, shards)
            for title in ("first opening", "again"):
                found = fresh("benchmarks.large_index", bucket, key, Path(name, "cache"))
                what = f"{found['images']:,} images in {shards:,} shards, {title}"
                for unit, of_unit, value in (
                    ("seconds", "s to a batch", found["total_seconds"]),
                    ("megabytes", "MB at most", found["peak_bytes"] / 1e6),
                ):
                    ending = unit.removeprefix("mega")
                    beside = ", ".join(f"{part} {each:,.3g}" for part, each in found.items() if part.endswith(ending))
                    key_of_figure = f"large_index_{shards}_{title.replace(' ', '_')}_{unit}"
                    figures.append(Figure(key_of_figure, f"{what}: {of_unit}", [value], beside=beside, raw=found))
    return figures


class Requests:
    """The requests that a proxy has passed on: their kinds and objects, and the bytes of all answers."""

    def __init__(self, proxy: FaultyProxy) -> None:
        """Listens to the proxy."""
        self.seen: Counter[tuple[str, str]] = Counter()
        self.received_bytes = 0
        proxy.passed, proxy.received = self._passed, self._received

    def _passed(self, request: Request) -> Request:
        target = unquote(request.target)
        kind = {"DELETE": "delete", "GET": "read"}.get(request.method, "write")
        if kind == "read" and re.search(r"/o/?([?&]|$)", target):
            kind = "list"
        named = re.search(rb'"name": ?"([^"]+)', request.body[:1000])
        key = named[1].decode() if named else target.rpartition("/o/")[2].partition("?")[0]
        # The names of attempts, checkpoints and the like have numbers.
        self.seen[kind, re.sub(r"[0-9a-f-]*\d{3,}[-\w]*", "#", key)] += 1
        return request

    def _received(self, body: bytes) -> bytes:
        self.received_bytes += len(body)
        return body

    def during(self, work: Callable[[], object]) -> Counter[tuple[str, str]]:
        """Returns the requests of `work`."""
        before = self.seen.copy()
        work()
        return self.seen - before


def requests(folder: Path, quick: bool) -> list[Figure]:
    """Counts the requests of three epochs of a tenth of a million images, and those of a checkpoint."""
    shards = 1 if quick else REQUESTED_SHARDS
    shape = (REQUESTED_SIZE, REQUESTED_SIZE, 3)
    with served(folder) as (bucket, objects):
        shard_images = SHARD_PIXEL_BYTES // math.prod(shape)
        key = write_dataset(bucket, objects, shards, shard_images=shard_images, shape=shape, levels=LEVELS)
        emulator = os.environ["STORAGE_EMULATOR_HOST"]
        with FaultyProxy(emulator) as proxy, patch.dict(os.environ, STORAGE_EMULATOR_HOST=proxy.url):
            passed = Requests(proxy)
            return [*of_epochs(passed, bucket, key, folder / "cache"), *of_checkpoint(passed, bucket, folder)]


def of_epochs(passed: Requests, bucket: str, key: str, cache_dir: Path) -> list[Figure]:
    """Reads a dataset from its bucket, and counts the requests of its opening and of each epoch."""
    store = open_store(bucket)
    index, caches = load_index(store, key), list[ImageCache]()
    opening = passed.during(lambda: caches.append(open_cache(store, index, 1 << 40, cache_dir=cache_dir))).total()
    share = passed.received_bytes / int(index.shards.bytes.sum())
    order, last = Order(tuple(index.shards.images.tolist()), seed=0), EPOCHS * index.images
    batches = stream_batches(caches[0], order, batch_size_images=REQUESTED_BATCH_IMAGES, first_image=0, last_image=last)
    steps = index.images // REQUESTED_BATCH_IMAGES
    epochs = [passed.during(lambda: [next(batches) for _ in range(steps)]).total() for _ in range(EPOCHS)]
    batches.close()
    caches[0].close()
    shards = f"{len(index.shards)} shards of {index.shards.bytes[0]:,} bytes"
    what = f"requests to open {index.images:,} images of {REQUESTED_SIZE}×{REQUESTED_SIZE} in {shards}"
    return [
        Figure("requests_of_opening", what, [opening], beside=f"{share:.4f} × their bytes"),
        Figure("requests_of_epochs", "requests of each epoch after that", list(map(float, epochs))),
    ]


def of_checkpoint(passed: Requests, bucket: str, folder: Path) -> list[Figure]:
    """Trains tiny networks, and counts what a checkpoint more costs."""
    subject.pack_noise(bucket, folder / "images", 64)
    sets = [f"--set={one}" for one in (*TINY_RUN, "checkpoint.every_epochs=1", "sample.every_epochs=0")]
    words = [sys.executable, "-m", "job", "--quiet", "train", "--dataset", subject.DATASET, *sets]
    environment = os.environ | {"DDPM_CACHE": str(folder / "cache"), "DDPM_BUCKET": bucket}

    def train(epochs: int) -> None:
        more = ["--run", f"r{epochs}", "--epochs", str(epochs)]
        subprocess.run([*words, *more], env=environment, check=True, cwd=ROOT)

    few, more = (passed.during(partial(train, epochs)) for epochs in (FEW, MORE))
    found: dict[str, dict[str, float]] = {kind: {} for kind in DOLLARS}
    for (kind, key), count in sorted(more.items()):
        if share := (count - few[kind, key.replace(f"r{MORE}", f"r{FEW}")]) / (MORE - FEW):
            found[kind][key] = share
    return [
        Figure(
            f"requests_of_checkpoint_{kind}",
            f"{kind} requests of a checkpoint",
            [sum(of_kind.values())],
            beside=f"{1000 * sum(of_kind.values()) * DOLLARS[kind]:.4f} dollars for a thousand checkpoints: "
            + ", ".join(f"{share:.1f} {key}" for key, share in of_kind.items()),
        )
        for kind, of_kind in found.items()
    ]


if __name__ == "__main__":
    bucket, key, cache = sys.argv[1:]
    print(json.dumps(read_dataset(bucket, key, Path(cache))))
