"""One process per GPU: starts the ranks, forwards signals to them, and translates how they ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from job.exits import Exit

LAUNCHED = "DDPM_LAUNCHED"
"""Set for ranks whose parent is this launcher, which speaks for them."""
GRACE_SECONDS = 30.0
"""How long other ranks may take to end after the first one did."""


def under_launcher() -> bool:
    """Whether this process is already one rank of several, started by us, torchrun or accelerate."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_processes() -> int:
    """One per visible GPU, or one; without importing torch where there is no NVIDIA driver."""
    if not Path("/proc/driver/nvidia").exists():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `python -m job ARGUMENTS` as `processes` ranks on this machine and returns the exit code of the whole.

    That is 0 if all ranks ended with 0, else the code of the rank that failed first: accelerate and torchrun flatten
    every code to 1, which no retry policy can use.
    """
    port = _free_port()
    ranks = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            LAUNCHED: "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        # -P: a job.py in the working folder must not stand in for the program.
        ranks.append(subprocess.Popen([sys.executable, "-P", "-m", "job", *arguments], env=environment))

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    first_failure: int | None = None
    deadline = float("inf")
    while None in (codes := [process.poll() for process in ranks]):
        failures = [code for code in codes if code]
        if failures and first_failure is None:
            first_failure = failures[0]
            deadline = time.monotonic() + GRACE_SECONDS
            if first_failure != Exit.STOPPED:
                _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.05)
    code = next((code for code in [first_failure, *codes] if code), 0)
    return 128 - code if code < 0 else code


def _signal_all(ranks: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
