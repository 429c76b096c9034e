"""Attempts at one run, as `TrainingAttempt` makes them, and commands that read the run meanwhile, without its lease."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.exploration import runtime
from benchmarks.exploration.runtime import SimulatedStore
from benchmarks.exploration.world import Process, World
from job.config import RunConfig, validated
from job.coordination.lease import Lease
from job.exits import JobError, LostRunError
from job.runs import metric_rows, records
from job.runs.checkpoints import Manifest, choose, newest_good, restore
from job.runs.retention import Retention, reading_chosen
from job.runs.writer import CheckpointWriter, LeasedRun
from job.verbs import averages, upkeep

RUN = "runs/r"
BATCH_IMAGES, DATASET_IMAGES = 24, 48
STD = 0.1
"""The width of the average that is made: between those in the checkpoint."""
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


def attempt(wait_seconds: float, world: World, process: Process) -> None:
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


def read(world: World, process: Process) -> None:
    """Reads the newest checkpoint twice, as `ddpm sample` does: a mark keeps it meanwhile."""
    run = SimulatedStore(world, process).sub(RUN)
    with reading_chosen(run, lambda: choose(run, "latest", DATASET_IMAGES, BATCH_IMAGES)) as found:
        refs, renew = found
        for _ in range(2):
            restore(run, refs[0], groups=("model",))
            renew()
            world.sleep(4.0)


def average(world: World, process: Process) -> None:
    """Makes an average of the newest checkpoint, as `ddpm ema` does."""
    averages.make_averages("sim://bucket", "r", STD, "latest")


def prune(world: World, process: Process) -> None:
    """Prunes the run, as `ddpm runs prune` does."""
    upkeep.prune_run("sim://bucket", "r", keep_last=None, dry_run=False)


@contextmanager
def opened_here() -> Iterator[None]:
    """Has commands open the bucket of their world until the context ends."""

    def store(*_: Any) -> SimulatedStore:
        return SimulatedStore(runtime.world(), runtime.world().process)

    def stop() -> Any:
        return SimpleNamespace(install=lambda: runtime.world().process.stop)

    with ExitStack() as stack:
        for module in (averages, upkeep):
            name = "open_bucket" if module is averages else "open_store"
            stack.enter_context(patch.object(module, name, store))
            stack.enter_context(patch.object(module, "Stop", stop))
            for printing in ("note", "say", "print"):
                stack.enter_context(patch.object(module, printing, lambda *_, **__: None, create=True))
        # To read the configuration takes longer than the rest, and it never changes.
        stack.enter_context(patch("job.runs.records.parsed_config", lambda *_: config()))
        stack.enter_context(patch("job.runs.records.as_last_changed", lambda run, config: config))
        yield
