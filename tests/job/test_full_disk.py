"""A disk that is full: of the bucket, of the folder for temporary files, of the cache, of a person's pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from job.data.checks import verify_dataset
from job.exits import Exit
from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded
from tests.job.some_images import encoded, picture, zip_of

IMAGES = [(f"{number}.png", encoded(picture(number))) for number in range(12)]
SMALLEST = {
    "model__channels": "4",
    "model__channel_mults": "1",
    "model__attention_sizes": "[]",
    "train__batch_size": "12",
    "checkpoint__every_epochs": "1",
}


def filled(disk: Path, free_bytes: int) -> Path:
    """Leaves a disk with this much space; returns what takes the rest."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filling").write_bytes(bytes(free - free_bytes))
    return disk / "filling"


def packed(bucket: Path, folder: Path) -> list[object]:
    """Packs twelve images, and returns the options that train a small network on them in a step per epoch."""
    source = zip_of(folder / "images.zip", IMAGES)
    succeeded(ddpm_here("data", "pack", source, "few", "--size", 16, "--bucket", bucket))
    return ["--dataset", "few", "--bucket", bucket, *settings(**SMALLEST)]


def test_a_full_disk_while_packing(small_disk, tmp_path):
    filling = filled(small_disk, 64 << 10)
    bucket, temporary = tmp_path / "bucket", {"TMPDIR": str(small_disk)}
    words = ("data", "pack", "landscape-sample", "mine", "--size", 16, "--bucket", bucket)
    line = refused(ddpm(*words, **temporary), Exit.DISK_FULL)
    assert str(small_disk) in line
    assert "No space left on device: free some space" in line
    assert not list(bucket.rglob("index.json"))
    assert not list(small_disk.glob("ddpm-*"))
    filling.unlink()
    succeeded(ddpm(*words, **temporary))
    assert verify_dataset(open_store(str(bucket)), "datasets/mine-16") == []


@pytest.mark.slow
def test_a_full_disk_while_training(small_disk, tmp_path):
    """There is space for the first checkpoint and none for the second: the next attempt goes on from the first."""
    bucket, cache = small_disk / "bucket", {"DDPM_CACHE": str(tmp_path / "cache")}
    words = packed(bucket, tmp_path)
    succeeded(ddpm_here("train", *words, "--epochs", 1, **cache))
    filling = filled(small_disk, 64 << 10)
    done = ddpm_here("train", *words, "--epochs", 2, **cache)
    assert done.returncode == Exit.DISK_FULL
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ddpm: {bucket}/runs/few/checkpoints/000002-000000000024/")
    assert "No space left on device: free some space" in line
    run = open_store(str(bucket)).sub("runs/few")
    assert [ref.images_seen for ref in list_checkpoints(run)] == [12]
    status = read_status(run)
    assert status is None or status.state == "failed"
    filling.unlink()
    out = succeeded(ddpm_here("train", *words, "--epochs", 2, **cache))
    assert "Run 'few' is finished: 2 epochs, 24 images seen." in out


def test_a_full_disk_for_a_picture(small_disk):
    filled(small_disk, 4 << 10)
    output = small_disk / "schedule.png"
    line = refused(ddpm_here("figure", "schedule", "-o", output), Exit.DISK_FULL)
    assert f"{output}: No space left on device" in line
    assert [path.name for path in small_disk.iterdir()] == ["filling"]
