"""How a job goes and ended, as it says itself in its bucket: there it can be read when its machine is long gone.

    BUCKET/jobs/NAME/2-of-4.json    of machine 2 of the four that make this job; most have one, `0-of-1`

Who submits a job gives it its name in a variable. Commands that somebody types have none, and write nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from job.exits import BadDataError, Exit, JobError, ending_of, retried, severity
from job.sealed import Moment, Sealed, utc_now
from job.store import ObjectMissingError, Retry, open_store

JOB = "DDPM_JOB"
"""The job's name."""
JOBS = "jobs"
"""Folder of the bucket."""
WRITE_SECONDS = 5.0
"""How long a bucket that is away may hold up a job that is to end."""
LONGEST_MESSAGE = 500
"""In characters."""
MOST_STARTS = 100
"""Of one machine; those before are forgotten."""
OUTCOME_READ_SECONDS = 10.0
"""How long a bucket may be away before its word is done without."""
_SEVERITIES = ("finished", "stopped", "failed", "running")
"""Of several machines the one that is furthest on in this list decides."""


class Outcome(Sealed):
    """What one machine of a job says about it, or all of them together."""

    state: Literal["running", "stopped", "finished", "failed"]
    """`stopped` is exit code 75: the same command goes on from there."""
    exit_code: int | None
    """None while it runs."""
    updated: Moment
    """When it said so."""
    message: str = ""
    """Why it ended so, in a line."""
    machine: int = 0
    machines: int = 1
    starts: tuple[Moment, ...] = ()
    """When the machine began each attempt, the newest last, those of earlier jobs of this name included."""


@contextmanager
def outcome_written(bucket_uri: str, machine: int = 0, machines: int = 1) -> Iterator[None]:
    """Says in the bucket that the job runs, and in the end how it ended. A bucket that is away is no reason to stop.

    Args:
        bucket_uri: the job's bucket.
        machine: the number of this one among those that do the same job: a node, or a slice of sampling.
        machines: how many there are.
    """
    # Taken away, for processes that this one starts are no jobs.
    name = os.environ.pop(JOB, "")
    if not name:
        yield
        return

    key, starts = f"{JOBS}/{name}/{machine}-of-{machines}.json", [utc_now()]
    # An engine forgets an attempt with its pod.
    with suppress(JobError):
        before = Outcome.load(open_store(bucket_uri, Retry(WRITE_SECONDS)), key)
        starts = [*before.starts, *starts][-MOST_STARTS:]

    def write(code: int | None, message: str = "") -> None:
        states: dict[int | None, Any] = {None: "running", Exit.FINISHED: "finished", Exit.STOPPED: "stopped"}
        state, message = states.get(code, "failed"), " ".join(message.split())[:LONGEST_MESSAGE]
        told: dict[str, Any] = {"machine": machine, "machines": machines, "starts": tuple(starts)}
        outcome = Outcome(state=state, exit_code=code, updated=utc_now(), message=message, **told)
        # The engine has the exit code as well, and the program's own lines say what is wrong with the bucket.
        with suppress(JobError):
            store = open_store(bucket_uri, Retry(WRITE_SECONDS))
            # Raises for a folder that is not there: what is misspelt must not be made.
            store.folders(JOBS)
            store.put(key, outcome.to_json())

    write(None)
    try:
        yield
    except BaseException as error:
        write(*ending_of(error))
        raise
    write(Exit.FINISHED)


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
    # Submitted for another number of machines than before, it is another job of this name.
    newest = max(found, key=lambda one: one.updated)
    found = [one for one in found if one.machines == newest.machines]
    worst = max(found, key=lambda one: (_SEVERITIES.index(one.state), severity(retried(one.exit_code or 0))))
    # Nodes begin an attempt together, slices each its own.
    by_machine = [one.starts for one in found]
    starts = sum(by_machine, ()) if name.startswith("sample-") else max(by_machine, key=len)
    worst = worst.model_copy(update={"starts": starts})
    if worst.state == "finished" and len(found) < worst.machines:
        # The others have not begun yet.
        return worst.model_copy(update={"state": "running", "exit_code": None})
    return worst
