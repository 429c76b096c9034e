"""The parent of all ranks, and PID 1 in a container: starts them, passes signals on, and reports how they ended.

Container engines signal process 1 alone. The kernel gives it every orphan, and only the signals that it handles: this
process handles them, passes them on, and reaps. It imports no torch. If it is killed, so are the ranks (see `attach`).

torchrun and accelerate can start the ranks as well. Training and stopping are the same then. But these two end with 1
after every failure, kill a rank that has not saved within 30 s of a signal, and notice no process that hangs.
"""

from __future__ import annotations

import faulthandler
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from job.exits import CRASHED, TABLE, BadRequestError, Exit, State, StoppedError, state_after
from job.platform import end_with_parent
from job.processes.group import JOB, PLACES, Group, has_driver
from job.stop import (
    HEARTBEATS,
    STOP_SIGNALS,
    Heartbeats,
    connect_heartbeat,
    count_of,
    handle_stop_signals,
    ignore_stop_signals,
)

LAUNCHED = "DDPM_LAUNCHED"
"""The variable that holds the launcher's process id, in the ranks it started."""
GATE = "DDPM_GATE"
"""The variable that holds the descriptor of a pipe, from which each rank gets a byte before it works."""

ENDS_WITH = "DDPM_ENDS_WITH"
"""The variable that holds the id of a process with whose end this program stops, as at SIGTERM."""

HANG_SECONDS = 600.0
"""The default time without a heartbeat after which a rank counts as hung."""
GRACE_SECONDS = 30.0
"""The time in which the other ranks must end after one of them failed."""
CAUSE_SECONDS = 3.0
"""The time to wait for the end of a lost peer, which is the cause: the rank that lost it may end earlier."""
DUMP_SECONDS, SIGNAL_SECONDS = 1.0, 0.2

_STDERR = 2
_TAIL_LINES = 20
_LINE_BYTES = 8192
_PIPE_BYTES = 1 << 20
"""More than a pipe holds: one read takes the whole rest of a dead rank's output."""
_BACKEND_NOISE = re.compile(rb"\[rank\d+\]:\[[A-Z]\d|frame #\d+: |terminate called|  what\(\): |Exception raised from ")
"""Lines that torch's C++ side prints at the end of a process group, a screenful per rank."""


_PEER_IS_AWAY = re.compile(
    r"(?i)(closed|reset) by peer|broken pipe|timed out|connection (refused|was likely closed)|ncclRemoteError"
    r"|remote process exited|communicator was aborted"
)

_gate: int | None = None
"""That descriptor, in a process that the launcher started."""


def is_launched() -> bool:
    """Returns whether this program's launcher started this process."""
    return LAUNCHED in os.environ


def is_rank() -> bool:
    """Returns whether this process does the work itself: this launcher, torchrun or accelerate started it.

    Raises:
        BadRequestError: the variables that describe its place in the group are not valid.
    """
    if not (is_launched() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()):
        return False
    for number, among in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number in os.environ:
            count_of(number, 0, most=count_of(among, 1 << 16, least=1) - 1)
    count_of("MASTER_PORT", 1, least=1, most=65_535)
    return True


def attach() -> None:
    """Ties this process to its launcher, or to the program that called it; call it before anything that takes time.

    The rank asks itself to end with the launcher: the launcher's Python code between fork and exec could deadlock on a
    lock that another thread held at the fork. `getppid` shows whether the launcher died before.
    """
    if owner := os.environ.pop(ENDS_WITH, ""):
        end_with_parent(signal.SIGTERM)
        if str(os.getppid()) != owner:
            raise StoppedError("stopped because the program that called it is gone; the same call begins again")
    if not is_launched():
        return
    end_with_parent(signal.SIGKILL)
    if str(os.getppid()) != os.environ[LAUNCHED]:
        raise BadRequestError(f"the launcher of this process is gone: unset {LAUNCHED} to run without one")
    # Until `Stop` handles it, Ctrl-C must end this process without a traceback, as SIGTERM does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connect_heartbeat()
    global _gate
    # Removed, because the number means nothing in processes that this one starts.
    if gate := os.environ.pop(GATE, ""):
        _gate = int(gate)


def await_go() -> None:
    """Waits until the launcher has checked the command; if it refuses the command, it kills this process.

    Raises:
        SystemExit: the launcher was killed. Its end of the pipe may close before the parent-death signal comes.
    """
    if _gate is not None and not os.read(_gate, 1):
        raise SystemExit(CRASHED)


def lost_peer(error: BaseException) -> str:
    """Returns the line in which a distributed backend reports a process that went away; empty for any other error."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return ""
    import torch.distributed as dist

    # Gloo raises plain RuntimeErrors that begin with the name of its source file.
    is_distributed = isinstance(error, dist.DistError) or "gloo" in str(error)
    text = " ".join(str(error).split())
    if not (is_distributed and _PEER_IS_AWAY.search(text)):
        return ""
    return re.sub(r"^\[\S+\] ", "", text).split(". ")[0][:200]


def this_command() -> list[str]:
    """Returns the words that run the command line of this process again."""
    # -P: a job.py in the working folder must not be imported instead of this package.
    return [sys.executable, "-P", "-m", "job", *sys.argv[1:]]


def early_ranks(processes: int | None, hang_after_seconds: float) -> AbstractContextManager[Callable[[], int] | None]:
    """Returns the context `launching` for the ranks of this command line; one that yields None in a rank.

    It also yields None if the number of ranks is that of the GPUs: PyTorch would have to be loaded to count them.
    """
    if is_rank() or (processes is None and has_driver()):
        return nullcontext()
    return launching(this_command(), processes or 1, hang_after_seconds)


def launch(command: Sequence[str], processes: int, hang_after_seconds: float = HANG_SECONDS) -> int:
    """Runs `command` as `processes` ranks on this machine, in the main thread, and returns the exit code of them all.

    That is the code of the rank that failed first, 128 + n if signal n killed it. A rank that failed because another
    one was gone is not the first, and a failure counts before a stop with the state saved. A single rank gets no group,
    because Accelerate would make a process group of one. If the environment describes several nodes (see
    `job.processes.group`), these are the ranks of this one.

    Args:
        command: the words that start a rank; it calls `attach` first thing.
        processes: the number of ranks; a single one has this process's input, output and terminal to itself.
        hang_after_seconds: a rank without a heartbeat for this time ends all with code 71; 0 means never.

    Raises:
        BadRequestError: the environment's description of the nodes contradicts itself.
    """
    with launching(command, processes, hang_after_seconds) as go:
        return go()


@contextmanager
def launching(command: Sequence[str], processes: int, hang_after_seconds: float) -> Iterator[Callable[[], int]]:
    """Starts ranks that import what they need and then wait; yields a function that lets them go on.

    It returns as `launch` does. Without its call the ranks are killed when the context ends, before they did anything:
    a rank waits in `await_go`. So the checks of a command take no time of their own.
    """
    launch = _Launch(Group.of(processes), hang_after_seconds)
    try:
        launch.start(command)
        yield launch.run
    finally:
        launch.end()


class _Rank:
    """A process, and its output if it has no terminal, or the launcher's own stderr, to itself.

    The first rank of this machine speaks for all; lines of others begin with `[rank 1] `. Their errors are kept back
    until the cause is known, and so is the output of a distributed backend that goes down.

    Attributes:
        tail: the last lines, also those that were not shown.
    """

    def __init__(self, number: int, local: int, process: subprocess.Popen[bytes]) -> None:
        """Wraps the process of rank `number` of the whole group, `local` among those of this node."""
        self.number, self.local, self.process = number, local, process
        self.code, self.state = 0, State.RUNNING
        self.pipe = process.stdout or process.stderr
        self._unfinished, self.tail = b"", deque[str](maxlen=_TAIL_LINES)
        if self.pipe:
            os.set_blocking(self.pipe.fileno(), False)

    def show(self, *, is_last: bool = False) -> bool:
        """Shows the new lines, with `is_last` also one without an end; returns whether more may come."""
        data, may_come = b"", True
        with suppress(BlockingIOError):
            may_come = bool(data := os.read(self.pipe.fileno(), _PIPE_BYTES) if self.pipe else b"")
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if self._unfinished and (is_last or not may_come or len(self._unfinished) > _LINE_BYTES):
            lines.append(self._unfinished)
            self._unfinished = b""
        self.tail += [line.decode(errors="replace") for line in lines]
        shown = [line for line in lines if not _BACKEND_NOISE.match(line)]
        if self.local:
            shown = [b"[rank %d] %b" % (self.number, line) for line in shown if not line.startswith(b"ddpm: ")]
        _show(shown)
        return may_come


class _Launch:
    """One run of the ranks of this node, from their start to the last one's end."""

    def __init__(self, group: Group, hang_after_seconds: float) -> None:
        self._group, self._hang_after_seconds = group, hang_after_seconds
        self._heartbeats = Heartbeats(group.processes)
        self._selector = selectors.DefaultSelector()
        self._gate_of_ranks, self._gate = os.pipe()
        self._living: dict[int, _Rank] = {}
        """The ranks that have not ended, by process id."""
        self._ended: list[_Rank] = []
        """The others, in the order of their ends."""
        self._stop_signals: list[int] = []
        self._failed_at = float("inf")
        self._is_ending = self._is_killed = False
        self._hang = ""
        """The message about the rank that hung."""

    def start(self, command: Sequence[str]) -> None:
        """Starts the ranks, which wait at the gate."""
        # A signal between a rank's start and its entry in the list would leave it behind. Ranks inherit the mask, until
        # `attach`: Ctrl-C would end a starting interpreter with a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for number in range(self._group.processes):
                self._start(command, number)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def end(self) -> None:
        """Kills the ranks that are left."""
        self._kill()
        for rank in self._living.values():
            rank.process.wait()
        for descriptor in (self._gate_of_ranks, self._gate):
            os.close(descriptor)

    def run(self) -> int:
        """Opens the gate; returns the exit code, and prints the reason unless the ranks themselves have."""
        waking, woken = socket.socketpair()
        with waking, woken, self._selector:
            waking.setblocking(False)
            # Signals are read like the ranks' output, one after the other, instead of breaking in anywhere.
            signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
            handle_stop_signals(lambda number, frame: None)
            self._selector.register(woken, selectors.EVENT_READ, lambda: self._forward(woken.recv(4096)))
            try:
                os.write(self._gate, bytes(self._group.processes))
                while self._living:
                    self._listen(min(1.0, self._hang_after_seconds / 4 or 1.0))
                    self._reap()
                    self._end_the_others()
                    self._find_hung()
                if any(rank.state is State.FAILED and -rank.code in STOP_SIGNALS for rank in self._ended):
                    self._listen_for(SIGNAL_SECONDS)
            finally:
                signal.set_wakeup_fd(-1)
        ignore_stop_signals()
        code, why = self._verdict()
        if why:
            _say(f"ddpm: {why}")
        return code

    def _start(self, command: Sequence[str], local: int) -> None:
        """Starts a rank; from the main thread, for the parent-death signal comes when the thread that forked ends."""
        in_group = self._group.environment(local)
        heartbeat = f"{self._heartbeats.descriptor}:{local}"
        # The variables of another launcher would describe a group that does not exist. A rank is not a job of its own.
        inherited = {name: value for name, value in os.environ.items() if name != JOB and not PLACES.fullmatch(name)}
        of_launcher = {LAUNCHED: str(os.getpid()), HEARTBEATS: heartbeat, GATE: str(self._gate_of_ranks)}
        # A single rank has the streams to itself; the first of several draws its progress on a terminal itself.
        has_stderr = local == 0 and (self._group.world_size == 1 or os.isatty(_STDERR))
        process = subprocess.Popen(
            command,
            env={**inherited, **in_group, **of_launcher},
            pass_fds=[self._heartbeats.descriptor, self._gate_of_ranks],
            stdout=subprocess.PIPE if local else None,
            stderr=None if has_stderr else subprocess.STDOUT if local else subprocess.PIPE,
        )
        rank = _Rank(int(in_group.get("RANK", 0)), local, process)
        self._living[process.pid] = rank
        if rank.pipe:
            self._selector.register(rank.pipe, selectors.EVENT_READ, rank.show)

    def _listen(self, seconds: float) -> None:
        """Waits for signals and output, and passes them on."""
        for key, _ in self._selector.select(seconds):
            if not key.data():
                self._selector.unregister(key.fileobj)

    def _listen_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._listen(left)

    def _forward(self, signals: bytes) -> bool:
        for number in filter(STOP_SIGNALS.__contains__, signals):
            self._stop_signals.append(number)
            self._send(number)
            # A signal to the whole process group may reach a rank before this process.
            for rank in self._ended:
                if rank.state is State.FAILED and rank.code == -number:
                    rank.state = State.NEVER_BEGAN
        return True

    def _send(self, number: int) -> None:
        # Only this process reaps: until then the process id of a rank is its own, even if it is dead.
        for pid in self._living:
            os.kill(pid, number)

    def _reap(self) -> None:
        """Takes the exit status of every dead child: of the ranks for the verdict, of orphans to be rid of them."""
        with suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                if rank := self._living.pop(child[0], None):
                    rank.code = rank.process.returncode = os.waitstatus_to_exitcode(child[1])
                    rank.show(is_last=True)
                    rank.state = self._state_of(rank)
                    self._ended.append(rank)

    def _state_of(self, rank: _Rank) -> State:
        if -rank.code in self._stop_signals:
            return State.NEVER_BEGAN
        is_consequence = {
            # NCCL's watchdog aborts a process whose peers are gone.
            -signal.SIGABRT: any("ProcessGroupNCCL" in line for line in rank.tail),
            -signal.SIGTERM: self._is_ending,
            -signal.SIGKILL: self._is_killed,
            # The request for its stacks came when it was past showing them.
            -signal.SIGUSR1: True,
        }
        return State.LOST_PEER if is_consequence.get(rank.code) else state_after(rank.code)

    def _end_the_others(self) -> None:
        """Once a rank has ended without finishing, asks the others to save and end, and later kills the rest."""
        states, now = {rank.state for rank in self._ended} - {State.FINISHED}, time.monotonic()
        if not states or not self._living or self._is_killed:
            return
        if states != {State.STOPPED}:
            self._failed_at = min(self._failed_at, now)
        if not self._is_ending and (states != {State.LOST_PEER} or now > self._failed_at + CAUSE_SECONDS):
            self._is_ending = True
            self._send(signal.SIGTERM)
        # Without all of its ranks the group never met: it has nothing to save, and nothing to wait for.
        if State.NEVER_BEGAN in states:
            self._kill()
        elif now > self._failed_at + GRACE_SECONDS:
            self._dump_stacks()
            self._kill()

    def _find_hung(self) -> None:
        silent_seconds, living = self._heartbeats.silent_seconds(), self._living.values()
        is_hung = any(silent_seconds[rank.local] > self._hang_after_seconds for rank in living)
        if not is_hung or not self._hang_after_seconds or self._is_killed:
            return
        import psutil

        # The first one to fall silent: the others soon wait for it. A stopped rank may have beaten last of all.
        status = {rank: psutil.Process(rank.process.pid).status() for rank in living}
        first = max(living, key=lambda rank: (status[rank] == psutil.STATUS_STOPPED, silent_seconds[rank.local]))
        self._hang = (
            f"{self._name(first)} hung: no sign of life for {silent_seconds[first.local]:.0f} s ({status[first]}); "
            "--hang-after sets the limit. The stacks of all processes are above"
        )
        self._dump_stacks()
        self._kill()

    def _dump_stacks(self) -> None:
        for pid, rank in self._living.items():
            _say(f"ddpm: stacks of {self._name(rank)}:")
            os.kill(pid, signal.SIGUSR1)
            # A stopped process would keep the signal for later.
            os.kill(pid, signal.SIGCONT)
            self._listen_for(DUMP_SECONDS)

    def _kill(self) -> None:
        self._is_killed = True
        self._send(signal.SIGKILL)

    def _verdict(self) -> tuple[int, str]:
        """Returns the exit code of all ranks, and the reason for people."""
        if self._hang:
            return int(Exit.HUNG), self._hang
        for rank in self._ended:
            if rank.state is State.NEVER_BEGAN:
                name = signal.Signals(self._stop_signals[0]).name
                return int(Exit.STOPPED), f"stopped by {name} before it began; the same command begins again"
            if rank.state is State.FAILED:
                return 128 - rank.code if rank.code < 0 else rank.code, self._failure(rank)
        by_state = {rank.state: rank for rank in reversed(self._ended)}
        if State.STOPPED in by_state:
            return int(Exit.STOPPED), ""
        # The cause is unknown, such as on a node whose peer node died.
        lost = by_state.get(State.LOST_PEER)
        return (CRASHED, self._failure(lost)) if lost else (int(Exit.FINISHED), "")

    def _failure(self, rank: _Rank) -> str:
        what = self._name(rank) + (" failed first" if self._group.world_size > 1 else " failed")
        if rank.code in TABLE and rank.state is not State.LOST_PEER:
            # Rank 0 has printed what ends all ranks alike; a rank prints why it ends with a code of the table.
            if any(one.code == rank.code for one in self._ended if one.local == 0):
                return ""
            errors = [line.removeprefix("ddpm: ") for line in rank.tail if line.startswith("ddpm: ")]
            return f"{what}: {errors[-1] if errors else TABLE[rank.code].text}"
        if rank.code < 0:
            hint = ", as the kernel does when memory runs out" if rank.code == -signal.SIGKILL else ""
            what += f": killed by {signal.Signals(-rank.code).name}{hint}"
        elif rank.state is State.LOST_PEER:
            what += ": it lost the others"
        elif self._group.processes == 1:
            # Its traceback is the last output.
            return ""
        else:
            what += f", with exit code {rank.code}"
        return "\n    ".join([f"{what}{'; its last lines:' if rank.tail else ''}", *rank.tail])

    def _name(self, rank: _Rank) -> str:
        return f"rank {rank.number} of {self._group.world_size}" if self._group.world_size > 1 else "the process"


def _say(text: str) -> None:
    """Prints a line of the launcher's own."""
    _show([text.encode(errors="backslashreplace")])


def _show(lines: list[bytes]) -> None:
    # The line may hold a progress bar: the output takes its place, and the bar is drawn anew below.
    begin = b"\r\x1b[2K" if os.isatty(_STDERR) and os.environ.get("TERM") != "dumb" else b""
    data = b"".join(begin + line + b"\n" for line in lines)
    # A terminal or a pipe that went away must not end a run.
    with suppress(OSError):
        while data:
            data = data[os.write(_STDERR, data) :]
