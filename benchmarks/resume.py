"""From starting `ddpm train` again to the first step it does: what comes on top of importing and loading."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from torch import Tensor

from benchmarks.measuring import Figure, seconds
from benchmarks.subject import DATASET, PRESET, SIZE, forget_accelerator, pack_noise, write_noise
from job.progress import Progress
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints, load_manifest, newest_good
from job.runs.metric_rows import Row, read_rows
from job.store import Store, open_store
from job.training.attempt import run_training

RUN = "resumed"
IMAGES = 2
EVERY_STEP_LOGGED = (
    f"train.batch_size={IMAGES}",
    f"log.every_images={IMAGES}",
    "sample.images=1",
    "sample.steps=2",
    "checkpoint.keep_last=1",
)
"""One step per epoch, over two images: what the step itself takes hardly counts."""
IMPORTS = "import job.training.attempt, job.store.gcs, safetensors.torch, accelerate, torch._dynamo"
"""What any training process on a bucket imports before its first step; torch's optimisers import its compiler."""


def resumptions(
    bucket: str, folder: Path, sets: tuple[str, ...], state: dict[str, dict[str, Tensor]], turns: int
) -> Figure:
    """Trains one epoch here, then goes on `turns` times in new processes, and reads from the log when they stepped.

    Args:
        bucket: a `gs://` bucket that the children find, too.
        folder: on the local disk.
        sets: changes to the configuration of the network.
        state: live tensors that the run's checkpoints fit.
        turns: how often the run is started again.
    """
    write_noise(folder / "images", IMAGES, SIZE)
    pack_noise(bucket, folder / "images", SIZE)
    run = open_store(bucket).sub(f"runs/{RUN}")
    importing, loading, totals = [], [], []
    all_sets = (*sets, *EVERY_STEP_LOGGED)
    forget_accelerator()
    run_training(TrainRequest(DATASET, bucket, RUN, PRESET, epochs=1, sets=all_sets).check())
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
    """The log of a run, up to its newest checkpoint."""
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
    with newest_good(run, print) as restored:
        assert restored is not None
        restored.copy_into(state)
