"""One kind of run, killed again and again: what is started, who is killed when, and what must hold afterwards."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.crash_campaign import rot
from benchmarks.crash_campaign.history import differences, lost_images, read_ending, saved_images
from benchmarks.crash_campaign.points import POINTS, Point
from benchmarks.crash_campaign.processes import HungError, Invocation, LeavingError, Place
from benchmarks.crash_campaign.records import EXPECTED_CODES, BrokenError, Moment, Run, Tally, Undisturbed
from benchmarks.crash_campaign.sharing import share_out
from benchmarks.crash_campaign.work import DATASET_KEY, Work
from job.exits import Exit, JobError
from job.runs.layout import RUNS, SAMPLES
from job.store import Store, open_store

SHORTER = 0.8
"""Times the fraction of a moment that a whole run did not reach."""


class Lane:
    """A kind of run (processes, dropout): once undisturbed, then killed until points and moments are used up."""

    def __init__(
        self,
        work: Callable[[str], Work],
        folder: Path,
        points: Iterable[Point],
        moments: Iterable[Moment],
        *,
        sabotage: str,
        tell: Callable[[str], None],
        killed: Callable[[], None],
    ) -> None:
        """`work` gives the commands for a folder of the bucket; `tell` prints a line; `killed` hears of each kill."""
        self._work_in, self._folder, self._tell, self._killed = work, folder, tell, killed
        self._work = work("disturbed")
        self._points, self._moments, self._sabotage = tuple(points), tuple(moments), sabotage
        self._bucket = open_store(self._work.bucket)
        self._place = Place(folder / "disturbed", folder / "disturbed" / "cache-0", sabotage)
        self._undisturbed: Undisturbed | None = None
        self._started: list[Invocation] = []
        self._caches = 0
        self._pace_seconds = 0.0, 0.0
        """To the end of a process's first step, and from then on per image."""
        self.tally = Tally()
        self.name = f"{self._work.processes} process{'es' * (self._work.processes > 1)}, dropout {self._work.dropout:g}"

    def run(self) -> Tally:
        """Does it all; what does not hold is in the tally's `failures`."""
        try:
            if not self._sabotage:
                self._undisturbed = self._make_undisturbed()
            self._pack()
            run = self._train()
            self._sample(run)
            self._share(run)
        except (BrokenError, HungError) as error:
            self._fail(str(error))
        except LeavingError:
            self.tally.failures.append(f"{self.name}: stopped before it was done")
        except JobError as error:
            self._fail(f"reading the bucket: {error}")
        finally:
            for invocation in self._started:
                invocation.destroy()
        return self.tally

    @property
    def undisturbed(self) -> Undisturbed:
        """Made when it is first needed."""
        if self._undisturbed is None:
            self._undisturbed = self._make_undisturbed()
        return self._undisturbed

    def _of(self, *phases: str) -> list[Point]:
        return [point for point in self._points if point.phase in phases]

    def _fail(self, what: str) -> None:
        self.tally.failures.append(f"{self.name}: {what}")
        self._tell(f"FAILED  {self.name}: {what}")

    def _start(self, words: list[str], point: Point | None = None, place: Place | None = None) -> Invocation:
        invocation = Invocation(len(self._started) + 1, words, place or self._place, point)
        self._started.append(invocation)
        return invocation

    def _make_undisturbed(self) -> Undisturbed:
        work, folder = self._work_in("undisturbed"), self._folder / "undisturbed"
        place, bucket = Place(folder, folder / "cache"), open_store(work.bucket)
        run = Run("run-1", bucket.sub(f"{RUNS}/run-1"))
        self._finish(self._start(work.pack, place=place))
        training = self._start(work.train(run.name), place=place)
        run.invocations.append(training)
        self._finish(training)
        seconds = time.time() - training.started
        self._note_pace(training)
        ending, history = read_ending(run.store), run.history
        self.tally.undisturbed_hash = ending.weights_sha256
        for problem in differences(history, ending, history, ending):
            self._fail(f"undisturbed: {problem}")
        if lost_images(history, ending) or history.repeated_images:
            raise BrokenError("undisturbed training does not see every image once")
        sampled: dict[str, str] = {}
        saved: dict[str, str] = {}
        if self._of("sample"):
            self._finish(self._start(work.sample(run.name), place=place))
            pictures = read_ending(run.store).pictures
            sampled = {name: sha256 for name, sha256 in pictures.items() if name not in ending.pictures}
        if self._of("batch", "shared-batch"):
            self._finish(self._start(work.batch(run.name), place=place))
            saved = saved_images(run.store)
        images_seen, sha256 = ending.ref[1], ending.weights_sha256
        self._tell(f"{self.name}: undisturbed, {images_seen:,} images in {seconds:.1f} s, {sha256[:16]}…")
        return Undisturbed(ending, history, _objects(bucket.sub(DATASET_KEY)), sampled, saved)

    def _finish(self, invocation: Invocation) -> None:
        if code := invocation.wait():
            raise BrokenError(f"`{' '.join(invocation.words[:2])}` ended with {code}: {_last_line(invocation)}")

    def _pack(self) -> None:
        for point in self._of("pack"):
            self._at_point(self._start(self._work.pack, point), point)
        self._finish(self._start(self._work.pack))
        if self._of("pack") and _objects(self._bucket.sub(DATASET_KEY)) != self.undisturbed.dataset:
            self._fail("the packed dataset is not the one that was packed undisturbed")

    def _train(self) -> Run:
        events: deque[Point | Moment] = deque([*self._of("train"), *self._moments, *self._of("end")])
        while True:
            self.tally.runs += 1
            name = f"run-{self.tally.runs}"
            run = Run(name, self._bucket.sub(f"{RUNS}/{name}"))
            self._one_run(run, events)
            self._compare(run)
            if not events:
                return run

    def _one_run(self, run: Run, events: deque[Point | Moment]) -> None:
        """Starts the command until the run is finished; each process meets the next event, if it comes to that."""
        finished = False
        while not finished:
            event = events[0] if events else None
            if isinstance(event, Point) and event.op == "rot":
                finished = self._rot(run, event, events)
                continue
            if isinstance(event, Point) and event.name == "zombie":
                finished = self._zombie(run, event)
                events.popleft()
                continue
            happened, finished = self._meet(run, event)
            if happened:
                events.popleft()
            elif finished and len(run.invocations) == 1 and event is not None:
                # Nothing else was in its way.
                event = events.popleft()
                if isinstance(event, Point):
                    self._fail(f"point {event.name} was not reached by a whole run")
                else:
                    events.appendleft(replace(event, fraction=event.fraction * SHORTER))

    def _meet(self, run: Run, event: Point | Moment | None) -> tuple[bool, bool]:
        """Starts a process that is to meet `event`; whether it did, and whether the run is finished."""
        if isinstance(event, Point) and event.fresh:
            self._new_cache()
        invocation = self._begin(run, event if isinstance(event, Point) else None)
        happened = False
        if isinstance(event, Moment):
            if (target := self._at_moment(run, invocation, event)) and event.at_once:
                run.lingering.append((invocation, replace(event, target=target)))
                return True, False
            happened = bool(target)
        elif isinstance(event, Point):
            happened = self._at_point(invocation, event)
        else:
            self._finish(invocation)
        code = invocation.wait()
        self._await_lingering(run)
        self._note_recovery(run, invocation)
        run.audit()
        return happened, code == Exit.FINISHED

    def _begin(self, run: Run, point: Point | None = None) -> Invocation:
        if run.invocations:
            self.tally.resumes += 1
        invocation = self._start(self._work.train(run.name), point)
        run.invocations.append(invocation)
        return invocation

    def _at_point(self, invocation: Invocation, point: Point) -> bool:
        code = invocation.wait()
        if invocation.find("fault") is None:
            if code:
                raise BrokenError(f"before {point.name} the command ended with {code}: {_last_line(invocation)}")
            return False
        self._expect(invocation, point.action, point.target, point.name)
        self._count(invocation, f"SIG{point.action.upper()} {point.target} at a point", point.name)
        return True

    def _at_moment(self, run: Run, invocation: Invocation, moment: Moment) -> str:
        """Sends the signal when it is time; who got it, or nothing if the run was finished before."""
        until = invocation.started + moment.fraction * self._expected_seconds(run)
        while time.time() < until and invocation.code is None:
            time.sleep(0.01)
        number = signal.SIGKILL if moment.action == "kill" else signal.SIGTERM
        target = moment.target
        # A rank that has not begun cannot be killed: the only process that there is takes its place.
        if target == "rank" and invocation.rank_pid(moment.rank) is None:
            target = "launcher"
        if invocation.code is not None or not invocation.send(number, target, moment.rank):
            if code := invocation.wait():
                raise BrokenError(f"before {moment.name} the command ended with {code}: {_last_line(invocation)}")
            return ""
        if not moment.at_once:
            invocation.wait()
            self._expect(invocation, moment.action, target, moment.name)
        self._count(invocation, f"SIG{moment.action.upper()} {target} at a random moment", moment.name)
        return target

    def _expected_seconds(self, run: Run) -> float:
        """How long the next process would take to the end of the run, at the pace of the one before."""
        done = max((ref.images_seen for ref in run.checkpoints), default=0)
        start_up, per_image = self._pace_seconds
        return start_up + (self.undisturbed.ending.ref[1] - done) * per_image

    def _expect(self, invocation: Invocation, action: str, target: str, name: str) -> None:
        code = invocation.code
        if code not in {*EXPECTED_CODES[action, target], Exit.FINISHED}:
            raise BrokenError(f"after {name} the command ended with {code}: {_last_line(invocation)}")

    def _await_lingering(self, run: Run) -> None:
        for invocation, moment in run.lingering:
            invocation.wait()
            self._note_recovery(run, invocation)
            self._expect(invocation, moment.action, moment.target, moment.name)
        run.lingering.clear()

    def _count(self, invocation: Invocation, kind: str, name: str) -> None:
        self.tally.kills[kind] += 1
        self._killed()
        steps = [event for event in invocation.events if event["event"] in ("began", "step")]
        fence, images = (steps[-1]["fence"], steps[-1].get("images_seen")) if steps else (0, None)
        where = "starting"
        if fence:
            where = f"attempt {fence}, " + (f"{images:,} images" if images else "before a step")
        seconds = time.time() - invocation.started
        self._tell(f"{self.name:<26} {name:<36} {where:<28} {seconds:5.1f} s")

    def _note_recovery(self, run: Run, invocation: Invocation) -> None:
        if (seconds := self._note_pace(invocation)) is not None and invocation is not run.invocations[0]:
            self.tally.recovery_seconds.append(seconds)

    def _note_pace(self, invocation: Invocation) -> float | None:
        """Seconds to the end of the first step, if there was one."""
        steps = [event for event in invocation.events if event["event"] == "step"]
        if not steps:
            return None
        start_up, per_image = steps[0]["time"] - invocation.started, self._pace_seconds[1]
        if images := steps[-1]["images_seen"] - steps[0]["images_seen"]:
            per_image = (steps[-1]["time"] - steps[0]["time"]) / images
        self._pace_seconds = start_up, per_image
        return float(start_up)

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
        elif not list(self._place.cache.glob("*/images")):
            return self._meet(run, _point("latest"))[1]
        else:
            where = str(rot.flip_cached_byte(self._place.cache))
        events.popleft()
        self.tally.rot[point.name] += 1
        self._tell(f"{self.name:<26} {point.name:<36} {where.rpartition('/disturbed/')[2]}")
        return False

    def _rotten_shard(self, run: Run, point: Point) -> bool:
        self._new_cache()
        replaced = rot.ReplacedImage(self._bucket)
        invocation = self._begin(run, _point("manifest"))
        code = invocation.wait()
        replaced.mend()
        self.tally.rot[point.name] += 1
        self._tell(f"{self.name:<26} {point.name:<36} {replaced.name}: exit {code}")
        if code != Exit.BAD_DATA or replaced.name not in invocation.output:
            raise BrokenError(
                f"a rotten shard was not noticed: {replaced.name} holds an image that was not packed, and training "
                f"ended with {code} instead of {int(Exit.BAD_DATA)}, after {_last_images(invocation):,} images"
            )
        return False

    def _new_cache(self) -> None:
        self._caches += 1
        self._place = Place(self._place.folder, self._place.folder / f"cache-{self._caches}", self._sabotage)

    def _zombie(self, run: Run, point: Point) -> bool:
        zombie = self._begin(run, point)
        zombie.wait_until(lambda: zombie.find("fault") or zombie.code is not None, f"did not reach {point.name}")
        if (fault := zombie.find("fault")) is None:
            raise BrokenError(f"point {point.name} was not reached: {_last_line(zombie)}")
        run.zombies.add(fault["fence"])
        self._count(zombie, "SIGSTOP group beyond expiry, then SIGCONT", point.name)
        other = self._begin(run)
        try:
            other.wait_until(lambda: other.find("commit") or other.code is not None, "did not replace a stopped holder")
        finally:
            zombie.send(signal.SIGCONT, "group")
        code, finished = zombie.wait(), other.wait()
        self._note_recovery(run, other)
        if finished:
            raise BrokenError(f"the attempt that replaced a stopped one ended with {finished}: {_last_line(other)}")
        if code != Exit.LOST_RUN:
            late = [event["ref"] for event in zombie.events if event["event"] == "commit"]
            raise BrokenError(
                f"two attempts wrote to one run: the fence of attempt {fault['fence']} was ignored, which woke after "
                f"it was replaced and ended with {code} instead of {int(Exit.LOST_RUN)}, with {len(late)} commits"
            )
        run.audit()
        return True

    def _compare(self, run: Run) -> None:
        ending, history = read_ending(run.store), run.history
        undisturbed = self.undisturbed
        self.tally.hashes.append(ending.weights_sha256)
        self.tally.lost_images += lost_images(history, ending)
        self.tally.repeated_images += history.repeated_images
        aside = run.set_aside
        self.tally.bad_checkpoints += len(aside)
        planted = {str(ref) for ref in run.rotten}
        if unexpected := sorted(aside - planted):
            self._fail(f"{run.name}: checkpoint {unexpected[0]} was set aside, and nobody had damaged it")
        if unseen := sorted(planted - aside):
            self._fail(f"{run.name}: checkpoint {unseen[0]} was damaged, and nobody noticed")
        problems = differences(history, ending, undisturbed.history, undisturbed.ending)
        for problem in [*problems, *run.written_after_loss()]:
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
        began = len(self._started)
        self._draw(self._work.batch(run.name), self._of("batch"))
        if self._of("batch"):
            if saved_images(run.store) != self.undisturbed.saved:
                self._fail("the images of `ddpm sample --count` are not those that were made undisturbed")
            made = Counter(e["uri"] for i in self._started[began:] for e in i.events if e["event"] == "piece")
            if twice := [uri for uri, count in made.items() if count > 1]:
                self._fail(f"{twice[0]} was committed twice")

    def _share(self, run: Run) -> None:
        """Has machines share packing and sampling, from nothing each time."""
        samples, dataset = run.store.sub(SAMPLES), self._bucket.sub(f"shared/{DATASET_KEY}")
        batch = self._work.batch(run.name)
        for point in self._of("shared-pack", "shared-batch"):
            is_packing = point.phase == "shared-pack"
            for entry in list(dataset.list() if is_packing else samples.list()):
                (dataset if is_packing else samples).delete(entry.key)
            killed = share_out(self._start, self._work.shared_pack if is_packing else batch, point)
            self._count(killed, f"SIGKILL of one of {point.machines} machines at a point", point.name)
            if is_packing and _objects(dataset) != self.undisturbed.dataset:
                self._fail(f"{point.name}: the dataset that machines packed together is not that of one machine")
            if not is_packing and saved_images(run.store) != self.undisturbed.saved:
                self._fail(f"{point.name}: the images that machines drew together are not those of one machine")

    def _draw(self, words: list[str], points: list[Point]) -> None:
        for point in points:
            if not self._at_point(self._start(words, point), point):
                self._fail(f"point {point.name} was not reached")
        if points:
            self._finish(self._start(words))


def _point(name: str) -> Point:
    return next(point for point in POINTS if point.name == name)


def _objects(store: Store) -> dict[str, bytes]:
    """A dataset's objects, without the journal, which stays behind when packing is killed after its commit."""
    keys = (entry.key for entry in store.list() if not entry.key.startswith(("pieces/", "claims/")))
    return {key: store.read(key).data for key in keys}


def _last_line(invocation: Invocation) -> str:
    return (invocation.output.strip().splitlines() or ["(it printed nothing)"])[-1]


def _last_images(invocation: Invocation) -> int:
    return max((event["images_seen"] for event in invocation.events if event["event"] == "step"), default=0)
