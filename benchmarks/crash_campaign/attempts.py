"""The processes of one lane: started, signalled at a point or at a moment, and counted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.crash_campaign.points import Point
from benchmarks.crash_campaign.processes import BrokenError, Invocation, Place
from benchmarks.crash_campaign.records import EXPECTED_CODES, Moment, Tally
from job.exits import Exit


class Attempts:
    """Starts the commands of a lane one after another, and kills some of them."""

    def __init__(
        self, name: str, folder: Path, *, sabotage: str, tell: Callable[[str], None], killed: Callable[[], None]
    ) -> None:
        """Prepares the processes of a lane.

        Args:
            name: the lane, for the lines that `tell` prints.
            folder: the folder for caches, traces and outputs.
            sabotage: the protocol to break, or empty.
            tell: prints a line.
            killed: called after each kill.
        """
        self.name, self.tally = name, Tally()
        self.place = Place(folder, folder / "cache-0", sabotage)
        self.started: list[Invocation] = []
        self.tell, self._killed, self._caches = tell, killed, 0
        self._start_up_seconds, self._seconds_per_image = 0.0, 0.0

    def start(self, words: list[str], point: Point | None = None, place: Place | None = None) -> Invocation:
        """Starts a command, which meets the point if it gets that far."""
        invocation = Invocation(len(self.started) + 1, words, place or self.place, point)
        self.started.append(invocation)
        return invocation

    def fail(self, what: str) -> None:
        """Counts and prints a claim that does not hold."""
        self.tally.failures.append(f"{self.name}: {what}")
        self.tell(f"FAILED  {self.name}: {what}")

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
        self.count(invocation, f"SIG{point.action.upper()} {point.target} at a point", point.name)
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
        self.tell(f"{self.name:<26} {name:<36} {where:<28} {seconds:5.1f} s")

    def count_damage(self, point: Point, where: str) -> None:
        """Counts a damaged object and prints its place."""
        self.tally.rot[point.name] += 1
        self.tell(f"{self.name:<26} {point.name:<36} {where}")

    def note_pace(self, invocation: Invocation) -> float | None:
        """Returns the seconds to the end of the first step, if there was one."""
        steps = [event for event in invocation.events if event["event"] == "step"]
        if not steps:
            return None
        self._start_up_seconds = float(steps[0]["time"] - invocation.started)
        if images := steps[-1]["images_seen"] - steps[0]["images_seen"]:
            self._seconds_per_image = (steps[-1]["time"] - steps[0]["time"]) / images
        return self._start_up_seconds
