"""Every phase ends within ten seconds of being asked to, with code 75 and its state kept, whoever asks and however."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.coordination.lease import load_lease
from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.store import Store, open_store
from tests.faulty_proxy import Fault
from tests.job.answering import metadata_server
from tests.job.command_line import ddpm, settings, started, succeeded
from tests.job.hooked import hooked
from tests.job.launching import eventually
from tests.job.processes.conftest import ON_AND_ON

LIMIT_SECONDS = 10
TELL = """
import os
from pathlib import Path
check_agreed = Painter.check_agreed

def tell_and_check(painter, *step):
    Path(os.environ["SAMPLING"]).touch()
    check_agreed(painter, *step)

Painter.check_agreed = tell_and_check
"""
Process = subprocess.Popen[str]


def by_group(number: int) -> Callable[[Process], object]:
    """A signal to the process group, as from a terminal: it reaches a rank twice. And again, by an impatient person."""

    def ask(process: Process) -> None:
        os.killpg(process.pid, number)
        time.sleep(0.05)
        os.killpg(process.pid, number)

    return ask


def stopped_by(ask: Callable[[Process], object], process: Process) -> str:
    """Asks a command to stop and returns what it said; it must end in time, with 75."""
    assert process.poll() is None, process.communicate()
    ask(process)
    asked = time.monotonic()
    err, _ = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - asked < LIMIT_SECONDS
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("ddpm: stopped")]) == 1, err
    return err


def saved(run: Store, said: str) -> None:
    """What a run that was stopped leaves: everything up to where it was."""
    status = read_status(run)
    assert status.state == "stopped"
    newest = max(list_checkpoints(run))
    assert newest.images_seen == status.images_seen
    assert f"after {newest.images_seen:,} images; everything is saved" in said
    assert load_lease(run).released


# --- training


def test_training_by_a_preemption_notice(place):
    with metadata_server() as server:
        process = place.begun("notice", GCE_METADATA_HOST=server.host)
        saved(place.run("notice"), said := stopped_by(lambda process: server.preempt(), process))
    assert "the machine's notice instance/preempted=TRUE" in said


SLOW_STEP = """
import os, time
from pathlib import Path
training_noise_of = randomness.training_noise

def training_noise(seed, image_numbers, *where):
    if image_numbers[0] >= 96:
        Path(os.environ["IN_STEP"]).touch()
        time.sleep(1.5)
    return training_noise_of(seed, image_numbers, *where)

randomness.training_noise = training_noise
"""


@pytest.mark.slow
def test_a_step_of_many_micro_batches(place, tmp_path):
    """Of two processes, in a step that takes longer than what counts as a hang."""
    began, hooks = tmp_path / "began", hooked(tmp_path / "hooks", ddpm__training=SLOW_STEP)
    batch = settings(train__batch_size="48", train__micro_batch_size="1")
    words = (*ON_AND_ON, "--processes", 2, "--hang-after", 15, *batch)
    process = place.started("long-steps", *words, PYTHONPATH=hooks, IN_STEP=str(began))
    eventually(lambda: began.exists() or process.poll() is not None, 120)
    time.sleep(16)
    asked = time.monotonic()
    said = stopped_by(lambda process: process.send_signal(signal.SIGTERM), process)
    assert time.monotonic() - asked < 8, "the rest of the step takes 20 s"
    saved(place.run("long-steps"), said)
    assert "stopped by SIGTERM after 96 images" in said
    assert "\nloading PyTorch in 2 processes\n" in said and said.count("\nbeginning, image 0, attempt 1\n") == 1


# --- sampling


@pytest.fixture
def telling(tmp_path) -> dict[str, str]:
    """Variables that make a process tell when it samples, by a file in `SAMPLING`."""
    hooks = hooked(tmp_path / "hooks", job__sampling__painter=TELL)
    return {"PYTHONPATH": hooks, "SAMPLING": str(tmp_path / "sampling")}


def sampling(process: Process, telling: dict[str, str]) -> Process:
    """Waits until the command samples."""
    eventually(lambda: Path(telling["SAMPLING"]).exists() or process.poll() is not None, 120)
    return process


@pytest.mark.slow
def test_sampling_in_training(place, telling):
    grid = {"diffusion.timesteps": 1000, "sample.every_epochs": 1, "sample.steps": 1000, "sample.images": 500}
    words = [word for key, value in grid.items() for word in ("--set", f"{key}={value}")]
    process = sampling(place.started("paints", *words, "--processes", 2, **telling), telling)
    saved(place.run("paints"), stopped_by(by_group(signal.SIGTERM), process))
    assert max(list_checkpoints(place.run("paints"))).images_seen == 312


@pytest.mark.slow
def test_sample(place, telling):
    process = place.started("drawn", "--epochs", 1, "--set", "diffusion.timesteps=1000")
    assert process.wait(120) == 0, process.communicate()

    before = {entry.key for entry in place.run("drawn").list()}
    words = ("--run", "drawn", "--bucket", place.bucket, "--seeds", "0-499", "--steps", 1000, "--sampler", "ddpm")
    for processes, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        Path(telling["SAMPLING"]).unlink(missing_ok=True)
        process = started("sample", *words, "--processes", processes, **telling)
        assert "while sampling" in stopped_by(by_group(number), sampling(process, telling))
        assert {entry.key for entry in place.run("drawn").list()} == before


# --- data


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_the_first_download(proxy, remote_bucket, tmp_path):
    succeeded(ddpm("data", "ensure", "landscape-sample", "--bucket", remote_bucket))
    proxy.inject(Fault.SILENCE, "^GET .*shard-", times=1000)
    options = ("--dataset", "landscape-sample", "--bucket", remote_bucket, "--epochs", 1, *settings())
    process = started("train", *options, DDPM_CACHE=str(tmp_path / "cache"))
    eventually(lambda: proxy.injected[Fault.SILENCE] or process.poll() is not None, 120)
    said = stopped_by(Process.terminate, process)
    assert re.search(r"stopped( by SIGTERM)? while (reading the images|the bucket was away)", said)
    run = open_store(remote_bucket).sub("runs/landscape-sample")
    assert list_checkpoints(run) == []
    assert load_lease(run).released
