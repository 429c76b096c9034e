"""A dataset of a hundred million images in a bucket: the time and memory to open it, shuffle it and yield a batch.

    python -m benchmarks.large_index                        100,100,000 images in 11,000 shards
    python -m benchmarks.large_index --shards 110000        1,001,000,000 images

The dataset lies on an object server of this machine, where each shard and each table is an object with a name of its
own. The benchmark reads, verifies and decodes it like any other. Only its images are few: the server keeps its objects
as files, of which all shards are hard links to one, so that a terabyte takes ten megabytes of disk. Each measurement is
a fresh process with the cache for datasets that do not fit. Time and memory count from a program with its imports and
its connection to the server, to the first batch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.loader import anonymous_bytes
from ddpm.image_size import ImageSize
from job.data.reading.cache import open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import INDEX, DatasetIndex, Shards, ShardWriter, dataset_key, load_index, shard_name
from job.progress import Progress
from job.store import open_store
from tests.servers import SERVERS, fake_gcs_server, new_bucket

SHARDS = 11_000
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


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Path]]:
    """Starts an object server on an empty folder; yields the URI of a bucket, and the folder of its objects."""
    objects = folder / "objects"
    with fake_gcs_server(folder, objects) as url:
        os.environ.update(SERVERS["gs"].variables(url))
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
        encoded = [_png(Image.fromarray(image)) for image in pixels]
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


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_dataset(bucket: str, key: str, cache_dir: Path) -> dict[str, Any]:
    """Opens the dataset in this process and takes batches; returns seconds since its imports, and bytes of memory."""
    store = open_store(bucket)
    assert store.exists(f"{key}/{INDEX}")
    with most_memory() as most_bytes:
        before_bytes = anonymous_bytes()
        began = time.perf_counter()
        index = load_index(store, key)
        indexed = time.perf_counter()
        cache = open_cache(store, index, BUDGET_BYTES, cache_dir=cache_dir)
        opened = time.perf_counter()
        batches = stream_batches(
            cache,
            Order(tuple(index.shards.images.tolist()), seed=0, block_images=BLOCK_IMAGES),
            batch_size_images=BATCH_SIZE_IMAGES,
            first_image=0,
            last_image=None,
        )
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


def measure(shards: int) -> dict[str, dict[str, Any]]:
    """Writes the dataset and reads it, shuffled within blocks: for the first time, and again."""
    with TemporaryDirectory(prefix="ddpm-bench-") as name, Progress("large index", total=3, unit="steps") as bar:
        folder = Path(name)
        with served(folder) as (bucket, objects):
            key = write_dataset(bucket, objects, shards)
            bar.update(1)
            found = {}
            for number, title in enumerate(("first opening", "opened again")):
                found[title] = read(bucket, key, folder / "cache")
                bar.update(number + 2)
            return found


def read(bucket: str, key: str, cache: Path) -> dict[str, Any]:
    """Reads the dataset in a process of its own; see `read_dataset`."""
    command = [sys.executable, "-m", "benchmarks.large_index", "--read", bucket, key, str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def main() -> None:
    """The command line."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_index", description=description)
    parser.add_argument(
        "--shards", type=int, default=SHARDS, help=f"of {SHARD_IMAGES:,} images each (default: {SHARDS:,})"
    )
    parser.add_argument("--read", nargs=3, metavar=("BUCKET", "KEY", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        bucket, key, cache = options.read
        print(json.dumps(read_dataset(bucket, key, Path(cache))))
        return
    show(measure(options.shards))


def show(found: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    seconds = ("index s", "tables s", "first batch s", "all of these s")
    table = Table("", *seconds, "next batches ms", "MB to the first batch", "MB at most", "of the program MB")
    for title, row in found.items():
        times = [row[f"{name}_seconds"] for name in ("index", "open", "first_batch", "total")]
        sizes = [row[name] for name in ("first_batch_bytes", "peak_bytes", "program_bytes")]
        table.add_row(
            title,
            *(f"{value:.2f}" for value in times),
            f"{1000 * row['next_batch_seconds']:.1f}",
            *(f"{value / 1e6:.0f}" for value in sizes),
        )
    row = next(iter(found.values()))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(
        f"{row['images']:,} images in {row['shards']:,} shards, batches of {BATCH_SIZE_IMAGES}, in blocks of "
        f"{BLOCK_IMAGES:,}. The memory is that above the program, at its peak, without mapped files.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
