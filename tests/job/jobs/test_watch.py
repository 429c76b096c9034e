"""`--watch`, against an engine whose answers are written down beforehand, and a clock that only they move."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from job.coordination.outcome import Outcome
from job.exits import BadRequestError, BucketAwayError, Exit, JobError, NoPermissionError, State, StoppedError
from job.jobs.backends import Cause, JobStatus, NoCapacityError
from job.jobs.watch import ELSEWHERE_SECONDS, LONGEST_PAUSE_SECONDS, WATCH_POLL_SECONDS, JobEndedError
from job.store import open_store
from tests.job.jobs.written_engine import CANCELLED, FINISHED, GONE, RUNNING, SPEC, TAKEN, WAITING, Engine, Place

DAY = 86_400.0
PATIENCE = int(ELSEWHERE_SECONDS / WATCH_POLL_SECONDS) + 2
"""Looks at a job that waits, after which it is moved."""
MOST_FAILURES = 4
WAITED = [(WAITING, 45.0)] * 160
"""Two hours without a machine."""


LATER = "2026-02-28T12:00:00Z"


def stops(engine: Engine, match: str, *places: str, **options) -> Engine:
    with pytest.raises(StoppedError, match=match) as stopped:
        engine.watch(*places, **options)
    assert stopped.value.exit_code == Exit.STOPPED
    return engine


def test_absent_jobs_are_submitted():
    engine = Engine([GONE, WAITING, WAITING, RUNNING, RUNNING, FINISHED]).watch()
    assert engine.submitted == [("a", 2.0)]
    assert engine.told == ["train-a is waiting", "train-a is running in a", "train-a is finished"]
    engine = Engine([RUNNING, RUNNING, FINISHED]).watch()
    assert engine.submitted == []
    assert engine.told[0] == "train-a is running already: watching it"
    for over in (FINISHED, CANCELLED, 66):
        assert len(Engine([over, RUNNING, FINISHED]).watch().submitted) == 1


def test_codes_are_retried_by_table():
    never = [2, 64, 65, 66, 70, 74, 76, 77, 78]
    bounded = [1, 3, 68, 69, 71, 134, 137, 139, 143, 255, None, GONE]
    always = [75, TAKEN]
    assert {int(code) for code in Exit} - {0} <= {*never, *bounded, *always}
    for ending in never + bounded:
        engine = Engine([GONE, ending])
        with pytest.raises(JobEndedError) as ended:
            engine.watch()
        assert ended.value.exit_code == (ending if type(ending) is int else 1), ending
        assert len(engine.submitted) == (MOST_FAILURES + 1 if ending in bounded else 1), ending
    for ending in always:
        assert len(Engine([GONE, *[ending] * 40, FINISHED]).watch().submitted) == 41, ending
    # In between, these count for nothing.
    engine = Engine([GONE, *[75, 137, TAKEN] * MOST_FAILURES, FINISHED]).watch()
    assert len(engine.submitted) == 3 * MOST_FAILURES + 1
    with pytest.raises(JobEndedError, match=r"ended with 137, the 5th failure: giving up: because"):
        Engine([GONE, 137]).watch()


def test_failures_of_the_engine_count():
    five, three = (JobStatus("train-a", State.FAILED, "because", 137, failures=count) for count in (5, 3))
    with pytest.raises(JobEndedError, match=r"ended with 137, the 5th failure: giving up: because"):
        (engine := Engine([GONE, RUNNING, five])).watch()
    assert engine.retries == [4]
    # Three before its hours were over without a machine, one, and the last that there may be.
    late = replace(three, exit_code=None, cause=Cause.OUT_OF_TIME)
    with pytest.raises(JobEndedError, match="the 5th failure"):
        (engine := Engine([GONE, late, RUNNING, 137, RUNNING, 137])).watch()
    assert engine.retries == [4, 1, 0]


def test_bucket_counts_without_the_engine(tmp_path):
    spec = replace(SPEC, bucket=str(tmp_path))

    def follow(*words: str, ending=GONE, answers=()) -> Engine:
        """What each attempt says before its end, as `state code why`; the first is there before."""
        told = list(words)

        def say() -> None:
            if told and (word := told.pop(0)):
                state, code, *why = word.split(maxsplit=2)
                said = Outcome(state=state, exit_code=int(code), updated=LATER, message="".join(why))
                open_store(spec.bucket).put("jobs/train-a/0-of-1.json", said.to_json())

        (tmp_path / "jobs/train-a/0-of-1.json").unlink(missing_ok=True)
        say()
        return Engine([*answers] or [GONE, RUNNING, ending], at_submission=say, keeps_ended=bool(answers)).watch(
            spec=spec
        )

    # A VM is gone, and its job had finished; whether it could say in time that it was taken away or not.
    for ending in (GONE, TAKEN):
        assert follow("", "finished 0", ending=ending).told[-1] == "train-a is finished"
        with pytest.raises(JobEndedError, match="ended with 78, which would come again: no such key") as ended:
            follow("", "failed 78 no such key", ending=ending)
        assert ended.value.exit_code == 78
    # Its engine remembered it for a day, and the machine that watches slept.
    assert follow("", "finished 0", answers=[GONE, RUNNING, (GONE, 2 * DAY)]).told[-1] == "train-a is finished"
    # Who deletes it has it stop.
    with pytest.raises(StoppedError, match="deleted by a person"):
        follow("", "stopped 75", "finished 0", answers=[GONE, RUNNING, GONE, FINISHED])
    # What was there before is an earlier job's.
    with pytest.raises(JobEndedError, match="is gone, the 5th failure"):
        follow("failed 78")
    # Stopped with all saved, and not counted.
    assert len(follow("", *[f"stopped 75 {number}" for number in range(9)], "finished 0").submitted) == 10
    # An engine that knows better.
    with pytest.raises(JobEndedError, match="ended with 70"):
        follow("", "finished 0", ending=70)


def test_pauses_grow_and_shrink():
    engine = Engine([GONE, *[75] * 12, (RUNNING, 0), (RUNNING, 700), 75, RUNNING, FINISHED]).watch(
        spec=replace(SPEC, max_hours=500.0)
    )
    pauses = [later - earlier for earlier, later in pairwise(engine.submitted_at)]
    assert pauses[:6] == [10, 20, 40, 80, 160, 320]
    assert pauses[6:12] == [LONGEST_PAUSE_SECONDS] * 6
    assert pauses[12] == 700 + 2 * WATCH_POLL_SECONDS + 10


def test_cancelled_jobs_are_left_alone():
    assert len(stops(Engine([GONE, RUNNING, CANCELLED]), "was cancelled").submitted) == 1
    stops(
        Engine([GONE, RUNNING, JobStatus("train-a", CANCELLED, "its queue")]),
        r"was cancelled \(its queue\): its saved state stays",
    )
    # On this machine nothing else stops a job.
    stopped = JobStatus("train-a", State.STOPPED, exit_code=75)
    stops(Engine([GONE, RUNNING, stopped], is_remote=False), "was cancelled: its saved state stays")
    assert len(Engine([GONE, RUNNING, stopped, RUNNING, FINISHED]).watch().submitted) == 2
    for answers, submissions in (([GONE, RUNNING, GONE], 1), ([RUNNING, GONE], 0), ([GONE, 137, GONE], 1)):
        engine = stops(Engine(answers, keeps_ended=True), "train-a is gone, deleted by a person or over for longer")
        assert len(engine.submitted) == submissions
    # Who failed and is there still is tried again.
    assert len(Engine([GONE, 137, 137, FINISHED], keeps_ended=True).watch().submitted) == 2


def test_next_places_are_tried():
    engine = Engine([GONE, RUNNING, FINISHED], full={"a": 2, "b": 2, "c": 1}).watch("a", "b", "c")
    assert (engine.submitted, engine.submitted_at) == ([("c", 2.0)], [10.0])
    assert [line for line in engine.told if "no machine" in line] == [
        "a has no machine; trying the next place",
        "b has no machine; trying the next place",
        "c has no machine; trying again from the first place",
        "a has no machine; trying the next place",
        "b has no machine; trying the next place",
    ]
    # However long that takes; and where there was one, there may be one again.
    assert Engine([GONE, RUNNING, FINISHED], full={"a": 500}).watch("a").submitted == [("a", 2.0)]
    engine = Engine([GONE, RUNNING, GONE, RUNNING, FINISHED], full={"a": 1}).watch("a", "b")
    assert [place for place, _ in engine.submitted] == ["b", "b"]
    # Without the watch each is tried once.
    assert Place(Engine([GONE], full={"a": 1}), ("a", "b")).submit_where_possible(SPEC).name == "b"
    with pytest.raises(NoCapacityError, match="b has no machine"):
        Place(Engine([GONE], full={"a": 1, "b": 1}), ("a", "b")).submit_where_possible(SPEC)


def test_waiting_jobs_are_moved():
    away = [BucketAwayError("the API is away")] * 3
    for cancelling in ([], away, [*away, BadRequestError("it is over: the request had arrived")]):
        engine = Engine([GONE, *[WAITING] * PATIENCE, CANCELLED, RUNNING, FINISHED], cancelling=[*cancelling]).watch(
            "a", "b"
        )
        assert [place for place, _ in engine.submitted] == ["a", "b"], cancelling
        assert engine.told.count("the API is away; trying again to remove train-a") == bool(cancelling)
    # One that gets ready has a machine; and where there is no other place, patience is all there is.
    ready = JobStatus("train-a", WAITING, "the image is being pulled", has_machine=True)
    assert Engine([GONE, *[ready] * PATIENCE, RUNNING, FINISHED]).watch("a", "b").cancelled == []
    assert Engine([GONE, *[WAITING] * 500, RUNNING, FINISHED]).watch("a").cancelled == []
    # One that ended by itself meanwhile.
    engine = Engine([GONE, *[WAITING] * PATIENCE, FINISHED], cancelling=[BadRequestError("it is over")]).watch("a", "b")
    assert len(engine.submitted) == 1


def test_jobs_without_image_are_removed():
    without = JobStatus("train-a", WAITING, "ImagePullBackOff", cause=Cause.NO_IMAGE, has_machine=True)
    engine = Engine([GONE, *[without] * 22, GONE])
    with pytest.raises(JobEndedError, match="train-a cannot begin, and is removed: ImagePullBackOff") as ended:
        engine.watch()
    assert (ended.value.exit_code, engine.cancelled) == (66, ["a"])
    # Somebody pushed it just in time.
    assert Engine([GONE, *[without] * 15, WAITING, *[without] * 15, RUNNING, FINISHED]).watch().cancelled == []


def test_silent_engines_leave_jobs_alone():
    engine = Engine([GONE, RUNNING, *[BucketAwayError("the API is away")] * 100, RUNNING, FINISHED]).watch()
    assert len(engine.submitted) == 1
    assert engine.told.count("the API is away; the job goes on meanwhile") == 1
    refusals: list[JobError] = [NoPermissionError("no"), BadRequestError("no such GPU")]
    for refusal in refusals:
        with pytest.raises(type(refusal), match=str(refusal)):
            Engine([GONE, GONE], refusal=refusal).watch()
    # The answer to the first request was lost: the second finds the job there.
    Engine([GONE, RUNNING, RUNNING, FINISHED], refusal=refusals[1]).watch()


def test_stopped_watches_leave_jobs_alone():
    engine = Engine([GONE, (RUNNING, DAY)])
    stops(engine, "no longer watching train-a, which goes on", spec=replace(SPEC, max_hours=700.0))
    assert engine.cancelled == []


def test_max_hours_hold_for_all_attempts():
    engine = stops(
        Engine([GONE, *[(RUNNING, 0.0), (RUNNING, 1800.0), 75] * 6]), "has used its 2 hours: the same command goes on"
    )
    hours = [hours for _, hours in engine.submitted]
    assert hours[0] == 2.0
    assert 3 <= len(hours) <= 4
    assert all(later < earlier - 0.5 for earlier, later in pairwise(hours))
    # A machine that only gets ready is paid for, too; the time without one is not.
    ready = JobStatus("train-a", WAITING, "the GPU driver is being installed", has_machine=True)
    engine = stops(Engine([GONE, *[ready, (ready, 600.0), TAKEN] * 50]), "has used its 2 hours")
    assert 10 <= len(engine.submitted) <= 12
    assert Engine([GONE, *[(WAITING, 3600.0)] * 10, (RUNNING, 0.0), FINISHED]).watch().submitted == [("a", 2.0)]
    # Where nobody named a limit there is none.
    engine = Engine([GONE, RUNNING, (RUNNING, 360_000.0), 137, RUNNING, FINISHED]).watch(
        spec=replace(SPEC, max_hours=math.inf)
    )
    assert engine.submitted == [("a", math.inf), ("a", math.inf)]


def test_hours_begin_with_the_job(tmp_path):
    there = JobStatus("train-a", RUNNING, created="2026-01-31T11:00:00Z")
    for other, least, most in (
        (there, 0.98, 1.0),
        (replace(there, created="2026-01-31T11:00:00.123456+00:00"), 0.98, 1.001),
        # Who waits for a first machine has not run, and a time that is none is none.
        (replace(there, state=WAITING), 1.9, 2.0),
        (replace(there, created=""), 1.9, 2.0),
    ):
        ((_, hours),) = Engine([other, 75, RUNNING, FINISHED]).watch().submitted
        assert least < hours <= most, other
    engine = stops(Engine([replace(there, created="2026-01-31T09:00:00Z"), 75]), "has used its 2 hours")
    assert engine.submitted == []
    # An engine forgets an evicted attempt, and the job's bucket does not; what an earlier job said is none of it.
    evicted = replace(there, state=WAITING)
    for updated, least, most in (("2026-01-31T11:30:00Z", 0.9, 1.0), ("2026-01-31T10:30:00Z", 1.9, 2.0)):
        said = Outcome(state="stopped", exit_code=75, updated=updated)
        open_store(str(tmp_path)).put("jobs/train-a/0-of-1.json", said.to_json())
        ((_, hours),) = (
            Engine([evicted, 75, RUNNING, FINISHED]).watch(spec=replace(SPEC, bucket=str(tmp_path))).submitted
        )
        assert least < hours <= most, updated


def test_waiting_uses_no_hours():
    for answers, submissions in (
        ([RUNNING, (Cause.OUT_OF_TIME, 7200.0)], 0),
        ([GONE, RUNNING, (RUNNING, 7000.0), Cause.OUT_OF_TIME], 1),
        # Nobody looked while it got its machine, and had it.
        ([GONE, WAITING, (Cause.OUT_OF_TIME, 9000.0)], 1),
    ):
        assert len(stops(Engine(answers), "has used its 2 hours").submitted) == submissions
    for keeps_ended in (False, True):
        looks = 2 if keeps_ended else 1
        ending = [Cause.OUT_OF_TIME] * looks
        engine = Engine(
            [GONE, *WAITED, *ending, RUNNING, (RUNNING, 1800.0), *[75] * looks, RUNNING, FINISHED],
            keeps_ended=keeps_ended,
        ).watch()
        first, second, third = (hours for _, hours in engine.submitted)
        assert first == 2.0 and second > 1.97 and 1.4 < third < 1.5, ending
        assert "train-a had a machine for less than its 2 hours; submitting it again" in engine.told
    stops(Engine([GONE, RUNNING, (RUNNING, 7000.0), Cause.OUT_OF_TIME], keeps_ended=True), "has used its 2 hours")


def test_jobs_without_machine_never_started():
    no_node, short = JobStatus("train-a", WAITING, "FailedScheduling: 0/3 nodes"), replace(SPEC, max_hours=0.02)
    said = r"train-a never started within its 0.02 hours \(FailedScheduling: 0/3 nodes\): the same command goes on"
    stops(Engine([GONE, *[no_node] * 5, Cause.OUT_OF_TIME]), said, spec=short)
    # One that had a machine for a while has, also if it waited for another in the end.
    stops(Engine([GONE, RUNNING, no_node, no_node, Cause.OUT_OF_TIME]), "has used its 0.02 hours", spec=short)


def test_waiting_ends_with_the_hours():
    for keeps_ended in (False, True):
        engine = stops(
            Engine([GONE, RUNNING, (RUNNING, 7200.0), WAITING, GONE], keeps_ended=keeps_ended), "has used its 2 hours"
        )
        assert engine.cancelled == ["a"]
    # Made three days ago, preempted once: it may have run for most of them, or for minutes.
    waiting = JobStatus("train-a", WAITING, created="2026-01-28T12:00:00Z", attempts=2)
    engine = Engine([waiting, waiting, RUNNING, FINISHED]).watch()
    assert engine.cancelled == [] and engine.submitted == []
    # One that had ended by itself is told as it ended.
    engine = Engine(
        [GONE, RUNNING, (RUNNING, 7200.0), WAITING, FINISHED], cancelling=[BadRequestError("it is over")]
    ).watch()
    assert engine.told[-1] == "train-a is finished"


def test_jobs_end_themselves_in_time():
    assert replace(SPEC, max_hours=0.5).argv_that_ends == (*SPEC.argv, "--stop-after", "1800s")
    assert replace(SPEC, max_hours=math.inf).argv_that_ends == SPEC.argv
    words = replace(SPEC, argv=("data", "pack", "--", "-a", "b")).argv_that_ends
    assert words == ("data", "pack", "--stop-after", "7200s", "--", "-a", "b")
    # On this machine its own deadline ends it as somebody would who cancels it.
    ends = Engine([GONE, RUNNING, (RUNNING, 7200.0), CANCELLED])
    assert stops(ends, "has used its 2 hours: the same command", spec=SPEC).submitted == [("a", 2)]
