"""Runs of a small network, to be damaged: how they are trained, copied and compared."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from job.runs.checkpoints import load_manifest, newest_good
from job.runs.layout import CheckpointRef
from job.store import Store
from tests.job.command_line import ddpm_here, settings

DESCRIPTIONS = ("model_index.json", "config.json", "id2label.json", "run_config.yaml")
"""Ends of the keys of what describes the weights to diffusers: the same in all checkpoints, and not needed here."""


def train(bucket: Path, run: str, epochs: int, **changes: str):
    words = ("train", "--dataset", "tiles", "--run", run, "--epochs", epochs, "--bucket", bucket)
    changes = {
        "checkpoint__keep_last": "9",
        "checkpoint__every_epochs": "1",
        "model__channels": "4",
        "log__every_images": "144",
        "ema__stds": "0.1",
        "ema__snapshot_epochs": "1",
        **changes,
    }
    return ddpm_here(*words, *settings(**changes))


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


def resumed(run: Store, capsys: pytest.CaptureFixture[str]) -> tuple[CheckpointRef, list[str], str]:
    """What an attempt would go on from: the checkpoint, the keys that warnings name, and the content."""
    ref = newest_good(run).ref
    warnings = capsys.readouterr().err.splitlines()
    named = [key for warning in warnings for key in re.findall(rf"{re.escape(run.uri)}/(\S+?)[:;)]? ", f"{warning} ")]
    return ref, named, content_hash(run, ref)
