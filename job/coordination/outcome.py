"""The state and the end of a job, as it writes them into its bucket, where they outlive its machine.

    BUCKET/jobs/NAME/2-of-4.json    by machine 2 of the job's four; most jobs have one machine, `0-of-1`

`ddpm submit` gives a job its name in a variable. A command that a person types has none, and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import Field

from job.coordination.pieces import Slice
from job.coordination.sealed import Moment, Sealed, utc_now
from job.exits import BadDataError, Exit, JobError, State, ending_of, restart_after, state_after
from job.options import JobOptions
from job.processes.group import JOB
from job.stop import Stop, deadline, preemption_watched
from job.store import ObjectMissingError, Retry, open_store

JOBS = "jobs"
"""The folder of the bucket."""
WRITE_SECONDS = 5.0
"""The limit of a write: a bucket that is away must not hold up a job that ends."""
MOST_STARTS = 100
"""The number of starts that one machine keeps."""
OUTCOME_READ_SECONDS = 10.0
"""The limit of a read: an engine's answer is shown without the bucket's if that is away."""


class Outcome(Sealed):
    """The state of one machine of a job, or of all of them together."""

    state: State
    exit_code: int | None
    """None while the job runs."""
    updated: Moment
    message: str = ""
    """The reason of the end, in a line."""
    machine: int = 0
    machines: int = 1
    is_group: bool = False
    """Whether the machines train together: they begin an attempt together, while slices each have their own."""
    starts: tuple[Moment, ...] = ()
    """The begin of each attempt, the newest last, those of earlier jobs of this name included."""
    failed: tuple[int, ...] = Field((), exclude=True)
    """Of all machines together: the numbers of those that failed. No record has it."""

    @property
    def is_sliced(self) -> bool:
        """Returns whether several machines share the pieces of the job."""
        return self.machines > 1 and not self.is_group


@contextmanager
def command_on(request: JobOptions, node: Slice | None = None) -> Iterator[Stop]:
    """Runs a command with the common parts: its outcome in the bucket, its deadline, and its reaction to signals.

    Args:
        request: the command's.
        node: this machine among those that train together.
    """
    share = node or Slice.parse(getattr(request, "slice", ""))
    outcome = outcome_written(request.bucket, share.index, share.count, is_group=node is not None)
    with outcome, deadline(request.stop_after):
        # Signals end this process until its work begins.
        stop = Stop().install(signals=False)
        with preemption_watched(stop):
            yield stop


@contextmanager
def outcome_written(bucket_uri: str, machine: int = 0, machines: int = 1, *, is_group: bool = False) -> Iterator[None]:
    """Writes into the bucket that the job runs, and in the end how it ended; a bucket that is away stops nothing.

    Args:
        bucket_uri: the job's bucket.
        machine: the number of this one among those that do the same job: a node, or a slice.
        machines: their count.
        is_group: whether they train together.
    """
    # Removed, because processes that this one starts are no jobs.
    name = os.environ.pop(JOB, "")
    if not name:
        yield
        return

    key, starts = f"{JOBS}/{name}/{machine}-of-{machines}.json", [utc_now()]
    # The record outlives the attempt, which its engine forgets with the pod.
    with suppress(JobError):
        before = Outcome.load(open_store(bucket_uri, Retry(WRITE_SECONDS)), key)
        starts = [*before.starts, *starts][-MOST_STARTS:]

    def write(code: int | None, message: str = "") -> None:
        outcome = Outcome(
            state=state_after(code),
            exit_code=code,
            updated=utc_now(),
            message=" ".join(message.split()),
            machine=machine,
            machines=machines,
            is_group=is_group,
            starts=tuple(starts),
        )
        # The engine has the exit code as well, and the program itself prints what is wrong with the bucket.
        with suppress(JobError):
            store = open_store(bucket_uri, Retry(WRITE_SECONDS))
            # Raises for a folder that does not exist: a misspelt one must not be made.
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
    """Returns the outcome of a job, all its machines together; None if the bucket has none, or cannot be read."""
    found: list[Outcome] = []
    with suppress(JobError):
        bucket = open_store(bucket_uri, Retry(OUTCOME_READ_SECONDS))
        for entry in bucket.list(f"{JOBS}/{name}"):
            # The record of one machine may be corrupt, or just being deleted.
            with suppress(BadDataError, ObjectMissingError):
                found.append(Outcome.load(bucket, entry.key))
    if not found:
        return None
    # A job of this name for another number of machines is another job.
    newest = max(found, key=lambda one: one.updated)
    found = [one for one in found if one.machines == newest.machines]
    worst = max(found, key=lambda one: (one.state.order, restart_after(one.exit_code or 0)))
    by_machine = [one.starts for one in found]
    starts = max(by_machine, key=len) if newest.is_group else sum(by_machine, ())
    failed = tuple(sorted(one.machine for one in found if one.state is State.FAILED))
    worst = worst.model_copy(update={"starts": starts, "failed": failed})
    if worst.state is State.FINISHED and len(found) < worst.machines:
        # The others have not begun yet.
        return worst.model_copy(update={"state": State.RUNNING, "exit_code": None})
    return worst
