"""The requests of a run, counted by a proxy before an object server, with their price.

    python -m benchmarks.requests                       a tenth of a million images, three epochs; 12 checkpoints
    python -m benchmarks.requests --shards 123          a million

The images are noise that PNG compresses to 7.7 kB, so that a shard has 67 MB. The last table counts `ddpm train`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from benchmarks.large_index import served, write_dataset
from benchmarks.subject import write_noise
from job.data.reading.cache import open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import SHARD_PIXEL_BYTES, load_index
from job.store import open_store
from tests.faulty_proxy import FaultyProxy, Request

SHARDS = 12
SIZE = 64
LEVELS = 32
EPOCHS = 3
BATCH_SIZE_IMAGES = 512
FEW, MORE = 2, 12
"""Epochs, and checkpoints, of the two runs whose difference is the price of a checkpoint."""
DOLLARS = {"write": 0.005e-3, "list": 0.005e-3, "read": 0.0004e-3, "delete": 0.0}
"""The price of a request: the same on Google (single region, standard) and S3 (us-east-1, standard)."""
TINY = ("model.channels=16", "model.channel_mults=1,1", "model.layers_per_level=1", "train.batch_size=8")


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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.requests", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=SHARDS, help="of 8,192 images each")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        folder = Path(name)
        with served(folder) as (bucket, objects), FaultyProxy(os.environ["STORAGE_EMULATOR_HOST"]) as proxy:
            shape = (SIZE, SIZE, 3)
            images = SHARD_PIXEL_BYTES // math.prod(shape)
            key = write_dataset(bucket, objects, options.shards, shard_images=images, shape=shape, levels=LEVELS)
            os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
            requests = Requests(proxy)
            read_epochs(requests, bucket, key, folder / "cache")
            write_checkpoints(requests, bucket, folder)


def read_epochs(requests: Requests, bucket: str, key: str, cache_dir: Path) -> None:
    """Reads a dataset from its bucket, and counts the requests of each epoch."""
    store = open_store(bucket)
    index = load_index(store, key)
    print(f"{index.images:,} images of {SIZE}×{SIZE} in {len(index.shards)} shards of {index.shards.bytes[0]:,} bytes")
    before = requests.seen.copy()
    cache = open_cache(store, index, 1 << 40, cache_dir=cache_dir)
    read = requests.received_bytes / int(index.shards.bytes.sum())
    count = (requests.seen - before).total()
    print(f"opening: {count} requests, {count / len(index.shards):.1f} a shard, {read:.4f} × the bytes of the shards")
    batches = stream_batches(
        cache,
        Order(tuple(index.shards.images.tolist()), seed=0),
        batch_size_images=BATCH_SIZE_IMAGES,
        first_image=0,
        last_image=EPOCHS * index.images,
    )
    for epoch in range(EPOCHS):
        seen = requests.during(lambda: [next(batches) for _ in range(index.images // BATCH_SIZE_IMAGES)])
        print(f"epoch {epoch + 1}: {seen.total()} requests")
    batches.close()
    cache.close()


def write_checkpoints(requests: Requests, bucket: str, folder: Path) -> None:
    """Trains tiny networks and prints what a checkpoint more costs."""
    write_noise(folder / "images", 64, 32)
    words = [sys.executable, "-m", "job", "--quiet"]
    environment = os.environ | {"DDPM_CACHE": str(folder / "cache"), "DDPM_BUCKET": bucket}

    def ddpm(*more: object) -> None:
        subprocess.run([*words, *map(str, more)], env=environment, check=True, cwd=Path(__file__).parents[1])

    ddpm("data", "pack", folder / "images", "tiny", "--size", 32)
    sets = [word for text in (*TINY, "checkpoint.every_epochs=1", "sample.every_epochs=0") for word in ("--set", text)]
    few, more = (
        requests.during(partial(ddpm, "train", "--dataset", "tiny", "--run", f"r{epochs}", "--epochs", epochs, *sets))
        for epochs in (FEW, MORE)
    )
    each = Counter[str]()
    print("\na checkpoint more:")
    for (kind, key), count in sorted(more.items()):
        share = (count - few[kind, key.replace(f"r{MORE}", f"r{FEW}")]) / (MORE - FEW)
        if share:
            each[kind] += share
            print(f"  {share:4.1f} {kind:6} {key}")
    for kind, share in each.items():
        print(f"{kind}: {share:.1f}, of {1000 * share * DOLLARS[kind]:.4f} dollars for a thousand checkpoints")


if __name__ == "__main__":
    main()
