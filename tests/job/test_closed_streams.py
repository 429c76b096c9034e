"""Whoever starts a job may have closed its streams, as daemons do: the codes and the work are the same."""

from __future__ import annotations

import os
import subprocess

import pytest

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.job.command_line import DDPM, environment, settings


@pytest.mark.parametrize("words", ["runs list --json", "runs list", "--help", "config --list"])
def test_a_closed_pipe_is_no_failure(bucket, words):
    """As `head` and pagers are."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [DDPM, *words.split(), *(["--bucket", str(bucket)] if words.startswith("runs") else [])]
    with os.fdopen(writes, "w") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment(PYTHONUNBUFFERED="1"),
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (Exit.FINISHED, b"")


@pytest.mark.slow
def test_a_run_is_trained(bucket, tmp_path):
    """Also in a folder that has a `job` of its own."""
    (tmp_path / "job.py").write_text("raise SystemExit('the wrong job')")
    words = ("submit", "train", "--dataset", "tiles", "--bucket", bucket, "--epochs", 1, *settings(), "--on", "local")
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", DDPM, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), check=False, timeout=120)
    assert done.returncode == Exit.FINISHED
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/tiles"))] == [312]
