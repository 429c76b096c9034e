"""Our side of the benchmarks: images of noise, buckets on real servers, and the loops of training and sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from ddpm.training import train
from job.config import RunConfig, draft, method, parse_sets
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.reading.cache import open_cache
from job.data.shards import DatasetIndex
from job.plan import plan_run
from job.processes import compute
from job.processes.ranks import Agreement, meet
from job.requests import TrainRequest
from job.sampling.painter import Painter
from job.stop import NEVER
from job.store import open_store
from job.training.session import TrainingSession

DATASET = "noise"
PRESET = "cifar10"
SIZE = 32
SHARD_IMAGES = (16 << 20) // 12_288
"""Shards of 16 MiB of pixels at 64 × 64."""
HALF_WIDTH = ("model.channels=64", "model.dropout=0", "train.batch_size=32")
"""Ho et al.'s CIFAR-10 network at half its width, 9 million parameters: a step takes about a second on two cores."""
TINY = ("model.channels=32", "model.channel_mults=1,2", "model.dropout=0", "train.batch_size=4")
"""A network for a quick test of a benchmark."""
NO_SAVES = (
    *("checkpoint.every_epochs=9999", "checkpoint.every_minutes=9999", "checkpoint.keep_every_epochs=0"),
    "sample.every_epochs=0",
)
BUCKETS = ("file", "gs", "s3", "s3-moto", "az")
"""A folder, and new servers: fake-gcs-server, SeaweedFS, moto and Azurite."""


def run_config(sets: tuple[str, ...], preset: str = PRESET, size: int = SIZE) -> RunConfig:
    """Returns Ho et al.'s CIFAR-10 configuration, or that of another preset, with changes, for square RGB images."""
    return draft(preset, {"data.size": size, "data.channels": 3, **parse_sets(sets)})


def pack_noise(bucket_uri: str, folder: Path, images: int, size: int = SIZE) -> DatasetIndex:
    """Writes PNG files of uniform noise, uint8 [size, size, 3], and packs them as the dataset `noise`.

    The files are in `folder/all`, the layout of torchvision.
    """
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(images):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "all" / f"{number:06d}.png", compress_level=1)
    request = PackRequest(str(folder), DATASET, size=size, classes=False)
    return pack(open_store(bucket_uri), request, shard_images=SHARD_IMAGES)


@contextmanager
def bucket(wanted: str, folder: Path) -> Iterator[str]:
    """Yields the URI of a bucket, whose server runs while the context lasts, also for child processes.

    Args:
        wanted: one of `BUCKETS`, or the URI of a bucket.
        folder: the folder for the data and logs of a server.
    """
    from tests.servers import SERVERS, new_bucket

    kind = wanted.removesuffix("://")
    if kind not in BUCKETS:
        yield wanted
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        yield f"file://{folder.resolve()}"
        return
    server = SERVERS[kind]
    with server.start(folder) as url, patch.dict(os.environ, server.variables(url)):
        yield new_bucket(kind, url)


def forget_accelerator() -> None:
    """Resets the state of `Accelerator`, so that the next one of this process can have another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


class OurLoop:
    """Runs `ddpm.training.train` on the noise in `folder/bucket`, with the hooks of a real run; one step per call."""

    def __init__(
        self,
        folder: Path,
        precision: str,
        preset: str = PRESET,
        sets: tuple[str, ...] = HALF_WIDTH,
        exact: str = "null",
    ) -> None:
        sets = (*sets, *NO_SAVES, f"train.precision={precision}", f"train.exact={exact}")
        request = TrainRequest(DATASET, bucket=str(folder / "bucket"), preset=preset, epochs=1000, sets=sets)
        plan = plan_run(request.check(), suited=compute.suited)
        forget_accelerator()
        cache = open_cache(plan.bucket, plan.index, 1 << 40, cache_dir=folder / "cache")
        # The run saves nothing, so the rows of the log have no destination.
        writer = SimpleNamespace(overdue=False, troubled=False, before_change=lambda: None)
        recorder: Any = SimpleNamespace(writer=writer, add_row=lambda row: None, show=lambda bar: None)
        ranks = meet(NEVER)
        state = method.initial_state(method.build_network(plan.config, ranks.device), plan.config)
        about: dict[str, Any] = {"plan": plan, "ranks": ranks, "state": state, "images": cache, "recorder": recorder}
        attempt: Any = SimpleNamespace(**about, held_out=None, restored=None, stop=NEVER)
        self.session = TrainingSession(attempt)

    def step(self) -> None:
        """Runs one whole step."""
        session, batch = self.session, islice(self.session.batches, 1)
        how = {"settings": session.settings, "accelerator": session.accelerator, "hooks": session.hooks}
        shared = {"slots": session.slots, "threads": session.threads}
        with session.threads.outside() if session.threads else nullcontext():
            train(session.state, session.network, batch, session.objective, **how, **shared)

    def close(self) -> None:
        """Ends the thread that reads images."""
        self.session.batches.close()


def painter_of(config: RunConfig, precision: str) -> Painter:
    """Returns the painter of `ddpm sample`, with initial weights."""
    forget_accelerator()
    return Painter(config, meet(NEVER), precision, Agreement(1, flags=1))
