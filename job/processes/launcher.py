"""The parent of all ranks, and PID 1 in a container: starts them, passes signals on, and tells how they ended.

Container engines signal process 1 alone; the kernel gives it every orphan, and of the signals those that it handles. So
this process handles them, passes them on, and reaps. It imports no torch. If it is killed, the kernel kills the ranks
(see `job.processes.launched`).

torchrun and accelerate can start the ranks as well. Training and stopping are the same then, but these two end with 1
for whatever code a rank ended with, kill what has not saved within 30 s of a signal, and notice no process that hangs.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NoReturn

from job.exits import TABLE, Exit, JobError, MissingInputError
from job.processes.group import Group
from job.processes.heartbeat import Heartbeats
from job.processes.launched import LAUNCHED, LOST_PEER
from job.processes.relay import STDERR, Relay
from job.stop import HEARTBEATS, handle_stop_signals, ignore_stop_signals

GPUS = "DDPM_GPUS"
"""How many GPUs of each machine the job was given; whoever starts it there says so."""
DRIVER = Path("/proc/driver/nvidia")
HANG_SECONDS = 600.0
"""After so long without a heartbeat a rank counts as hung, unless another limit is given."""
GRACE_SECONDS = 30.0
"""How long other ranks may take to end after one of them failed."""
CAUSE_SECONDS = 3.0
"""How long a rank that lost a peer is earlier to end than the peer: the dead one's memory is freed meanwhile."""
DUMP_SECONDS = 1.0
ABANDON_SECONDS = 10.0
"""A killed process that waits for a dead disk or driver does not end; this one does, which ends the container."""

_PR_SET_CHILD_SUBREAPER = 36
_STOPPED = "stopped"
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk or a driver", "T": _STOPPED}


def leave_at_signals() -> None:
    """Makes a signal end this process before it has launched anything: as PID 1 it would not even notice it."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(STDERR, _before_it_began(number).encode() + b"\n")
        # There is nothing to save, and an exception may be lost in a callback or in a thread's end.
        os._exit(int(Exit.STOPPED))

    handle_stop_signals(leave)


def default_processes() -> int:
    """One per GPU that torch sees, or one."""
    return max(1, _cuda()[1])


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

    ("unknown", 0) if torch cannot be asked.

    A process of its own asks torch, which would take its time and the GPUs' memory here.
    """
    if not DRIVER.exists():
        return "", 0
    ask = "import torch; print(torch.version.cuda or '', torch.cuda.device_count(), sep=',')"
    asked = subprocess.run([sys.executable, "-P", "-c", ask], stdout=subprocess.PIPE, text=True, check=False)
    cuda, _, count = asked.stdout.strip().rpartition("\n")[2].partition(",")
    return (cuda, int(count)) if asked.returncode == 0 and count.isdecimal() else ("unknown", 0)


def launch(command: Sequence[str], processes: int, hang_after_seconds: float = HANG_SECONDS) -> int:
    """Runs `command` as `processes` ranks on this machine, in the main thread, and returns the exit code of them all.

    That is the code of the rank that failed first, 128 + n if signal n killed it. A rank that failed because another
    one was gone is not the first, and one that stopped with its state saved does not outweigh one that failed. A single
    rank learns of no group, for which Accelerate would make a process group of one. Where the environment tells of
    several nodes (see `job.processes.group`), these are the ranks of this one.

    Args:
        command: the words that start a rank; it calls `job.processes.launched.attach` first thing.
        processes: how many; with one it has this process's input, output and terminal to itself.
        hang_after_seconds: a rank without a heartbeat for so long ends all with code 71; 0 means never.

    Raises:
        BadRequestError: the environment tells of nodes in a way that makes no sense.
    """
    return _Job(command, Group.of(processes), hang_after_seconds).run()


class _End(Enum):
    FINISHED = auto()
    STOPPED = auto()
    NEVER_BEGAN = auto()
    """A signal that was to stop the job came before the rank could take it."""
    LOST_PEER = auto()
    KILLED_BY_US = auto()
    FAILED = auto()


@dataclass
class _Rank:
    number: int
    """In the whole group."""
    local: int
    """Among those of this node."""
    process: subprocess.Popen[bytes]
    code: int = 0
    end: _End | None = None


@dataclass(frozen=True)
class _Hung:
    rank: int
    silent_seconds: float
    state: str


class _Job:
    def __init__(self, command: Sequence[str], group: Group, hang_after_seconds: float) -> None:
        self._command, self._group, self._hang_after_seconds = command, group, hang_after_seconds
        self._heartbeats, self._relay = Heartbeats(group.processes), Relay(is_alone=group.world_size == 1)
        self._ranks: list[_Rank] = []
        self._ended: list[_Rank] = []
        self._signals: deque[int] = deque()
        self._stop_signals: set[int] = set()
        self._failed_at = self._killed_at = float("inf")
        self._told_to_end = False
        self._hung: _Hung | None = None

    def run(self) -> int:
        waking, woken = socket.socketpair()
        with waking, woken:
            waking.setblocking(False)
            woken.setblocking(False)
            signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
            handle_stop_signals(lambda number, frame: self._signals.append(number))
            # What a rank leaves behind comes to this process, which must reap it, also where it is not PID 1.
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                self._start()
                while self._living() and time.monotonic() < self._killed_at + ABANDON_SECONDS:
                    select.select([woken], [], [], min(1.0, self._hang_after_seconds / 4 or 1.0))
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                    self._forward()
                    self._reap()
                    self._end_the_others()
                    self._find_hung()
            finally:
                self._kill()
                signal.set_wakeup_fd(-1)
        ignore_stop_signals()
        self._relay.close()
        self._report()
        self._relay.flush()
        return self._exit_code()

    def _start(self) -> None:
        group = self._group
        # The parent-death signal comes when the thread that forked ends: this one must be the main thread.
        for number in range(group.processes):
            environment = {
                **os.environ,
                LAUNCHED: str(os.getpid()),
                HEARTBEATS: self._heartbeats.place(number),
                **group.environment(number),
            }
            # Rank 0 draws its progress on a terminal itself; what else a rank prints comes by way of the relay, which
            # whoever reads it cannot hold up.
            is_relayed = number > 0 or not os.isatty(STDERR)
            process = subprocess.Popen(
                self._command,
                env=environment,
                pass_fds=[self._heartbeats.descriptor],
                stdout=subprocess.PIPE if number else None,
                stderr=subprocess.STDOUT if number else subprocess.PIPE if is_relayed else None,
            )
            rank = _Rank(group.first_rank + number, number, process)
            self._ranks.append(rank)
            if (pipe := process.stdout or process.stderr) is not None:
                self._relay.follow(rank.number, os.dup(pipe.fileno()), speaks=number == 0)
                pipe.close()
        self._relay.start()

    def _living(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.end is None]

    def _forward(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            self._stop_signals.add(number)
            self._send(number)

    def _send(self, number: int) -> None:
        # Nobody else reaps: the process id of a rank that is not in `_ended` is its own, even if it is dead by now.
        for rank in self._living():
            os.kill(rank.process.pid, number)

    def _reap(self) -> None:
        """Takes the status of every dead child: the ranks' for what they tell, the orphans' to be rid of them."""
        with suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                for rank in self._living():
                    if rank.process.pid == child[0]:
                        rank.code = rank.process.returncode = os.waitstatus_to_exitcode(child[1])
                        rank.end = self._end_of(rank)
                        self._ended.append(rank)

    def _end_of(self, rank: _Rank) -> _End:
        if rank.code == 0:
            return _End.FINISHED
        if rank.code == Exit.STOPPED:
            return _End.STOPPED
        if -rank.code in self._stop_signals:
            return _End.NEVER_BEGAN
        # NCCL's watchdog aborts a process whose peers are gone.
        lines = self._relay.tail(rank.number) if rank.code == -signal.SIGABRT else []
        if rank.code == LOST_PEER or any("ProcessGroupNCCL" in line for line in lines):
            return _End.LOST_PEER
        sent = {-signal.SIGTERM: self._told_to_end, -signal.SIGKILL: self._killed_at < float("inf")}
        return _End.KILLED_BY_US if sent.get(rank.code) else _End.FAILED

    def _end_the_others(self) -> None:
        ends, now = {rank.end for rank in self._ended} - {_End.FINISHED}, time.monotonic()
        if not ends or not self._living():
            return
        if ends != {_End.STOPPED}:
            self._failed_at = min(self._failed_at, now)
        if not self._told_to_end and (ends != {_End.LOST_PEER} or now > self._failed_at + CAUSE_SECONDS):
            self._told_to_end = True
            self._send(signal.SIGTERM)
        if self._killed_at < float("inf"):
            return
        # Without all of its ranks the group never met, so that there is nothing to save, and nothing to wait for.
        if _End.NEVER_BEGAN in ends:
            self._kill()
        elif now > self._failed_at + GRACE_SECONDS:
            self._dump_stacks()
            self._kill()

    def _find_hung(self) -> None:
        silent_seconds = self._heartbeats.look()
        living = self._living()
        is_hung = any(silent_seconds[rank.local] > self._hang_after_seconds for rank in living)
        if not is_hung or not self._hang_after_seconds or self._killed_at < float("inf"):
            return
        states = {rank.number: _state(rank.process.pid) for rank in living}

        def turn(rank: _Rank) -> tuple[bool, float]:
            # One that is stopped may have had the last word, so that the others wait for it.
            return states[rank.number] != _STOPPED, self._heartbeats.last_beat(rank.local)

        # The others soon wait for the first one, and are silent as well.
        first = min(living, key=turn)
        self._hung = _Hung(first.number, silent_seconds[first.local], states[first.number])
        self._dump_stacks()
        self._kill()

    def _dump_stacks(self) -> None:
        for rank in self._living():
            self._relay.say(f"ddpm: stacks of {self._name(rank.number)}:")
            self._relay.flush()
            os.kill(rank.process.pid, signal.SIGUSR1)
            # A stopped process would keep the signal for later.
            os.kill(rank.process.pid, signal.SIGCONT)
            time.sleep(DUMP_SECONDS)

    def _kill(self) -> None:
        self._killed_at = min(self._killed_at, time.monotonic())
        self._send(signal.SIGKILL)

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self._group.world_size}" if self._group.world_size > 1 else "the process"

    def _exit_code(self) -> int:
        if self._hung is not None:
            return int(Exit.HUNG)
        for rank in self._ended:
            if rank.end is _End.FAILED:
                return 128 - rank.code if rank.code < 0 else rank.code
        ends = {rank.end for rank in self._ranks}
        if ends & {_End.STOPPED, _End.NEVER_BEGAN}:
            return int(Exit.STOPPED)
        if ends == {_End.FINISHED}:
            return int(Exit.FINISHED)
        # Somebody waited in vain for a rank that had to be killed, or nobody knows why they parted.
        return int(Exit.HUNG) if ends & {_End.KILLED_BY_US, None} else 1

    def _report(self) -> None:
        if self._hung is not None:
            self._relay.say(
                f"ddpm: {self._name(self._hung.rank)} hung: no sign of life for {self._hung.silent_seconds:.0f} s "
                f"({self._hung.state}); --hang-after sets the limit. The stacks of all processes are above"
            )
            return
        if any(rank.end is _End.NEVER_BEGAN for rank in self._ended):
            self._relay.say(_before_it_began(min(self._stop_signals)))
            return
        causes = [rank for rank in self._ended if rank.end is _End.FAILED]
        if not causes and self._exit_code() not in (Exit.FINISHED, Exit.STOPPED):
            causes = [rank for rank in self._ended if rank.end in (_End.LOST_PEER, _End.KILLED_BY_US)]
        if causes:
            self._report_failure(causes[0])

    def _report_failure(self, first: _Rank) -> None:
        name = self._name(first.number) + (" failed first" if self._group.world_size > 1 else " failed")
        if first.code < 0:
            hint = ", as the kernel does when memory runs out" if first.code == -signal.SIGKILL else ""
            self._tell(f"{name}: killed by {signal.Signals(-first.code).name}{hint}", first)
        elif first.end is _End.LOST_PEER:
            self._tell(f"{name}: it lost the others", first)
        elif first.code not in TABLE:
            if self._group.processes > 1:
                self._tell(f"{name}, with exit code {first.code}", first)
        elif self._ranks[0].code != first.code:
            # What ends all ranks alike, rank 0 has said; one that ends with a code of the table has said why.
            said = [line.removeprefix("ddpm: ") for line in self._relay.tail(first.number) if line.startswith("ddpm: ")]
            self._relay.say(f"ddpm: {name}: {said[-1] if said else TABLE[Exit(first.code)].text}")

    def _tell(self, what: str, rank: _Rank) -> None:
        # Those of a process that is alone stand above, all of them.
        lines = self._relay.tail(rank.number) if self._group.world_size > 1 else []
        self._relay.say("\n    ".join([f"ddpm: {what}{'; its last lines:' if lines else ''}", *lines]))


def _before_it_began(number: int) -> str:
    return f"ddpm: stopped by {signal.Signals(number).name} before it began; the same command begins again"


def _state(pid: int) -> str:
    with suppress(OSError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return _STATES.get(letter, letter)
    return "gone"
