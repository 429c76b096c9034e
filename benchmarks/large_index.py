"""A dataset of ten million images: the time and memory to open it, shuffle it and yield a batch.

    python -m benchmarks.large_index                        10,000,000 images in 1,000 shards
    python -m benchmarks.large_index --images 1000000

The dataset is a real one in a local folder, and the benchmark reads, verifies and decodes it like any other. Only its
images are few: every shard is the same file under another name, so that ten gigabytes take ten megabytes of disk. Each
measurement is a fresh process with the cache for datasets that do not fit.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from job.data.cache import open_cache
from job.data.order import Order
from job.data.shards import INDEX, DatasetIndex, ShardWriter, dataset_key, load_index, shard_name
from job.data.stream import stream_batches
from job.progress import Progress
from job.store import open_store

IMAGES = 10_000_000
SHARD_IMAGES = 10_000
SIZE = 8
BATCH_SIZE_IMAGES = 128
BLOCK_IMAGES = 100_000
MORE_BATCHES = 50
DATASET = "large"


def write_dataset(bucket: Path, images: int) -> str:
    """Writes a dataset of `images` images, a multiple of `SHARD_IMAGES`, below `bucket`; returns its key."""
    key = dataset_key(DATASET, SIZE)
    folder = bucket / key
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / shard_name(0))
    pixels = np.random.default_rng(0).integers(0, 256, (256, SIZE, SIZE), dtype=np.uint8)
    encoded = [_png(Image.fromarray(image)) for image in pixels]
    for number in range(SHARD_IMAGES):
        writer.add(f"{number:09d}", encoded[number % len(encoded)], -1)
    first, offsets = writer.finish()
    (folder / first.offsets_name).write_bytes(offsets)
    shards = [first.model_copy(update={"name": shard_name(number)}) for number in range(images // SHARD_IMAGES)]
    for shard in shards[1:]:
        for name, original in ((shard.name, first.name), (shard.offsets_name, first.offsets_name)):
            (folder / name).hardlink_to(folder / original)
    index = DatasetIndex(
        name=DATASET,
        size=SIZE,
        channels=1,
        crop="center",
        resize_filter="box",
        source="noise",
        source_sha256="0" * 64,
        shards=tuple(shards),
    )
    (folder / INDEX).write_bytes(index.to_json())
    return key


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_dataset(bucket: Path, key: str, cache_dir: Path, block_images: int) -> dict[str, Any]:
    """Opens the dataset in this process and takes batches; returns seconds since its imports, and bytes of memory."""
    before = memory()
    began = time.perf_counter()
    store = open_store(str(bucket))
    index = load_index(store, key)
    indexed = time.perf_counter()
    cache = open_cache(store, key, index, cache_dir=cache_dir, budget_bytes=index.decoded_bytes // 2)
    opened = time.perf_counter()
    batches = stream_batches(
        cache,
        Order(tuple(shard.images for shard in index.shards), seed=0, block_images=block_images),
        batch_size_images=BATCH_SIZE_IMAGES,
        first_image=0,
        last_image=None,
    )
    sizes = [len(next(batches).images)]
    first = time.perf_counter()
    sizes += [len(next(batches).images) for _ in range(MORE_BATCHES)]
    done = time.perf_counter()
    batches.close()
    cache.close()
    assert sizes == [BATCH_SIZE_IMAGES] * (1 + MORE_BATCHES)
    after = memory()
    return {
        "images": index.images,
        "shards": len(index.shards),
        "index_seconds": indexed - began,
        "open_seconds": opened - indexed,
        "first_batch_seconds": first - opened,
        "total_seconds": first - began,
        "next_batch_seconds": (done - first) / MORE_BATCHES,
        "peak_rss_bytes": after["VmHWM"],
        "anonymous_bytes": after["RssAnon"],
        "anonymous_bytes_before": before["RssAnon"],
    }


def memory() -> dict[str, int]:
    """Returns peak and present memory of this process in bytes (Linux, proc(5)); only `VmHWM` counts mapped files."""
    status = Path("/proc/self/status").read_text()
    return {name: 1024 * int(kb) for name, kb in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.MULTILINE)}


def measure(images: int) -> dict[str, dict[str, Any]]:
    """Writes the dataset and reads it: for the first time, again, and shuffled within blocks."""
    with TemporaryDirectory(prefix="ddpm-bench-") as name, Progress("large index", total=4, unit="steps") as bar:
        folder = Path(name)
        key = write_dataset(folder / "bucket", images)
        bar.update(1)
        found = {}
        for number, (title, block_images) in enumerate(
            [("first opening", 0), ("opened again", 0), (f"in blocks of {BLOCK_IMAGES:,}", BLOCK_IMAGES)]
        ):
            arguments = [str(folder / "bucket"), key, str(folder / "cache"), str(block_images)]
            command = [sys.executable, "-m", "benchmarks.large_index", "--read", *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
            found[title] = json.loads(done.stdout)
            bar.update(number + 2)
        return found


def main() -> None:
    """The command line."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_index", description=description)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"{IMAGES:,}, or a multiple of {SHARD_IMAGES:,}")
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    parser.add_argument("--read", nargs=4, metavar=("BUCKET", "KEY", "CACHE", "BLOCK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        bucket, key, cache, block = options.read
        print(json.dumps(read_dataset(Path(bucket), key, Path(cache), int(block))))
        return
    if options.images < SHARD_IMAGES or options.images % SHARD_IMAGES:
        parser.error(f"--images {options.images}: use a multiple of {SHARD_IMAGES:,}")
    found = measure(options.images)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def show(found: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    seconds = ("index s", "tables s", "first batch s", "all of these s")
    table = Table("", *seconds, "next batches ms", "anonymous MB", "of it before MB", "peak RSS MB")
    for title, row in found.items():
        times = [row[f"{name}_seconds"] for name in ("index", "open", "first_batch", "total")]
        sizes = [row[name] for name in ("anonymous_bytes", "anonymous_bytes_before", "peak_rss_bytes")]
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
        f"{row['images']:,} images in {row['shards']:,} shards, batches of {BATCH_SIZE_IMAGES}. Before was the "
        "program itself. The mapped tables in the peak are taken back by the system when it needs memory.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
