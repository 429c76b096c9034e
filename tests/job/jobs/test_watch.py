"""`--watch`, against an engine whose answers are written down beforehand, and a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from job.exits import TABLE, BadRequestError, BucketAwayError, Exit, JobError, NoPermissionError, StoppedError, retried
from job.jobs import watch
from job.jobs.backends.base import Backend, Cause, JobStatus, Manifest, NoCapacityError, State
from job.jobs.spec import JobSpec
from job.jobs.submit import submit_somewhere
from job.jobs.targets import parse_targets
from job.jobs.watch import LONGEST_PAUSE_SECONDS, MOST_FAILURES, POLL_SECONDS, JobEndedError, Watch

VM = parse_targets("vm: {backend: vm, project: my-project, zones: [us-east1-b], image: i}", "f")["vm"]
SPEC = JobSpec("train-a", "train", ("train", "--dataset", "a"), "i", "gs://bucket", run="a", max_hours=2.0)

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
"""When the clock begins."""
W, R, F, C, G = State.WAITING, State.RUNNING, State.FINISHED, State.CANCELLED, State.GONE
TAKEN = Cause.TAKEN_AWAY


@dataclass
class Engine:
    """What several places share: the answers to `status`, in order, and what was asked of them."""

    answers: list
    """A state, an exit code or a cause of a failed job, a pair of state and seconds that pass first, a status, or an
    error; a machine that was taken away is gone."""
    full: dict[str, int] = field(default_factory=dict)
    """How often each place has no machine."""
    now: float = 0.0
    told: list[str] = field(default_factory=list)
    submitted: list[tuple[str, float]] = field(default_factory=list)
    """Where, and for how many hours."""
    submitted_at: list[float] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    # The clock.
    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > 30 * 86400

    def clock(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return NOON + timedelta(seconds=self.now)


class Place(Backend):
    """One of the places of an engine."""

    def __init__(self, engine: Engine, places: tuple[str, ...]) -> None:
        super().__init__(VM)
        self.engine, self.name, self.rest = engine, places[0], places[1:]

    def elsewhere(self) -> Backend | None:
        return Place(self.engine, self.rest) if self.rest else None

    def render(self, spec: JobSpec) -> list[Manifest]:
        return [{}]

    def submit(self, spec: JobSpec) -> None:
        if self.engine.full.get(self.name, 0) > 0:
            self.engine.full[self.name] -= 1
            raise NoCapacityError(f"{self.name} has no machine")
        self.engine.submitted.append((self.name, spec.max_hours))
        self.engine.submitted_at.append(self.engine.now)

    def status(self, name: str) -> JobStatus:
        answer = self.engine.answers.pop(0)
        if isinstance(answer, tuple):
            answer, seconds = answer
            self.engine.now += seconds
        if isinstance(answer, JobError):
            raise answer
        if isinstance(answer, JobStatus):
            return answer
        if isinstance(answer, Cause):
            state = State.GONE if answer is TAKEN else State.FAILED
            return JobStatus(name, state, "because", cause=answer)
        if isinstance(answer, State):
            return JobStatus(name, answer, place=self.name if answer is R else "")
        return JobStatus(name, State.FAILED, "because", answer)

    def jobs(self) -> list[JobStatus]:
        return []

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool]) -> Iterator[str]:
        yield from ()

    def cancel(self, name: str) -> str:
        self.engine.cancelled.append(self.name)
        return "was told to stop"

    def describe(self, name: str) -> Manifest:
        return {}


class EnginesClock:
    def __init__(self, engine: Engine) -> None:
        self.now, self.utc, self.wait = engine.clock, engine.utc, engine.wait


def watching(engine: Engine, *places: str, spec: JobSpec = SPEC, is_finished: Callable[[], bool] = lambda: False):
    return Watch(Place(engine, places or ("a",)), spec, EnginesClock(engine), engine.told.append, is_finished)


def test_a_job_that_ends_well_is_submitted_once():
    engine = Engine([G, W, W, R, R, F])
    watching(engine).run()
    assert engine.submitted == [("a", 2.0)]
    assert engine.told == ["train-a is waiting", "train-a is running in a", "train-a is finished"]


def test_a_job_that_runs_already_is_watched_and_not_submitted():
    engine = Engine([R, R, F])
    watching(engine).run()
    assert engine.submitted == []
    assert engine.told[0] == "train-a is running already: watching it"


@pytest.mark.parametrize("before", [F, C, 66])
def test_a_job_that_was_over_before_is_submitted_again(before):
    engine = Engine([before, R, F])
    watching(engine).run()
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("code", sorted({*map(int, Exit), 1, 3, 134, 137, 139, 143, 255} - {0}))
def test_codes_are_tried_again_as_the_table_says(code):
    rule = retried(code)
    assert rule == (TABLE[Exit(code)].retried if code in TABLE else "bounded")
    count = {"never": 1, "bounded": MOST_FAILURES + 1, "always": 40}[rule]
    engine = Engine([G, *[code] * count, F])
    if rule == "always":
        watching(engine).run()
        assert len(engine.submitted) == count + 1
        return
    with pytest.raises(JobEndedError) as ended:
        watching(engine).run()
    assert ended.value.exit_code == code
    assert "because" in str(ended.value)
    assert len(engine.submitted) == count


def test_a_failure_without_a_code_counts():
    engine = Engine([G, *[None] * (MOST_FAILURES + 1)])
    with pytest.raises(JobEndedError, match="5th failure: giving up") as ended:
        watching(engine).run()
    assert ended.value.exit_code == 1


def test_preemptions_in_between_do_not_count_as_failures():
    engine = Engine([G, *[75, 137, TAKEN] * MOST_FAILURES, F])
    watching(engine).run()
    assert len(engine.submitted) == 3 * MOST_FAILURES + 1


def test_pauses_grow_to_a_limit_and_shrink_after_a_steady_run():
    engine = Engine([G, *[75] * 12, (R, 0), (R, 700), 75, R, F])
    watching(engine, spec=replace(SPEC, max_hours=500.0)).run()
    pauses = [later - earlier for earlier, later in pairwise(engine.submitted_at)]
    assert pauses[:6] == [10, 20, 40, 80, 160, 320]
    assert pauses[6:12] == [LONGEST_PAUSE_SECONDS] * 6
    assert pauses[12] == 700 + 2 * POLL_SECONDS + 10


def test_a_vm_that_is_gone_is_made_again_unless_its_run_is_finished():
    engine = Engine([G, R, G, R, G])
    answers = [False, True]
    watching(engine, is_finished=lambda: answers.pop(0)).run()
    assert len(engine.submitted) == 2
    assert engine.told[-1] == "train-a is finished, and its machine is gone"


def test_a_cancelled_job_is_left_alone():
    engine = Engine([G, R, C])
    with pytest.raises(StoppedError, match="was cancelled"):
        watching(engine).run()
    assert len(engine.submitted) == 1


def test_machines_that_are_gone_without_a_word_are_failures_however_long_they_ran():
    for attempt in ([G], [R, R, G], [(R, 0), (R, 3600.0), G]):
        engine = Engine([G, *attempt * 50])
        with pytest.raises(JobEndedError, match=r"train-a is gone, the 5th failure: giving up") as ended:
            watching(engine, spec=replace(SPEC, max_hours=500.0)).run()
        assert ended.value.exit_code == 1
        assert len(engine.submitted) == MOST_FAILURES + 1
    assert engine.told[-2] == "train-a is gone; submitting it again (failure 4 of 4)"


class Keeping(Place):
    """Of an engine that forgets no job by itself."""

    keeps_jobs = True


def test_where_an_engine_keeps_its_jobs_one_that_is_gone_was_deleted_and_stays_so():
    for answers, submissions in (([G, R, G], 1), ([R, G], 0), ([G, 137, G], 1)):
        engine = Engine(answers)
        with pytest.raises(StoppedError, match="train-a was deleted: what it saved stays") as stopped:
            Watch(Keeping(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
        assert stopped.value.exit_code == Exit.STOPPED
        assert len(engine.submitted) == submissions
    # One that is over for longer than its engine tells may have finished.
    engine = Engine([R, G])
    Watch(Keeping(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append, lambda: True).run()
    assert engine.told[-1] == "train-a is finished, and its machine is gone"
    # Who failed and is there still is tried again.
    engine = Engine([G, 137, 137, F])
    Watch(Keeping(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    assert len(engine.submitted) == 2


def test_without_a_machine_the_next_place_is_tried_and_then_all_again_later():
    engine = Engine([G, R, F], full={"a": 2, "b": 2, "c": 1})
    watching(engine, "a", "b", "c").run()
    assert (engine.submitted, engine.submitted_at) == ([("c", 2.0)], [10.0])
    assert [line for line in engine.told if "no machine" in line] == [
        "a has no machine; trying the next place",
        "b has no machine; trying the next place",
        "c has no machine; trying again from the first place",
        "a has no machine; trying the next place",
        "b has no machine; trying the next place",
    ]
    # However long that takes.
    engine = Engine([G, R, F], full={"a": 500})
    watching(engine, "a").run()
    assert engine.submitted == [("a", 2.0)]


def test_the_place_where_there_was_a_machine_is_asked_first_when_it_is_taken_away():
    engine = Engine([G, R, G, R, F], full={"a": 1})
    watching(engine, "a", "b").run()
    assert [place for place, _ in engine.submitted] == ["b", "b"]


def test_a_job_that_waits_for_too_long_is_moved():
    patience = int(watch.ELSEWHERE_SECONDS / POLL_SECONDS) + 2
    engine = Engine([G, *[W] * patience, R, C, R, F])
    watching(engine, "a", "b").run()
    assert engine.cancelled == ["a"]
    assert [place for place, _ in engine.submitted] == ["a", "b"]
    # Where there is no other place, patience is all there is.
    engine = Engine([G, *[W] * 500, R, F])
    watching(engine, "a").run()
    assert engine.cancelled == []


def test_max_hours_hold_for_all_attempts_together():
    half_an_hour = [(R, 0.0), (R, 1800.0), 75]
    engine = Engine([G, *half_an_hour * 6])
    with pytest.raises(StoppedError, match="has used its 2 hours"):
        watching(engine).run()
    hours = [hours for _, hours in engine.submitted]
    assert hours[0] == 2.0
    assert 3 <= len(hours) <= 4
    assert all(later < earlier - 0.5 for earlier, later in pairwise(hours))


@pytest.mark.parametrize("created", ["2026-01-31T11:00:00Z", "2026-01-31T11:00:00.123456+00:00"])
def test_the_hours_of_a_job_that_runs_already_began_when_it_did(created):
    there = JobStatus("train-a", R, created=created)
    engine = Engine([there, 75, R, F])
    watching(engine).run()
    ((_, hours),) = engine.submitted
    assert 0.98 < hours < 1
    engine = Engine([replace(there, created="2026-01-31T09:00:00Z"), 75])
    with pytest.raises(StoppedError, match="has used its 2 hours"):
        watching(engine).run()
    assert engine.submitted == []
    # Between two attempts it has run; who waits for a first machine has not, and a time that cannot be read is none.
    engine = Engine([replace(there, state=W, attempts=2), 75, R, F])
    watching(engine).run()
    assert engine.submitted[0][1] < 1
    for other in (replace(there, state=W, attempts=1), replace(there, created="")):
        engine = Engine([other, 75, R, F])
        watching(engine).run()
        assert engine.submitted[0][1] > 1.9


def test_what_the_engine_ended_for_its_hours_has_used_them():
    for answers, submissions in (([R, Cause.OUT_OF_TIME], 0), ([G, R, Cause.OUT_OF_TIME], 1)):
        engine = Engine(answers)
        with pytest.raises(StoppedError, match="has used its 2 hours: the same command goes on") as stopped:
            watching(engine).run()
        assert stopped.value.exit_code == Exit.STOPPED
        assert len(engine.submitted) == submissions


def test_time_without_a_machine_costs_nothing():
    engine = Engine([G, *[(W, 3600.0)] * 10, (R, 0.0), F])
    watching(engine).run()
    assert engine.submitted == [("a", 2.0)]


def test_time_on_a_machine_that_gets_ready_counts():
    ready = JobStatus("train-a", W, "the GPU driver is being installed", has_machine=True)
    engine = Engine([G, *[ready, (ready, 600.0), TAKEN] * 50])
    with pytest.raises(StoppedError, match="has used its 2 hours"):
        watching(engine).run()
    assert 10 <= len(engine.submitted) <= 12


def test_an_engine_that_does_not_answer_leaves_the_job_alone():
    away = BucketAwayError("the API is away")
    engine = Engine([G, R, *[away] * 100, R, F])
    watching(engine).run()
    assert len(engine.submitted) == 1
    assert engine.told.count("the API is away; the job goes on meanwhile") == 1


def test_what_an_engine_refuses_ends_the_watch():
    with pytest.raises(NoPermissionError):
        watching(Engine([NoPermissionError("no")])).run()

    class Refusing(Place):
        def submit(self, spec: JobSpec) -> None:
            raise BadRequestError("no such GPU")

    engine = Engine([G, G])
    with pytest.raises(BadRequestError, match="no such GPU"):
        Watch(Refusing(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    # The answer to the first request was lost: the second finds the job there.
    engine = Engine([G, R, R, F])
    Watch(Refusing(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()


def test_a_watch_that_is_told_to_stop_leaves_the_job_alone():
    engine = Engine([G, *[(R, 86400.0)] * 40])
    with pytest.raises(StoppedError, match="no longer watching train-a, which goes on"):
        watching(engine, spec=replace(SPEC, max_hours=700.0)).run()
    assert engine.cancelled == []


def test_without_watch_each_place_is_tried_once():
    engine = Engine([], full={"a": 1})
    assert submit_somewhere(Place(engine, ("a", "b")), SPEC).name == "b"
    engine = Engine([], full={"a": 1, "b": 1})
    with pytest.raises(NoCapacityError, match="b has no machine; --watch tries until there is one"):
        submit_somewhere(Place(engine, ("a", "b")), SPEC)
    assert engine.submitted == []
