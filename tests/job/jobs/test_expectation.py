"""What a person is told of the end of an interrupted job, and which jobs are not sent."""

from __future__ import annotations

import re

import pytest

from job.config import CheckpointConfig
from job.exits import BadRequestError, Exit
from job.jobs.expectation import prospects
from job.jobs.targets import load_targets
from job.runs.outlook import spans_of
from job.runs.records import LastStatus
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN, built
from tests.job.report.test_outlook import at, attempt, status

pytestmark = pytest.mark.usefixtures("targets_folder")


def expects(on: str = "gke", spans=(), told=None, changes=None, **resources):
    target = load_targets()[on].model_copy(update=changes or {})
    return prospects(built("train", FOR_TRAIN, on, **resources), target, CheckpointConfig(), spans, told)


def test_priors_are_those_of_the_machines():
    spot, on_demand = expects("gke"), expects("gke", spot=False, gpus=8)
    assert (spot.course.every_seconds, spot.course.has_notice) == (3 * 3600, True)
    assert (on_demand.course.every_seconds, on_demand.course.has_notice) == (50_000 / 8 * 3600, False)
    assert not expects("gke", changes={"grace_seconds": 12}).course.has_notice
    assert expects("gke", nodes=4).course.every_seconds == 3 * 3600 / 4
    # Nobody knows of nodes that a target selects by labels of its own, but their user.
    assert expects("own").course.every_seconds == 50_000 * 3600
    told = expects("own", changes={"preempted_every_hours": 0.5})
    assert (told.course.every_seconds, told.measured) == (1800, [])
    assert "an interruption (told by the target) every 30 min" in told.prior
    assert all(each.interval_seconds == 600 for each in (spot, on_demand, told))


@pytest.mark.parametrize(("state", "is_lost"), [("running", True), ("stopped", False)])
def test_a_run_tells_how_often_it_is_interrupted(state, is_lost):
    # Four hours on, half an hour until the next machine is there; the first attempt was the user's own.
    attempts = [attempt(1, 0, None)]
    attempts += [
        attempt(n, 4.5 * (n - 1), 2.0, LastStatus(state=state, images_seen=n, updated=at(4.5 * (n - 1) - 0.5)))
        for n in range(2, 6)
    ]
    last = status(5, at(22)).model_copy(
        update={"start_seconds": 40.0, "save_seconds": 2.0, "stall_seconds": 0.05, "epoch": 2.0}
    )
    found = expects(spans=spans_of(attempts, last), told=last)
    assert found.prior == []
    assert found.measured == [
        "an interruption every 5 h 20 min",
        "a queue of 30 min",
        "a start of 40 s",
        "a save of 2 s",
        "an epoch of 33 min",
    ]
    assert (found.course.restart_seconds, found.course.has_notice) == (40.0, not is_lost)
    what, why = found.lines(50 * 3600.0, 2.0)
    hours, dollars = re.fullmatch(
        r"2 d (\d+) h \d+ min to 2 d \d+ h \d+ min and \$(\d+\.\d+) to .+ to the end for 8 of 10 such jobs, "
        + ("saving every 42 s" if is_lost else "saving every 3 min"),
        what,
    ).groups()
    # Ten waits of half an hour, for which nobody pays.
    assert (int(hours) > 3, 100 < float(dollars) < 103, why.startswith("measured: ")) == (True, True, True)


def test_attempts_that_did_not_train_are_no_rate():
    # Out of memory after 20 s, three times, and a night before somebody mended it.
    seen = LastStatus(state="running", images_seen=0, updated=at(0))
    attempts = [
        attempt(1, 0),
        *(attempt(n, n / 100, seen=seen.model_copy(update={"updated": at((n - 1) / 100 + 0.005)})) for n in (2, 3)),
    ]
    attempts.append(attempt(4, 14, seen=seen.model_copy(update={"updated": at(0.035)})))
    found = expects(spans=spans_of(attempts, None))
    assert found.measured == []
    assert found.course == expects().course
    found.check(48)


def test_what_a_run_measured_refuses_no_job():
    # Killed each minute, though it trained.
    attempts = [attempt(1, 0)]
    attempts += [
        attempt(n, n / 60, seen=LastStatus(state="running", images_seen=n, updated=at((n - 0.1) / 60)))
        for n in range(2, 6)
    ]
    found = expects(spans=spans_of(attempts, None))
    assert found.course.every_seconds < 100
    found.check(48)
    with pytest.raises(BadRequestError, match="begins to train 1 min after its start and needs 10 s for a save"):
        expects(changes={"preempted_every_hours": 0.005}).check(48)


def test_hopeless_jobs_are_not_sent():
    never = ["--set", "checkpoint.every_minutes=100000", "--set", "checkpoint.every_epochs=9999", "--dry-run"]
    words = ["submit", "train", *FOR_TRAIN, "--on", "gke", "--max-hours", "48"]
    line = refused(ddpm_here(*words, *never), Exit.BAD_REQUEST)
    assert "the job would save every 2 d (checkpoint.every_minutes, checkpoint.every_epochs), but" in line
    (works,) = re.findall("--set (checkpoint.every_minutes=[0-9.]+)", line)
    succeeded(ddpm_here(*words, *never[:-1], "--set", works, "--dry-run"))
    # Halfway there is a save, which notices then take too; and two settings may need each other.
    succeeded(ddpm_here(*words, "--set", "checkpoint.every_minutes=720", *never[2:]))
    scores = ["--set", "evaluate.every_epochs=10", "--set", "checkpoint.keep_best=true", "--dry-run"]
    succeeded(ddpm_here(*words, *scores))
    # On machines that stay, for an hour, and where the ends of epochs save, it gets on.
    succeeded(ddpm_here(*words, "--on-demand", *never))
    succeeded(ddpm_here(*words[:-1], "1", *never))
    succeeded(ddpm_here(*words, *never[:2], "--dry-run"))
