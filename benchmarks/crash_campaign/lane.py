"""One kind of run, killed repeatedly: the processes to start, the kills, and the checks afterwards."""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.crash_campaign.history import Run, differences, lost_images, read_ending, saved_images
from benchmarks.crash_campaign.points import BY_NAME, Point
from benchmarks.crash_campaign.processes import Attempts, BrokenError, Invocation, LeavingError, Moment, Tally
from benchmarks.crash_campaign.work import (
    DATASET_KEY,
    Undisturbed,
    Work,
    flip_cached_byte,
    flip_checkpoint_bit,
    make_undisturbed,
    objects_of,
    replace_image,
)
from job.exits import Exit, JobError
from job.runs.layout import RUNS, SAMPLES
from job.store import Store, open_store

SHORTER = 0.8
"""The factor on the fraction of a moment that a whole run did not reach."""


class Lane:
    """A kind of run (processes, dropout): trained once undisturbed, then killed at all its points and moments."""

    def __init__(
        self,
        work: Callable[[str], Work],
        folder: Path,
        points: Iterable[Point],
        moments: Iterable[Moment],
        attempts: Attempts,
    ) -> None:
        """Prepares a lane.

        Args:
            work: returns the commands for a folder of the bucket.
            folder: the folder of the undisturbed run's processes.
            points: the points of this lane.
            moments: its random kills.
            attempts: starts and kills its processes.
        """
        self._work_in, self._work, self._folder = work, work("disturbed"), folder
        self._points, self._moments, self._attempts = tuple(points), tuple(moments), attempts
        self._bucket = open_store(self._work.bucket)
        self._undisturbed: Undisturbed | None = None
        self._parent = ""
        self.name, self.tally, self._tell, self._fail = attempts.name, attempts.tally, attempts.tell, attempts.fail

    def run(self) -> Tally:
        """Runs the lane; claims that do not hold are in the tally's `failures`."""
        try:
            if not self._attempts.place.sabotage:
                _ = self.undisturbed
            self._pack()
            run = self._train()
            self._sample(run)
            self._share(run)
            self._train_children(run)
        except BrokenError as error:
            self._fail(str(error))
        except LeavingError:
            self.tally.failures.append(f"{self.name}: stopped before it was done")
        except JobError as error:
            self._fail(f"reading the bucket: {error}")
        finally:
            self._attempts.destroy()
        return self.tally

    @property
    def undisturbed(self) -> Undisturbed:
        """The undisturbed run, made at its first use."""
        if self._undisturbed is None:
            phases = {point.phase for point in self._points}
            self._undisturbed = make_undisturbed(self._work_in("undisturbed"), self._folder, self._attempts, phases)
        return self._undisturbed

    def _of(self, phase: str) -> list[Point]:
        return [point for point in self._points if point.phase == phase]

    def _pack(self) -> None:
        self._work_through(self._work.pack, "pack")
        self._attempts.start(self._work.pack).finish()
        if self._of("pack") and objects_of(self._bucket.sub(DATASET_KEY)) != self.undisturbed.dataset:
            self._fail("the packed dataset is not the one that was packed undisturbed")

    def _work_through(self, words: list[str], phase: str) -> None:
        """Starts a command for each point of a phase, which kills it, and then once more to its end."""
        for point in self._of(phase):
            if not self._attempts.happens(self._attempts.start(words, point), point):
                self._fail(f"point {point.name} was not reached")
        if self._of(phase):
            self._attempts.start(words).finish()

    def _new_run(self, kind: str = "run") -> Run:
        self.tally.runs += 1
        name = f"{kind}-{self.tally.runs}"
        return Run(name, self._bucket.sub(f"{RUNS}/{name}"))

    def _train(self) -> Run:
        events: deque[Point | Moment] = deque([*self._of("train"), *self._moments, *self._of("end")])
        while True:
            run = self._new_run()
            self._one_run(run, events)
            self._compare(run, self.undisturbed)
            if not events:
                return run

    def _train_children(self, parent: Run) -> None:
        """Trains a run from a finished one for each point; it must not need its parent once it has a checkpoint."""
        self._parent = parent.name
        for point in self._of("from"):
            run = self._new_run("child")
            happened, finished = self._meet(run, point)
            if not happened:
                self._fail(f"point {point.name} was not reached")
            if point.name == "parent-saved":
                self._attempts.start(self._work.delete(parent.name)).finish()
            if not finished:
                self._one_run(run, deque())
            assert self.undisturbed.child is not None
            self._compare(run, self.undisturbed.child)

    def _one_run(self, run: Run, events: deque[Point | Moment]) -> None:
        """Starts the command until the run is finished; each process meets the next event, if it gets that far."""
        finished = False
        while not finished:
            event = events[0] if events else None
            if isinstance(event, Point) and event.op == "rot":
                finished = self._rot(run, event, events)
                continue
            if isinstance(event, Point) and event.action == "stop":
                self._replace_stopped(run, event)
                events.popleft()
                return
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
            images = self.undisturbed.ending.ref[1] - max((ref.images_seen for ref in run.checkpoints), default=0)
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
        invocation = self._attempts.start(self._work.train(run.name, self._parent), point)
        run.invocations.append(invocation)
        return invocation

    def _note_recovery(self, run: Run, invocation: Invocation) -> None:
        if (seconds := self._attempts.note_pace(invocation)) is not None and invocation is not run.invocations[0]:
            self.tally.recovery_seconds.append(seconds)

    def _replace_stopped(self, run: Run, point: Point) -> None:
        """Suspends an attempt at the point until another has replaced it and finished the run.

        Raises:
            BrokenError: the point was not reached, the other failed, or the first one still wrote after it woke.
        """
        zombie = self._begin(run, point)
        zombie.wait_until(lambda: zombie.find("fault") or zombie.code is not None, f"did not reach {point.name}")
        if (fault := zombie.find("fault")) is None:
            raise BrokenError(f"point {point.name} was not reached: {zombie.last_line}")
        run.zombies.add(fault["fence"])
        self._attempts.count(zombie, "SIGSTOP group beyond expiry, then SIGCONT", point.name)
        other = self._begin(run)
        try:
            other.wait_until(lambda: other.find("commit") or other.code is not None, "did not replace a stopped holder")
        finally:
            zombie.send(signal.SIGCONT, "group")
        code, other_code = zombie.wait(), other.wait()
        if other_code:
            raise BrokenError(f"the attempt that replaced a stopped one ended with {other_code}: {other.last_line}")
        if code != Exit.LOST_RUN:
            late = [event["ref"] for event in zombie.events if event["event"] == "commit"]
            raise BrokenError(
                f"two attempts wrote to one run: the fence of attempt {fault['fence']} was ignored, which woke after "
                f"it was replaced and ended with {code} instead of {int(Exit.LOST_RUN)}, with {len(late)} commits"
            )
        self._note_recovery(run, other)
        run.audit()

    def _rot(self, run: Run, point: Point, events: deque[Point | Moment]) -> bool:
        """Damages an object or a file between two processes; returns whether the run is finished."""
        if point.name == "shard-rot":
            self._rotten_shard(run, point)
        elif point.name == "checkpoint-rot":
            good = [ref for ref in run.checkpoints if ref not in run.rotten]
            if len(good) < 2:
                return self._meet(run, BY_NAME["manifest"])[1]
            self._attempts.count_damage(point, flip_checkpoint_bit(run.store, good[-1]))
            run.rotten.add(good[-1])
            self.tally.planted_checkpoints += 1
        elif not list(self._attempts.place.cache.glob("*/images")):
            return self._meet(run, BY_NAME["manifest"])[1]
        else:
            self._attempts.count_damage(point, flip_cached_byte(self._attempts.place.cache))
        events.popleft()
        return False

    def _rotten_shard(self, run: Run, point: Point) -> None:
        self._attempts.new_cache()
        name, key, sound = replace_image(self._bucket)
        invocation = self._begin(run, BY_NAME["manifest"])
        code = invocation.wait()
        self._bucket.put(key, sound)
        self._attempts.count_damage(point, f"{name}: exit {code}")
        if code != Exit.BAD_DATA or name not in invocation.output:
            seen = max((event["images_seen"] for event in invocation.events if event["event"] == "step"), default=0)
            raise BrokenError(
                f"a corrupt shard was not noticed: {name} holds an image that was not packed, and training "
                f"ended with {code} instead of {int(Exit.BAD_DATA)}, after {seen:,} images"
            )

    def _compare(self, run: Run, undisturbed: Undisturbed) -> None:
        ending, history = read_ending(run.store), run.history
        self.tally.hashes.append(ending.weights_sha256)
        self.tally.lost_images += lost_images(history, ending)
        self.tally.repeated_images += history.repeated_images
        self.tally.bad_checkpoints += len(run.set_aside)
        problems = differences(history, ending, undisturbed.history, undisturbed.ending)
        for problem in [*run.misjudged(), *problems, *run.written_after_loss()]:
            self._fail(f"{run.name}: {problem}")
        self._tell(
            f"{self.name}: {run.name} finished after {len(run.invocations)} starts, {history.repeated_images:,} images "
            f"repeated, {ending.weights_sha256[:16]}…"
        )

    def _sample(self, run: Run) -> None:
        self._work_through(self._work.sample(run.name), "sample")
        if self._of("sample"):
            pictures = read_ending(run.store).pictures
            for name, sha256 in self.undisturbed.sampled.items():
                if pictures.get(name) != sha256:
                    self._fail(f"{name} of `ddpm sample` is not the picture that was made undisturbed")
        began = len(self._attempts.started)
        self._work_through(self._work.batch(run.name), "batch")
        if self._of("batch"):
            if saved_images(run.store) != self.undisturbed.saved:
                self._fail("the images of `ddpm sample --count` are not those that were made undisturbed")
            made = Counter(e["uri"] for i in self._attempts.started[began:] for e in i.events if e["event"] == "piece")
            if twice := [uri for uri, count in made.items() if count > 1]:
                self._fail(f"{twice[0]} was committed twice")

    def _share(self, run: Run) -> None:
        """Starts machines that share packing, then machines that share sampling."""
        dataset = self._bucket.sub(f"shared/{DATASET_KEY}")
        for point in self._of("shared-pack"):
            self._share_out(self._work.shared_pack, dataset, point)
            if objects_of(dataset) != self.undisturbed.dataset:
                self._fail(f"{point.name}: the dataset that machines packed together is not that of one machine")
        for point in self._of("shared-batch"):
            self._share_out(self._work.batch(run.name), run.store.sub(SAMPLES), point)
            if saved_images(run.store) != self.undisturbed.saved:
                self._fail(f"{point.name}: the images that machines drew together are not those of one machine")

    def _share_out(self, words: list[str], results: Store, point: Point) -> None:
        """Empties `results`, kills the first machine at the point, then runs a slice on each of the machines at once.

        Raises:
            BrokenError: the point was not reached, or a machine ended with another code than 0.
        """
        for entry in list(results.list()):
            results.delete(entry.key)
        slices = [[*words, "--slice", f"{number}/{point.machines}"] for number in range(point.machines)]
        killed = self._attempts.start(slices[0], point)
        killed.wait()
        if killed.find("fault") is None:
            raise BrokenError(f"point {point.name} was not reached")
        for machine in [self._attempts.start(each) for each in slices]:
            machine.finish()
        self._attempts.count(killed, f"SIGKILL of one of {point.machines} machines at a point", point.name)
