"""The small runs of the campaign: their images, settings and commands, and the damage that they meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from job.runs.checkpoints import load_manifest
from job.runs.layout import CheckpointRef
from job.store import Store

IMAGES, SIZE, BATCH_SIZE_IMAGES = 200, 16, 24
DATASET = "campaign"
SETTINGS = {
    "model.channels": 8,
    "model.channel_mults": "1,2",
    "model.norm_groups": 4,
    "model.attention_sizes": 8,
    "diffusion.timesteps": 50,
    "train.batch_size": BATCH_SIZE_IMAGES,
    "train.warmup_images": 960,
    "data.augment": 0.2,
    "ema.stds": 0.1,
    "ema.snapshot_epochs": 1,
    "sample.images": 4,
    "sample.steps": 6,
    "sample.every_epochs": 2,
    "sample.nearest": "false",
    "checkpoint.every_epochs": 1,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every_epochs": 5,
    "log.every_images": 96,
}
"""With these settings batches straddle epochs, log rows straddle checkpoints, and old checkpoints are retired."""


@dataclass(frozen=True)
class Work:
    """The commands of one lane."""

    bucket: str
    processes: int
    dropout: float
    seed: int
    epochs: int
    source: Path

    @property
    def pack(self) -> list[str]:
        """Packs the images unless they are packed."""
        return ["data", "ensure", DATASET, "--source", str(self.source), "--size", str(SIZE), "--bucket", self.bucket]

    def train(self, run: str) -> list[str]:
        """Trains or resumes a run; waits for another attempt that holds it."""
        chosen = SETTINGS | {"model.dropout": self.dropout, "train.seed": self.seed}
        chosen["train.precision"] = "fp16" if self.dropout else "fp32"
        words = ["train", "--dataset", DATASET, "--run", run, "--bucket", self.bucket, "--epochs", str(self.epochs)]
        words += ["--processes", str(self.processes), "--wait", "120"]
        return words + [f"--set={key}={value}" for key, value in chosen.items()]


def make_images(folder: Path) -> Path:
    """Writes the images, random pixels that are the same for all runs, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def flip_checkpoint_bit(run: Store, ref: CheckpointRef) -> str:
    """Flips the middle bit of a checkpoint's averaged weights in the bucket; returns the object's URI."""
    manifest = load_manifest(run, ref)
    (record,) = (record for record in manifest.files if manifest.group_of(record) == "ema")
    data = bytearray(record.read(run))
    data[len(data) // 2] ^= 16
    run.put(record.key, bytes(data))
    return run.uri_of(record.key)


def flip_cached_byte(cache: Path) -> str:
    """Flips a byte of the decoded images on the local disk; returns the file."""
    (path,) = cache.glob("*/images")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 255]))
    return str(path)
