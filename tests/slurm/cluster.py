"""A Slurm of two nodes on this machine: the real controller, node daemons and munge, with files of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.servers import free_port

GRACE_SECONDS = 20
NODES = ("n0", "n1")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={n0} CPUs=2 RealMemory=4000 Gres=gpu:a100:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=first Nodes=n0 State=UP PriorityTier=1
PartitionName=short Nodes=ALL MaxTime=10 State=UP PriorityTier=1
"""


class Cluster:
    """The cluster, and the hand of its administrator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.variables = folder, {"SLURM_CONF": f"{folder}/slurm.conf"}
        for name in ("state", "spool-n0", "spool-n1"):
            (folder / name).mkdir()
        ports = {name: free_port() for name in ("port", *NODES)}
        where = {"host": socket.gethostname().partition(".")[0], "folder": folder, "grace": GRACE_SECONDS}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**where, **ports))
        # Slurm counts the files; that they are no GPUs, only a program would notice.
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName=n0 Name=gpu Type=a100 File={folder}/gpu[0-1]\n")

    def run(self, *words: object) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            [*map(str, words)], env={**os.environ, **self.variables}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        """The cluster, until the end of the block."""
        start_munge()
        self.run("slurmctld")
        for node in NODES:
            self.start(node)
        try:
            until(lambda: self.run("sinfo", "-hN", "-p", "low", "-o", "%T").split() == ["idle"] * 2)
            yield self
        finally:
            self.run("scancel", "--me")
            until(lambda: not self.run("squeue", "-h", "-o", "%i"), said=lambda: self.run("squeue"))
            for pid in (self.folder / f"{name}.pid" for name in (*NODES, "controller")):
                with suppress(OSError):
                    os.kill(int(pid.read_text()), signal.SIGTERM)

    def start(self, node: str) -> None:
        """Starts a node's daemon."""
        self.run("slurmd", "-N", node)

    def forget(self) -> None:
        """Restarts the controller without its memory: jobs that are over are unknown, as they are after minutes."""
        pid = int((self.folder / "controller.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not psutil.pid_exists(pid))
        self.run("slurmctld", "-c")

    def kill(self, node: str) -> None:
        """Kills a node's daemon, but not the jobs on the node."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def state(self, job: str) -> str:
        """Slurm's word for the newest job of a name."""
        rows = self.run("squeue", "-h", "--states=all", f"--name={job}", "-o", "%i %T").splitlines()
        return max(((int(re.split("[_ ]", row)[0]), row.split()[1]) for row in rows), default=(0, ""))[1]

    def wait_for(self, job: str, state: str, seconds: float = 60) -> None:
        """Waits until a job is in a state."""
        until(lambda: self.state(job) == state, seconds, lambda: f"{job} is {self.state(job)}, not {state}")

    def wait_for_requeue(self, job: str, times: int = 1, seconds: float = 60) -> None:
        """Waits until a job is in the queue again."""

        def rows() -> list[str]:
            return self.run("squeue", "-h", f"--name={job}", "-O", "State:|,RestartCnt:|").split()

        until(lambda: rows() == [f"PENDING|{times}|"], seconds, lambda: f"{job} is {rows()}")

    def number(self, job: str) -> str:
        """The number of a job that is not over."""
        (number,) = self.run("squeue", "-h", f"--name={job}", "-o", "%A").split()
        return number

    def begin_now(self, job: str) -> None:
        """Spares a requeued job the two minutes for which Slurm holds it back."""
        number = self.number(job)
        # Two minutes later nothing of the old attempt would be left, whose end would count for the new one.
        old = f"slurmstepd: [{number}."
        until(
            lambda: (
                not any(
                    " ".join(each.info["cmdline"] or ()).startswith(old) for each in psutil.process_iter(["cmdline"])
                )
            )
        )
        time.sleep(1)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")


def start_munge() -> None:
    """Starts munge, by which Slurm knows its users, unless it runs."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    subprocess.run(
        ["chown", "-R", "munge:munge", "/etc/munge", "/run/munge", "/var/log/munge", "/var/lib/munge"], check=True
    )
    subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)


def until(is_so: Callable[[], bool], seconds: float = 60, said: Callable[[], str] = str) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, said()
        time.sleep(0.2)
