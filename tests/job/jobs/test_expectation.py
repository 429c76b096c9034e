"""The end that a person is told of an interrupted job, and which jobs are not sent."""

from __future__ import annotations

import itertools
import re
from math import exp, expm1

import numpy as np
import pytest

from job.config import CheckpointConfig
from job.exits import BadRequestError, Exit
from job.jobs.expectation import Expectation, expectation_of
from job.jobs.targets import load_targets
from job.runs.outlook import spans_of
from job.runs.records import LastStatus
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN, built
from tests.job.report.test_outlook import at, attempt, status

pytestmark = pytest.mark.usefixtures("targets_folder")


def expects(on: str = "gke", spans=(), told=None, changes=None, **resources):
    target = load_targets()[on].model_copy(update=changes or {})
    return expectation_of(built("train", FOR_TRAIN, on, **resources), target, CheckpointConfig(), spans, told)


def test_priors_are_those_of_the_machines():
    spot, on_demand = expects("gke"), expects("gke", spot=False, gpus=8)
    assert (spot.every_seconds, spot.has_notice) == (3 * 3600, True)
    assert (on_demand.every_seconds, on_demand.has_notice) == (50_000 / 8 * 3600, False)
    assert not expects("gke", changes={"grace_seconds": 12}).has_notice
    assert expects("gke", nodes=4).every_seconds == 3 * 3600 / 4
    # Nobody knows of nodes that a target selects by labels of its own, but their user.
    assert expects("own").every_seconds == 50_000 * 3600
    told = expects("own", changes={"preempted_every_hours": 0.5})
    assert (told.every_seconds, told.has_notice) == (1800, True)
    for each in (spot, on_demand, told):
        assert (each.start_seconds, each.save_seconds, each.interval_seconds) == (60, 10, 600)


@pytest.mark.parametrize("is_lost", [False, True])
def test_hours_and_dollars_are_those_of_daly(is_lost):
    measured = status(5, at(22)).model_copy(
        update={"start_seconds": 900.0, "save_seconds": 10.0, "stall_seconds": 0.05}
    )
    # A notice of so few seconds leaves no time for a save, so that saving takes a tenth of the time.
    found = expects(told=measured, changes={"grace_seconds": 12} if is_lost else None)
    every, start, save, interval = 3 * 3600, 900.0, 10.0, 100.0
    # Daly (2006), eq. 20: M e^{R/M} (e^{τ/M} - 1) / τ for a second of training, and its limit for an interval of 0.
    slower, restart = exp(start / every), start
    if is_lost:
        slower, restart = every * exp((start + save) / every) * expm1(interval / every) / interval, start + save
    seconds = every * expm1(restart / every) + 50 * 3600 * slower
    assert (found.share, found.machine_seconds(50 * 3600)) == pytest.approx((1 / slower, seconds))
    percent, saving = ("91%", "2 min") if is_lost else ("92%", "10 min")
    why = f"{percent} of the time on machines trains: an interruption every 3 h, a start of 15 min, "
    why += f"saving at least every {saving}"
    hours, dollars = ("2 d 6 h 55 min", "109.82") if is_lost else ("2 d 6 h 36 min", "109.21")
    assert found.text(50 * 3600, 2.0) == f"{hours} on machines and ${dollars} to the end; {why}"
    assert found.text(50 * 3600, None) == f"{hours} on machines to the end; {why}"
    assert found.text(None, 2.0) == f"{why}; the first minutes tell the speed and so the end"


def machine_seconds(work: float, course: Expectation, random: np.random.Generator) -> float:
    """The time on machines of one run: they are killed at random, and each of them commits something before."""
    machine = done = 0.0
    while True:
        lives = random.exponential(course.every_seconds)
        needs = course.start_seconds + work - done + course.save_seconds * (not course.has_notice)
        if lives >= needs:
            return machine + needs
        machine += lives
        if course.has_notice:
            done += max(0.0, lives - course.start_seconds)
        else:
            saves = np.arange(1, np.ceil((work - done) / course.interval_seconds))
            arrived = course.start_seconds + saves * course.interval_seconds + course.save_seconds
            done += np.count_nonzero(arrived <= lives) * course.interval_seconds


@pytest.mark.parametrize("has_notice", [False, True])
@pytest.mark.parametrize(
    ("every", "start", "save"),
    [(60.0, 3.0, 0.3), (1200.0, 90.0, 8.0), (3 * 3600.0, 90.0, 8.0), (24 * 3600.0, 3.0, 0.3)],
)
def test_expectation_is_the_mean_of_traces(every, start, save, has_notice):
    course = Expectation(every, start, save, interval_seconds=max(10 * save, every / 20), has_notice=has_notice)
    random = np.random.default_rng(0)
    for intervals in (10, 400):
        work = intervals * course.interval_seconds
        traces = np.array([machine_seconds(work, course, random) for _ in range(1000)])
        assert abs(traces.mean() - course.machine_seconds(work)) < 4 * traces.std() / np.sqrt(traces.size)


def test_a_run_that_is_killed_saves_often():
    seen = [LastStatus(state="running", images_seen=n, updated=at((n - 0.1) / 60)) for n in range(2, 6)]
    attempts = [attempt(1, 0), *(attempt(last.images_seen, last.images_seen / 60, seen=last) for last in seen)]
    found = expects(spans=spans_of(attempts, None))
    assert (found.interval_seconds, expects().interval_seconds) == (100, 600)
    # It may be mended, and so refuses no job.
    assert found.every_seconds == 3 * 3600
    found.check()


def test_machines_that_are_gone_before_they_train_are_refused():
    with pytest.raises(BadRequestError, match="begins to train 1 min after its start and needs 10 s for a save"):
        expects(changes={"preempted_every_hours": 0.005}).check()
    for every, interval in itertools.product((1e-3, 1.0, 3600.0), (60.0, 1e9)):
        with pytest.raises(BadRequestError, match="would lose almost all"):
            Expectation(max(1.0, every), 3.0, 1e9, interval).check()


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
