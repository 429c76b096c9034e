"""A launcher in a process of its own, whose ranks run a few lines of Python; stops; and leases of others."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from job.coordination import lease as lease_module
from job.coordination.lease import LEASE_KEY, Lease, ProcessIdentity
from job.stop import NEVER, SPOT_GRACE_SECONDS, Stop
from job.store import Store

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


@contextmanager
def lasting(at_least: float = 0, at_most: float = math.inf) -> Iterator[None]:
    """Checks how many seconds its block takes."""
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began < at_most


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


class StopWhen(Stop):
    """Stops as soon as `condition` is true, which is looked at whenever somebody asks."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        super().__init__(SPOT_GRACE_SECONDS)
        self._condition = condition

    def __call__(self) -> bool:
        if not self.reason and self._condition():
            self.request("a test")
        return super().__call__()


def stop_after(times: int) -> Stop:
    """Stops when somebody has asked so often in vain."""
    asked = count()
    return StopWhen(lambda: next(asked) >= times)


QUICK = {"RENEW_SECONDS": 0.1, "AGAIN_SECONDS": 0.05, "WATCH_SECONDS": 0.05}
"""The expiry stays as it is, so that a machine that is busy elsewhere makes no holder look dead."""
Notes = list[str]


def taken(run: Store, floor: int = 0, wait_seconds: float = 0, notes: Notes | None = None) -> Lease:
    return Lease.take(run, floor, wait_seconds, NEVER, (notes if notes is not None else []).append)


def record_in(run: Store) -> dict[str, Any]:
    return json.loads(run.read(LEASE_KEY).data)


def by_somebody_elsewhere(run: Store, fence: int = 4, since: str = "2031-01-01T00:00:00Z") -> bytes:
    """The lease of a holder on another machine, of whom nothing more is heard."""
    elsewhere = ProcessIdentity.of_this_process().model_copy(
        update={"host": "far-away", "pid": 77, "boot_id": "00000000-0000-4000-8000-000000000000"}
    )
    record = lease_module.LeaseRecord(
        fence=fence, holder=f"holder-{since}", renewal=9, released=False, since=since, process=elsewhere
    )
    run.put(LEASE_KEY, record.to_json())
    return record.to_json()
