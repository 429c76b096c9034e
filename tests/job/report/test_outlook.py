"""How long runs take and what that costs: the same words wherever they are told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from job.runs.outlook import duration, outlook_of, spans_of
from job.runs.records import Attempt, LastStatus, Status

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(hours: float) -> str:
    return (BEGAN + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def attempt(fence: int, hours: float, dollars: float | None = 2.0, seen: LastStatus | None = None) -> Attempt:
    return Attempt(
        fence=fence,
        id=str(fence),
        started=at(hours),
        host="h",
        code_version="c",
        world_size=1,
        device="d",
        changes={},
        config_sha256="0" * 64,
        previous=fence - 1 or None,
        previous_seen=seen,
        dollars_per_hour=dollars,
    )


def status(fence: int, updated: str, state: str = "stopped", seen: int = 4000, speed: float | None = 1.0) -> Status:
    return Status(
        state=state,
        fence=fence,
        images_seen=seen,
        target_images=13_000,
        epoch=1.0,
        loss=0.1,
        images_per_second=speed,
        updated=updated,
    )


def test_attempts_last_until_their_last_status():
    attempts = [
        attempt(1, 0),
        attempt(2, 5, seen=LastStatus(state="running", images_seen=1000, updated=at(2))),
        attempt(3, 9, seen=LastStatus(state="stopped", images_seen=2000, updated=at(6))),
        # One of which nobody says how the one before ended.
        attempt(4, 12),
    ]
    found = spans_of(attempts, status(4, at(12.5)))
    assert [(each.hours, each.state, each.images_seen) for each in found] == [
        (2.0, "cut off", 1000),
        (1.0, "stopped", 2000),
        (0.0, "", None),
        (0.5, "stopped", 4000),
    ]


def test_hours_and_dollars_add_up():
    attempts = [attempt(1, 0), attempt(2, 5, 4.0, LastStatus(state="stopped", images_seen=1000, updated=at(2)))]
    found = spans_of(attempts, status(2, at(6)))
    outlook = outlook_of(found, status(2, at(6)))
    assert (outlook.hours_so_far, outlook.dollars_so_far) == (3.0, 2 * 2.0 + 1 * 4.0)
    assert (outlook.hours_left, outlook.dollars_left, outlook.ends) == (2.5, 10.0, None)
    assert outlook.words == {
        "cost so far": "about $8.00 (3.0 hours)",
        "to the end": "2 h 30 min when it goes on, for about $10.00 more",
    }
    # On other machines.
    assert outlook_of(found, status(2, at(6)), 1.0).dollars_left == 2.5
    # Of a part of the attempts nobody knows the price: a sum of the others would be too low.
    without = [attempt(1, 0, None), attempts[1]]
    assert outlook_of(spans_of(without, status(2, at(6))), status(2, at(6))).dollars_so_far is None


def test_running_runs_state_their_end():
    now = datetime.now(UTC).replace(microsecond=0)
    running = status(1, now.strftime("%Y-%m-%dT%H:%M:%SZ"), "running", speed=0.5)
    outlook = outlook_of(spans_of([attempt(1, 0)], running), running)
    assert outlook.ends == now + timedelta(hours=5)
    assert f"5 h 0 min, at {outlook.ends:%Y-%m-%d %H:%M} UTC, for about $10.00 more" == outlook.words["to the end"]


@pytest.mark.parametrize("told", [status(1, at(1), speed=None), status(1, at(1), seen=13_000), None])
def test_unknown_durations_are_left_out(told):
    outlook = outlook_of(spans_of([attempt(1, 0, None)], told), told)
    assert (outlook.hours_left, outlook.ends, outlook.words) == (None, None, {})


def test_durations_are_for_people():
    assert [duration(hours) for hours in (0.001, 0.5, 3.34, 50.0)] == [
        "less than a minute",
        "30 min",
        "3 h 20 min",
        "2 d 2 h 0 min",
    ]
