"""Which processes make one group: those of this machine, and of the other nodes of the job if it has several.

The environment of each node says it, in torchrun's `PET_` variables or in the plain ones; a single machine needs to be
told nothing.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from job.exits import BadRequestError
from job.store.retry import away_limit_seconds

_NODES = ("PET_NNODES", "NNODES")
_NODE = ("PET_NODE_RANK", "NODE_RANK", "JOB_COMPLETION_INDEX")
_ADDRESS = ("PET_MASTER_ADDR", "MASTER_ADDR")
_PORT = ("PET_MASTER_PORT", "MASTER_PORT")
PORT = 29500
"""Of the first node, where nothing else is said; PyTorch's own default."""
MAX_NODES = 1024
MEETING_SECONDS = 600.0
"""How long processes wait for each other, at the beginning and in each step: one that is gone must end the others in
minutes, not in the hours that backends default to. One that waits for the bucket is not: its patience comes on top."""

_INTERFACE = "GLOO_SOCKET_IFNAME"
_LOOPBACK = "127."
_ELSEWHERE = "192.0.2.1"
"""An address of documentation (RFC 5737), to which only the default route leads."""
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
        nodes = _number(environment, _NODES, range(1, MAX_NODES + 1), default=1)
        if nodes == 1:
            return cls(processes, port=_free_port() if processes > 1 else 0)
        name, address = _first(environment, _ADDRESS)
        if not address:
            raise BadRequestError(f"{name} is not set: it names node 0, which {nodes} nodes meet at")
        node, port = _number(environment, _NODE, range(nodes)), _number(environment, _PORT, range(1, 65536), PORT)
        return cls(processes, nodes, node, address, port)

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes

    @property
    def first_rank(self) -> int:
        """Rank of this node's first process."""
        return self.node * self.processes

    def environment(self, number: int) -> dict[str, str]:
        """Variables of this node's process `number`; none for a process that is alone, which needs no group."""
        if self.world_size == 1:
            return {}
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "RANK": str(self.first_rank + number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            **self._interface(),
        }

    def _interface(self) -> dict[str, str]:
        """Gloo listens where the host's name leads, which many a machine has as 127.0.1.1 in its /etc/hosts."""
        if self.nodes == 1 or _INTERFACE in os.environ:
            return {}
        name = interface_to(self.address)
        return {_INTERFACE: name} if name else {}


def interface_to(address: str) -> str:
    """The network interface by which this machine reaches a host name or IPv4 address; empty if nobody can tell."""
    import psutil

    with suppress(OSError):
        own = _own_address(address)
        if own.startswith(_LOOPBACK) and not (address == "localhost" or address.startswith(_LOOPBACK)):
            # This machine's own name in its /etc/hosts; the other nodes know it otherwise.
            own = _own_address(_ELSEWHERE)
        for name, addresses in psutil.net_if_addrs().items():
            if own in [there.address for there in addresses]:
                return name
    return ""


def _own_address(address: str) -> str:
    """This machine's address on the way to `address`. Nothing is sent: this only chooses a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    for name in names:
        if text := environment.get(name, ""):
            return name, text
    return " or ".join(names), ""


def _number(environment: Mapping[str, str], names: tuple[str, ...], allowed: range, default: int | None = None) -> int:
    name, text = _first(environment, names)
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and int(text) in allowed):
        said = f"{name}={text!r}" if text else f"{name} is not set"
        raise BadRequestError(f"{said}: give a number from {allowed[0]} to {allowed[-1]}")
    return int(text)


def _free_port() -> int:
    for port in [*random.sample(_LISTENING_PORTS, 50), 0]:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return int(listener.getsockname()[1])
    raise OSError("no port is free for the processes of this machine to meet at")
