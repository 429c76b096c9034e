"""A run that goes on with other code, or on another machine: allowed, and told."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import job
from job.coordination.sealed import PACKAGES, code_version
from job.processes import compute
from job.runs.records import last_attempt
from job.store import open_store
from tests.job.command_line import about, ddpm, ddpm_here, succeeded


@pytest.fixture
def words(bucket: Path) -> tuple[object, ...]:
    """A command that goes on with a run of three epochs."""
    return ("train", "--dataset", "tiles", "--run", "walk", "--bucket", bucket)


@pytest.mark.slow
def test_other_code_is_told(words, tmp_path):
    # Nothing is said where nothing changed.
    done = ddpm_here(*words, "--epochs", 4)
    assert " ran code " not in succeeded(done) + done.stderr
    checkout = Path(job.__file__).parents[1]
    for package in PACKAGES:
        shutil.copytree(checkout / package, tmp_path / "other" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other/ddpm/ema.py").open("a") as source:
        source.write("# Another line.\n")
    done = ddpm(*words, "--epochs", 5, program=(sys.executable, "-P", "-m", "job"), PYTHONPATH=str(tmp_path / "other"))
    succeeded(done)
    (line,) = [line for line in done.stderr.splitlines() if " ran code " in line]
    assert line.startswith(f"attempt 2 ran code {code_version()}, and this one runs {code_version().split('+')[0]}+")
    attempt = last_attempt(open_store(str(tmp_path / "bucket")).sub("runs/walk"))
    assert attempt.code_version != code_version()
    assert attempt.code_version in line


def test_another_gpu_is_told(words, monkeypatch):
    name = "NVIDIA A100-SXM4-80GB, torch 2.9.0"
    monkeypatch.setattr(compute, "describe_device", lambda *_: name)
    done = ddpm_here(*words, "--epochs", 4)
    succeeded(done)
    assert f"and this one runs on {name}: images and noise stay the same, rounding differs" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the variable is MKL's")
def test_another_code_path_of_the_processor_is_told(words, bucket):
    """The instructions are the same; only what the kernels compute shows it."""
    attempts = []
    for epochs, variables in enumerate(({}, {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}), 4):
        done = ddpm(*words, "--epochs", epochs, **variables)
        succeeded(done)
        attempts.append(last_attempt(open_store(str(bucket)).sub("runs/walk")))
        otherwise = [line for line in done.stderr.splitlines() if "rounding differs" in line]
        assert len(otherwise) == (epochs == 5), otherwise
        if otherwise:
            ran_on, runs_on = (attempt.device for attempt in attempts)
            assert f"attempt 2 ran on {ran_on}, and this one runs on {runs_on}: " in otherwise[0]
            assert re.sub("kernels [0-9a-f]{8}", "", ran_on) == re.sub("kernels [0-9a-f]{8}", "", runs_on)


@pytest.mark.slow
@pytest.mark.parametrize("slots", ["2", "3"])
def test_a_new_run_says_whether_its_bits_depend_on_processes(bucket, slots):
    done = ddpm("train", *about(bucket, "new"), "--epochs", 1, "--processes", 3, "--set", f"train.slots={slots}")
    succeeded(done)
    assert ("1 to 3 processes give equal bits" in done.stderr) == (slots == "3")
    assert ("more than train.slots=2 processes: DDP adds the gradients" in done.stderr) == (slots == "2")
