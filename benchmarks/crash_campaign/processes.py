"""Commands of the product as real processes: starts them, reads their traces, kills them, and waits for all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.crash_campaign.injection import VARIABLE
from benchmarks.crash_campaign.points import Point

ROOT = Path(__file__).resolve().parents[2]
INJECTED = Path(__file__).with_name("injected")
PATIENCE_SECONDS = 300.0
"""The longest time of a process; then it counts as hung, which is a failure of the product."""
POLL_SECONDS = 0.02

Event = dict[str, Any]
_leaving = threading.Event()
_started: set[Invocation] = set()
"""Groups that may still run. Each has its own session, so signals to this process do not reach them."""


def destroy_all() -> None:
    """Kills all processes that may still run; afterwards none can be started."""
    _leaving.set()
    for invocation in list(_started):
        invocation.destroy()


class BrokenError(Exception):
    """A claim does not hold, and the rest of the lane would prove nothing."""


class HungError(Exception):
    """A process did not reach a state in time."""


class LeavingError(Exception):
    """A signal stopped the campaign."""


@dataclass(frozen=True)
class Place:
    """The folders of a lane's processes, for cache, temporary files and traces; and the protocol that is broken."""

    folder: Path
    cache: Path
    sabotage: str = ""

    def environment(self, trace: Path, point: Point | None) -> dict[str, str]:
        """Returns the variables of a child process: one thread, so that sums have one order, and no `DDPM_…`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
        paths = [str(INJECTED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        fault = None if point is None or point.op == "rot" else asdict(point)
        return inherited | {
            "OMP_NUM_THREADS": "1",
            "DDPM_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": os.pathsep.join(paths),
            VARIABLE: json.dumps({"trace": str(trace), "fault": fault, "sabotage": self.sabotage}),
        }


class Invocation:
    """One start of a command, in a new process group."""

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
                [sys.executable, "-P", "-m", "job", *words],
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

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """Waits until `condition` returns a true value, and returns that.

        Raises:
            HungError: it did not in time.
        """
        deadline = time.monotonic() + seconds
        while not (said := condition()):
            if _leaving.is_set():
                raise LeavingError
            if time.monotonic() > deadline:
                raise HungError(f"process {self.number} ({' '.join(self.words[:2])}) {what} within {seconds:g} s")
            time.sleep(POLL_SECONDS)
        return said

    def wait(self) -> int:
        """Waits until the whole group is gone, and returns the first process's exit code."""
        self.wait_until(lambda: self.code is not None and not self.living(), "did not end")
        code = self.code
        if code is None or _leaving.is_set():
            raise LeavingError
        _started.discard(self)
        return code

    def finish(self) -> None:
        """Waits for its end.

        Raises:
            BrokenError: it ended with another code than 0.
        """
        if code := self.wait():
            raise BrokenError(f"`{' '.join(self.words[:2])}` ended with {code}: {self.last_line}")

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
