"""The group of a job's processes: one for each GPU of this machine, and of the other nodes if the job has several.

The environment of each node describes the group; a single machine needs no description. This module imports no torch:
a process of its own reports torch's GPUs.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddpm.device import is_cpu_asked_for
from job.exits import BadRequestError, Exit, JobError, MissingInputError
from job.platform import usable_cores
from job.stop import count_of

MEETING_SECONDS = 600.0
"""The limit of waiting for another process, at the beginning and in each step: a process that is gone must end the
others in minutes, not in the hours that are the default of backends. The limit of a wait for the bucket is added."""

JOB = "DDPM_JOB"
"""The variable that holds the job's name; its engine sets it."""
GPUS = "DDPM_GPUS"
"""The variable that holds the number of GPUs that the job has on each machine; its engine sets it."""
DRIVERS = Path("/proc/driver/nvidia"), Path("/dev/kfd"), Path("/dev/dxg")
"""The traces of NVIDIA's driver, AMD's, and that of a GPU in WSL."""

PLACES = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(MPI_LOCALR|PMI_R)ANK.*|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+")
"""The variables in which this launcher and others describe a process's place in a group."""
_LISTENING_PORTS = range(10_000, 32_768)
"""Below the ports of outgoing connections, one of which could be taken before a rank listens."""


def rendezvous_seconds() -> float:
    """Returns the time after which a process counts the others as lost."""
    # Every command imports this module.
    from job.store.retry import away_limit_seconds

    return MEETING_SECONDS + away_limit_seconds()


@dataclass(frozen=True)
class Group:
    """The processes of a job, as one node sees them.

    Attributes:
        processes: on this node, and as many on each other one.
        nodes: of the job.
        node: this one's number, from 0.
        address: host name or address of node 0, which every other node must reach.
        port: of node 0.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of(cls, processes: int, environment: Mapping[str, str] = os.environ) -> Group:
        """Returns the group of `processes` on each of the nodes that the environment describes.

        Raises:
            BadRequestError: a variable is missing or contradicts another; the message names it.
        """
        try:
            nodes = int(environment.get("NNODES", "1"))
            if nodes == 1:
                return cls(processes, port=_free_port() if processes > 1 else 0)
            node, port = int(environment["NODE_RANK"]), int(environment["MASTER_PORT"])
            if not (0 <= node < nodes and 0 < port < 65_536):
                raise ValueError(f"NODE_RANK={node}, NNODES={nodes}, MASTER_PORT={port}")
            return cls(processes, nodes, node, environment["MASTER_ADDR"], port)
        except (KeyError, ValueError) as error:
            raise BadRequestError(
                f"invalid group ({error}): with NNODES, set NODE_RANK, and the first node's MASTER_ADDR and MASTER_PORT"
            ) from None

    @property
    def world_size(self) -> int:
        """Returns the number of processes on all nodes."""
        return self.nodes * self.processes

    def environment(self, number: int) -> dict[str, str]:
        """Returns the variables of this node's process `number`; a single process gets none about the group."""
        threads = max(1, usable_cores() // self.processes)
        variables = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that spin while they wait for each other would slow each other down on shared cores.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        }
        if self.world_size == 1:
            return variables
        return variables | {
            "RANK": str(self.node * self.processes + number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def _free_port() -> int:
    while True:
        port = random.choice(_LISTENING_PORTS)  # noqa: S311
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


def default_processes() -> int:
    """Returns one process per GPU that torch sees; one without GPUs, or if the CPU is asked for."""
    return 1 if is_cpu_asked_for() else max(1, _cuda()[1])


def gpu_gib() -> float:
    """Returns the memory in GiB of the smallest GPU that torch sees; 0 without one, or if the CPU is asked for."""
    return 0.0 if is_cpu_asked_for() else _cuda()[2]


def local_gpus() -> int:
    """Returns the number of NVIDIA GPUs of this machine, whether they may be used or not."""
    return sum(path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*"))


def has_driver() -> bool:
    """Returns whether the machine has the driver of a GPU that PyTorch calls `cuda`."""
    return any(driver.exists() for driver in DRIVERS)


def check_gpus() -> None:
    """Checks that torch sees the job's GPUs: on a CPU the job would take weeks, at a GPU's price.

    Raises:
        MissingInputError: this machine lacks the driver, or this PyTorch lacks CUDA.
        JobError: it sees fewer (71), such as on a machine whose GPU failed; another machine may have them all.
    """
    if not (given := count_of(GPUS, 0)):
        return
    cuda, seen, _ = _cuda()
    counts = f"this job was given {given} GPU{'s' * (given != 1)}, and PyTorch sees {seen}"
    if not has_driver():
        raise MissingInputError(f"{counts}: this machine lacks the NVIDIA driver")
    if not cuda:
        how = "`make image TORCH=cuda`, or `make clean setup TORCH=cuda` without an image, installs the other"
        raise MissingInputError(f"{counts}: this is a PyTorch for CPUs; {how}")
    if seen < given:
        why = f"a GPU failed, or the driver is too old for CUDA {cuda}: run `nvidia-smi` there"
        raise JobError(f"{counts}: {why}", Exit.HUNG)


@cache
def _cuda() -> tuple[str, int, float]:
    """Returns torch's version of CUDA or ROCm, the number of its GPUs, and the smallest one's GiB; ("", 0, 0) without.

    A process of its own imports torch, which takes seconds and memory of the GPUs; if it fails, ("unknown", 0, 0).
    """
    if not has_driver():
        return "", 0, 0.0
    ask = (
        "import torch; gpus = range(torch.cuda.device_count()); print(torch.version.cuda or torch.version.hip or '', "
        "len(gpus), min((torch.cuda.get_device_properties(i).total_memory / 2**30 for i in gpus), default=0), sep=',')"
    )
    asked = subprocess.run([sys.executable, "-P", "-c", ask], stdout=subprocess.PIPE, text=True, check=False)
    answer = re.fullmatch(r"(.*),(\d+),([\d.]+)", asked.stdout.strip().rpartition("\n")[2])
    return (answer[1], int(answer[2]), float(answer[3])) if asked.returncode == 0 and answer else ("unknown", 0, 0.0)
