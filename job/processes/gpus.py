"""The GPUs of this machine, as the launcher sees them: it imports no torch, and asks one in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from job.exits import Exit, JobError, MissingInputError

GPUS = "DDPM_GPUS"
"""How many GPUs of each machine the job was given; whoever starts it there says so."""
DRIVER = Path("/proc/driver/nvidia")


def default_processes() -> int:
    """One per GPU that torch sees, or one."""
    return max(1, _cuda()[1])


def local_gpus() -> int:
    """How many NVIDIA GPUs this machine has, whether anybody may use them or not."""
    return sum(path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*"))


def check_gpus() -> None:
    """Returns if torch sees the GPUs that the job was given: on a CPU it would go on for weeks, at a GPU's price.

    Raises:
        MissingInputError: this machine has no driver for them, or this PyTorch no CUDA.
        JobError: it sees fewer (71), such as on a machine whose GPU failed: another machine may have them all.
    """
    given = os.environ.get(GPUS, "")
    if not given.isdecimal() or int(given) == 0:
        return
    cuda, seen = _cuda()
    said = f"this job was given {given} GPU{'s' * (given != '1')}, and PyTorch sees {seen}"
    if not DRIVER.exists():
        raise MissingInputError(f"{said}: there is no NVIDIA driver on this machine")
    if not cuda:
        raise MissingInputError(f"{said}: the image has a PyTorch for CPUs; `make image TORCH=cuda` builds the other")
    if seen < int(given):
        raise JobError(
            f"{said}: did one fail, or is the driver too old for CUDA {cuda}? `nvidia-smi` and `ddpm doctor` on that "
            "machine say more",
            Exit.HUNG,
        )


@cache
def _cuda() -> tuple[str, int]:
    """The CUDA that torch was built for, and how many GPUs it sees; ("", 0) where there is no NVIDIA driver.

    ("unknown", 0) if torch cannot be asked. Here it would take its time, and the GPUs' memory.
    """
    if not DRIVER.exists():
        return "", 0
    ask = "import torch; print(torch.version.cuda or '', torch.cuda.device_count(), sep=',')"
    asked = subprocess.run([sys.executable, "-P", "-c", ask], stdout=subprocess.PIPE, text=True, check=False)
    cuda, _, count = asked.stdout.strip().rpartition("\n")[2].partition(",")
    return (cuda, int(count)) if asked.returncode == 0 and count.isdecimal() else ("unknown", 0)
