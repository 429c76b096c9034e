"""One status of an engine's answer, whether a job lives, and of the end that the job wrote into its bucket."""

from __future__ import annotations

from typing import Any

import pytest

from job.coordination.outcome import Outcome
from job.exits import Restart, State, state_after
from job.jobs.backends import Cause, JobStatus
from job.store import open_store

NOON, LATER = "2026-01-31T12:00:00Z", "2026-01-31T13:00:00Z"
BEFORE = "the attempt before ended with exit code"
TAKEN, STUCK = Cause.TAKEN_AWAY, Cause.STUCK


@pytest.mark.parametrize(
    ("engine", "wrote", "state", "code", "message", "restart"),
    [
        ({"state": "running"}, (None, ""), "running", None, "", None),
        # While it lives, the engine's words come first, and then how its last attempt ended.
        ({"state": "waiting"}, None, "waiting", None, "why", None),
        ({"state": "waiting"}, (None, ""), "waiting", None, "why", None),
        ({"state": "waiting"}, (75, "by SIGTERM"), "waiting", None, f"why; {BEFORE} 75: by SIGTERM", None),
        ({"state": "waiting", "exit_code": 137}, (None, ""), "waiting", 137, f"why; {BEFORE} 137: killed by", None),
        ({"state": "running", "exit_code": 3}, (None, ""), "running", 3, f"{BEFORE} 3: crashed", None),
        ({"state": "waiting", "cause": STUCK}, (75, "by SIGTERM"), "waiting", None, "why", None),
        # A program that was killed writes no end, and an engine that has a code knows better.
        ({"state": "failed", "exit_code": 137}, (None, ""), "failed", 137, "why", Restart.BOUNDED),
        ({"state": "failed", "exit_code": 70}, (0, ""), "failed", 70, "why", Restart.NEVER),
        ({"state": "failed", "exit_code": 78}, (78, "no such key"), "failed", 78, "no such key", Restart.NEVER),
        ({"state": "failed"}, None, "failed", None, "why", Restart.BOUNDED),
        # Otherwise the bucket's counts.
        ({"state": "failed"}, (0, ""), "finished", 0, "", None),
        ({"state": "failed"}, (75, "by SIGTERM"), "stopped", 75, "by SIGTERM", Restart.ALWAYS),
        ({"state": "failed"}, (1, ""), "failed", 1, "why", Restart.BOUNDED),
        ({"state": "gone"}, (0, ""), "finished", 0, "", None),
        ({"state": "gone"}, (75, "by SIGTERM"), "gone", 75, "by SIGTERM", Restart.ALWAYS),
        ({"state": "gone"}, (78, "no such key"), "gone", 78, "no such key", Restart.NEVER),
        ({"state": "gone"}, (None, ""), "gone", None, "why", Restart.BOUNDED),
        # A code that would come again counts more than the loss of the machine; a person's word more than any code.
        ({"state": "gone", "cause": TAKEN}, (None, ""), "gone", None, "why", Restart.ALWAYS),
        ({"state": "gone", "cause": TAKEN}, (78, "no such key"), "gone", 78, "no such key", Restart.NEVER),
        ({"state": "failed", "cause": Cause.OUT_OF_TIME}, (75, "late"), "stopped", 75, "late", Restart.NEVER),
        ({"state": "cancelled"}, (75, "by SIGTERM"), "cancelled", None, "why", None),
    ],
)
def test_engine_and_bucket_make_one_status(tmp_path, engine: dict[str, Any], wrote, state, code, message, restart):
    if wrote:
        one = Outcome(state=state_after(wrote[0]), exit_code=wrote[0], message=wrote[1], updated=LATER, starts=(LATER,))
        open_store(str(tmp_path)).put("jobs/train-a/0-of-1.json", one.to_json())
    said = "" if engine["state"] == "running" else "why"
    alive = JobStatus("train-a", message=said, created=NOON, **engine | {"state": State(engine["state"])})
    found = alive.with_outcome(str(tmp_path))
    assert (found.state, found.exit_code, found.attempts) == (state, code, bool(wrote))
    assert found.message.startswith(message) and bool(found.message) == bool(message)
    assert restart in (None, found.restart)
