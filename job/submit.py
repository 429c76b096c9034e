"""`ddpm submit`: the same command, as a job on a target. `local` is this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from job.exits import BadRequestError

TARGETS = ("local",)


def submit(verb: str, arguments: Sequence[str], on: str, detach: bool) -> None:
    """Starts `ddpm VERB ARGUMENTS` on a target; in the foreground this process becomes the job.

    Raises:
        BadRequestError: there is no such target.
    """
    if on not in TARGETS:
        raise BadRequestError(f"there is no target {on!r} (there are: {', '.join(TARGETS)})")
    command = [sys.executable, "-P", "-m", "job", verb, *arguments]
    if detach:
        from job.data.cache import default_cache_dir
        from job.store.files import os_errors

        # Not in the working folder, which may be somebody's checkout.
        path = default_cache_dir() / "logs" / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = path.open("wb")
        with log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        print(f"process {child.pid} does it in the background and writes {path}; `kill {child.pid}` stops it")
        return
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606
