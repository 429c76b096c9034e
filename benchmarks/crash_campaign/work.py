"""The small runs of the campaign: their images, settings and commands, and what they make undisturbed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.crash_campaign.history import Ending, History, Run, differences, lost_images, read_ending, saved_images
from benchmarks.crash_campaign.processes import Attempts, BrokenError, Place
from job.data.shards import OFFSETS_DTYPE, load_index
from job.runs.checkpoints import load_manifest
from job.runs.layout import RUNS, CheckpointRef
from job.store import Store, open_store

IMAGES, SIZE, BATCH_SIZE_IMAGES = 200, 16, 24
DATASET = "campaign"
DATASET_KEY = f"datasets/{DATASET}-{SIZE}"
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
        return ["data", "pack", str(self.source), DATASET, "--size", str(SIZE), "--bucket", f"{self.bucket}/shared"]

    def train(self, run: str, parent: str = "") -> list[str]:
        """Trains or resumes a run, with the first weights of a parent; waits for another attempt that holds it."""
        chosen = SETTINGS | {"model.dropout": self.dropout, "train.seed": self.seed}
        words = ["train", "--dataset", DATASET, "--run", run, "--bucket", self.bucket, "--epochs", str(self.epochs)]
        words += ["--processes", str(self.processes), "--wait", "120", *(["--from", parent] if parent else [])]
        return words + [f"--set={key}={value}" for key, value in chosen.items()]

    def delete(self, run: str) -> list[str]:
        """Deletes a run."""
        return ["runs", "delete", run, "--yes", "--bucket", self.bucket]

    def sample(self, run: str) -> list[str]:
        """Makes another picture of a finished run."""
        return self._sample(run, "--seeds=0-7", "--steps=8", "--batch-size=4")

    def batch(self, run: str) -> list[str]:
        """Saves many images of a finished run, in pieces."""
        return self._sample(run, "--count=64", "--save=shards", "--steps=4", "--batch-size=8")

    def _sample(self, run: str, *options: str) -> list[str]:
        return ["sample", "--run", run, "--bucket", self.bucket, *options, "--processes", str(self.processes)]


def make_images(folder: Path) -> Path:
    """Writes the images, random pixels that are the same for all runs, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


@dataclass(frozen=True)
class Undisturbed:
    """The results of the undisturbed run of a lane, which the disturbed ones must match."""

    ending: Ending
    history: History
    dataset: dict[str, bytes]
    sampled: dict[str, str]
    """Pictures of `ddpm sample`: SHA-256 by name."""
    saved: dict[str, str]
    """Pieces of `ddpm sample --count`: SHA-256 by name."""
    child: Undisturbed | None = None
    """A run that began with the weights of this one."""


def make_undisturbed(work: Work, folder: Path, attempts: Attempts, phases: Collection[str]) -> Undisturbed:
    """Packs, trains and, for the points of these phases, samples without a fault.

    Raises:
        BrokenError: a command failed, or training did not see every image once.
    """
    place, bucket = Place(folder, folder / "cache"), open_store(work.bucket)
    attempts.start(work.pack, place=place).finish()

    def trained(name: str, parent: str = "") -> tuple[Run, Ending]:
        run = Run(name, bucket.sub(f"{RUNS}/{name}"))
        run.invocations.append(attempts.start(work.train(name, parent), place=place))
        run.invocations[0].finish()
        return run, read_ending(run.store)

    run, ending = trained("run-1")
    history = run.history
    attempts.note_pace(run.invocations[0])
    attempts.tally.undisturbed_hash = ending.weights_sha256
    attempts.tell(f"{attempts.name}: undisturbed, {ending.ref[1]:,} images, {ending.weights_sha256[:16]}…")
    for problem in differences(history, ending, history, ending):
        attempts.fail(f"undisturbed: {problem}")
    if lost_images(history, ending) or history.repeated_images:
        raise BrokenError("undisturbed training does not see every image once")
    sampled: dict[str, str] = {}
    saved: dict[str, str] = {}
    if "sample" in phases:
        attempts.start(work.sample(run.name), place=place).finish()
        pictures = read_ending(run.store).pictures
        sampled = {name: sha256 for name, sha256 in pictures.items() if name not in ending.pictures}
    if {"batch", "shared-batch"} & {*phases}:
        attempts.start(work.batch(run.name), place=place).finish()
        saved = saved_images(run.store)
    made = Undisturbed(ending, history, objects_of(bucket.sub(DATASET_KEY)), sampled, saved)
    if "from" not in phases:
        return made
    child, ending = trained("child", run.name)
    return replace(made, child=replace(made, ending=ending, history=child.history))


def objects_of(dataset: Store) -> dict[str, bytes]:
    """Returns a dataset's objects without records and claims, which a kill after the commit leaves behind."""
    keys = (entry.key for entry in dataset.list() if not entry.key.startswith(("pieces/", "claims/")))
    return {key: dataset.read(key).data for key in keys}


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


def replace_image(bucket: Store) -> tuple[str, str, bytes]:
    """Replaces an image of a shard by another valid PNG, which only a hash can detect.

    Returns the name and the key of the shard, and its intact content.
    """
    shard = load_index(bucket, DATASET_KEY).shards[1]
    sound = bucket.read(f"{DATASET_KEY}/{shard.name}").data
    table = np.frombuffer(bucket.read(f"{DATASET_KEY}/{shard.offsets_name}").data, OFFSETS_DTYPE)
    sizes = table["bytes"].tolist()
    first, second = next((i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j])
    data, size = bytearray(sound), sizes[first]
    start, other = int(table[first]["offset"]), int(table[second]["offset"])
    data[start : start + size] = sound[other : other + size]
    bucket.put(f"{DATASET_KEY}/{shard.name}", bytes(data))
    return shard.name, f"{DATASET_KEY}/{shard.name}", sound
