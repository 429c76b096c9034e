"""`--watch`, against an engine whose answers are written down beforehand, and a clock that only they move."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from job.exits import TABLE, BadRequestError, BucketAwayError, Exit, NoPermissionError, StoppedError, retried
from job.jobs import watch
from job.jobs.backends.base import JobStatus, NoCapacityError
from job.jobs.spec import JobSpec
from job.jobs.submit import submit_somewhere
from job.jobs.watch import LONGEST_PAUSE_SECONDS, MOST_FAILURES, POLL_SECONDS, JobEndedError, Watch
from tests.job.jobs.written_engine import (
    SPEC,
    TAKEN,
    C,
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
    # One that gets ready has a machine, and would only begin anew elsewhere.
    ready = JobStatus("train-a", W, "the image is being pulled", has_machine=True)
    engine = Engine([G, *[ready] * patience, R, F])
    watching(engine, "a", "b").run()
    assert engine.cancelled == []
    # Where there is no other place, patience is all there is.
    engine = Engine([G, *[W] * 500, R, F])
    watching(engine, "a").run()
    assert engine.cancelled == []


@pytest.mark.parametrize("arrived", [True, False])
def test_a_job_is_moved_though_the_engine_is_away_meanwhile(arrived):
    patience = int(watch.ELSEWHERE_SECONDS / POLL_SECONDS) + 2
    engine = Engine([G, *[W] * patience, *[C] * (1 + arrived), R, F])
    answers = [BucketAwayError("the API is away")] * 3 + ([BadRequestError("it is over")] if arrived else [])

    class Away(Place):
        def cancel(self, name: str) -> str:
            if answers:
                raise answers.pop(0)
            return super().cancel(name)

    Watch(Away(engine, ("a", "b")), SPEC, EnginesClock(engine), engine.told.append).run()
    assert engine.told.count("the API is away; trying again to end train-a") == 3
    assert engine.cancelled == ([] if arrived else ["a"])
    assert [place for place, _ in engine.submitted] == ["a", "b"]


def test_a_job_that_ends_by_itself_while_it_is_moved_is_not_submitted_elsewhere():
    patience = int(watch.ELSEWHERE_SECONDS / POLL_SECONDS) + 2

    class Over(Place):
        def cancel(self, name: str) -> str:
            raise BadRequestError("it is over")

    engine = Engine([G, *[W] * patience, F])
    Watch(Over(engine, ("a", "b")), SPEC, EnginesClock(engine), engine.told.append).run()
    assert [place for place, _ in engine.submitted] == ["a"]


def test_what_an_engine_has_forgotten_while_nobody_looked_was_not_deleted():
    spec = replace(SPEC, max_hours=240.0)
    engine = Engine([G, R, R, (G, 2 * 86_400.0), G, R, F])
    Watch(Keeping(engine, ("a",)), spec, EnginesClock(engine), engine.told.append).run()
    assert len(engine.submitted) == 2
    assert "train-a is gone; submitting it again (failure 1 of 4)" in engine.told


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
