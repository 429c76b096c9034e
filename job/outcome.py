"""The state and the outcome of a job, in its bucket: readable when its machine is gone.

    BUCKET/jobs/NAME/2-of-4.json    by machine 2 of the job's four; most jobs have one machine, `0-of-1`

`submit` passes the name of the job in a variable. A command from a terminal has no such name and writes no outcome.
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
"""The variable with the job's name."""
JOBS = "jobs"
"""Folder of the bucket."""
WRITE_SECONDS = 5.0
"""The longest time that a bucket without an answer delays the end of a job."""
LONGEST_MESSAGE = 500
"""Characters."""
MOST_STARTS = 100
"""The number of starts that the record of a machine keeps."""
OUTCOME_READ_SECONDS = 10.0
"""The longest wait for a bucket; then `read_outcome` returns nothing."""
_SEVERITIES = ("finished", "stopped", "failed", "running")
"""States of machines: the last one in this order decides about the job."""


class Outcome(Sealed):
    """The report of one machine of a job, or of all of them together."""

    state: Literal["running", "stopped", "finished", "failed"]
    """`stopped` is exit code 75: the same command resumes."""
    exit_code: int | None
    """None while the job runs."""
    updated: Moment
    """The time of this report."""
    message: str = ""
    """The reason of the end, in a line."""
    machine: int = 0
    machines: int = 1
    starts: tuple[Moment, ...] = ()
    """The times at which the machine began attempts, the newest last, also of earlier jobs of this name."""


@contextmanager
def outcome_written(bucket_uri: str, machine: int = 0, machines: int = 1) -> Iterator[None]:
    """Writes into the bucket that the job runs, and at its end how it ended. The job goes on if the bucket is away.

    Args:
        bucket_uri: the job's bucket.
        machine: the number of this machine in its job: a node, or a slice of shared work.
        machines: the number of machines of the job.
    """
    # Removed, because the processes that this one starts are not jobs.
    name = os.environ.pop(JOB, "")
    if not name:
        yield
        return

    key, starts = f"{JOBS}/{name}/{machine}-of-{machines}.json", [utc_now()]
    # An engine forgets an attempt with its pod: the bucket keeps the list.
    with suppress(JobError):
        before = Outcome.load(open_store(bucket_uri, Retry(WRITE_SECONDS)), key)
        starts = [*before.starts, *starts][-MOST_STARTS:]

    def write(code: int | None, message: str = "") -> None:
        states: dict[int | None, Any] = {None: "running", Exit.FINISHED: "finished", Exit.STOPPED: "stopped"}
        state, message = states.get(code, "failed"), " ".join(message.split())[:LONGEST_MESSAGE]
        about: dict[str, Any] = {"machine": machine, "machines": machines, "starts": tuple(starts)}
        outcome = Outcome(state=state, exit_code=code, updated=utc_now(), message=message, **about)
        # The engine has the exit code too, and the command itself reports errors of the bucket.
        with suppress(JobError):
            store = open_store(bucket_uri, Retry(WRITE_SECONDS))
            # Raises if the folder is missing: a misspelt name must not create a bucket.
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
    """Returns the outcome of a job, of all its machines together; None if the bucket has none or cannot be read."""
    found: list[Outcome] = []
    with suppress(JobError):
        bucket = open_store(bucket_uri, Retry(OUTCOME_READ_SECONDS))
        for entry in bucket.list(f"{JOBS}/{name}"):
            # A corrupt record, or one that was deleted since the listing, must not hide the others.
            with suppress(BadDataError, ObjectMissingError):
                found.append(Outcome.load(bucket, entry.key))
    if not found:
        return None
    # Records of another number of machines belong to an earlier job of this name.
    newest = max(found, key=lambda one: one.updated)
    found = [one for one in found if one.machines == newest.machines]
    worst = max(found, key=lambda one: (_SEVERITIES.index(one.state), severity(retried(one.exit_code or 0))))
    # Nodes that train begin an attempt together; slices begin separately.
    by_machine = [one.starts for one in found]
    starts = max(by_machine, key=len) if name.startswith("train-") else sum(by_machine, ())
    worst = worst.model_copy(update={"starts": starts})
    if worst.state == "finished" and len(found) < worst.machines:
        # The other machines have not begun yet.
        return worst.model_copy(update={"state": "running", "exit_code": None})
    return worst
