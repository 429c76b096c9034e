"""Real processes: the launcher is run as a program that starts small rank scripts under the name of `python -m job`."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest


def start(tmp_path, rank_code, processes=2):
    """Runs `launch` in a child whose ranks execute `rank_code` instead of the command line."""
    package = tmp_path / "job"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(textwrap.dedent(rank_code))
    code = f"""
import os, sys
from job.launcher import launch
os.environ["PYTHONPATH"] = {str(tmp_path)!r}
sys.exit(launch(["x"], {processes}))
"""
    return subprocess.Popen([sys.executable, "-P", "-c", code], cwd=tmp_path)


def test_ranks_know_their_place(tmp_path):
    child = start(
        tmp_path,
        """
        import os, pathlib
        pathlib.Path(os.environ["RANK"]).write_text(
            " ".join(os.environ[k] for k in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")))
        """,
        3,
    )
    assert child.wait(30) == 0
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} 3 3 127.0.0.1"


@pytest.mark.parametrize(("code", "seen"), [("sys.exit(70)", 70), ("os.kill(os.getpid(), 9)", 137), ("1/0", 1)])
def test_the_first_failure_is_the_exit_code_and_ends_the_others(tmp_path, code, seen):
    child = start(
        tmp_path,
        f"""
        import os, sys, time
        if os.environ["RANK"] == "1":
            {code}
        time.sleep(60)
        """,
    )
    started = time.monotonic()
    assert child.wait(30) == seen
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank(tmp_path, number):
    child = start(
        tmp_path,
        """
        import os, pathlib, signal, sys, time
        def stop(number, frame):
            pathlib.Path(os.environ["RANK"] + ".stopped").touch()
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
        pathlib.Path(os.environ["RANK"] + ".ready").touch()
        time.sleep(60)
        """,
    )
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"{rank}.ready").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, number)
    assert child.wait(20) == 75
    assert all((tmp_path / f"{rank}.stopped").exists() for rank in range(2))
