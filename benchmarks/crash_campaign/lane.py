"""One kind of run, killed repeatedly: the processes to start, the kills, and the checks afterwards."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.crash_campaign import rot
from benchmarks.crash_campaign.attempts import Attempts
from benchmarks.crash_campaign.history import differences, lost_images, read_ending, saved_images
from benchmarks.crash_campaign.points import POINTS, Point
from benchmarks.crash_campaign.processes import BrokenError, HungError, Invocation, LeavingError
from benchmarks.crash_campaign.records import Moment, Run, Tally
from benchmarks.crash_campaign.sharing import share_out
from benchmarks.crash_campaign.undisturbed import Undisturbed, make_undisturbed, objects_of
from benchmarks.crash_campaign.work import DATASET_KEY, Work
from benchmarks.crash_campaign.zombie import replace_stopped
from job.exits import Exit, JobError
from job.runs.layout import RUNS, SAMPLES
from job.store import open_store

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
        except (BrokenError, HungError) as error:
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

    def _of(self, *phases: str) -> list[Point]:
        return [point for point in self._points if point.phase in phases]

    def _pack(self) -> None:
        for point in self._of("pack"):
            self._attempts.happens(self._attempts.start(self._work.pack, point), point)
        self._attempts.start(self._work.pack).finish()
        if self._of("pack") and objects_of(self._bucket.sub(DATASET_KEY)) != self.undisturbed.dataset:
            self._fail("the packed dataset is not the one that was packed undisturbed")

    def _train(self) -> Run:
        events: deque[Point | Moment] = deque([*self._of("train"), *self._moments, *self._of("end")])
        while True:
            self.tally.runs += 1
            name = f"run-{self.tally.runs}"
            run = Run(name, self._bucket.sub(f"{RUNS}/{name}"))
            self._one_run(run, events)
            self._compare(run, self.undisturbed)
            if not events:
                return run

    def _train_children(self, parent: Run) -> None:
        """Trains a run from a finished one for each point; it must not need its parent once it has a checkpoint."""
        self._parent = parent.name
        for number, point in enumerate(self._of("from"), 1):
            self.tally.runs += 1
            run = Run(f"child-{number}", self._bucket.sub(f"{RUNS}/child-{number}"))
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
            if isinstance(event, Point) and event.name == "zombie":
                self._note_recovery(run, replace_stopped(self._attempts, run, event, partial(self._begin, run)))
                run.audit()
                events.popleft()
                return
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
        self._await_lingering(run)
        self._note_recovery(run, invocation)
        run.audit()
        return happened, code == Exit.FINISHED

    def _begin(self, run: Run, point: Point | None = None) -> Invocation:
        if run.invocations:
            self.tally.resumes += 1
        invocation = self._attempts.start(self._work.train(run.name, self._parent), point)
        run.invocations.append(invocation)
        return invocation

    def _await_lingering(self, run: Run) -> None:
        for invocation, moment in run.lingering:
            invocation.wait()
            self._note_recovery(run, invocation)
            self._attempts.expect(invocation, moment.action, moment.target, moment.name)
        run.lingering.clear()

    def _note_recovery(self, run: Run, invocation: Invocation) -> None:
        if (seconds := self._attempts.note_pace(invocation)) is not None and invocation is not run.invocations[0]:
            self.tally.recovery_seconds.append(seconds)

    def _rot(self, run: Run, point: Point, events: deque[Point | Moment]) -> bool:
        if point.name == "shard-rot":
            events.popleft()
            return self._rotten_shard(run, point)
        if point.name == "checkpoint-rot":
            good = [ref for ref in run.checkpoints if ref not in run.rotten]
            if len(good) < 2:
                return self._meet(run, _point("latest"))[1]
            where = rot.flip_checkpoint_bit(run.store, good[-1])
            run.rotten.add(good[-1])
            self.tally.planted_checkpoints += 1
        elif not list(self._attempts.place.cache.glob("*/images")):
            return self._meet(run, _point("latest"))[1]
        else:
            where = str(rot.flip_cached_byte(self._attempts.place.cache))
        events.popleft()
        self._attempts.count_damage(point, where.rpartition("/disturbed/")[2])
        return False

    def _rotten_shard(self, run: Run, point: Point) -> bool:
        self._attempts.new_cache()
        replaced = rot.ReplacedImage(self._bucket)
        invocation = self._begin(run, _point("manifest"))
        code = invocation.wait()
        replaced.mend()
        self._attempts.count_damage(point, f"{replaced.name}: exit {code}")
        if code != Exit.BAD_DATA or replaced.name not in invocation.output:
            raise BrokenError(
                f"a corrupt shard was not noticed: {replaced.name} holds an image that was not packed, and training "
                f"ended with {code} instead of {int(Exit.BAD_DATA)}, after {_last_images(invocation):,} images"
            )
        return False

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
        self._draw(self._work.sample(run.name), self._of("sample"))
        if self._of("sample"):
            pictures = read_ending(run.store).pictures
            for name, sha256 in self.undisturbed.sampled.items():
                if pictures.get(name) != sha256:
                    self._fail(f"{name} of `ddpm sample` is not the picture that was made undisturbed")
        began = len(self._attempts.started)
        self._draw(self._work.batch(run.name), self._of("batch"))
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
            share_out(self._attempts, self._work.shared_pack, dataset, point)
            if objects_of(dataset) != self.undisturbed.dataset:
                self._fail(f"{point.name}: the dataset that machines packed together is not that of one machine")
        for point in self._of("shared-batch"):
            share_out(self._attempts, self._work.batch(run.name), run.store.sub(SAMPLES), point)
            if saved_images(run.store) != self.undisturbed.saved:
                self._fail(f"{point.name}: the images that machines drew together are not those of one machine")

    def _draw(self, words: list[str], points: list[Point]) -> None:
        for point in points:
            if not self._attempts.happens(self._attempts.start(words, point), point):
                self._fail(f"point {point.name} was not reached")
        if points:
            self._attempts.start(words).finish()


def _point(name: str) -> Point:
    return next(point for point in POINTS if point.name == name)


def _last_images(invocation: Invocation) -> int:
    return max((event["images_seen"] for event in invocation.events if event["event"] == "step"), default=0)
