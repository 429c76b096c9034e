"""Ranks that have imported everything while the launcher still checks the command: it alone speaks and writes."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from job.coordination.outcome import JOB, read_outcome
from job.stop import STOP_AT
from tests.job.command_line import settings, started
from tests.job.launching import children, ended, eventually, is_gone

NODE_1 = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def is_waiting(pid: int) -> bool:
    """Whether a rank has loaded PyTorch, and now does nothing."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text() and not psutil.Process(pid).cpu_percent(0.2)


@pytest.mark.parametrize(
    ("processes", "more", "node", "code", "said"),
    [
        # A single rank has the launcher's streams.
        (1, ("--set", "x=1"), {}, 78, "ddpm: --set: unknown key 'x'"),
        (2, (), NODE_1, 75, "ddpm: stopped by SIGTERM; the same command begins again\n"),
    ],
)
def test_ranks_wait_for_the_checks(tiles, tmp_path, processes, more, node, code, said):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    before = {path for path in bucket.rglob("*") if path.is_file()}
    words = ("--dataset", "tiles", "--bucket", bucket, "--epochs", 1, "--stop-after", "1h", *settings(), *more)
    child = started("train", *words, "--processes", processes, **{JOB: "train-tiles"}, **node)
    ranks = eventually(lambda: len(found := children(child.pid)) == processes and found)
    # Checks may take long.
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: all(map(is_waiting, ranks)))
    for rank in ranks:
        inherited = psutil.Process(rank).environ()
        assert 3500 < float(inherited[STOP_AT]) - time.clock_gettime(time.CLOCK_BOOTTIME) < 3600
        # A rank is not a job: it would write its own starts and end beside the launcher's.
        assert JOB not in inherited
    if code == 75:
        child.terminate()
    child.send_signal(signal.SIGCONT)

    found, out, _ = ended(child)
    assert (found, out.count("\n")) == (code, 1) and out.startswith(said), out
    assert all(map(is_gone, ranks))
    written = {str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file() and path not in before}
    assert written <= {"jobs/train-tiles/1-of-2.json" if node else "jobs/train-tiles/0-of-1.json"}
    if code == 78:
        outcome = read_outcome("train-tiles", str(bucket))
        assert (outcome.exit_code, len(outcome.starts)) == (code, 1)
