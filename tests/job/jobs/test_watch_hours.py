"""What `--watch` counts of `max_hours`, and what it does when they are used up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from job.exits import BadRequestError, BucketAwayError, Exit, MissingInputError, StoppedError
from job.jobs.backends.base import Cause, JobStatus
from job.jobs.watch import Watch
from tests.job.jobs.written_engine import (
    SPEC,
    TAKEN,
    Engine,
    EnginesClock,
    F,
    G,
    Keeping,
    Place,
    R,
    W,
    watching,
)


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
    for answers, submissions in (
        ([R, (Cause.OUT_OF_TIME, 7200.0)], 0),
        ([G, R, (R, 7000.0), Cause.OUT_OF_TIME], 1),
        # Nobody looked while it got its machine, and had it.
        ([G, W, (Cause.OUT_OF_TIME, 9000.0)], 1),
    ):
        engine = Engine(answers)
        with pytest.raises(StoppedError, match="has used its 2 hours: the same command goes on") as stopped:
            watching(engine).run()
        assert stopped.value.exit_code == Exit.STOPPED
        assert len(engine.submitted) == submissions


def test_what_the_engine_ended_for_hours_in_which_it_only_waited_has_most_of_them_still():
    engine = Engine([G, *[(W, 45.0)] * 160, Cause.OUT_OF_TIME, R, (R, 1800.0), 75, R, F])
    watching(engine).run()
    assert [place for place, _ in engine.submitted] == ["a", "a", "a"]
    (_, first), (_, second), (_, third) = engine.submitted
    assert first == 2.0 and second > 1.99 and 1.4 < third < 1.5
    assert "train-a had a machine for less than its 2 hours; submitting it again" in engine.told
    assert not any("failure" in line for line in engine.told)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_job_that_waits_for_its_next_machine_when_its_hours_are_used_is_removed(keeps):
    engine = Engine([G, R, (R, 7200.0), W, G])
    place = (Keeping if keeps else Place)(engine, ("a",))
    with pytest.raises(StoppedError, match="has used its 2 hours"):
        Watch(place, SPEC, EnginesClock(engine), engine.told.append).run()
    assert engine.cancelled == ["a"]


def test_a_job_that_waits_is_not_removed_for_hours_that_nobody_saw():
    # Made three days ago, preempted once: it may have run for most of them, or for minutes.
    waiting = JobStatus("train-a", W, created="2026-01-28T12:00:00Z", attempts=2)
    engine = Engine([waiting, waiting, R, F])
    watching(engine).run()
    assert engine.cancelled == [] and engine.submitted == []


def test_a_job_that_ended_by_itself_before_it_was_removed_is_told_as_it_ended():
    class Over(Place):
        def cancel(self, name: str) -> str:
            raise BadRequestError("it is over")

    engine = Engine([G, R, (R, 7200.0), W, F])
    Watch(Over(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    assert engine.told[-1] == "train-a is finished"


def test_a_removal_whose_answer_was_lost_was_nobody_else_s():
    answers = [BucketAwayError("the API is away"), MissingInputError("there is no such job")]

    class Lost(Keeping):
        def cancel(self, name: str) -> str:
            raise answers.pop(0)

    stopped = JobStatus("train-a", W, "stopped", cause=Cause.OUT_OF_TIME)
    engine = Engine([G, *[(W, 45.0)] * 160, stopped, G, G, R, F])
    Watch(Lost(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    assert len(engine.submitted) == 2


def test_a_job_that_ends_itself_has_what_is_left_of_its_hours():
    spec = replace(SPEC, argv=(*SPEC.argv, "--stop-after", "7200s"))
    assert spec.lasting(0.5).argv == (*SPEC.argv, "--stop-after", "1800s")
    assert spec.lasting(0.5).max_hours == 0.5
    # What a person wrote stays.
    own = replace(SPEC, argv=(*SPEC.argv, "--stop-after", "3600s"))
    assert own.lasting(0.5).argv == own.argv


def test_what_a_queue_stopped_for_good_is_removed_and_submitted_again_if_it_has_hours_left():
    stopped = JobStatus("train-a", W, "stopped", cause=Cause.OUT_OF_TIME)
    engine = Engine([G, *[(W, 45.0)] * 160, stopped, G, R, F])
    Watch(Keeping(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    assert engine.cancelled == ["a"] and len(engine.submitted) == 2
    engine = Engine([G, R, (R, 7000.0), stopped, G, R, F])
    with pytest.raises(StoppedError, match="has used its 2 hours"):
        Watch(Keeping(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append).run()
    assert engine.cancelled == ["a"] and len(engine.submitted) == 1


def test_a_job_without_a_limit_is_submitted_again_however_long_it_ran():
    engine = Engine([G, R, (R, 360_000.0), 137, R, F])
    Watch(Place(engine, ("a",)), SPEC, EnginesClock(engine), engine.told.append, has_limit=False).run()
    assert engine.submitted == [("a", 2.0), ("a", 2.0)]


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
