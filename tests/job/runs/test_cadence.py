"""How often a run saves: as configured, else as its own history and its last save make it worth while."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from job.coordination.sealed import MOMENT_FORMAT
from job.runs.layout import ObjectKind
from job.runs.outlook import Cadence, best_interval_seconds, interval_seconds
from job.runs.records import LastStatus
from job.store import open_store
from tests.job.launching import eventually
from tests.job.runs.leased import leased

pytestmark = pytest.mark.usefixtures("notes")


@pytest.mark.parametrize(
    ("configured", "grace", "save", "killed_every", "seconds"),
    [
        # In a run that was not killed it takes a hundredth.
        (None, 30.0, (1.0, 0.05), None, 100.0),
        (None, 30.0, (0.01, 0.0), None, 10.0),
        (None, 30.0, (7.0, 0.05), None, 600.0),
        # Young's square root, of 2 × 0.5 s × an hour.
        (None, 30.0, (1.0, 0.5), 3600.0, 60.0),
        (None, 30.0, (1.0, 5.0), 10**7, 600.0),
        # Saving takes a tenth of the time at most.
        (None, 30.0, (3.0, 0.05), 60.0, 30.0),
        (None, 900.0, (100.0, 0.05), None, 1000.0),
        (None, 900.0, (100.0, 0.05), 3600.0, 1000.0),
        (None, 30.0, (100.0, 0.05), None, 1000.0),
        (7.0, 30.0, (3.0, 0.05), 60.0, 420.0),
        # A notice that is too short loses the work since the last save.
        (None, 30.0, (40.0, 0.05), None, 400.0),
        (7.0, 30.0, (40.0, 0.05), None, 400.0),
        (2.0, 30.0, (40.0, 0.05), None, 120.0),
    ],
)
def test_intervals(configured, grace, save, killed_every, seconds):
    assert interval_seconds(configured, grace, save, killed_every) == pytest.approx(seconds, rel=0.02)


def test_no_other_interval_takes_less_time():
    for every, stall in itertools.product((60.0, 3600.0, 24 * 3600.0), (0.05, 1.0, 20.0)):
        best = best_interval_seconds(stall, every)
        intervals = np.array([best, *np.geomspace(best / 20, best * 20, 400)])
        # Daly (2006), eq. 20, of which e^{R/M} does not depend on the interval: M (e^{(τ + δ)/M} - 1) / τ.
        took = every * np.expm1((intervals + stall) / every) / intervals
        assert took[0] <= 1.001 * took.min()
        # Young's square root (1974), where a save takes little of the time.
        assert best == pytest.approx(np.sqrt(2 * stall * every), rel=2 * np.sqrt(stall / every))
    # Daly, eq. 37, for half a save in an interruption: √(2δM) (1 + √(δ/2M)/3 + δ/2M/9) - δ, and M from 2M on.
    assert best_interval_seconds(2.0, 4.0) == pytest.approx(4 * (1 + 0.5 / 3 + 0.25 / 9) - 2)
    assert best_interval_seconds(8.0, 4.0) == 4.0


def test_a_run_that_is_killed_saves_often(tmp_path):
    def moment(seconds: float) -> str:
        return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime(MOMENT_FORMAT)

    for name, state in (("killed", "running"), ("stopped", "stopped")):
        run = open_store(str(tmp_path / name))
        for fence in range(1, 4):
            seen = LastStatus(state=state, images_seen=0, updated=moment(100 * (4 - fence) + 95))
            record = leased(run, fence).record.model_copy(
                update={
                    "started": moment(100 * (4 - fence)),
                    "previous": fence - 1 or None,
                    "previous_seen": seen if fence > 1 else None,
                }
            )
            run.create(ObjectKind.ATTEMPT.key(fence=fence), record.to_json())
    # Killed after five seconds, twice: it saves before the next five are over.
    cadences = {name: Cadence(open_store(str(tmp_path / name)), None, 30.0) for name in ("killed", "stopped")}
    began = time.monotonic()
    eventually(lambda: cadences["killed"].is_over)
    assert time.monotonic() - began < 2.5
    assert not cadences["stopped"].is_over
