"""Commands of the product as real processes: starts them, reads their traces, kills them at points or at moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.crash_campaign.injection import VARIABLE
from benchmarks.crash_campaign.points import Point
from job.exits import Exit
from job.progress import note

ROOT = Path(__file__).resolve().parents[2]
INJECTED = Path(__file__).with_name("injected")
PATIENCE_SECONDS = 300.0
"""The longest time of a process; then it counts as hung, which is a failure of the product."""
POLL_SECONDS = 0.02

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
EXPECTED_CODES = {
    ("kill", "group"): {KILLED},
    ("kill", "launcher"): {KILLED},
    ("kill", "rank"): {128 + signal.SIGKILL},
    # A signal that comes before Python has installed a handler ends the process as signals do.
    ("term", "group"): {Exit.STOPPED, TERMINATED},
    ("term", "launcher"): {Exit.STOPPED, TERMINATED},
    ("term", "rank"): {Exit.STOPPED, 128 + signal.SIGTERM},
    ("shortage", "rank"): {Exit.NO_MEMORY},
}
"""The exit codes of the command after a signal to a target; it may also have finished just before."""

Event = dict[str, Any]
_leaving = threading.Event()
_started: set[Invocation] = set()
"""Groups that may still run. Each has its own session, so signals to this process do not reach them."""


def destroy_at_signals() -> None:
    """Has a signal kill all processes that may still run, and end this one; afterwards none can be started."""

    def leave(number: int, frame: object) -> NoReturn:
        _leaving.set()
        for invocation in list(_started):
            invocation.destroy()
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


class BrokenError(Exception):
    """A claim does not hold, and the rest of the lane would prove nothing."""


class LeavingError(Exception):
    """A signal stopped the campaign."""


@dataclass(frozen=True)
class Place:
    """The folders of a lane's processes, for cache, temporary files and traces; and the protocol that is broken."""

    folder: Path
    cache: Path
    sabotage: str = ""
    is_timed: bool = False
    """Whether `benchmarks.goodput` measures it, which takes all threads and has its own trace."""

    def environment(self, trace: Path, point: Point | None) -> dict[str, str]:
        """Returns the variables of a child process: one thread, so that sums have one order, and no other `DDPM_…`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
        paths = [str(INJECTED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        fault = None if point is None or point.op == "rot" else asdict(point)
        chosen = {"trace": str(trace), "fault": fault, "sabotage": self.sabotage, "is_timed": self.is_timed}
        return inherited | {
            **({} if self.is_timed else {"OMP_NUM_THREADS": "1"}),
            "DDPM_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": os.pathsep.join(paths),
            VARIABLE: json.dumps(chosen),
        }


class Invocation:
    """One start of a module with its words, in a new process group."""

    def __init__(self, number: int, words: Sequence[str], place: Place, point: Point | None = None) -> None:
        if _leaving.is_set():
            raise LeavingError
        self.number, self.words = number, tuple(words)
        (place.folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.trace_path = place.folder / f"{number:04d}.trace"
        self.output_path = place.folder / f"{number:04d}.output"
        self.started = time.time()
        with self.output_path.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                cwd=place.folder,
                env=place.environment(self.trace_path, point),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.group = self._process.pid
        _started.add(self)

    @property
    def code(self) -> int | None:
        """The exit code, once the first process of the group has ended."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """Its output so far, from both streams."""
        return self.output_path.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """The last line of its output, which says why it ended."""
        return (self.output.strip().splitlines() or ["(it printed nothing)"])[-1]

    @property
    def events(self) -> list[Event]:
        """Its trace so far."""
        with suppress(FileNotFoundError):
            # The last line may be incomplete.
            whole, _, _ = self.trace_path.read_text().rpartition("\n")
            return [json.loads(line) for line in whole.splitlines()]
        return []

    def find(self, event: str) -> Event | None:
        """Returns the first event of a kind in its trace."""
        return next((found for found in self.events if found["event"] == event), None)

    def rank_pid(self, rank: int) -> int | None:
        """Returns the process id of a rank, once it has started."""
        ranks = (event for event in self.events if event["event"] == "process" and event["role"] == "rank")
        return next((event["pid"] for event in ranks if event["rank"] == rank), None)

    def send(self, number: int, target: str, rank: int = 0) -> bool:
        """Signals the group, a rank or the launcher alone; returns whether that process existed."""
        with suppress(ProcessLookupError):
            if target == "group":
                os.killpg(self.group, number)
            elif target == "launcher":
                os.kill(self.group, number)
            elif (pid := self.rank_pid(rank)) is not None and pid in self.living():
                os.kill(pid, number)
            else:
                return False
            return True
        return False

    def living(self) -> list[int]:
        """Returns the processes of the group that still run, without zombies."""
        return [pid for pid, group, state in _processes() if group == self.group and state not in "ZX"]

    def wait(self) -> int:
        """Waits until the whole group is gone, and returns the first process's exit code.

        Raises:
            BrokenError: it did not end in time.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (code := self.code) is None or self.living():
            if time.monotonic() > deadline:
                what = f"process {self.number} ({' '.join(self.words[1:3])})"
                raise BrokenError(f"{what} did not end within {PATIENCE_SECONDS:g} s")
            if _leaving.is_set():
                raise LeavingError
            time.sleep(POLL_SECONDS)
        if _leaving.is_set():
            raise LeavingError
        _started.discard(self)
        return code

    def finish(self) -> None:
        """Waits for its end.

        Raises:
            BrokenError: it ended with another code than 0.
        """
        if code := self.wait():
            raise BrokenError(f"`{' '.join(self.words[1:3])}` ended with {code}: {self.last_line}")

    def destroy(self) -> None:
        """Kills all processes of the group that still run."""
        if self not in _started:
            # The number of an ended group may belong to another one now.
            return
        _started.discard(self)
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yields id, group and state of every process of this machine."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                yield int(folder.name), int(group), state


@dataclass(frozen=True)
class Moment:
    """A kill at a random moment: after `fraction` of the expected time of a process, with its start-up."""

    fraction: float
    action: str
    target: str
    rank: int
    at_once: bool
    """Whether the command starts again at once, while processes of the killed one may still run."""

    @property
    def name(self) -> str:
        """Its name for people."""
        whom = f"rank {self.rank}" if self.target == "rank" else self.target
        return f"SIG{self.action.upper()} to {whom}{', again at once' if self.at_once else ''}"


@dataclass
class Tally:
    """The counts of a lane."""

    kills: Counter[str] = field(default_factory=Counter)
    rot: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    runs: int = 0
    lost_images: int = 0
    repeated_images: int = 0
    bad_checkpoints: int = 0
    planted_checkpoints: int = 0
    recovery_seconds: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    undisturbed_hash: str = ""
    failures: list[str] = field(default_factory=list)


class Attempts:
    """Starts the commands of a lane one after another, and kills some of them."""

    def __init__(self, name: str, folder: Path, *, sabotage: str, killed: Callable[[], None]) -> None:
        """Prepares the processes of a lane.

        Args:
            name: the lane, for the lines that it prints.
            folder: the folder for caches, traces and outputs.
            sabotage: the protocol to break, or empty.
            killed: called after each kill.
        """
        self.name, self.tally = name, Tally()
        self.place = Place(folder, folder / "cache-0", sabotage)
        self.started: list[Invocation] = []
        self._killed, self._caches = killed, 0
        self._start_up_seconds, self._seconds_per_image = 0.0, 0.0

    def start(self, words: list[str], point: Point | None = None, place: Place | None = None) -> Invocation:
        """Starts a command, which meets the point if it gets that far."""
        invocation = Invocation(len(self.started) + 1, ["job", *words], place or self.place, point)
        self.started.append(invocation)
        return invocation

    def fail(self, what: str) -> None:
        """Counts and prints a claim that does not hold."""
        self.tally.failures.append(f"{self.name}: {what}")
        note(f"FAILED  {self.name}: {what}")

    def destroy(self) -> None:
        """Kills all that still run."""
        for invocation in self.started:
            invocation.destroy()

    def new_cache(self) -> None:
        """Gives the next processes an empty cache."""
        self._caches += 1
        folder = self.place.folder
        self.place = Place(folder, folder / f"cache-{self._caches}", self.place.sabotage)

    def happens(self, invocation: Invocation, point: Point) -> bool:
        """Waits for the end of a command; returns whether the fault of its point happened, which is then counted."""
        code = invocation.wait()
        if invocation.find("fault") is None:
            if code:
                raise BrokenError(f"before {point.name} the command ended with {code}: {invocation.last_line}")
            return False
        self.expect(invocation, point.action, point.target, point.name)
        what = point.action if point.action == "shortage" else f"SIG{point.action.upper()}"
        self.count(invocation, f"{what} {point.target} at a point", point.name)
        return True

    def signal(self, invocation: Invocation, moment: Moment, images: int) -> str:
        """Sends a signal at its moment; returns its target, or an empty text if the command had finished before.

        Args:
            invocation: the command.
            moment: the moment and the signal.
            images: the images that the command has to train on until its end.
        """
        seconds = self._start_up_seconds + images * self._seconds_per_image
        until = invocation.started + moment.fraction * seconds
        while time.time() < until and invocation.code is None:
            time.sleep(0.01)
        number = signal.SIGKILL if moment.action == "kill" else signal.SIGTERM
        target = moment.target
        # A rank that has not begun cannot be killed: the launcher, the only process so far, is killed instead.
        if target == "rank" and invocation.rank_pid(moment.rank) is None:
            target = "launcher"
        if invocation.code is not None or not invocation.send(number, target, moment.rank):
            if code := invocation.wait():
                raise BrokenError(f"before {moment.name} the command ended with {code}: {invocation.last_line}")
            return ""
        if not moment.at_once:
            invocation.wait()
            self.expect(invocation, moment.action, target, moment.name)
        self.count(invocation, f"SIG{moment.action.upper()} {target} at a random moment", moment.name)
        return target

    def expect(self, invocation: Invocation, action: str, target: str, name: str) -> None:
        """Checks the exit code after a signal.

        Raises:
            BrokenError: the command ended otherwise.
        """
        if invocation.code not in {*EXPECTED_CODES[action, target], Exit.FINISHED}:
            raise BrokenError(f"after {name} the command ended with {invocation.code}: {invocation.last_line}")

    def count(self, invocation: Invocation, kind: str, name: str) -> None:
        """Counts a kill and prints where it happened."""
        self.tally.kills[kind] += 1
        self._killed()
        steps = [event for event in invocation.events if event["event"] in ("began", "step")]
        fence, images = (steps[-1]["fence"], steps[-1].get("images_seen")) if steps else (0, None)
        where = "starting"
        if fence:
            where = f"attempt {fence}, " + (f"{images:,} images" if images else "before a step")
        seconds = time.time() - invocation.started
        note(f"{self.name:<26} {name:<36} {where:<28} {seconds:5.1f} s")

    def count_damage(self, point: Point, where: str) -> None:
        """Counts a damaged object and prints its place."""
        self.tally.rot[point.name] += 1
        note(f"{self.name:<26} {point.name:<36} {where}")

    def note_pace(self, invocation: Invocation) -> float | None:
        """Returns the seconds to the end of the first step, if there was one."""
        steps = [event for event in invocation.events if event["event"] == "step"]
        if not steps:
            return None
        self._start_up_seconds = float(steps[0]["time"] - invocation.started)
        if images := steps[-1]["images_seen"] - steps[0]["images_seen"]:
            self._seconds_per_image = (steps[-1]["time"] - steps[0]["time"]) / images
        return self._start_up_seconds
