"""The expected duration of interrupted training, against traces of events that know nothing of its formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from job.runs.goodput import Interruptions, best_interval_seconds, expected


def trace(work: float, interval: float, course: Interruptions, random: np.random.Generator) -> tuple[float, float]:
    """Wall and machine seconds of one run: machines that are killed at random, and what each of them still commits."""
    wall = machine = done = 0.0
    period = interval + course.stall_seconds
    while True:
        wall += random.exponential(course.queue_seconds)
        lives = random.exponential(course.every_seconds)
        saves = np.arange(1, np.ceil((work - done) / interval))
        needs = (
            course.restart_seconds + (work - done) * period / interval + course.save_seconds * (not course.has_notice)
        )
        if lives >= needs:
            return wall + needs, machine + needs
        wall, machine = wall + lives, machine + lives
        if course.has_notice:
            done += max(0.0, lives - course.restart_seconds) * interval / period
        else:
            arrived = course.restart_seconds + saves * period + course.save_seconds
            done += np.count_nonzero(arrived <= lives) * interval


GRID = [
    Interruptions(every, queue, restart, save, stall, notice)
    for every, queue, (restart, save, stall), notice in itertools.product(
        (15.0, 60.0, 1200.0, 3 * 3600.0, 24 * 3600.0), (0.0, 900.0), ((3.0, 0.3, 0.05), (90.0, 8.0, 1.0)), (False, True)
    )
    # A machine that is gone before it has begun trains nothing.
    if restart < every
]


@pytest.mark.parametrize("course", GRID, ids=str)
def test_means_and_bands_are_those_of_traces(course):
    random = np.random.default_rng(0)
    interval = max(10 * course.save_seconds, best_interval_seconds(course.stall_seconds, course.every_seconds))
    for interruptions in (0.5, 20):
        work = interruptions * course.every_seconds + interval / 3
        told = expected(work, interval, course)
        traces = np.array([trace(work, interval, course, random) for _ in range(1000)])
        for band, found in zip(told, traces.T, strict=True):
            assert abs(found.mean() - band.mean) < 4 * found.std() / np.sqrt(found.size) + 0.002 * band.mean
            below, above = np.mean(found < band.low * (1 - 1e-9)), np.mean(found > band.high * (1 + 1e-9))
            # Of 1,000 runs four in five lie inside, give or take some; more where most runs are not interrupted.
            assert below <= 0.14 and above <= 0.18 and below + above <= 0.28
            assert interruptions < 20 or min(below, above) >= 0.06


def test_the_median_error_of_jobs_is_below_a_tenth():
    random = np.random.default_rng(1)
    errors = []
    for _ in range(400):
        course = Interruptions(
            every_seconds=np.exp(random.uniform(np.log(15), np.log(24 * 3600))),
            queue_seconds=random.uniform(0, 900),
            restart_seconds=0.0,
            save_seconds=random.uniform(0.1, 30),
            stall_seconds=random.uniform(0.01, 0.5),
            has_notice=bool(random.integers(2)),
        )
        course = Interruptions(**{**vars(course), "restart_seconds": random.uniform(0, 0.3) * course.every_seconds})
        interval = min(600.0, max(course.save_seconds, course.every_seconds / 10))
        if course.save_seconds + interval > course.every_seconds:
            continue
        work = np.exp(random.uniform(np.log(3600), np.log(48 * 3600)))
        wall, _ = trace(work, interval, course, random)
        errors.append(abs(expected(work, interval, course).wall.mean / wall - 1))
    assert len(errors) >= 200
    assert np.median(errors) <= 0.1


def test_no_other_interval_takes_less_time():
    for every, stall in itertools.product((60.0, 3600.0, 24 * 3600.0), (0.05, 1.0, 20.0)):
        course = Interruptions(every, restart_seconds=5.0, stall_seconds=stall)
        best = best_interval_seconds(stall, every)
        intervals = [best, *np.geomspace(best / 20, best * 20, 400)]
        took = [expected(1000 * every, interval, course).machine.mean for interval in intervals]
        assert took[0] <= 1.001 * min(took)
        # Young's square root, where a save takes little of the time.
        assert best == pytest.approx(np.sqrt(2 * stall * every), rel=2 * np.sqrt(stall / every))


def test_hopeless_runs_never_end():
    course = Interruptions(3 * 3600.0, restart_seconds=120.0)
    assert expected(48 * 3600.0, 48 * 3600.0, course).wall.mean > 1e5 * 48 * 3600
    assert expected(40.0, 40.0, Interruptions(1.0)).machine.mean == pytest.approx(np.expm1(40.0))
    assert expected(1e6, 600.0, Interruptions(1.0)).wall.mean == float("inf")
