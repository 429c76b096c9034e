"""Costs that do not grow: a run's memory, files and threads with its age, and a list's time with the number of runs."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from statistics import median

import psutil
import pytest

from job.runs.checkpoints import list_checkpoints
from job.runs.records import LastStatus, Status
from job.store import open_store
from job.store.local import LocalStore
from tests.job.command_line import DDPM, ddpm_here, environment, settings, succeeded
from tests.job.launching import children, lasting
from tests.job.runs.leased import leased, write
from tests.job.some_images import encoded, folder_of, picture

IMAGES, BATCH, EPOCHS = 80, 4, 200
WARM, LAST = range(97, 105), range(192, 200)
"""Epochs that are compared: before the first, the allocator grows to what a step, a checkpoint and a picture need."""
GROWTH_BYTES = 6 << 20
"""Less than 70 kB for each checkpoint between them; a heap that grows and is trimmed takes half of it."""
LIMITS = {"memory": GROWTH_BYTES, "own memory": GROWTH_BYTES, "files": 2, "threads": 2}
"""Four uploads and a checkpoint on its way have files of their own, now and then."""


def sample_of(rank, epoch):
    """What a process holds at a moment of the run."""
    memory = rank.memory_info()
    # The unique set size would grow when a neighbour that shares libraries ends.
    held = {"memory": memory.rss, "own memory": memory.rss - memory.shared}
    return held | {"threads": rank.num_threads(), "files": rank.num_fds(), "epoch": epoch}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bucket_uri", ["gs"], indirect=True)
def test_a_long_run_does_not_grow(bucket_uri, tmp_path):
    """In 4,000 steps and 200 checkpoints."""
    images = folder_of(tmp_path / "images", [(f"{n}.png", encoded(picture(n, 8, 8))) for n in range(IMAGES)])
    succeeded(ddpm_here("data", "pack", images, "small", "--size", 8, "--bucket", bucket_uri))
    every = {"checkpoint__every_epochs": "1", "sample__every_epochs": "10"}
    sets = settings(train__batch_size=str(BATCH), sample__images="1", sample__steps="1", **every)
    words = ["train", "--dataset", "small", "--bucket", bucket_uri, "--epochs", str(EPOCHS), *sets]
    samples, run = [], open_store(bucket_uri).sub("runs/small")
    # A pipe that nobody reads would soon be full.
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([DDPM, *words], env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            # One that has just ended has no memory, or is not there.
            with suppress(psutil.Error, ValueError):
                (rank,) = children(process.pid)
                refs = list_checkpoints(run)
                sample = sample_of(psutil.Process(rank), max(refs).images_seen // IMAGES if refs else 0)
                samples += [sample] if sample["memory"] else []
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "log").read_text()
    assert process.returncode == 0, said
    assert f"{EPOCHS} epochs, {EPOCHS * IMAGES:,} images seen" in said
    warm, last = ([sample for sample in samples if sample["epoch"] in epochs] for epochs in (WARM, LAST))
    assert min(len(warm), len(last)) >= 5, len(samples)
    for name, growth in LIMITS.items():
        before, after = (median(sample[name] for sample in part) for part in (warm, last))
        assert after <= before + growth, name


def test_many_runs_take_few_requests_at_once(tmp_path, monkeypatch, count=64):
    """Runs of three attempts each, with two checkpoints and a status."""
    bucket, moment, asked = open_store(str(tmp_path)), "2026-01-01T00:00:00Z", []
    run, seen = bucket.sub("runs/run-000"), LastStatus(state="stopped", images_seen=24, updated=moment)
    for fence in range(1, 4):
        update = {"previous": fence - 1, "previous_seen": seen} if fence > 1 else {}
        run.create(f"attempts/{fence:06d}.json", leased(run, fence).record.model_copy(update=update).to_json())
    write(run, (2, 24), (3, 48))
    place = {"state": "stopped", "fence": 3, "images_seen": 48, "target_images": 96, "epoch": 1.0}
    run.put("status.json", Status(**place, loss=0.5, images_per_second=10.0, updated=moment).to_json())
    for number in range(1, count):
        shutil.copytree(tmp_path / "runs/run-000", tmp_path / f"runs/run-{number:03d}")
    attempt = LocalStore._attempt

    def slowly(store, work, key, *args):
        asked.append(key)
        time.sleep(0.25)
        return attempt(store, work, key, *args)

    monkeypatch.setattr(LocalStore, "_attempt", slowly)
    # One after the other they would take 16 seconds.
    with lasting(at_most=8):
        rows = succeeded(ddpm_here("runs", "list", "--bucket", tmp_path)).splitlines()[1:]
    assert len(rows) == count and all("48/96" in row.split() for row in rows)
    # The names of the runs; then the status of each.
    assert len(asked) == 1 + count
