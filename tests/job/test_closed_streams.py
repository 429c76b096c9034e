"""Whoever starts a job may have closed its streams, as daemons do: the codes and the work are the same."""

from __future__ import annotations

import subprocess

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.job.command_line import DDPM, ddpm_here, environment, settings, succeeded


def test_a_run_is_trained(tmp_path):
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", tmp_path))
    words = ("train", "--dataset", "tiles", "--bucket", tmp_path, "--epochs", 1, "--processes", 2, *settings())
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", DDPM, *map(str, words)]
    variables = environment(DDPM_CACHE=str(tmp_path / "cache"))
    assert subprocess.run(command, env=variables, check=False, timeout=120).returncode == Exit.FINISHED
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(tmp_path)).sub("runs/tiles"))] == [312]
