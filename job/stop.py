"""Being stopped: one object that says whether, why, and how much time is left; and the signs of life of who goes on.

The command makes it, `install` has signals and the deadline ask it, and everybody below gets it as `stop`.
"""

from __future__ import annotations

import atexit
import mmap
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from job.exits import BadRequestError, Exit, StoppedError

STOP_AT = "DDPM_STOP_AT"
"""The deadline in seconds of CLOCK_BOOTTIME, which all processes of a machine share and which counts a suspension."""
GRACE_VARIABLE = "DDPM_GRACE_SECONDS"
SPOT_GRACE_SECONDS = 30.0
"""What a spot VM is given. A GKE spot node gives 15 unless its pool is told otherwise, which the variable says."""
MARGIN_SECONDS = 3.0
"""For noticing the signal and for ending the process."""
HEARTBEATS = "DDPM_HEARTBEATS"
"""`DESCRIPTOR:RANK` of the memory that this process shares with its launcher, and its place in it."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", re.IGNORECASE | re.ASCII)
_UNIT_SECONDS = (86400, 3600, 60, 1)
_SLICE_SECONDS = 0.1
_LONGEST_LOOK_SECONDS = 3.0
_MEETING_SLICE_SECONDS = 0.5


class StopSignal(SystemExit):
    """Ends a process at a signal. A `SystemExit` of any other kind may come from the user's code."""


class Stop:
    """Calling it says whether to stop. Made once per process by the command, handed down as `stop`, never wrapped.

    A second request changes nothing: a signal to a process group reaches a process twice, directly and from its
    launcher, and must not cut the save short.

    Attributes:
        reason: why, for people; empty until somebody asks.
        grace_seconds: from the first request to the end of the machine.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        """Nobody asks yet; without `grace_seconds` these are `DDPM_GRACE_SECONDS`, or those of a spot VM."""
        self.reason = ""
        if grace_seconds is None:
            which = "between a preemption notice and the end"
            grace_seconds = seconds_of(GRACE_VARIABLE, SPOT_GRACE_SECONDS, which, least=1.0)
        self.grace_seconds = grace_seconds
        self._asked_at = self._deadline = float("inf")
        self._is_installed = False

    def install(self, *, signals: bool = True) -> Stop:
        """Has the signals of this process (main thread only) and its deadline ask, and returns itself.

        Without `signals` these end the process, as they did before, until `waiting` is over.
        """
        self._is_installed = True
        if os.environ.get(STOP_AT):
            self._deadline = seconds_of(STOP_AT, 0.0, "of this machine's clock at which to stop")
        if signals:
            handle_stop_signals(lambda number, frame: self.request(signal.Signals(number).name))
            # On its way out the interpreter restores the default actions: a second signal would change the exit code.
            atexit.register(ignore_stop_signals)
        return self

    def __call__(self) -> bool:
        """Whether to stop; costs a microsecond. A call in the main thread is a heartbeat: see `beat`."""
        # In other threads a loop may go on for ever while the work hangs.
        if threading.current_thread() is threading.main_thread():
            beat()
        if not self.reason and self._deadline < float("inf") and _boot_clock() >= self._deadline:
            self.request("its deadline (--stop-after)")
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Asks this process to stop: a signal, a preemption notice, or another process. The first one counts."""
        if not self.reason:
            self._asked_at, self.reason = time.monotonic(), reason

    def check(self, what: str, then: str = "the same command goes on") -> None:
        """Raises if this process is to stop; `what` goes on after "stopped by SIGTERM", such as "while packing".

        `then` is what is left of the work so far.

        Raises:
            StoppedError: it is.
        """
        if self():
            raise StoppedError(f"stopped by {self.reason} {what}; {then}")

    def sleep(self, seconds: float) -> bool:
        """Sleeps so long, or until this process is to stop; whether it is.

        A heartbeat, in whichever thread: for waits with an end, such as for a bucket that is away.
        """
        until = time.monotonic() + seconds
        while not self() and (left := until - time.monotonic()) > 0:
            beat()
            time.sleep(min(_SLICE_SECONDS, left))
        return bool(self.reason)

    def seconds_left(self) -> float:
        """Seconds until the machine is gone; infinite until somebody asks."""
        return max(0.0, self._asked_at + self.grace_seconds - time.monotonic())

    def seconds_left_to_save(self) -> float:
        """As `seconds_left`, less what is needed for ending the process in order."""
        return max(0.0, self.seconds_left() - min(MARGIN_SECONDS, self.grace_seconds / 2))

    @contextmanager
    def waiting(self, patience_seconds: float) -> Iterator[None]:
        """While this process waits for others to begin, who may never come, being asked ends it: nothing is to save.

        Waiting is no hang for so many seconds, though nothing beats meanwhile. One that is installed takes signals
        afterwards.
        """
        if not self._is_installed:
            yield
            return
        have_met, began = threading.Event(), time.monotonic()

        def stand_in() -> None:
            while not have_met.wait(_MEETING_SLICE_SECONDS):
                if time.monotonic() - began < patience_seconds:
                    beat()
                if self():
                    said = f"ddpm: stopped by {self.reason} before it began; the same command begins again\n"
                    os.write(2, said.encode())
                    os._exit(int(Exit.STOPPED))

        threading.Thread(target=stand_in, name="until-all-have-met", daemon=True).start()
        try:
            yield
        finally:
            have_met.set()
        self.install()


def seconds_of(variable: str, default: float, which: str, least: float = 0.0) -> float:
    """The seconds that a variable of the environment holds, or `default`; `which` says what they are, for people.

    Raises:
        BadRequestError: it holds no such number, or less than `least`.
    """
    text = os.environ.get(variable) or str(default)
    with suppress(ValueError):
        if least <= float(text) < float("inf"):
            return float(text)
    raise BadRequestError(f"{variable}={text[:100]!r}: give the seconds {which}, such as {default:g}")


def count_of(variable: str, default: int, least: int = 0, most: int = 1_000_000) -> int:
    """The whole number that a variable of the environment holds, or `default`; whoever starts processes sets such.

    Raises:
        BadRequestError: it holds no such number, or one that is not from `least` to `most`.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise BadRequestError(f"{variable}={text[:100]!r}: unset it, or give a number from {least} to {most:,}")


NEVER = Stop(SPOT_GRACE_SECONDS)
"""One that nobody asks; the default of library functions."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Has `handler` called at the signals that ask this process to stop (main thread only)."""
    for number in STOP_SIGNALS:
        # nohup has SIGHUP ignored, and means it.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For a process whose exit code is decided, so that no signal replaces it (main thread only)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def duration_seconds(text: str, option: str) -> int:
    """`"90m"`, `"1h30m"`, `"2d"`, `"45s"` or a number of seconds, in seconds.

    Raises:
        BadRequestError: it is none of these, or zero.
    """
    match = _DURATION.fullmatch(text.strip())
    counts = match.groups("0") if match else ()
    seconds = sum(int(count) * unit for count, unit in zip(counts, _UNIT_SECONDS, strict=False))
    if not seconds:
        raise BadRequestError(f"{option} {text!r}: use a duration such as 90m, 1h30m or 3600 (seconds)")
    return seconds


@contextmanager
def deadline(stop_after: str) -> Iterator[None]:
    """Asks what is installed within, here and in child processes, to stop `stop_after` from now; empty means never.

    A deadline that is set already stays: the launcher counts from its own start, and its ranks take over what it says.

    Raises:
        BadRequestError: `stop_after` is no duration.
    """
    seconds = duration_seconds(stop_after, "--stop-after") if stop_after else 0
    if not seconds or os.environ.get(STOP_AT):
        yield
        return
    os.environ[STOP_AT] = str(_boot_clock() + seconds)
    try:
        yield
    finally:
        del os.environ[STOP_AT]


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Heartbeats:
    """The launcher's side: when each rank last beat, in memory that all share.

    Silence counts from the start: a process that never gets going is found, too.
    """

    def __init__(self, processes: int) -> None:
        # Ranks inherit it. It is of no file system: a page of a full disk would be SIGBUS.
        self.descriptor = os.memfd_create("ddpm-heartbeats")
        os.ftruncate(self.descriptor, 8 * processes)
        self._times = memoryview(mmap.mmap(self.descriptor, 0)).cast("d")
        self._counts_from = self._looked = time.monotonic()

    def silent_seconds(self) -> list[float]:
        """For how long each rank has been silent, to the microsecond; to be called every second or so.

        It counts anew when the launcher did not run itself: a suspended laptop, a migrated VM or Ctrl-Z stops all
        processes alike, and none of them hangs for that.
        """
        now = time.monotonic()
        if now - self._looked > _LONGEST_LOOK_SECONDS:
            self._counts_from = now
        self._looked = now
        return [now - max(beaten, self._counts_from) for beaten in self._times]


_own_beat: memoryview[float] | None = None
"""The place of this process in the memory that it shares with its launcher."""


def beat() -> None:
    """Says that this process gets on with its work; does nothing without a launcher.

    It takes less than a microsecond and never waits, so call it from any thread and as often as you like: in each round
    of a loop that does the work, and while waiting for something that may rightly take long. Not from a thread whose
    only task is to beat: that would go on in a process whose work hangs.
    """
    if _own_beat is not None:
        _own_beat[0] = time.monotonic()


def connect_heartbeat() -> None:
    """Lets `beat` reach the launcher that started this process, if one did."""
    global _own_beat
    if place := os.environ.pop(HEARTBEATS, ""):
        descriptor, rank = map(int, place.split(":"))
        _own_beat = memoryview(mmap.mmap(descriptor, 0)).cast("d")[rank:]
        os.close(descriptor)
        beat()
