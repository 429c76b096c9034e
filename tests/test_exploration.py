"""The exploration finds protocols that are broken on purpose, repeats itself, and finds nothing in those of the job."""

from __future__ import annotations

import pytest

from benchmarks.exploration.__main__ import explore, found_after, replay
from benchmarks.exploration.mutations import MUTATIONS
from benchmarks.exploration.scenarios import all_scenarios

MOST = 1200
"""Schedules until a mutation must have shown; three times what the slowest one takes."""


def test_few_interleavings_hold():
    report = explore(["pack", "train"], 60, seed=1, processes=1)
    assert report.failed == []
    assert report.schedules.total() == 60
    assert sum(map(len, report.distinct.values())) > 35


def test_a_schedule_repeats_itself():
    first, again = replay("sample:4z25,20C"), replay("sample:4z25,20C")
    assert (first.violation, first.trace) == ("", again.trace)
    assert [step.number for step in first.trace if "suspended" in step.outcome or "killed" in step.outcome] == [4, 20]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", all_scenarios())
def test_interleavings_hold(scenario):
    report = explore([scenario], 500, seed=2, processes=1)
    assert [(failed.schedule, failed.violation) for failed in report.failed] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_found(mutation):
    count, found = found_after(mutation, list(MUTATIONS[mutation].scenarios), MOST, seed=1)
    assert found is not None, f"not in {count:,} schedules"
    # A schedule that fails without the mutation, too, would prove nothing.
    assert replay(found.schedule).violation == ""
