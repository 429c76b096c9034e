"""One kind of run, killed repeatedly: the processes to start, the kills, and the checks afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from benchmarks.crash_campaign.history import Ending, History, Run, differences, lost_images, read_ending
from benchmarks.crash_campaign.points import BY_NAME, Point
from benchmarks.crash_campaign.processes import Attempts, BrokenError, Invocation, LeavingError, Moment, Place, Tally
from benchmarks.crash_campaign.work import Work, flip_cached_byte, flip_checkpoint_bit
from job.exits import Exit, JobError
from job.progress import note

SHORTER = 0.8
"""The factor on the fraction of a moment that a whole run did not reach."""


class Lane:
    """A kind of run (processes, dropout): trained once undisturbed, then killed at all its points and moments."""

    def __init__(
        self,
        work: Work,
        folder: Path,
        points: Iterable[Point],
        moments: Iterable[Moment],
        attempts: Attempts,
    ) -> None:
        """Prepares a lane.

        Args:
            work: its commands.
            folder: the folder of the undisturbed run's processes.
            points: the points of this lane.
            moments: its random kills.
            attempts: starts and kills its processes.
        """
        self._work, self._folder, self._attempts = work, folder, attempts
        self._events: deque[Point | Moment] = deque([*points, *moments])
        self.name, self.tally, self._fail = attempts.name, attempts.tally, attempts.fail

    def run(self) -> Tally:
        """Runs the lane; claims that do not hold are in the tally's `failures`."""
        try:
            if not self._attempts.place.sabotage:
                _ = self.undisturbed
            self._attempts.start(self._work.pack).finish()
            self._train()
        except BrokenError as error:
            self._fail(str(error))
        except LeavingError:
            self.tally.failures.append(f"{self.name}: stopped before it was done")
        except JobError as error:
            self._fail(f"reading the bucket: {error}")
        finally:
            self._attempts.destroy()
        return self.tally

    @cached_property
    def undisturbed(self) -> tuple[History, Ending]:
        """The undisturbed run, made at its first use, which the disturbed ones must match.

        Raises:
            BrokenError: a command failed, or training did not see every image once.
        """
        work, place = replace(self._work, bucket=f"{self._work.bucket}-undisturbed"), Place(self._folder, self._folder)
        self._attempts.start(work.pack, place=place).finish()
        run = Run.of(work.bucket, "run-1")
        run.invocations.append(self._attempts.start(work.train(run.name), place=place))
        run.invocations[0].finish()
        history, ending = run.history, read_ending(run.store)
        self._attempts.note_pace(run.invocations[0])
        self.tally.undisturbed_hash = ending.weights_sha256
        note(f"{self.name}: undisturbed, {ending.ref[1]:,} images, {ending.weights_sha256[:16]}…")
        for problem in differences(history, ending, history, ending):
            self._fail(f"undisturbed: {problem}")
        if lost_images(history, ending) or history.repeated_images:
            raise BrokenError("undisturbed training does not see every image once")
        return history, ending

    def _train(self) -> None:
        while self._events:
            self.tally.runs += 1
            run = Run.of(self._work.bucket, f"run-{self.tally.runs}")
            self._one_run(run)
            self._compare(run)

    def _one_run(self, run: Run) -> None:
        """Starts the command until the run is finished; each process meets the next event, if it gets that far."""
        finished, events = False, self._events
        while not finished:
            event = events[0] if events else None
            if isinstance(event, Point) and event.op == "rot":
                finished = self._rot(run, event)
                continue
            happened, finished = self._meet(run, event)
            if happened:
                events.popleft()
            elif finished and len(run.invocations) == 1 and event is not None:
                # A whole run without another kill must reach every point.
                event = events.popleft()
                if isinstance(event, Point):
                    self._fail(f"point {event.name} was not reached by a whole run")
                else:
                    events.appendleft(replace(event, fraction=event.fraction * SHORTER))

    def _meet(self, run: Run, event: Point | Moment | None) -> tuple[bool, bool]:
        """Starts a process for `event`; returns whether the event happened, and whether the run is finished."""
        if isinstance(event, Point) and event.fresh:
            self._attempts.new_cache()
        invocation = self._begin(run, event if isinstance(event, Point) else None)
        happened = False
        if isinstance(event, Moment):
            images = self.undisturbed[1].ref[1] - max((ref.images_seen for ref in run.checkpoints), default=0)
            if (target := self._attempts.signal(invocation, event, images)) and event.at_once:
                run.lingering.append((invocation, replace(event, target=target)))
                return True, False
            happened = bool(target)
        elif isinstance(event, Point):
            happened = self._attempts.happens(invocation, event)
        else:
            invocation.finish()
        code = invocation.wait()
        for other, moment in run.lingering:
            other.wait()
            self._note_recovery(run, other)
            self._attempts.expect(other, moment.action, moment.target, moment.name)
        run.lingering.clear()
        self._note_recovery(run, invocation)
        run.audit()
        return happened, code == Exit.FINISHED

    def _begin(self, run: Run, point: Point | None = None) -> Invocation:
        if run.invocations:
            self.tally.resumes += 1
        invocation = self._attempts.start(self._work.train(run.name), point)
        run.invocations.append(invocation)
        return invocation

    def _note_recovery(self, run: Run, invocation: Invocation) -> None:
        if (seconds := self._attempts.note_pace(invocation)) is not None and invocation is not run.invocations[0]:
            self.tally.recovery_seconds.append(seconds)

    def _rot(self, run: Run, point: Point) -> bool:
        """Damages an object or a file between two processes; returns whether the run is finished."""
        good = [ref for ref in run.checkpoints if ref not in run.rotten]
        if len(good) < 2 or not list(self._attempts.place.cache.glob("*/images")):
            return self._meet(run, BY_NAME["manifest"])[1]
        if point.name == "checkpoint-rot":
            self._attempts.count_damage(point, flip_checkpoint_bit(run.store, good[-1]))
            run.rotten.add(good[-1])
            self.tally.planted_checkpoints += 1
        else:
            self._attempts.count_damage(point, flip_cached_byte(self._attempts.place.cache))
        self._events.popleft()
        return False

    def _compare(self, run: Run) -> None:
        ending, history = read_ending(run.store), run.history
        self.tally.hashes.append(ending.weights_sha256)
        self.tally.lost_images += lost_images(history, ending)
        self.tally.repeated_images += history.repeated_images
        self.tally.bad_checkpoints += len(run.set_aside)
        problems = differences(history, ending, *self.undisturbed)
        for problem in [*run.misjudged(), *problems, *run.written_after_loss()]:
            self._fail(f"{run.name}: {problem}")
        note(
            f"{self.name}: {run.name} finished after {len(run.invocations)} starts, {history.repeated_images:,} images "
            f"repeated, {ending.weights_sha256[:16]}…"
        )
