"""A Slurm of two nodes on this machine: the real controller, node daemons and munge, with files of its own.

Once for all tests of this folder, with a bucket with images that its nodes see.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.containers.runs import training
from tests.job.command_line import ddpm_here, succeeded
from tests.servers import free_port

NASTY = "a b'\"$(touch pwned);%j"
"""A folder whose name no shell may read."""
NODES = ("n0", "n1")
PATIENCE_SECONDS = 400


class Cluster:
    """The cluster, and the hand of its administrator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.variables = folder, {"SLURM_CONF": f"{folder}/slurm.conf"}
        for name in ("state", "spool-n0", "spool-n1"):
            (folder / name).mkdir()
        ports = {name: free_port() for name in ("port", *NODES)}
        host = socket.gethostname().partition(".")[0]
        text = Path(__file__).with_name("slurm.conf").read_text()
        (folder / "slurm.conf").write_text(text.format(host=host, folder=folder, **ports))
        # Slurm counts the files; that they are no GPUs, only a program would notice.
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName=n0 Name=gpu Type=a100 File={folder}/gpu[0-1]\n")

    def run(self, *words: object) -> str:
        """What a command of Slurm prints."""
        environment = {**os.environ, **self.variables}
        done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *nodes: str) -> None:
        """Starts the daemons of nodes, and waits until the cluster takes jobs."""
        for node in nodes:
            self.run("slurmd", "-N", node)
        until(lambda: self.run("sinfo", "-hN", "-p", "low", "-o", "%T").split() == ["idle"] * 2)

    def end(self) -> None:
        """Ends all jobs, then the daemons."""
        self.run("scancel", "--me")
        until(lambda: not self.run("squeue", "-h", "-o", "%i"), said=lambda: self.run("squeue"))
        for name in (*NODES, "controller"):
            with suppress(OSError):
                os.kill(self.pid(name), signal.SIGTERM)

    def pid(self, daemon: str) -> int:
        """The process of a node's daemon, or that of the controller."""
        return int((self.folder / f"{daemon}.pid").read_text())

    def preempt(self) -> None:
        """Has a job of more weight take both nodes for a second."""
        self.run("sbatch", "-p", "high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")

    def state(self, job: str) -> str:
        """Slurm's word for the newest job of a name."""
        rows = self.run("squeue", "-h", "--states=all", f"--name={job}", "-o", "%i %T").splitlines()
        return max(((int(re.split("[_ ]", row)[0]), row.split()[1]) for row in rows), default=(0, ""))[1]

    def wait_for(self, job: str, state: str) -> None:
        """Waits until a job is in a state."""
        until(lambda: self.state(job) == state, lambda: f"{job} is {self.state(job)}, not {state}")

    def wait_for_requeue(self, job: str, times: int = 1) -> None:
        """Waits until a job is in the queue again."""

        def rows() -> list[str]:
            return self.run("squeue", "-h", f"--name={job}", "-O", "State:|,RestartCnt:|").split()

        until(lambda: rows() == [f"PENDING|{times}|"], lambda: f"{job} is {rows()}")

    def number(self, job: str) -> str:
        """The number of a job that is not over."""
        (number,) = self.run("squeue", "-h", f"--name={job}", "-o", "%A").split()
        return number

    def begin_now(self, job: str) -> None:
        """Spares a requeued job the two minutes for which Slurm holds it back."""
        # Two minutes later nothing of the old attempt would be left, whose end would count for the new one.
        number = self.number(job)

        def is_over() -> bool:
            lines = (" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"]))
            return not any(line.startswith(f"slurmstepd: [{number}.") for line in lines)

        until(is_over)
        time.sleep(1)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")


def until(is_so: Callable[[], object], said: Callable[[], str] = str) -> None:
    """Waits until something is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    # Munge, by which Slurm knows its users, unless it runs.
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        owned = ["/etc/munge", "/run/munge", "/var/log/munge", "/var/lib/munge"]
        subprocess.run(["chown", "-R", "munge:munge", *owned], check=True)
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.variables.items():
            patch.setenv(name, value)
        cluster.run("slurmctld")
        try:
            cluster.start(*NODES)
            yield cluster
        finally:
            cluster.end()


@pytest.fixture(scope="session")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder, and all its targets on the cluster; the bucket in it has the embedded images at 16 pixels."""
    folder = tmp_path_factory.mktemp("work")
    usual = {
        "backend": "slurm",
        "folder": f"{folder}/{NASTY}/output",
        "venv": str(Path(sys.executable).parents[1]),
        "bucket": f"{folder}/{NASTY}/bucket",
        "scratch": f"{folder}/cache-$SLURM_JOB_PARTITION",
        "gpus": 0,
        "cpus": 1,
        "env": {"OMP_NUM_THREADS": "1"},
    }
    others = {
        "low": {"partition": "low"},
        "first": {"partition": "first"},
        "brief": {"max_hours": 0.017},
        "too-long": {"partition": "short"},
        "too-many": {"gpus": 3, "gpu_type": "a100"},
        "no-driver": {"gpus": 1, "gpu_type": "a100", "max_hours": 0.1},
        "elsewhere": {"venv": f"{folder}/nothing"},
    }
    (folder / "targets.yaml").write_text(json.dumps({name: usual | more for name, more in others.items()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DDPM_TARGETS", raising=False)
        patch.setenv("DDPM_CACHE", f"{folder}/cache")
        succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", usual["bucket"]))
        yield folder


@pytest.fixture(scope="session")
def bucket(folder: Path) -> str:
    return f"{folder}/{NASTY}/bucket"


@pytest.fixture(scope="session")
def undisturbed(bucket: str) -> str:
    """A run that nothing stopped, on this machine."""
    succeeded(ddpm_here(*training("undisturbed", bucket)))
    return "undisturbed"
