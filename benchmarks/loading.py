"""Reading images: a warm stream of a packed dataset, and the first epoch from a bucket that no cache knows.

`python -m benchmarks.loading READER BUCKET CACHE` reads such an epoch: each is a fresh process, whose time counts from
opening the dataset to the last batch, without imports.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

from benchmarks import peers
from benchmarks.measuring import Figure, faster, fresh, in_turn, seconds, timed
from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import dataset_key, load_index
from job.store import open_store

SIZE = 64
KEY = dataset_key("noise", SIZE)
EPOCH_SECONDS = 100
"""How long an epoch may take: the forked workers of a peer may hang."""
_LOOK_SECONDS = 0.005
Epoch = dict[str, float]
Readers = dict[str, Callable[[], Iterable[object]]]


def readers(bucket: str, cache: Path, chunks: str = "", files: Path | None = None) -> Readers:
    """Returns the installed readers of an epoch by name; those of chunks, and of files before packing, with these."""

    def urls() -> list[str]:
        # Not for litData, whose forked workers would wait for the threads of obstore that this starts.
        return [f"{bucket}/{KEY}/{shard.name}" for shard in load_index(open_store(bucket), KEY).shards]

    found: Readers = {
        "ours": lambda: our_epoch(opened(bucket, cache)),
        "webdataset": lambda: peers.webdataset_epoch(urls()),
    }
    if chunks:
        found["litData"] = lambda: peers.litdata_epoch(chunks, cache.with_name(f"{cache.name}-litdata"))
    if files:
        found["ImageFolder"] = lambda: peers.image_folder_epoch(files)
    return {name: found[name] for name in ("ours", *peers.installed(*found))}


def opened(bucket: str, cache_dir: Path) -> ImageCache:
    """Returns the filled cache of the dataset's decoded images."""
    store = open_store(bucket)
    return open_cache(store, load_index(store, KEY), 1 << 40, cache_dir=cache_dir)


def our_epoch(cache: ImageCache) -> Iterable[object]:
    """Yields shuffled uint8 batches, which one thread reads ahead."""
    order = Order(tuple(cache.index.shards.images.tolist()), seed=0)
    how = {"batch_size_images": peers.BATCH_SIZE_IMAGES, "first_image": 0, "last_image": cache.index.images}
    return stream_batches(cache, order, **how)


def loader(folder: Path, quick: bool) -> list[Figure]:
    """Reads the same images from the same disk, one epoch per reader in turn; the first turn warms up."""
    from benchmarks.subject import pack_noise

    images, bucket, cache, files = 256 if quick else 10_000, str(folder / "bucket"), folder / "cache", folder / "images"
    pack_noise(bucket, files, images, SIZE)
    decoding_seconds = seconds(lambda: opened(bucket, cache).close())
    works = {
        reader: partial(one_epoch, batches, images) for reader, batches in readers(bucket, cache, files=files).items()
    }
    took = in_turn("reading images", timed(**works), 1 if quick else 2)
    rates = {reader: [images / each for each in of_reader] for reader, of_reader in took.items()}
    best_peer = max(took.keys() - {"ours"}, key=lambda reader: median(rates[reader]))
    beside = (
        f"batch {peers.BATCH_SIZE_IMAGES}, from opening to the last batch; decoded once in {decoding_seconds:.1f} s"
    )
    return [
        Figure(
            "loader_images_per_second",
            f"loader, warm, {SIZE}×{SIZE}×3: images/s",
            rates["ours"],
            at_least=100_000,
            beside=f"{images:,} images, {beside}",
            raw={"images": images, "images_per_second": rates, "decoding_seconds": decoding_seconds},
        ),
        faster("loader_ratio", f"loader: ours / best peer, {best_peer}", took, best_peer),
    ]


def one_epoch(batches: Callable[[], Iterable[object]], images: int) -> None:
    """Opens a dataset and takes the batches of one epoch."""
    for _ in islice(batches(), -(-images // peers.BATCH_SIZE_IMAGES)):
        pass


def cold(folder: Path, quick: bool) -> list[Figure]:
    """Reads the same PNG files from the same server, one epoch per reader in turn."""
    from benchmarks.subject import bucket, pack_noise

    images, caches = 512 if quick else 10_000, iter(range(1000))
    names = ["ours", *peers.installed("webdataset", "litData")]
    with bucket("s3", folder / "server") as uri:
        pack_noise(uri, folder / "images", images, SIZE)
        if "litData" in names:
            peers.litdata_optimize(folder / "images", folder / "chunks")
            for path in sorted((folder / "chunks").iterdir()):
                open_store(uri).upload(path, f"chunks/{path.name}")
        works = {
            reader: lambda reader=reader: epoch_of(reader, uri, folder / f"cache-{next(caches)}") for reader in names
        }
        epochs = in_turn("from a cold bucket", works, 1 if quick else 2, warmup_turns=0)
    # Our last batch is full, with the first images of the next epoch.
    assert min(epoch["images"] for of_reader in epochs.values() for epoch in of_reader) >= images
    took = {reader: [epoch["seconds"] for epoch in of_reader] for reader, of_reader in epochs.items()}
    waits = [epoch["first_batch_seconds"] - epoch["first_shard_seconds"] for epoch in epochs["ours"]]
    medians = {reader: median(epoch["first_batch_seconds"] for epoch in found) for reader, found in epochs.items()}
    beside = ", ".join(f"{reader} {each:.2f} s" for reader, each in medians.items())
    what, raw = "from a cold bucket: first shard to first batch, s", {"images": images, "epochs": epochs}
    return [
        *(
            faster(f"cold_{name.lower()}_ratio", f"from a cold bucket: ours / {name}", took, name, at_least=2, raw=raw)
            for name in names[1:]
        ),
        Figure("cold_first_batch_seconds", what, waits, at_most=2, beside=f"from opening on: {beside}"),
    ]


def epoch_of(reader: str, bucket: str, cache: Path) -> Epoch:
    """Reads an epoch in a process of its own; see `read`."""
    before = os.times()
    found: Epoch = fresh("benchmarks.loading", reader, bucket, cache, timeout_seconds=EPOCH_SECONDS)
    after = os.times()
    # The whole process with its imports counts, for machines that are not idle.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return found | {"processor_seconds": spent}


def read(reader: str, bucket: str, cache: Path) -> Epoch:
    """Reads an epoch in this process; returns its images, and its seconds to the first shard, first batch and last."""
    first_shard, done = [0.0], threading.Event()

    def look(began: float) -> None:
        while not done.wait(_LOOK_SECONDS):
            if any(cache.rglob("shard-*.tar")):
                first_shard[0] = time.perf_counter() - began
                return

    if reader == "litData":
        import litdata  # noqa: F401
    elif reader == "webdataset":
        import webdataset  # noqa: F401
    batches = readers(bucket, cache, f"{bucket}/chunks")[reader]
    began = time.perf_counter()
    if reader == "ours":
        threading.Thread(target=look, args=(began,), daemon=True).start()
    images, first = 0, 0.0
    for batch in batches():
        first = first or time.perf_counter() - began
        while isinstance(batch, list):
            (batch,) = batch
        images += len(getattr(batch, "images", batch))
    spent = time.perf_counter() - began
    done.set()
    return {"images": images, "first_shard_seconds": first_shard[0], "first_batch_seconds": first, "seconds": spent}


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
