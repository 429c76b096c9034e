"""`--watch`, against an engine whose answers are written down beforehand, and a clock that only they move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from job.coordination.outcome import Outcome
from job.exits import BadRequestError, BucketAwayError, Exit, JobError, NoPermissionError, State, StoppedError
from job.jobs import backends, watch
from job.jobs.backends import Cause, JobStatus, NoCapacityError, Target
from job.jobs.spec import JobSpec
from job.jobs.watch import ELSEWHERE_SECONDS, LONGEST_PAUSE_SECONDS, WATCH_POLL_SECONDS, JobEndedError, Watch
from job.store import open_store
from tests.job.command_line import raised
from tests.job.jobs import submitting

SPEC = JobSpec("train-a", "train", ("train", "--dataset", "a"), "i", "/nowhere", run="a", max_hours=2.0)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
"""When the clock begins."""
WAITING, RUNNING, FINISHED, STOPPED = State.WAITING, State.RUNNING, State.FINISHED, State.STOPPED
CANCELLED, GONE, TAKEN, OUT_OF_TIME = State.CANCELLED, State.GONE, Cause.TAKEN_AWAY, Cause.OUT_OF_TIME
DAY = 86_400.0
PATIENCE = int(ELSEWHERE_SECONDS / WATCH_POLL_SECONDS) + 2
"""Looks at a job that waits, after which it is moved."""
MOST_FAILURES = 4
WAITED = [(WAITING, 45.0)] * 160
"""Two hours without a machine."""
USED = "has used its 2 hours"
AWAY, OVER = BucketAwayError("the API is away"), BadRequestError("it is over: the request had arrived")
ENDS = [RUNNING, FINISHED]


def status(state: State, message: str = "", **known: Any) -> JobStatus:
    return JobStatus("train-a", state, message, **known)


@dataclass
class Engine:
    """What several places share, and the clock.

    Attributes:
        answers: to `status`, in order; the last one stays. Each is a state, an exit code or a cause of a failed job, a
            status, an error, or a pair of one of these and the seconds that pass before it.
        full: how often each place has no machine.
        cancelling: what `cancel` raises, in order, before it works.
        refusal: what `submit` raises.
        keeps_ended: see `Target`.
    """

    answers: list
    full: dict[str, int] = field(default_factory=dict)
    cancelling: list[JobError] = field(default_factory=list)
    refusal: JobError | None = None
    keeps_ended: bool = False
    is_remote: bool = True
    seconds: float = NOON
    told: list[str] = field(default_factory=list)
    submitted: list[tuple[str, float]] = field(default_factory=list)
    """Where, and for how many hours."""
    retries: list[int] = field(default_factory=list)
    """Failures that the engine may follow by itself, of each that was submitted."""
    submitted_at: list[float] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    at_submission: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        return self.seconds > NOON + 30 * 86400

    def watch(self, *places: str, **changes: Any) -> Engine:
        """Watches a job on it, in which `changes` replace fields, to its end; its usual bucket is nowhere."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (watch, backends):
                patch.setattr(module, "note", self.told.append)
            Watch(Place(self, places or ("a",)), replace(SPEC, **changes), self.wait, self.now).run()
        return self

    def stops(self, match: str, *places: str, **changes: Any) -> Engine:
        """The same, with an end that leaves a job to be gone on with."""
        with pytest.raises(StoppedError, match=match) as stopped:
            self.watch(*places, **changes)
        assert stopped.value.exit_code == Exit.STOPPED
        return self

    def fails(self, match: str, code: int = 137, **changes: Any) -> Engine:
        """The same, with an end that nobody tries again."""
        with pytest.raises(JobEndedError, match=match) as ended:
            self.watch(**changes)
        assert ended.value.exit_code == code
        return self

    @property
    def places(self) -> list[str]:
        """Where it was submitted."""
        return [place for place, _ in self.submitted]

    @property
    def hours(self) -> list[float]:
        """For how many hours each time."""
        return [hours for _, hours in self.submitted]


class Place:
    """One of the places of an engine: what the watch asks of a `Target`."""

    submit_where_possible, limits_attempts = Target.submit_where_possible, False

    def __init__(self, engine: Engine, places: tuple[str, ...]) -> None:
        self.engine, self.name, self.rest = engine, places[0], places[1:]
        self.keeps_ended = engine.keeps_ended
        self.is_remote = engine.is_remote

    def elsewhere(self) -> Place | None:
        return Place(self.engine, self.rest) if self.rest else None

    def submit(self, spec: JobSpec) -> None:
        if self.engine.refusal:
            raise self.engine.refusal
        if self.engine.full.get(self.name, 0) > 0:
            self.engine.full[self.name] -= 1
            raise NoCapacityError(f"{self.name} has no machine")
        self.engine.at_submission()
        self.engine.submitted.append((self.name, spec.max_hours))
        self.engine.retries.append(spec.retries)
        self.engine.submitted_at.append(self.engine.seconds - NOON)

    def alive(self, name: str) -> JobStatus:
        answers = self.engine.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer, seconds = answer if isinstance(answer, tuple) else (answer, 0.0)
        self.engine.seconds += seconds
        match answer:
            case JobError():
                raise answer
            case JobStatus():
                return answer
            case Cause():
                return JobStatus(name, GONE if answer is TAKEN else State.FAILED, "because", cause=answer)
            case State():
                return JobStatus(name, answer, place=self.name if answer is RUNNING else "")
        return JobStatus(name, State.FAILED, "because", answer)

    def cancel(self, name: str) -> str:
        if self.engine.cancelling:
            raise self.engine.cancelling.pop(0)
        self.engine.cancelled.append(self.name)
        return "is stopping"


def test_absent_jobs_are_submitted():
    engine = Engine([GONE, WAITING, WAITING, RUNNING, *ENDS]).watch()
    assert engine.submitted == [("a", 2.0)]
    assert engine.told == ["train-a is waiting", "train-a is running in a", "train-a is finished"]
    engine = Engine([RUNNING, *ENDS]).watch()
    assert engine.submitted == []
    assert engine.told[0] == "train-a is running already: watching it"
    for over in (FINISHED, CANCELLED, 66):
        assert len(Engine([over, *ENDS]).watch().submitted) == 1


def test_codes_are_retried_by_table():
    never = [2, 64, 65, 66, 70, 74, 76, 77, 78]
    bounded = [1, 3, 68, 69, 71, 72, 134, 137, 139, 143, 255, None, GONE]
    always = [75, TAKEN]
    assert {int(code) for code in Exit} - {0} <= {*never, *bounded, *always}
    for ending in never + bounded:
        engine = Engine([GONE, ending]).fails("^train-a ", ending if type(ending) is int else 1)
        assert len(engine.submitted) == (MOST_FAILURES + 1 if ending in bounded else 1), ending
    for ending in always:
        assert len(Engine([GONE, *[ending] * 40, FINISHED]).watch().submitted) == 41, ending
    # In between, these count for nothing.
    engine = Engine([GONE, *[75, 137, TAKEN] * MOST_FAILURES, FINISHED]).watch()
    assert len(engine.submitted) == 3 * MOST_FAILURES + 1
    Engine([GONE, 137]).fails(r"ended with 137, the 5th failure: giving up: because")


def test_failures_of_the_engine_count():
    five, three = (status(State.FAILED, "because", exit_code=137, failures=count) for count in (5, 3))
    engine = Engine([GONE, RUNNING, five]).fails(r"ended with 137, the 5th failure: giving up: because")
    assert engine.retries == [4]
    # Three before its hours were over without a machine, one, and the last that there may be.
    late = replace(three, exit_code=None, cause=OUT_OF_TIME)
    assert Engine([GONE, late, RUNNING, 137, RUNNING, 137]).fails("the 5th failure").retries == [4, 1, 0]


def test_bucket_counts_without_the_engine(tmp_path):
    def engine(*words: str, ending=GONE, answers=()) -> Engine:
        """What each attempt says before its end, as `state code why`; the first is there before."""
        told = list(words)

        def say() -> None:
            if told and (word := told.pop(0)):
                state, code, *why = word.split(maxsplit=2)
                later = "2026-02-28T12:00:00Z"
                said = Outcome(state=state, exit_code=int(code), updated=later, message="".join(why))
                open_store(str(tmp_path)).put("jobs/train-a/0-of-1.json", said.to_json())

        (tmp_path / "jobs/train-a/0-of-1.json").unlink(missing_ok=True)
        say()
        return Engine([*answers] or [GONE, RUNNING, ending], at_submission=say, keeps_ended=bool(answers))

    there = {"bucket": str(tmp_path)}
    # A VM is gone, and its job had finished; whether it could say in time that it was taken away or not.
    for ending in (GONE, TAKEN):
        assert engine("", "finished 0", ending=ending).watch(**there).told[-1] == "train-a is finished"
        said = "ended with 78, which would come again: no such key"
        engine("", "failed 78 no such key", ending=ending).fails(said, 78, **there)
    # Its engine remembered it for a day, and the machine that watches slept.
    slept = engine("", "finished 0", answers=[GONE, RUNNING, (GONE, 2 * DAY)])
    assert slept.watch(**there).told[-1] == "train-a is finished"
    # Who deletes it has it stop.
    engine("", "stopped 75", "finished 0", answers=[GONE, RUNNING, GONE, FINISHED]).stops(
        "deleted by a person", **there
    )
    # What was there before is an earlier job's.
    engine("failed 78").fails("is gone, the 5th failure", 1, **there)
    # Stopped with all saved, and not counted.
    words = [f"stopped 75 {number}" for number in range(9)]
    assert len(engine("", *words, "finished 0").watch(**there).submitted) == 10
    # An engine that knows better.
    engine("", "finished 0", ending=70).fails("ended with 70", 70, **there)


def test_pauses_grow_and_shrink():
    engine = Engine([GONE, *[75] * 12, (RUNNING, 0), (RUNNING, 700), 75, *ENDS]).watch(max_hours=500.0)
    pauses = [later - earlier for earlier, later in pairwise(engine.submitted_at)]
    assert pauses[:6] == [10, 20, 40, 80, 160, 320]
    assert pauses[6:12] == [LONGEST_PAUSE_SECONDS] * 6
    assert pauses[12] == 700 + 2 * WATCH_POLL_SECONDS + 10


def test_cancelled_jobs_are_left_alone():
    saved = "its saved state stays"
    assert len(Engine([GONE, RUNNING, CANCELLED]).stops("was cancelled").submitted) == 1
    Engine([GONE, RUNNING, status(CANCELLED, "its queue")]).stops(rf"was cancelled \(its queue\): {saved}")
    # On this machine nothing else stops a job.
    stopped = status(STOPPED, exit_code=75)
    Engine([GONE, RUNNING, stopped], is_remote=False).stops(f"was cancelled: {saved}")
    assert len(Engine([GONE, RUNNING, stopped, *ENDS]).watch().submitted) == 2
    for answers, submissions in (([GONE, RUNNING, GONE], 1), ([RUNNING, GONE], 0), ([GONE, 137, GONE], 1)):
        engine = Engine(answers, keeps_ended=True).stops("train-a is gone, deleted by a person or over for longer")
        assert len(engine.submitted) == submissions
    # Who failed and is there still is tried again.
    assert len(Engine([GONE, 137, 137, FINISHED], keeps_ended=True).watch().submitted) == 2


def test_next_places_are_tried():
    engine = Engine([GONE, *ENDS], full={"a": 2, "b": 2, "c": 1}).watch("a", "b", "c")
    assert (engine.submitted, engine.submitted_at) == ([("c", 2.0)], [10.0])
    following = [f"{place} has no machine; trying the next place" for place in "ab"]
    again = "c has no machine; trying again from the first place"
    assert [line for line in engine.told if "no machine" in line] == [*following, again, *following]
    # However long that takes; and where there was one, there may be one again.
    assert Engine([GONE, *ENDS], full={"a": 500}).watch("a").submitted == [("a", 2.0)]
    assert Engine([GONE, RUNNING, GONE, *ENDS], full={"a": 1}).watch("a", "b").places == ["b", "b"]
    # Without the watch each is tried once.
    assert Place(Engine([GONE], full={"a": 1}), ("a", "b")).submit_where_possible(SPEC).name == "b"
    full = Place(Engine([GONE], full={"a": 1, "b": 1}), ("a", "b"))
    raised(NoCapacityError, "b has no machine", full.submit_where_possible, SPEC)


def test_waiting_jobs_are_moved():
    for cancelling in ([], [AWAY] * 3, [*[AWAY] * 3, OVER]):
        engine = Engine([GONE, *[WAITING] * PATIENCE, CANCELLED, *ENDS], cancelling=[*cancelling]).watch("a", "b")
        assert engine.places == ["a", "b"], cancelling
        assert engine.told.count("the API is away; trying again to remove train-a") == bool(cancelling)
    # One that gets ready has a machine; and where there is no other place, patience is all there is.
    ready = status(WAITING, "the image is being pulled", has_machine=True)
    assert Engine([GONE, *[ready] * PATIENCE, *ENDS]).watch("a", "b").cancelled == []
    assert Engine([GONE, *[WAITING] * 500, *ENDS]).watch("a").cancelled == []
    # One that ended by itself meanwhile.
    engine = Engine([GONE, *[WAITING] * PATIENCE, FINISHED], cancelling=[OVER]).watch("a", "b")
    assert len(engine.submitted) == 1


def test_jobs_without_image_are_removed():
    without = status(WAITING, "ImagePullBackOff", cause=Cause.NO_IMAGE, has_machine=True)
    engine = Engine([GONE, *[without] * 22, GONE]).fails("train-a cannot begin, and is removed: ImagePullBackOff", 66)
    assert engine.cancelled == ["a"]
    # Somebody pushed it just in time.
    assert Engine([GONE, *[without] * 15, WAITING, *[without] * 15, *ENDS]).watch().cancelled == []


def test_silent_engines_leave_jobs_alone():
    engine = Engine([GONE, RUNNING, *[AWAY] * 100, *ENDS]).watch()
    assert len(engine.submitted) == 1
    assert engine.told.count("the API is away; the job goes on meanwhile") == 1
    for refusal in (NoPermissionError("no"), BadRequestError("no such GPU")):
        raised(type(refusal), str(refusal), Engine([GONE, GONE], refusal=refusal).watch)
    # The answer to the first request was lost: the second finds the job there.
    Engine([GONE, RUNNING, *ENDS], refusal=refusal).watch()
    # Nor is it ended with the watch.
    engine = Engine([GONE, (RUNNING, DAY)]).stops("no longer watching train-a, which goes on", max_hours=700.0)
    assert engine.cancelled == []


def test_max_hours_hold_for_all_attempts():
    engine = Engine([GONE, *[(RUNNING, 0.0), (RUNNING, 1800.0), 75] * 6])
    hours = engine.stops(f"{USED}: the same command goes on").hours
    assert hours[0] == 2.0 and 3 <= len(hours) <= 4
    assert all(later < earlier - 0.5 for earlier, later in pairwise(hours))
    # A machine that only gets ready is paid for, too; the time without one is not.
    ready = status(WAITING, "the GPU driver is being installed", has_machine=True)
    assert 10 <= len(Engine([GONE, *[ready, (ready, 600.0), TAKEN] * 50]).stops(USED).submitted) <= 12
    assert Engine([GONE, *[(WAITING, 3600.0)] * 10, (RUNNING, 0.0), FINISHED]).watch().submitted == [("a", 2.0)]
    # Where nobody named a limit there is none.
    engine = Engine([GONE, RUNNING, (RUNNING, 360_000.0), 137, *ENDS]).watch(max_hours=math.inf)
    assert engine.submitted == [("a", math.inf), ("a", math.inf)]


THERE = status(RUNNING, created="2026-01-31T11:00:00Z")
EVICTED = replace(THERE, state=WAITING)


def test_hours_begin_with_the_job(tmp_path):
    place = tmp_path / "jobs/train-a/0-of-1.json"
    for first, said_at, least, most in (
        (THERE, "", 0.98, 1.0),
        (replace(THERE, created="2026-01-31T11:00:00.123456+00:00"), "", 0.98, 1.001),
        # Who waits for a first machine has not run, and a time that is none is none.
        (EVICTED, "", 1.9, 2.0),
        (replace(THERE, created=""), "", 1.9, 2.0),
        # An engine forgets an evicted attempt, and the job's bucket does not; an earlier job's word is none of it.
        (EVICTED, "2026-01-31T11:30:00Z", 0.9, 1.0),
        (EVICTED, "2026-01-31T10:30:00Z", 1.9, 2.0),
    ):
        place.unlink(missing_ok=True)
        if said_at:
            said = Outcome(state="stopped", exit_code=75, updated=said_at)
            open_store(str(tmp_path)).put("jobs/train-a/0-of-1.json", said.to_json())
        (hours,) = Engine([first, 75, *ENDS]).watch(bucket=str(tmp_path)).hours
        assert least < hours <= most, (first, said_at)
    assert Engine([replace(THERE, created="2026-01-31T09:00:00Z"), 75]).stops(USED).submitted == []


def test_waiting_uses_no_hours():
    for answers, submissions in (
        ([RUNNING, (OUT_OF_TIME, 7200.0)], 0),
        ([GONE, RUNNING, (RUNNING, 7000.0), OUT_OF_TIME], 1),
        # Nobody looked while it got its machine, and had it.
        ([GONE, WAITING, (OUT_OF_TIME, 9000.0)], 1),
    ):
        assert len(Engine(answers).stops(USED).submitted) == submissions
    for keeps_ended in (False, True):
        looks = 2 if keeps_ended else 1
        answers = [GONE, *WAITED, *[OUT_OF_TIME] * looks, RUNNING, (RUNNING, 1800.0), *[75] * looks, *ENDS]
        engine = Engine(answers, keeps_ended=keeps_ended).watch()
        first, second, third = engine.hours
        assert first == 2.0 and second > 1.97 and 1.4 < third < 1.5
        assert "train-a had a machine for less than its 2 hours; submitting it again" in engine.told
    Engine([GONE, RUNNING, (RUNNING, 7000.0), OUT_OF_TIME], keeps_ended=True).stops(USED)


def test_jobs_without_machine_never_started():
    no_node = status(WAITING, "FailedScheduling: 0/3 nodes")
    said = r"train-a never started within its 0.02 hours \(FailedScheduling: 0/3 nodes\): the same command goes on"
    Engine([GONE, *[no_node] * 5, OUT_OF_TIME]).stops(said, max_hours=0.02)
    # One that had a machine for a while has, also if it waited for another in the end.
    Engine([GONE, RUNNING, no_node, no_node, OUT_OF_TIME]).stops("has used its 0.02 hours", max_hours=0.02)


def test_waiting_ends_with_the_hours():
    used = [GONE, RUNNING, (RUNNING, 7200.0)]
    for keeps_ended in (False, True):
        assert Engine([*used, WAITING, GONE], keeps_ended=keeps_ended).stops(USED).cancelled == ["a"]
    # Made three days ago, preempted once: it may have run for most of them, or for minutes.
    waiting = status(WAITING, created="2026-01-28T12:00:00Z", attempts=2)
    engine = Engine([waiting, waiting, *ENDS]).watch()
    assert engine.cancelled == [] and engine.submitted == []
    # One that had ended by itself is told as it ended.
    assert Engine([*used, WAITING, FINISHED], cancelling=[OVER]).watch().told[-1] == "train-a is finished"
    # On this machine its own deadline ends it as somebody would who cancels it.
    assert Engine([*used, CANCELLED]).stops(f"{USED}: the same command").submitted == [("a", 2)]
    assert replace(SPEC, max_hours=0.5).argv_that_ends == (*SPEC.argv, "--stop-after", "1800s")
    assert replace(SPEC, max_hours=math.inf).argv_that_ends == SPEC.argv
    words = replace(SPEC, argv=("data", "pack", "--", "-a", "b")).argv_that_ends
    assert words == ("data", "pack", "--stop-after", "7200s", "--", "-a", "b")


def watched(backend, *happenings):
    """Watches a job to its end; after each look, and in each pause, the next thing happens on the engine."""
    following = iter(happenings)
    Watch(backend, submitting.spec(), lambda seconds: bool(next(following)())).run()
    assert next(following, None) is None


def nothing():
    """A pause passes."""


def test_batch_jobs_are_submitted_again(cloud):
    def becomes(state, *codes):
        cloud.batch.end_task(*codes)
        cloud.batch.move(state)

    def runs():
        becomes("RUNNING")

    backend = submitting.target("batch")
    lost = [lambda: becomes("FAILED", *[50001] * 10), nothing, runs]
    watched(backend, runs, *lost * 6, lambda: becomes("SUCCEEDED", 0))
    raised(JobEndedError, "could not be ended", watched, backend, runs, lambda: becomes("FAILED", 50004))
    # Batch makes eleven attempts by itself.
    said = "ended with 137, the 6th failure: giving up"
    raised(JobEndedError, said, watched, backend, runs, lambda: becomes("FAILED", *[50001] * 5, *[137] * 6))


def test_cluster_jobs_are_submitted_again(server):
    name, pods, backend = "train-celeba", [], submitting.target()

    def runs():
        pods.append(server.start_pod(name))

    def ends(code, *how):
        server.end_pod(pods.pop(), code)
        server.end_job(name, *how)

    def late():
        server.remove("pods", pods.pop())
        server.end_job(name, "Failed", "DeadlineExceeded")

    # Of the five failures that it may have three are used up before it waits for a node until its hours are over.
    crashed = [runs, lambda: server.end_pod(pods[-1], 137)] * 3
    watched(backend, *crashed, runs, late, nothing, runs, lambda: ends(0, "Complete"))
    assert [body["spec"]["backoffLimit"] for body in server.bodies] == [4, 1]
    with pytest.raises(JobEndedError, match="ended with 137, the 5th failure: giving up") as failed:
        watched(backend, runs, lambda: ends(137, "Failed", "BackoffLimitExceeded"))
    assert (failed.value.exit_code, len(server.bodies)) == (137, 3)
    with pytest.raises(StoppedError, match="deleted by a person") as stopped:
        watched(backend, runs, lambda: server.remove("jobs", name))
    assert stopped.value.exit_code is Exit.STOPPED
