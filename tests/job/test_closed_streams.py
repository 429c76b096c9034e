"""Whoever starts a job may have closed its streams, as daemons do: the codes and the work are the same."""

from __future__ import annotations

import subprocess

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.job.command_line import DDPM, environment, settings


def test_a_run_is_trained(bucket):
    words = ("train", "--dataset", "tiles", "--bucket", bucket, "--epochs", 1, *settings())
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", DDPM, *map(str, words)]
    assert subprocess.run(command, env=environment(), check=False, timeout=120).returncode == Exit.FINISHED
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/tiles"))] == [312]
