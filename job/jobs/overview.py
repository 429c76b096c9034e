"""`ddpm jobs`: the state of jobs by their engines and, also when the machines are long gone, by their bucket."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from job.coordination.outcome import read_outcome
from job.exits import BadRequestError, JobError, MissingInputError, State, meaning
from job.jobs.backends import JobStatus, Target
from job.jobs.spec import is_about, validated_job_name
from job.jobs.targets import load_targets, target_on
from job.printing import print_json, print_table
from job.progress import note, printable
from job.runs.layout import RUNS
from job.stop import handle_stop_signals
from job.store import open_store
from job.verbs.run_listing import show_run, summary_of


@dataclass(frozen=True)
class Search:
    """The targets that are searched for jobs: the one named `on`, or all of the file."""

    on: str = ""
    targets_file: Path | None = None

    @cached_property
    def targets(self) -> list[Target]:
        """Returns these targets."""
        if self.on:
            return [target_on(self.on, self.targets_file, note)]
        return list(load_targets(self.targets_file, say=note).values())

    def ask(self, question: Callable[[Target], list[JobStatus]]) -> list[tuple[Target, JobStatus]]:
        """Returns each job in the engines' answers once; reports and skips a silent engine if there are several."""
        found: dict[tuple[str, ...], tuple[Target, JobStatus]] = {}
        for target in self.targets:
            try:
                for status in question(target):
                    # Several targets may be one engine.
                    found.setdefault((target.backend, status.name, status.created), (target, status))
            except JobError as error:
                if self.on:
                    raise
                if target.is_remote:
                    note(f"{target.name}: {error}")
        return list(found.values())

    def find(self, name: str) -> list[tuple[Target, JobStatus]]:
        """Returns the engines that know a job of that name, or that have a record of its lost machine."""
        validated_job_name(name)
        found = self.ask(lambda target: [target.alive(name)])
        return [(target, status) for target, status in found if status.state is not State.GONE or status.created]

    def the_one(self, name: str) -> Target:
        """Returns the engine that knows a job of that name.

        Raises:
            MissingInputError: none does.
            BadRequestError: several do.
        """
        found = self.find(name)
        if not found:
            raise self.unknown(name)
        if len(found) > 1:
            names = ", ".join(target.name for target, _ in found)
            raise BadRequestError(f"there is a job {name!r} on several targets ({names}): choose one with --on")
        return found[0][0]

    def unknown(self, name: str) -> MissingInputError:
        """Returns the error about a job that no target knows."""
        names = ", ".join(target.name for target in self.targets)
        return MissingInputError(f"no target knows a job {name!r} ({names}): see `ddpm jobs list`")


def list_jobs(on: str, targets: Path | None, *, as_json: bool) -> None:
    """Prints a table of the jobs on the target `on`, or on all targets of a file, newest first."""
    from rich.table import Table

    search = Search(on, targets)
    _folders_of_runs.cache_clear()
    rows = []
    found = search.ask(lambda target: target.jobs())
    for target, status in sorted(found, key=lambda one: one[1].created, reverse=True):
        uri = status.bucket or target.usual_bucket
        # A bucket that is away is tried once, and not for each job.
        is_there = _folders_of_runs(uri) is not None
        rows.append(_row(status.with_outcome(uri) if is_there else status, target.name, uri))
    if as_json:
        print_json(rows)
        return
    names = ("target", "state", "attempts", "exit_code", "created", "place", "message")
    table = Table("job", *(name.replace("_", " ") for name in names), box=None)
    for row in rows:
        table.add_row(row["name"], *("-" if row[name] in (None, "") else str(row[name]) for name in names))
    where = f"on {on}" if on else "on any target"
    print_table(table, f"no jobs {where}: start one with `ddpm submit train --dataset NAME --on TARGET`")


def _row(status: JobStatus, target: str | None, bucket_uri: str) -> dict[str, Any]:
    """Returns the values of a job."""
    return asdict(status) | {"message": status.why, "target": target, "bucket": bucket_uri}


def show_job(name: str, on: str, targets: Path | None, bucket_of_run: str, *, as_json: bool) -> None:
    """Prints the state of a job, by its engine and its bucket; the default bucket is the target's.

    Raises:
        MissingInputError: neither an engine nor a bucket knows it.
    """
    _folders_of_runs.cache_clear()
    search = Search(on, targets)
    known: list[tuple[JobStatus, str | None, str]] = [
        (status, target.name, bucket_of_run or status.bucket or target.usual_bucket)
        for target, status in search.find(name)
    ]
    # Their machines are gone; a bucket knows the job, or its run.
    uris = dict.fromkeys([bucket_of_run] if bucket_of_run else [target.usual_bucket for target in search.targets])
    gone = (uri for uri in uris if read_outcome(name, uri) or _run_of(name, uri))
    known = known or [(JobStatus(name, State.GONE), None, uri) for uri in gone]
    if not known:
        raise search.unknown(name)
    found = [(status.with_outcome(uri), on, uri) for status, on, uri in known]
    if as_json:
        print_json([_row(*each) | {"run": _summary(name, each[2])} for each in found])
        return
    for status, target, uri in found:
        where = f", on {target}" if target else ": unknown to every engine; the facts below are in its bucket"
        started = f", {status.attempts} start{'s' * (status.attempts > 1)}" if status.attempts else ""
        submitted = f", submitted {status.created}" if status.created else ""
        print(f"job         {name}{where}{f', in {status.place}' * bool(status.place)}")
        print(f"state       {status.state}{started}{submitted}")
        if status.exit_code is not None:
            print(f"exit code   {status.exit_code}: {meaning(status.exit_code)}")
        if status.message:
            print(f"message     {status.message}")
        if run := _run_of(name, uri):
            with suppress(MissingInputError):
                show_run(uri, run)


def print_logs(name: str, on: str, targets: Path | None, *, follow: bool) -> None:
    """Prints a job's output; with `follow` until the job's end or a signal, which leaves the job alone.

    Raises:
        MissingInputError: no target knows it, or its output is gone.
    """
    target = Search(on, targets).the_one(name)
    if follow:
        handle_stop_signals(lambda number, frame: sys.exit(0))
    for line in target.logs(name, follow):
        # A terminal obeys escape sequences, and a carriage return would hide the text before it.
        print("\t".join(map(printable, line.rstrip("\r").split("\t"))), flush=True)


def cancel_job(name: str, on: str, targets: Path | None) -> None:
    """Makes a job save and end, and prints the effect.

    Raises:
        MissingInputError: no target knows it.
    """
    target = Search(on, targets).the_one(name)
    print(f"{name} on {target.name} {target.cancel(name)}")


def _summary(job_name: str, bucket_uri: str) -> dict[str, Any] | None:
    """Returns a summary of a job's run; None if it has none that can be read."""
    with suppress(JobError):
        return summary_of(open_store(bucket_uri), run) if (run := _run_of(job_name, bucket_uri)) else None
    return None


def _run_of(job_name: str, bucket_uri: str) -> str:
    """Returns the run of a job; empty if it does not exist yet, or may not be read."""
    for name in _folders_of_runs(bucket_uri) or ():
        # A folder of another program may have a name that no run can have.
        with suppress(BadRequestError):
            if is_about(job_name, name):
                return name
    return ""


@cache
def _folders_of_runs(bucket_uri: str) -> tuple[str, ...] | None:
    """Returns the folders of all runs, from one request for all jobs of a bucket; None if that is away."""
    try:
        return tuple(open_store(bucket_uri).folders(RUNS))
    except MissingInputError:
        return ()
    except JobError as error:
        note(f"the run's folder cannot be read: {error}")
    return None
