"""What a job's bucket says about how it goes or ended; see `job.outcome` for who writes it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from job.exits import BadDataError, Exit, JobError, retried
from job.jobs.backends.base import Cause, JobStatus, State, severity
from job.outcome import JOBS, Outcome
from job.store import ObjectMissingError, Retry, open_store

READ_SECONDS = 10.0
"""How long a bucket may be away before its word is done without."""
_STATES = ("finished", "stopped", "failed", "running")
"""Of several machines the one that is furthest on in this list decides."""


class Placed(Protocol):
    """A job and where its bucket is, such as a `JobSpec`."""

    @property
    def name(self) -> str:
        """Of the job."""

    @property
    def bucket(self) -> str:
        """URI of its bucket."""


class JobPlace(NamedTuple):
    """A job of which no more is known."""

    name: str
    bucket: str


def read_outcome(job: Placed) -> Outcome | None:
    """What the bucket says about a job, all its machines together; None if it says nothing, or cannot be read.

    It may be about an earlier job of the same name: compare it with what was there when the job was submitted.
    """
    found: list[Outcome] = []
    with suppress(JobError):
        bucket = open_store(job.bucket, Retry(READ_SECONDS))
        for entry in bucket.list(f"{JOBS}/{job.name}"):
            # What is rotten, or is just being deleted, says nothing.
            with suppress(BadDataError, ObjectMissingError):
                found.append(Outcome.load(bucket, entry.key))
    if not found:
        return None
    worst = max(found, key=lambda one: (_STATES.index(one.state), severity(retried(one.exit_code or 0))))
    if worst.state == "finished" and len(found) < worst.machines:
        # The others have not begun yet.
        return worst.model_copy(update={"state": "running", "exit_code": None})
    return worst


def informed(status: JobStatus, outcome: Outcome | None) -> JobStatus:
    """What an engine says of a job that is over, with the job's own word for how it ended where the engine has none."""
    if outcome is None or outcome.exit_code is None or status.exit_code is not None:
        return status
    if status.state not in (State.FAILED, State.GONE):
        return status
    # With a code that would come again a new machine is of no use, whatever became of this one.
    cause = None if status.cause is Cause.TAKEN_AWAY else status.cause
    state = State.FINISHED if outcome.exit_code == Exit.FINISHED else status.state
    message = outcome.message or status.message
    return replace(status, state=state, exit_code=outcome.exit_code, message=message, cause=cause)
