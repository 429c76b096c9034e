"""`ddpm train` on two nodes, which are two launchers of one machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.job.command_line import DDPM, environment, settings


class Nodes:
    """Starts runs about the dataset `tiles` of the bucket in `folder`.

    Attributes:
        bucket: where the runs lie.
    """

    def __init__(self, folder: Path, address: str, port: int, namespaces: tuple[str, ...] = ()) -> None:
        """Node 0 listens at `address`; each node is in its network namespace, if there are any."""
        self.bucket, self._folder = folder / "bucket", folder
        self._address, self._port, self._namespaces = address, port, namespaces

    def alone(self, run: str, epochs: int) -> subprocess.Popen[bytes]:
        """Starts a run of two processes on one node."""
        return self._start(run, epochs, 0, ["--processes", "2"], {})

    def together(self, run: str, epochs: int, *more: str) -> list[subprocess.Popen[bytes]]:
        """Starts a run of two nodes of one process; `more` are further words of the command."""
        variables = {"NNODES": "2", "MASTER_ADDR": self._address, "MASTER_PORT": str(self._port)}
        return [self._start(run, epochs, node, [*more], {**variables, "NODE_RANK": str(node)}) for node in range(2)]

    def said(self, processes: list[subprocess.Popen[bytes]]) -> str:
        """What they wrote, for the message of a failure."""
        return "\n".join((self._folder / f"{node}.log").read_text() for node in range(len(processes)))

    def _start(
        self, run: str, epochs: int, node: int, more: list[str], variables: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        words = ["train", "--dataset", "tiles", "--run", run, "--bucket", str(self.bucket), "--epochs", str(epochs)]
        before = ["ip", "netns", "exec", self._namespaces[node]] if self._namespaces else []
        with (self._folder / f"{node}.log").open("wb") as log:
            return subprocess.Popen(
                [*before, DDPM, *words, *settings(checkpoint__every_epochs="1"), *more],
                env=environment(DDPM_CACHE=str(self._folder / f"cache-{node}"), **variables),
                stdout=log,
                stderr=log,
            )
