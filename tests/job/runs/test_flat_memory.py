"""A run that lasts needs no more memory, files or threads than one that just began: 4,000 steps, 200 checkpoints."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import psutil
import pytest

from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, environment, settings, succeeded
from tests.job.some_images import encoded, folder_of, picture

IMAGES, BATCH, EPOCHS = 80, 4, 200
STEPS = EPOCHS * IMAGES // BATCH
WARM, LAST = range(97, 105), range(192, 200)
"""Epochs that are compared: before the first, the allocator grows to what a step, a checkpoint and a picture need."""
GROWTH_BYTES = 6 << 20
"""Less than 70 kB for each checkpoint between them; a heap that grows and is trimmed takes half of it."""


Sample = dict[str, int]
"""What a process holds at a moment of the run."""


def sample_of(rank: psutil.Process, epoch: int) -> Sample:
    memory = rank.memory_info()
    # One that has just ended has no memory.
    assert memory.rss
    return {
        "memory": memory.rss,
        # The unique set size would grow when a neighbour that shares libraries ends.
        "own memory": memory.rss - memory.shared,
        "threads": rank.num_threads(),
        "files": rank.num_fds(),
        "epoch": epoch,
    }


def epochs_done(run: Store) -> int:
    refs = list_checkpoints(run)
    return max(refs).images_seen // IMAGES if refs else 0


def samples_of(process: subprocess.Popen[bytes], run: Store) -> Iterator[Sample]:
    while process.poll() is None:
        try:
            for rank in psutil.Process(process.pid).children():
                if "train" in rank.cmdline():
                    yield sample_of(rank, epochs_done(run))
        except (psutil.Error, AssertionError):
            # It has just ended.
            pass
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bucket_uri", ["gs", "s3"], indirect=True)
def test_a_long_run_does_not_grow(bucket_uri, tmp_path):
    images = folder_of(tmp_path / "images", [(f"{n}.png", encoded(picture(n, 8, 8))) for n in range(IMAGES)])
    succeeded(ddpm_here("data", "pack", images, "small", "--size", 8, "--bucket", bucket_uri))
    words = ["train", "--dataset", "small", "--bucket", bucket_uri, "--epochs", str(EPOCHS)]
    every = {"checkpoint__every_epochs": "1", "sample__every_epochs": "10"}
    words += settings(train__batch_size=str(BATCH), sample__images="1", sample__steps="1", **every)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "job", *words],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            samples = list(samples_of(process, open_store(bucket_uri).sub("runs/small")))
        finally:
            process.kill()
            process.wait()
    log_text = (tmp_path / "log").read_text()
    assert process.returncode == 0, log_text
    assert f"{EPOCHS} epochs, {STEPS * BATCH:,} images seen" in log_text
    warm, last = ([sample for sample in samples if sample["epoch"] in epochs] for epochs in (WARM, LAST))
    assert min(len(warm), len(last)) >= 5, len(samples)
    limits = {"memory": GROWTH_BYTES, "own memory": GROWTH_BYTES, "files": 2, "threads": 2}
    for name, growth in limits.items():
        before, after = (median(sample[name] for sample in part) for part in (warm, last))
        # Four uploads and a checkpoint on its way have files of their own, now and then.
        assert after <= before + growth, name
