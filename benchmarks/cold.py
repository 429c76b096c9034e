"""The first epoch from a bucket that no cache knows, against webdataset and litData on the same server.

Each epoch is a fresh process; its time counts from opening the dataset to the last batch, without imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import peers
from benchmarks.loader import SIZE, opened, our_epoch
from benchmarks.measuring import Figure
from benchmarks.subject import DATASET, pack_noise, write_noise
from job.data.shards import dataset_key, load_index
from job.progress import Progress
from job.store import open_store
from tests.servers import SERVERS, new_bucket

EPOCH_SECONDS = 100
"""How long an epoch may take: the forked workers of a peer may hang."""
_LOOK_SECONDS = 0.005


def measure(quick: bool) -> list[Figure]:
    """Reads the same PNG files from the same server, one epoch per reader in turn."""
    images, turns = (512, 1) if quick else (10_000, 2)
    readers = ["ours", *peers.installed("webdataset", "litData")]
    epochs: dict[str, list[dict[str, float]]] = {reader: [] for reader in readers}
    with TemporaryDirectory(prefix="ddpm-bench-") as name, Progress("from a cold bucket", unit="epochs") as bar:
        folder = Path(name)
        write_noise(folder / "images", images, SIZE)
        (folder / "server").mkdir()
        with SERVERS["s3"].start(folder / "server") as url:
            os.environ.update(SERVERS["s3"].variables(url))
            bucket = new_bucket("s3", url)
            pack_noise(bucket, folder / "images", SIZE)
            if "litData" in readers:
                peers.litdata_optimize(folder / "images", folder / "chunks")
                for path in sorted((folder / "chunks").iterdir()):
                    open_store(bucket).upload(path, f"chunks/{path.name}")
            for turn in range(turns):
                for number, reader in enumerate(readers):
                    epochs[reader].append(epoch_of(reader, bucket, folder / f"cache-{turn}-{reader}"))
                    # Our last batch is full, with the first images of the next epoch.
                    assert epochs[reader][-1]["images"] >= images
                    bar.update(turn * len(readers) + number + 1, total=turns * len(readers))
    return figures(epochs, images)


def epoch_of(reader: str, bucket: str, cache: Path) -> dict[str, float]:
    """Reads an epoch in a process of its own; see `read`."""
    words, before = [sys.executable, "-m", "benchmarks.cold", reader, bucket, str(cache)], os.times()
    done = subprocess.run(words, capture_output=True, check=True, cwd=Path(__file__).parents[1], timeout=EPOCH_SECONDS)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    after = os.times()
    # The whole process with its imports counts, for machines that are not idle.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return found | {"processor_seconds": spent}


def figures(epochs: dict[str, list[dict[str, float]]], images: int) -> list[Figure]:
    """Returns our rate divided by each peer's, and the time from our first shard to our first batch."""
    rates = {reader: [images / epoch["seconds"] for epoch in of_reader] for reader, of_reader in epochs.items()}
    beside = ", ".join(f"{reader} {median(found):,.0f} images/s" for reader, found in rates.items())
    ratios = [
        Figure(
            f"cold_{reader.lower()}_ratio",
            f"from a cold bucket: ours / {reader}, ×",
            [ours / theirs for ours, theirs in zip(rates["ours"], rates[reader], strict=True)],
            at_least=2,
            beside=beside,
            raw={"images": images, "epochs": epochs},
        )
        for reader in epochs
        if reader != "ours"
    ]
    waits = [epoch["first_batch_seconds"] - epoch["first_shard_seconds"] for epoch in epochs["ours"]]
    medians = {reader: median(epoch["first_batch_seconds"] for epoch in found) for reader, found in epochs.items()}
    firsts = ", ".join(f"{reader} {seconds:.2f} s" for reader, seconds in medians.items())
    first = "from a cold bucket: first shard to first batch, s"
    return [*ratios, Figure("cold_first_batch_seconds", first, waits, at_most=2, beside=f"from opening on: {firsts}")]


def read(reader: str, bucket: str, cache: Path) -> dict[str, float]:
    """Reads an epoch in this process; returns its images, and its seconds to the first shard, first batch and last."""
    key, first_shard = dataset_key(DATASET, SIZE), [0.0]
    done = threading.Event()

    def look(began: float) -> None:
        while not done.wait(_LOOK_SECONDS):
            if any(cache.rglob("shard-*.tar")):
                first_shard[0] = time.perf_counter() - began
                return

    def shards() -> list[str]:
        # Not for litData, whose forked workers would wait for the threads of obstore that this starts.
        return [f"{bucket}/{key}/{shard.name}" for shard in load_index(open_store(bucket), key).shards]

    readers: dict[str, Callable[[], Iterable[object]]] = {
        "ours": lambda: our_epoch(opened(bucket, key, cache)),
        "webdataset": lambda: peers.webdataset_epoch(shards()),
        "litData": lambda: peers.litdata_epoch(f"{bucket}/chunks", cache),
    }
    if reader == "litData":
        import litdata  # noqa: F401
    elif reader == "webdataset":
        import webdataset  # noqa: F401
    began = time.perf_counter()
    looking = threading.Thread(target=look, args=(began,), daemon=True)
    if reader == "ours":
        looking.start()
    images, first_batch = 0, 0.0
    for batch in readers[reader]():
        first_batch = first_batch or time.perf_counter() - began
        while isinstance(batch, list):
            (batch,) = batch
        images += len(getattr(batch, "images", batch))
    spent = time.perf_counter() - began
    done.set()
    return {
        "images": images,
        "first_shard_seconds": first_shard[0],
        "first_batch_seconds": first_batch,
        "seconds": spent,
    }


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
