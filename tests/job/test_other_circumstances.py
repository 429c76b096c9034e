"""A run that goes on with other code, or on another machine: allowed, and told. And disks that are full."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import job
from job.coordination.sealed import PACKAGES, code_version
from job.data.checks import verify_dataset
from job.exits import Exit
from job.processes import compute
from job.runs.checkpoints import list_checkpoints
from job.runs.records import last_attempt, read_status
from job.store import open_store
from tests.job.command_line import about, ddpm, ddpm_here, ran, refused, settings, succeeded
from tests.job.packing import FILES
from tests.job.some_images import zip_of


@pytest.fixture
def words(bucket):
    """A command that goes on with a run of three epochs."""
    return ("train", "--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs")


@pytest.mark.slow
def test_other_code_is_told(words, bucket, tmp_path):
    # Nothing is said where nothing changed.
    done = ddpm_here(*words, 4)
    assert " ran code " not in succeeded(done) + done.stderr
    for package in PACKAGES:
        source = Path(job.__file__).parents[1] / package
        shutil.copytree(source, tmp_path / "other" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other/ddpm/ema.py").open("a") as source:
        source.write("# Another line.\n")
    done = ddpm(*words, 5, program=(sys.executable, "-P", "-m", "job"), PYTHONPATH=str(tmp_path / "other"))
    succeeded(done)
    (line,) = [line for line in done.stderr.splitlines() if " ran code " in line]
    assert line.startswith(f"attempt 2 ran code {code_version()}, and this one runs {code_version().split('+')[0]}+")
    attempt = last_attempt(open_store(str(bucket)).sub("runs/walk"))
    assert attempt.code_version != code_version()
    assert attempt.code_version in line


def test_another_gpu_is_told(words, monkeypatch):
    name = "NVIDIA A100-SXM4-80GB, torch 2.9.0"
    monkeypatch.setattr(compute, "describe_device", lambda *_: name)
    done = ddpm_here(*words, 4)
    succeeded(done)
    assert f"and this one runs on {name}: images and noise stay the same, rounding differs" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the variable is MKL's")
def test_another_code_path_of_the_processor_is_told(words, bucket):
    """The instructions are the same; only what the kernels compute shows it."""
    attempts = []
    for epochs, variables in enumerate(({}, {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}), 4):
        done = ddpm(*words, epochs, **variables)
        succeeded(done)
        attempts.append(last_attempt(open_store(str(bucket)).sub("runs/walk")))
        otherwise = [line for line in done.stderr.splitlines() if "rounding differs" in line]
        assert len(otherwise) == (epochs == 5), otherwise
        if otherwise:
            ran_on, runs_on = (attempt.device for attempt in attempts)
            assert f"attempt 2 ran on {ran_on}, and this one runs on {runs_on}: " in otherwise[0]
            assert re.sub("kernels [0-9a-f]{8}", "", ran_on) == re.sub("kernels [0-9a-f]{8}", "", runs_on)


SLOTS = [(2, "more than train.slots=2 processes: DDP adds"), (3, "1 to 3 processes give equal bits")]


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "told"), SLOTS)
def test_a_new_run_says_whether_its_bits_depend_on_processes(bucket, slots, told):
    done = ddpm("train", *about(bucket, "new"), "--epochs", 1, "--processes", 3, "--set", f"train.slots={slots}")
    succeeded(done)
    said = [line for line in done.stderr.splitlines() if "DDP adds" in line or "equal bits" in line]
    assert len(said) == 1 and told in said[0]


def filled(disk):
    """Leaves 64 KiB of a disk; returns what takes the rest."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filling").write_bytes(bytes(free - (64 << 10)))
    return disk / "filling"


def test_a_full_disk_while_packing(small_disk, tmp_path):
    filling = filled(small_disk)
    bucket, temporary = tmp_path / "bucket", {"TMPDIR": str(small_disk)}
    words = ("data", "pack", "landscape-sample", "mine", "--size", 16, "--bucket", bucket)
    line = refused(ddpm(*words, **temporary), Exit.DISK_FULL)
    assert str(small_disk) in line and "No space left on device: free some space" in line
    assert not list(bucket.rglob("index.json")) and not list(small_disk.glob("ddpm-*"))
    # Neither is there space for a picture.
    (small_disk / "more").write_bytes(bytes(60 << 10))
    output = small_disk / "schedule.png"
    assert f"{output}: No space left on device" in refused(ddpm_here("figure", "schedule", "-o", output), 74)
    assert {path.name for path in small_disk.iterdir()} == {"filling", "more"}
    filling.unlink()
    succeeded(ddpm(*words, **temporary))
    assert verify_dataset(open_store(str(bucket)), "datasets/mine-16") == []


@pytest.mark.slow
def test_a_full_disk_while_training(small_disk, tmp_path):
    """There is space for the first checkpoint and none for the second: the next attempt goes on from the first."""
    bucket, cache = small_disk / "bucket", {"DDPM_CACHE": str(tmp_path / "cache")}
    source = zip_of(tmp_path / "images.zip", FILES[:12])
    ran("data", "pack", source, "few", "--size", 16, "--bucket", bucket)
    smallest = {"model__channels": "4", "model__channel_mults": "1", "model__attention_sizes": "[]"}
    sets = settings(**smallest, train__batch_size="12", checkpoint__every_epochs="1")
    words = ("train", "--dataset", "few", "--bucket", bucket, *sets, "--epochs")
    ran(*words, 1, **cache)
    filling = filled(small_disk)
    done = ddpm_here(*words, 2, **cache)
    assert done.returncode == Exit.DISK_FULL and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ddpm: {bucket}/runs/few/checkpoints/000002-000000000024/")
    assert "No space left on device: free some space" in line
    run = open_store(str(bucket)).sub("runs/few")
    assert [ref.images_seen for ref in list_checkpoints(run)] == [12]
    status = read_status(run)
    assert status is None or status.state == "failed"
    filling.unlink()
    out = ran(*words, 2, **cache)
    assert "Run 'few' is finished: 2 epochs, 24 images seen." in out
