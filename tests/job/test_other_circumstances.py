"""A run that goes on with other code, or on another machine: allowed, and told."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import job
from job.processes import compute
from job.runs.records import last_attempt
from job.sealed import PACKAGES, code_version
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, succeeded


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
