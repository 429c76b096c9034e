"""Measures the time from a new `ddpm train` to its first step, minus the time of imports and loading.

`python -m benchmarks.resume` reads a large checkpoint over links of several speeds instead. A link is a folder whose
downloads, all together, get so many bytes a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import Figure, seconds
from benchmarks.subject import DATASET, PRESET, SIZE, forget_accelerator, pack_noise, write_noise
from job.progress import Progress
from job.requests import TrainRequest
from job.runs.checkpoints import Manifest, commit_manifest, list_checkpoints, load_manifest, newest_good
from job.runs.layout import CheckpointRef
from job.runs.metric_rows import Row, read_rows
from job.runs.writer import plan_parts, write_part
from job.store import Store, open_store
from job.store.local import LocalStore
from job.training.session import run_training

GIGABYTES_A_SECOND = (0.1, 0.3, 1.0, 1.5)
TENSOR_BYTES = 16 << 20
RUN = "resumed"
IMAGES = 2
EVERY_STEP_LOGGED = (
    f"train.batch_size={IMAGES}",
    f"log.every_images={IMAGES}",
    "sample.images=1",
    "sample.steps=2",
    "checkpoint.keep_last=1",
)
"""One step per epoch, over two images, so that the step itself takes almost no time."""
IMPORTS = "import job.training.session, job.store.gcs, safetensors.torch, accelerate, torch._dynamo"
"""The imports of any training process on a bucket before its first step; torch's optimisers import its compiler."""


def resumptions(
    bucket: str, folder: Path, sets: tuple[str, ...], state: dict[str, dict[str, Tensor]], turns: int
) -> Figure:
    """Trains one epoch here, resumes `turns` times in new processes, and reads the times of their steps from the log.

    Args:
        bucket: a `gs://` bucket that the child processes can reach.
        folder: a folder on the local disk.
        sets: changes to the configuration of the network.
        state: tensors that fit the run's checkpoints.
        turns: the number of restarts.
    """
    write_noise(folder / "images", IMAGES, SIZE)
    pack_noise(bucket, folder / "images", SIZE)
    run = open_store(bucket).sub(f"runs/{RUN}")
    importing, loading, totals = [], [], []
    all_sets = (*sets, *EVERY_STEP_LOGGED)
    forget_accelerator()
    run_training(TrainRequest(DATASET, bucket=bucket, run=RUN, preset=PRESET, epochs=1, sets=all_sets).check())
    with Progress("resuming", total=turns, unit="starts") as bar:
        for turn in range(1, turns + 1):
            started = time.time()
            _go_on(bucket, turn + 1, all_sets)
            totals.append(newest_rows(run)[-1]["time"] - started)
            importing.append(seconds(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True)))
            loading.append(seconds(lambda: _load(run, state)))
            bar.update(turn)
    return Figure(
        "resume_overhead_seconds",
        "resume: start to the first step, beyond import and load, s",
        [total - imported - loaded for total, imported, loaded in zip(totals, importing, loading, strict=True)],
        at_most=2.0,
        beside=f"{median(totals):.1f} s in all, from the emulated gs://: import {median(importing):.1f} s, "
        f"download, check and load {median(loading):.1f} s",
        raw={"total_seconds": totals, "import_seconds": importing, "load_seconds": loading},
    )


def newest_rows(run: Store) -> list[Row]:
    """Returns the log of a run, up to its newest checkpoint."""
    return read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics)


def _go_on(bucket: str, epochs: int, sets: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "job", "train", "--dataset", DATASET, "--bucket", bucket, "--run", RUN]
    command += ["--preset", PRESET, "--epochs", str(epochs)]
    for assignment in sets:
        command += ["--set", assignment]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def _load(run: Store, state: dict[str, dict[str, Tensor]]) -> None:
    assert newest_good(run, into=state) is not None


class Link(LocalStore):
    """A folder behind a link, whose downloads share `bytes_a_second`."""

    def __init__(self, root: Path, bytes_a_second: float) -> None:
        super().__init__(root)
        self._bytes_a_second, self._free_at, self._lock = bytes_a_second, 0.0, threading.Lock()

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        def carry(block: bytes) -> None:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + len(block) / self._bytes_a_second
                arrives_at = self._free_at
            time.sleep(max(0.0, arrives_at - time.monotonic()))
            consume(block)

        return super()._fetch(key, carry)


def save_large(run: Store, size_bytes: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Commits a checkpoint of noise; returns live tensors of the same shapes, touched as those of a network are."""
    noise = torch.randn(TENSOR_BYTES // 4)
    tensors = {"model": {f"layer.{number}": noise for number in range(size_bytes // TENSOR_BYTES)}}
    ref, files = CheckpointRef(1, 1000), []
    for name, part in plan_parts(tensors).items():
        files.append(write_part(folder / name, key := f"{ref.key}/{name}", part))
        run.upload(folder / name, key)
        (folder / name).unlink()
    about = {"fence": 1, "attempt": "", "images_seen": 1000, "loss_sums": []}
    commit_manifest(run, Manifest.model_validate(about | {"files": tuple(files)}))
    return {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors["model"].items()}}


def main(words: list[str] | None = None) -> None:
    """Prints the time to read a checkpoint over each link, beside the time of its bytes on the link."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5, help="size of the checkpoint")
    asked = parser.parse_args(words)
    table = Table(
        "link, GB/s", "seconds", "of the bytes alone", "ratio", title=f"a checkpoint of {asked.gigabytes:g} GB"
    )
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        bucket = Path(name, "bucket")
        live = save_large(LocalStore(bucket), int(asked.gigabytes * 1e9), Path(name))
        size_bytes = sum(tensor.nbytes for tensor in live["model"].values())
        with Progress("reading", total=len(GIGABYTES_A_SECOND), unit="links") as bar:
            for done, speed in enumerate(GIGABYTES_A_SECOND, 1):
                link, alone = Link(bucket, speed * 1e9), size_bytes / speed / 1e9
                took = seconds(partial(_load, link, live))
                table.add_row(f"{speed:g}", f"{took:.1f}", f"{alone:.1f}", f"{took / alone:.2f}")
                bar.update(done)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
