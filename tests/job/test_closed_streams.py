"""Whoever starts a job may have closed its streams, as daemons do: the codes and the work are the same."""

from __future__ import annotations

import subprocess

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.job.command_line import DDPM, ddpm_here, environment, settings, succeeded

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def closed(streams: str, *words: object, **variables: str) -> int:
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", DDPM, *map(str, words)]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, check=False, timeout=120
    ).returncode


def test_the_code_is_the_same(tmp_path):
    for streams in CLOSED:
        assert closed(streams, "runs", "list", "--bucket", tmp_path / "none") == Exit.MISSING_INPUT, streams


def test_a_run_is_trained(tmp_path):
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", tmp_path))
    words = ("train", "--dataset", "tiles", "--bucket", tmp_path, "--epochs", 1, "--processes", 2, *settings())
    assert closed(CLOSED[-1], *words, DDPM_CACHE=str(tmp_path / "cache")) == Exit.FINISHED
    assert [ref.images_seen for ref in list_checkpoints(open_store(str(tmp_path)).sub("runs/tiles"))] == [312]
