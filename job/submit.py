"""`ddpm submit`: the same command, as a job on a target. `local` is a child process on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from job.exits import BadRequestError

TARGETS = ("local",)
LOG = Path("ddpm-job.log")


def submit(verb: str, arguments: Sequence[str], on: str, detach: bool) -> None:
    """Starts `ddpm VERB ARGUMENTS` on a target; in the foreground this ends as the job does.

    Raises:
        BadRequestError: there is no such target.
    """
    if on not in TARGETS:
        raise BadRequestError(f"there is no target {on!r} (there are: {', '.join(TARGETS)})")
    command = [sys.executable, "-m", "job", verb, *arguments]
    if detach:
        with LOG.open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        print(f"process {child.pid} does it in the background and writes {LOG.absolute()}; `kill {child.pid}` stops it")
        return
    child = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = child.wait()
    raise SystemExit(128 - code if code < 0 else code)
