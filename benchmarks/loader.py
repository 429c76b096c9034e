"""Reading images: speed and memory of a warm stream of a packed dataset, against other loaders."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import peers
from benchmarks.measuring import Figure, seconds
from benchmarks.subject import DATASET, pack_noise, write_noise
from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import INDEX, Shard, Shards, dataset_key, load_index, shard_name
from job.progress import Progress
from job.store import open_store

SIZE = 64
MEMORY_COPIES = 10
"""The factor of a larger dataset, whose stream must not take more memory."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the dataset: seconds from opening it to the first batch and to the last."""

    first_batch_seconds: float
    seconds: float


def measure(quick: bool) -> list[Figure]:
    """Reads the same images from the same disk, one epoch per reader in turn; the first turn warms up."""
    images, turns = (256, 1) if quick else (10_000, 3)
    with TemporaryDirectory(prefix="ddpm-bench-") as name, Progress("reading images", unit="epochs") as bar:
        folder = Path(name)
        bucket, cache = str(folder / "bucket"), folder / "cache"
        write_noise(folder / "images", images, SIZE)
        index = pack_noise(bucket, folder / "images", SIZE)
        key = dataset_key(DATASET, SIZE)
        decoding_seconds = seconds(lambda: opened(bucket, key, cache).close())
        readers: dict[str, Callable[[], Iterable[object]]] = {
            "ours": lambda: our_epoch(opened(bucket, key, cache)),
            "webdataset": lambda: peers.webdataset_epoch([f"{bucket}/{key}/{shard.name}" for shard in index.shards]),
            "ImageFolder": lambda: peers.image_folder_epoch(folder / "images"),
            "litData": lambda: peers.litdata_epoch(str(folder / "chunks"), folder / "litdata"),
            "SPDL": lambda: peers.spdl_epoch(folder / "images"),
        }
        readers = {reader: readers[reader] for reader in ("ours", *peers.installed(*readers))}
        if "litData" in readers:
            peers.litdata_optimize(folder / "images", folder / "chunks")
        epochs: dict[str, list[Epoch]] = {reader: [] for reader in readers}
        for turn in range(turns + 1):
            for number, (reader, batches) in enumerate(readers.items()):
                epoch = timed_epoch(batches, images)
                if turn:
                    epochs[reader].append(epoch)
                bar.update(turn * len(readers) + number + 1, total=(turns + 1) * len(readers))
        large_key = multiply(bucket, key, f"large-{DATASET}", MEMORY_COPIES)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
            small_bytes, large_bytes = fresh_process.map(
                partial(stream_memory, bucket, folder / "memory"), (key, large_key)
            )
    return [
        *speed_figures(epochs, images, decoding_seconds),
        Figure(
            "loader_memory_ratio",
            f"loader: memory for {MEMORY_COPIES} times as many images, ×",
            [large_bytes / small_bytes],
            at_most=1.05,
            beside=f"{small_bytes / 1e6:.0f} MB for {images:,} images, {large_bytes / 1e6:.0f} MB for "
            f"{images * MEMORY_COPIES:,} (anonymous, the whole process)",
            raw={"small_bytes": small_bytes, "large_bytes": large_bytes},
        ),
    ]


def speed_figures(epochs: dict[str, list[Epoch]], images: int, decoding_seconds: float) -> list[Figure]:
    """Returns our rate, its ratio to the best peer's, and the time to the first batch."""
    rates = {reader: [images / epoch.seconds for epoch in all_of_it] for reader, all_of_it in epochs.items()}
    best_peer = max((reader for reader in rates if reader != "ours"), key=lambda reader: median(rates[reader]))
    return [
        Figure(
            "loader_images_per_second",
            f"loader, warm, {SIZE}×{SIZE}×3: images/s",
            rates["ours"],
            at_least=100_000,
            beside=f"{images:,} images, batch {peers.BATCH_SIZE_IMAGES}, from opening to the last batch; "
            f"decoded once before, in {decoding_seconds:.1f} s",
            raw={
                "images": images,
                "images_per_second": rates,
                "decoding_seconds": decoding_seconds,
                "peer_workers": peers.WORKERS,
            },
        ),
        Figure(
            "loader_ratio",
            "loader: ours / best peer, ×",
            [ours / peer for ours, peer in zip(rates["ours"], rates[best_peer], strict=True)],
            beside=", ".join(
                f"{reader} {median(rates[reader]):,.0f} images/s" for reader in epochs if reader != "ours"
            ),
        ),
        Figure(
            "loader_first_batch_seconds",
            "loader: opening to the first batch, s",
            [epoch.first_batch_seconds for epoch in epochs["ours"]],
            at_most=0.1,
            beside=", ".join(
                f"{reader} {median(epoch.first_batch_seconds for epoch in epochs[reader]):.2f} s"
                for reader in epochs
                if reader != "ours"
            ),
        ),
    ]


def timed_epoch(batches: Callable[[], Iterable[object]], images: int) -> Epoch:
    """Opens a dataset and takes the batches of one epoch."""
    start = time.perf_counter()
    iterator = iter(batches())
    next(iterator)
    first = time.perf_counter() - start
    for _ in islice(iterator, -(-images // peers.BATCH_SIZE_IMAGES) - 1):
        pass
    return Epoch(first, time.perf_counter() - start)


def opened(bucket: str, key: str, cache_dir: Path) -> ImageCache:
    """Returns the filled cache of the dataset's decoded images."""
    store = open_store(bucket)
    return open_cache(store, load_index(store, key), 1 << 40, cache_dir=cache_dir)


def our_epoch(cache: ImageCache) -> Iterable[object]:
    """Yields shuffled uint8 batches, which one thread reads ahead."""
    return stream_batches(
        cache,
        Order(tuple(cache.index.shards.images.tolist()), seed=0),
        batch_size_images=peers.BATCH_SIZE_IMAGES,
        first_image=0,
        last_image=cache.index.images,
    )


def multiply(bucket: str, key: str, large_name: str, copies: int) -> str:
    """Writes the dataset `key` again with `copies` times its shards; returns the new key."""
    store = open_store(bucket)
    index = load_index(store, key)
    large_key = dataset_key(large_name, index.size)
    shards: list[Shard] = []
    for shard in list(index.shards) * copies:
        copy = shard.model_copy(update={"name": shard_name(len(shards))})
        store.upload(Path(bucket) / key / shard.name, f"{large_key}/{copy.name}")
        store.create(f"{large_key}/{copy.offsets_name}", store.read(f"{key}/{shard.offsets_name}").data)
        shards.append(copy)
    large = index.model_copy(update={"name": large_name, "shards": Shards.of(shards)})
    store.create(f"{large_key}/{INDEX}", large.to_json())
    return large_key


def stream_memory(bucket: str, cache_dir: Path, key: str) -> int:
    """Returns the largest anonymous memory of this process in bytes while it streams a decoded dataset."""
    cache = opened(bucket, key, cache_dir)
    most = anonymous_bytes()
    for number, _ in enumerate(our_epoch(cache)):
        if number % 16 == 0:
            most = max(most, anonymous_bytes())
    return most


def anonymous_bytes() -> int:
    """Returns the memory of this process without mapped files such as the images (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
