"""`ddpm train` as ranks of torchrun and of accelerate: the same training and stopping; only the exit codes are flat."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from job.runs.checkpoints import list_checkpoints, load_manifest, opened
from job.runs.records import read_status
from job.store import Store, open_store
from tests.job.command_line import ddpm, environment, settings, succeeded
from tests.job.launching import eventually

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", "-m", "--", "job")
"""Without `--` torchrun takes `--run` for an abbreviation of an option of its own."""
ACCELERATE = (
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "job"),
)
EPOCHS = 3
GROUPS = ("model", "ema", "optimizer")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", "16", "--bucket", folder / "bucket"))
    return folder


def started(place: Path, program: tuple[str, ...], run: str, epochs: int, *words: str) -> subprocess.Popen[str]:
    options = ("train", "--dataset", "tiles", "--run", run, "--bucket", place / "bucket", "--epochs", epochs)
    return subprocess.Popen(
        [*program, *map(str, options), *settings(), *words],
        env=environment(DDPM_CACHE=str(place / "cache")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=150)
    return process.returncode, err


def run_of(place: Path, name: str) -> Store:
    return open_store(str(place / "bucket")).sub(f"runs/{name}")


def tensors(run: Store) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with opened(run, max(list_checkpoints(run)), GROUPS) as restored:
        return {
            f"{group}.{name}": tensor
            for group, paths in restored.files.items()
            for path in paths
            for name, tensor in load_file(path).items()
        }


def test_stopped_under_torchrun_and_finished_under_accelerate_it_is_the_same_run(place):
    run = run_of(place, "theirs")
    # It would go on for an hour.
    process = started(place, TORCHRUN, "theirs", 10_000, "--set", "checkpoint.every_minutes=0.005")
    eventually(lambda: list_checkpoints(run) or process.poll() is not None, 120)
    process.terminate()
    asked = time.monotonic()
    code, err = ended(process)
    print(f"torchrun: {time.monotonic() - asked:.1f} s from SIGTERM to exit code {code}")
    assert code == 1, err
    assert err.count("everything is saved, and the same command goes on from there") == 1
    assert read_status(run).state == "stopped"
    newest = load_manifest(run, max(list_checkpoints(run)))
    assert (newest.images_seen, newest.world_size) == (read_status(run).images_seen, 2)
    epochs = newest.images_seen // 299 + EPOCHS
    ours = started(place, (sys.executable, "-m", "job"), "ours", epochs, "--processes", "2")
    code, err = ended(started(place, ACCELERATE, "theirs", epochs))
    assert code == 0, err
    assert read_status(run).state == "finished"
    assert load_manifest(run, max(list_checkpoints(run))).world_size == 2
    code, err = ended(ours)
    assert code == 0, err
    expected, found = tensors(run_of(place, "ours")), tensors(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("program", [TORCHRUN, ACCELERATE])
def test_an_error_is_told_and_its_code_becomes_1(place, program):
    code, err = ended(started(place, program, "refused", 1, "--set", "train.batch_size=1"))
    assert code == 1
    assert re.search(r"^ddpm(?: \(rank 1\))?: 2 processes cannot share train\.batch_size=1 images", err, re.MULTILINE)
    assert "ddpm/" not in err, "a traceback of ours"
