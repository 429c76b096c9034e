"""Runs for tests: small ones whose lease lies in no bucket, and trained ones that are copied, damaged and compared."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from job.config import RunConfig, validated
from job.exits import LostRunError
from job.runs.checkpoints import list_checkpoints, load_manifest, newest_good
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef
from job.runs.records import Attempt
from job.runs.retention import Retention
from job.runs.writer import CheckpointWriter, LeasedRun
from job.stop import NEVER
from job.store import Store
from tests.job.command_line import ddpm_here, settings

DATASET_IMAGES = 48
"""Two steps of 24 images to an epoch."""
DESCRIPTIONS = ("model_index.json", "config.json", "id2label.json", "run_config.yaml")
"""Ends of the keys of what describes the weights to diffusers: the same in all checkpoints, and not needed here."""


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
    started = {"fence": fence, "id": f"{fence:032x}", "started": "2026-01-01T00:00:00Z", "previous": None}
    somewhere = {"host": "here", "code_version": "0", "world_size": 1, "device": "cpu"}
    attempt = Attempt(**started, **somewhere, changes={}, config_sha256="0" * 64)
    retention = Retention(small_config(**changes), DATASET_IMAGES)
    return LeasedRun(run, retention, attempt, SureLease(fence), ())  # type: ignore[arg-type]


def writer_of(leased_run: LeasedRun, tensors=None, before=None, stop=NEVER) -> CheckpointWriter:
    return CheckpointWriter(leased_run, tensors or live_tensors(), before=before, stop=stop)


def save(writer: CheckpointWriter, *images_seen: int) -> None:
    """Saves with a row of the metrics each."""
    for images in images_seen:
        writer.rows.append({"images_seen": images, "loss": images / 7, "time": float(images)})
        writer.save(images, [[1.5, 0.1], [3.0, 4.0]])
        writer.wait()


def committed_images(run: Store) -> list[int]:
    """How many images each checkpoint has seen."""
    return [ref.images_seen for ref in list_checkpoints(run)]


def write(run: Store, *places: tuple[int, int]) -> None:
    """Commits checkpoints at (fence, images seen)."""
    # They end epochs of no dataset, so that none is deleted.
    retention = Retention(small_config(), MAX_IMAGES_SEEN + 1)
    for fence, images_seen in places:
        writer = writer_of(replace(leased(run, fence), retention=retention))
        writer.save(images_seen, [[1.5, 0.1], [3.0, 4.0]])
        writer.close(wait=True)


def live_tensors() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {
        "model": {"conv.weight": weight, "conv.bias": torch.randn(8, generator=generator)},
        "ema": {"conv.weight": weight.clone(), "conv.bias": torch.zeros(8)},
        "optimizer": {
            "exp_avg.conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
            "exp_avg.coded": torch.arange(256).to(torch.uint8),
        },
    }


def train(bucket: Path, run: str, epochs: int, **changes: str):
    words = ("train", "--dataset", "tiles", "--run", run, "--epochs", epochs, "--bucket", bucket)
    kept = {"checkpoint__keep_last": "9", "checkpoint__every_epochs": "1", "ema__snapshot_epochs": "1"}
    small = {"model__channels": "4", "log__every_images": "144", "ema__stds": "0.1"}
    return ddpm_here(*words, *settings(**kept | small | changes))


def copy_objects(source: Store, target: Store, *folders: str) -> None:
    """Copies folders between buckets."""
    for folder in folders:
        for entry in source.sub(folder).list():
            target.sub(folder).put(entry.key, source.sub(folder).read(entry.key).data)


def content_hash(run: Store, ref: CheckpointRef) -> str:
    """Of all that a resumed run gets of a checkpoint."""
    files = [record for record in load_manifest(run, ref).files if not record.key.endswith(DESCRIPTIONS)]
    files.sort(key=lambda record: record.name)
    return hashlib.sha256(b"".join(record.read(run) for record in files)).hexdigest()


def resumed(run: Store, capsys) -> tuple[CheckpointRef, list[str], str]:
    """What an attempt would go on from: the checkpoint, the keys that warnings name, and the content."""
    ref = newest_good(run).ref
    warnings = capsys.readouterr().err.splitlines()
    named = [key for warning in warnings for key in re.findall(rf"{re.escape(run.uri)}/(\S+?)[:;)]? ", f"{warning} ")]
    return ref, named, content_hash(run, ref)
