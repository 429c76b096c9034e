"""Attempts at one run, as `TrainingAttempt` makes them: lease, restore, save, retire, release."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.exploration import runtime
from benchmarks.exploration.store import SimulatedStore
from benchmarks.exploration.world import Process, World
from job.config import RunConfig, validated
from job.coordination.lease import Lease
from job.exits import JobError, LostRunError
from job.runs import metric_rows, records
from job.runs.checkpoints import Manifest, newest_good
from job.runs.retention import Retention
from job.runs.writer import CheckpointWriter, LeasedRun

RUN = "runs/r"
BATCH_IMAGES, DATASET_IMAGES = 24, 48
STEPS = 3
STEP_SECONDS = 3.0
SETTINGS = {
    "data.dataset": "random",
    "data.size": 8,
    "train.batch_size": BATCH_IMAGES,
    "checkpoint.keep_last": 1,
    "model.kind": "dome",
    "ema.stds": [0.05],
    "ema.snapshot_epochs": 1,
}
FIRST = torch.tensor([1.0, -2.0])


@cache
def config() -> RunConfig:
    """Returns the configuration of the run."""
    return validated(SETTINGS, "here")


@cache
def _config_yaml() -> str:
    return config().to_yaml()


def _stepped(tensors: dict[str, dict[str, torch.Tensor]], images_seen: int) -> None:
    """Trains on a batch: a function of the state and of the images alone."""
    weight, moment = tensors["model"]["weight"], tensors["optimizer"]["moment"]
    moment.mul_(0.5).add_(images_seen)
    weight.mul_(0.75).add_(moment)
    for group, averaged in tensors.items():
        if group.startswith("ema"):
            averaged["weight"].lerp_(weight, 0.5)


def attempt(world: World, process: Process, wait_seconds: float) -> None:
    """Takes the run, restores its newest checkpoint and trains to the end."""
    store, notes = SimulatedStore(world, process), list[str]()
    run, note = store.sub(RUN), notes.append
    lease = Lease.take(run, records.highest_fence(run), wait_seconds, process.stop, note)
    try:
        _train(run, lease, process, note)
    finally:
        lease.close(process.stop.seconds_left() - 0.5)


def _train(run: Any, lease: Lease, process: Process, note: Any) -> None:
    if records.last_attempt(run) is None:
        records.create_config(run, SimpleNamespace(to_yaml=_config_yaml))  # type: ignore[arg-type]
    made = records.record_attempt(run, lease.fence, lease.holder, changes={}, world_size=1, device="cpu")
    tensors = {"model": {"weight": FIRST.clone()}, "optimizer": {"moment": torch.zeros(2)}}
    tensors |= {name: {"weight": torch.zeros(2)} for name in config().ema.names}
    seen, sums, damaged = 0, [0.0], set[Any]()
    with lease.unless_lost():
        if manifest := newest_good(run, damaged, tensors):
            seen, sums = manifest.images_seen, list(manifest.loss_sums[0])
    if manifest:
        metric_rows.read_rows(run, manifest.metrics)
    retention = Retention(config(), DATASET_IMAGES)
    leased = LeasedRun(run, retention, made, lease, classes=(), damaged=damaged)
    writer = CheckpointWriter(leased, tensors, before=manifest, stop=process.stop)
    try:
        while seen < STEPS * BATCH_IMAGES:
            runtime.world().sleep(STEP_SECONDS)
            writer.raise_trouble()
            seen += BATCH_IMAGES
            _stepped(tensors, seen)
            sums[0] += seen
            writer.rows.append({"images_seen": seen, "loss": sums[0], "time": 0.0})
            writer.save(seen, [sums])
            process.stop.check("while training")
        writer.wait()
    except LostRunError:
        with suppress(JobError):
            writer.close(wait=False)
        raise
    except BaseException as error:
        try:
            writer.close(wait=True)
        except JobError as second:
            if second is not error:
                note(str(second))
        raise
    else:
        writer.close(wait=True)


def rows_of(objects: dict[str, tuple[bytes, str]], manifest: Manifest) -> bytes:
    """Returns the lines of the metrics that a manifest names."""
    return b"".join(objects[f"{RUN}/{segment.rows.key}"][0] for segment in manifest.segments)


def ending(objects: dict[str, tuple[bytes, str]], manifest: Manifest) -> dict[str, Any]:
    """Returns what a finished run holds, which no disturbance may change."""
    hashes = {file.name: file.sha256 for file in manifest.files}
    snapshots = {file.key[len("snapshots/000001-") :]: file.sha256 for file in manifest.snapshots}
    return {
        "images seen": manifest.images_seen,
        "loss sums": manifest.loss_sums,
        "tensors": hashes,
        "snapshots": snapshots,
        "rows": hashlib.sha256(rows_of(objects, manifest)).hexdigest(),
    }
