"""A launcher in a process of its own, whose ranks run a few lines of Python instead of the command line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_PROLOGUE = """
from job.processes.launcher import attach
attach()
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from job.stop import beat
rank = int(os.environ.get("RANK", 0))
def ready():
    Path(f"{rank}.pid").write_text(str(os.getpid()))
    Path(f"{rank}.pid").rename(f"{rank}.ready")
def all_ready():
    while not all(Path(f"{other}.ready").exists() for other in range(int(os.environ.get("WORLD_SIZE", 1)))):
        time.sleep(0.01)
def work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        beat()
        time.sleep(0.02)
"""
_LAUNCHER = """
import sys
from job.processes import launcher
launcher.GRACE_SECONDS = 2.0
sys.exit(launcher.launch([sys.executable, "-P", "rank.py"], {processes}, {hang_after_seconds}))
"""


def start(
    folder: Path,
    rank_code: str,
    processes: int = 2,
    hang_after_seconds: float = 600,
    before: tuple[str, ...] = (),
    **options: Any,
) -> subprocess.Popen[str]:
    """Launches ranks in `folder` that execute `rank_code`; the grace for stragglers is two seconds."""
    (folder / "rank.py").write_text(_PROLOGUE + textwrap.dedent(rank_code))
    program = _LAUNCHER.format(processes=processes, hang_after_seconds=hang_after_seconds)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([*before, sys.executable, "-P", "-c", program], cwd=folder, **streams)


def ended(child: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str, str]:
    """The exit code of a launcher, and what it printed."""
    out, err = child.communicate(timeout=seconds)
    return child.returncode, out, err


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits until `condition()` is true, and returns what it said."""
    deadline = time.monotonic() + seconds
    while not (said := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return said


def ready_pids(folder: Path, processes: int = 2) -> list[int]:
    """Process ids of the ranks, once each has called `ready`."""
    paths = [folder / f"{rank}.ready" for rank in range(processes)]
    eventually(lambda: all(path.exists() for path in paths))
    return [int(path.read_text()) for path in paths]


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, dead ones that nobody has reaped included."""
    return [child.pid for child in psutil.process_iter(["ppid"]) if child.info["ppid"] == pid]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; what is left of it may wait for its parent."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
