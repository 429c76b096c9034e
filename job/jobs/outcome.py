"""What a job's bucket says about how it goes or ended; see `job.outcome` for who writes it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from job.exits import BadDataError, Exit, JobError, retried
from job.jobs.backends.base import Cause, JobStatus, State, severity
from job.outcome import JOBS, Outcome
from job.store import ObjectMissingError, Retry, open_store

OUTCOME_READ_SECONDS = 10.0
"""How long a bucket may be away before its word is done without."""
_SEVERITIES = ("finished", "stopped", "failed", "running")
"""Of several machines the one that is furthest on in this list decides."""


def read_outcome(name: str, bucket_uri: str) -> Outcome | None:
    """What the bucket says about a job, all its machines together; None if it says nothing, or cannot be read."""
    found: list[Outcome] = []
    with suppress(JobError):
        bucket = open_store(bucket_uri, Retry(OUTCOME_READ_SECONDS))
        for entry in bucket.list(f"{JOBS}/{name}"):
            # What is rotten, or is just being deleted, says nothing.
            with suppress(BadDataError, ObjectMissingError):
                found.append(Outcome.load(bucket, entry.key))
    if not found:
        return None
    worst = max(found, key=lambda one: (_SEVERITIES.index(one.state), severity(retried(one.exit_code or 0))))
    if worst.state == "finished" and len(found) < worst.machines:
        # The others have not begun yet.
        return worst.model_copy(update={"state": "running", "exit_code": None})
    return worst


def informed(status: JobStatus, bucket_uri: str, earlier: Outcome | None = None) -> JobStatus:
    """What an engine says of a job, with the job's own word for how it ended where the engine has none.

    Args:
        status: what the engine says; it may know nothing at all.
        bucket_uri: the job's bucket.
        earlier: what the bucket said before the job was submitted, which is about another one of this name.
    """
    if status.exit_code is not None or status.state not in (State.FAILED, State.GONE):
        return status
    outcome = read_outcome(status.name, bucket_uri)
    # What is older than the job is an earlier one's as well.
    if outcome is None or outcome.exit_code is None or outcome == earlier or outcome.updated < status.created:
        return status
    return replace(
        status,
        state=State.FINISHED if outcome.exit_code == Exit.FINISHED else status.state,
        exit_code=outcome.exit_code,
        message=outcome.message or status.message,
        # With a code that would come again a new machine is of no use, whatever became of this one.
        cause=None if status.cause is Cause.TAKEN_AWAY else status.cause,
    )
