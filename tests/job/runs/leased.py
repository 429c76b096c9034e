"""Runs with a lease that lies in no bucket, for tests of what its holder writes."""

from __future__ import annotations

from dataclasses import replace

import torch

from job.config import RunConfig, validated
from job.exits import LostRunError
from job.runs.checkpoints import list_checkpoints
from job.runs.layout import MAX_IMAGES_SEEN
from job.runs.records import Attempt
from job.runs.retention import Retention
from job.runs.writer import CheckpointWriter, LeasedRun
from job.stop import NEVER, Stop
from job.store import Store

Tensors = dict[str, dict[str, torch.Tensor]]
DATASET_IMAGES = 48
"""Two steps of 24 images to an epoch."""


class SureLease:
    """A lease that is confirmed without asking anybody, until `taken_over`."""

    def __init__(self, fence: int) -> None:
        self.fence, self.lost, self.confirmations = fence, False, 0

    def confirm(self) -> None:
        self.confirmations += 1
        self.check_lost()

    def check_lost(self) -> None:
        if self.lost:
            raise LostRunError("another attempt holds the run")


def small_config(**changes: object) -> RunConfig:
    """Settings by key, with a double underscore for the dot."""
    settings = {"data__dataset": "random", "data__size": 8, "train__batch_size": 24, "checkpoint__keep_last": 99}
    # Of which diffusers knows nothing, so that every group of tensors is named after itself.
    settings |= {"model__kind": "dome"}
    return validated({name.replace("__", "."): value for name, value in (settings | changes).items()}, "here")


def leased(run: Store, fence: int = 1, **changes: object) -> LeasedRun:
    """A run of which attempt `fence` has the lease."""
    attempt = Attempt(
        fence=fence,
        id=f"{fence:032x}",
        started="2026-01-01T00:00:00Z",
        host="here",
        code_version="0",
        world_size=1,
        device="cpu",
        changes={},
        config_sha256="0" * 64,
        previous=None,
    )
    retention = Retention(small_config(**changes), DATASET_IMAGES)
    return LeasedRun(run, retention, attempt, SureLease(fence), ())  # type: ignore[arg-type]


def writer_of(leased_run: LeasedRun, tensors: Tensors, stop: Stop = NEVER):
    return CheckpointWriter(leased_run, tensors, before=None, stop=stop)


def save(writer: CheckpointWriter, *images_seen: int) -> None:
    """Saves with a row of the metrics each."""
    for images in images_seen:
        writer.rows.append({"images_seen": images, "loss": 0.5, "time": 0.0})
        writer.save(images, [[1.5, 0.1], [3.0, 4.0]])
        writer.wait()


def committed_images(run: Store) -> list[int]:
    """How many images each checkpoint has seen."""
    return [ref.images_seen for ref in list_checkpoints(run)]


def write(run: Store, *places: tuple[int, int], tensors: Tensors | None = None, **changes: object) -> Tensors:
    """Commits checkpoints at (fence, images seen), and returns what is in them."""
    tensors = tensors or live_tensors()
    # They end epochs of no dataset, so that none is deleted.
    retention = Retention(small_config(**changes), MAX_IMAGES_SEEN + 1)
    for fence, images_seen in places:
        writer = writer_of(replace(leased(run, fence), retention=retention), tensors)
        writer.save(images_seen, [[1.5, 0.1], [3.0, 4.0]])
        writer.close(wait=True)
    return tensors


def live_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {
        "model": {"conv.weight": weight, "conv.bias": torch.randn(8, generator=generator)},
        "ema": {"conv.weight": weight.clone(), "conv.bias": torch.zeros(8)},
        "optimizer": {"exp_avg.conv.weight": torch.randn(8, 4, 3, 3, generator=generator)},
    }
