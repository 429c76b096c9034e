"""Two attempts at one run, as people start them: one is refused, one waits, one sleeps in the middle of a commit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from job.coordination.lease import EXPIRE_SECONDS
from job.runs.checkpoints import list_checkpoints
from job.runs.records import read_status
from job.store import open_store
from tests.job.command_line import DDPM, ddpm, environment, settings, succeeded
from tests.job.hooked import hooked
from tests.job.launching import children, eventually

FREEZE = """
import os, signal, threading, time
from pathlib import Path
from job.coordination.lease import Lease
commit, check_lost, committing = commit_manifest, Lease.check_lost, threading.RLock()

def commit_manifest(run, manifest):
    with committing:
        if Path(os.environ["FREEZE"]).exists():
            # Sent to the process, the signal would let this thread run on for as long as another takes to get it.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        commit(run, manifest)

def check_after_commit(lease):
    if threading.current_thread().name == "lease":
        time.sleep(1)
    with committing:
        check_lost(lease)

Lease.check_lost = check_after_commit
"""
"""A process that stops after it made sure that it holds the run, and before the commit: no check can help there.

When it wakes, its main thread or that of its lease might notice first, and end it before it could do harm: here they
are the slower ones.
"""


def words(bucket: Path, epochs: int) -> list[str]:
    return ["train", "--dataset", "tiles", "--bucket", str(bucket), "--epochs", str(epochs), *settings()]


@pytest.mark.slow
def test_a_sleeping_holder_is_replaced(tiles, tmp_path):
    bucket, freeze = shutil.copytree(tiles, tmp_path / "bucket"), tmp_path / "freeze"
    run, hooks = open_store(str(bucket)).sub("runs/tiles"), hooked(tmp_path / "hooks", job__runs__writer=FREEZE)
    sleeper = subprocess.Popen(
        [DDPM, *words(bucket, 10_000), "--set", "checkpoint.every_minutes=0.01"],
        env=environment(PYTHONPATH=hooks, FREEZE=str(freeze)),
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: list_checkpoints(run) or sleeper.poll() is not None, 120)
    (rank,) = children(sleeper.pid)

    # With --wait: it has the run when its holder fell silent.
    freeze.touch()
    eventually(lambda: psutil.Process(rank).status() == psutil.STATUS_STOPPED)
    silent = time.monotonic()
    epochs = max(list_checkpoints(run)).images_seen // 299 + 2
    waited = ddpm(*words(bucket, epochs), "--wait", 300)
    assert waited.returncode == 0, waited.stderr
    assert time.monotonic() - silent >= EXPIRE_SECONDS
    assert re.search(rf"took .*runs/tiles over: process {rank} .* was silent for 2\d s", waited.stderr)
    status, newest = read_status(run), max(list_checkpoints(run))
    assert (status.state, status.fence, newest.fence) == ("finished", 2, 2)

    # Woken in the middle of its commit, it writes the manifest it was about to write, and nothing more.
    before = {entry.key: run.read(entry.key).data for entry in run.list()}
    freeze.unlink()
    os.kill(rank, signal.SIGCONT)
    _, err = sleeper.communicate(timeout=60)
    assert sleeper.returncode == 76, err
    assert "Traceback" not in err
    assert re.search(r"ddpm: .*runs/tiles was taken over by process \d+ .* \(fence 2\)", err)
    after = {entry.key: run.read(entry.key).data for entry in run.list()}
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    (late,) = changed - {"LATEST"}
    assert re.fullmatch(r"checkpoints/000001-\d{12}/MANIFEST.json", late)

    # Nobody takes what it wrote for the state of the run.
    assert max(list_checkpoints(run)) == newest
    assert "is finished already" in succeeded(ddpm(*words(bucket, epochs)))
    succeeded(ddpm(*words(bucket, epochs + 1)))
    assert max(list_checkpoints(run)).fence == 3
    assert max(list_checkpoints(run)).images_seen > newest.images_seen
