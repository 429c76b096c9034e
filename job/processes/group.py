"""Which processes make one group: one for each GPU of this machine, and of the job's other nodes if it has several.

The environment of each node says it; a single machine needs to be told nothing. No torch is imported here: one in a
process of its own is asked for the GPUs.
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

from job.exits import BadRequestError, Exit, JobError, MissingInputError
from job.stop import count_of
from job.store.retry import away_limit_seconds

MEETING_SECONDS = 600.0
"""How long processes wait for each other, at the beginning and in each step: one that is gone must end the others in
minutes, not in the hours that backends default to. One that waits for the bucket is not: its patience comes on top."""

GPUS = "DDPM_GPUS"
"""How many GPUs of each machine the job was given; whoever starts it there says so."""
DRIVER = Path("/proc/driver/nvidia")
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""`QUOTA PERIOD` in microseconds, in a container (docs.kernel.org/admin-guide/cgroup-v2.html)."""

PLACES = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(MPI_LOCALR|PMI_R)ANK.*|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+")
"""Variables in which launchers, ours and others, tell a process its place in a group."""
_LISTENING_PORTS = range(10_000, 32_768)
"""Below those that the kernel gives to connections: one of these would be taken before a rank listens."""


def rendezvous_seconds() -> float:
    """After so long a process gives up the others for lost."""
    return MEETING_SECONDS + away_limit_seconds()


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one node.

    Attributes:
        processes: on this node, and as many on each other one.
        nodes: of the job.
        node: this one's number, from 0.
        address: host name or address of node 0, which all others must reach.
        port: where node 0 listens.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of(cls, processes: int, environment: Mapping[str, str] = os.environ) -> Group:
        """The group of `processes` on this node and as many on each of the others that the environment tells of.

        Raises:
            BadRequestError: the variables contradict each other, or one is missing; the message names it.
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
                f"{error} makes no group: with NNODES, a node needs NODE_RANK and the first one's MASTER_ADDR and _PORT"
            ) from None

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes

    def environment(self, number: int) -> dict[str, str]:
        """Variables of this node's process `number`; of the group nothing for one that is alone."""
        threads = max(1, usable_cores() // self.processes)
        variables = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that spin for long while they wait for each other are in their own way where others use the cores.
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


def usable_cores() -> int:
    """How many cores this process may use at once: those it is bound to, or what its container is given of them."""
    cores = len(os.sched_getaffinity(0))
    # Without a limit the quota is "max".
    with suppress(OSError, ValueError):
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def _free_port() -> int:
    while True:
        port = random.choice(_LISTENING_PORTS)  # noqa: S311
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


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
    if not (given := count_of(GPUS, 0)):
        return
    cuda, seen = _cuda()
    said = f"this job was given {given} GPU{'s' * (given != 1)}, and PyTorch sees {seen}"
    if not DRIVER.exists():
        raise MissingInputError(f"{said}: there is no NVIDIA driver on this machine")
    if not cuda:
        raise MissingInputError(f"{said}: the image has a PyTorch for CPUs; `make image TORCH=cuda` builds the other")
    if seen < given:
        raise JobError(
            f"{said}: did one fail, or is the driver too old for CUDA {cuda}? `nvidia-smi` there says more", Exit.HUNG
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
