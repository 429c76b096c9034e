"""The small run of the campaign: its images, its settings and its commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, SIZE, BATCH_SIZE_IMAGES = 200, 16, 24
DATASET = "campaign"
DATASET_KEY = f"datasets/{DATASET}-{SIZE}"
SAMPLED_SEEDS, SAVED_IMAGES = "0-7", 64

SETTINGS = {
    "model.channels": 8,
    "model.channel_mults": "1,2",
    "model.norm_groups": 4,
    "model.attention_sizes": 8,
    "diffusion.timesteps": 50,
    "train.precision": "fp32",
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

    @property
    def shared_pack(self) -> list[str]:
        """Packs the images by several machines."""
        words = ["data", "pack", str(self.source), DATASET, "--size", str(SIZE), "--bucket"]
        return [*words, f"{self.bucket}/shared"]

    def train(self, run: str, parent: str = "") -> list[str]:
        """Trains or resumes a run, with the first weights of a parent; waits for another attempt that holds it."""
        chosen = SETTINGS | {"model.dropout": self.dropout, "train.seed": self.seed}
        words = ["train", "--dataset", DATASET, "--run", run, "--bucket", self.bucket, "--epochs", str(self.epochs)]
        words += ["--processes", str(self.processes), "--wait", "120", *(["--from", parent] if parent else [])]
        return words + [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]

    def delete(self, run: str) -> list[str]:
        """Deletes a run."""
        return ["runs", "delete", run, "--yes", "--bucket", self.bucket]

    def sample(self, run: str) -> list[str]:
        """Makes another picture of a finished run."""
        options = ["--seeds", SAMPLED_SEEDS, "--steps", "8", "--batch-size", "4", "--processes", str(self.processes)]
        return ["sample", "--run", run, "--bucket", self.bucket, *options]

    def batch(self, run: str) -> list[str]:
        """Saves many images of a finished run, in pieces."""
        options = ["--count", str(SAVED_IMAGES), "--save", "shards", "--steps", "4", "--batch-size", "8"]
        return ["sample", "--run", run, "--bucket", self.bucket, *options, "--processes", str(self.processes)]


def make_images(folder: Path) -> Path:
    """Writes the images, random pixels that are the same for all runs, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder
