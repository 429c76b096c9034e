"""`ddpm jobs`: how jobs are going, from their engines and, also when the machines are long gone, from their bucket."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from job.exits import BadRequestError, JobError, MissingInputError, meaning
from job.jobs.backends import backend_for
from job.jobs.backends.base import Backend, JobStatus, State
from job.jobs.spec import is_about, validated_job_name
from job.jobs.targets import Target, chosen_target, load_targets
from job.outcome import Outcome, read_outcome
from job.progress import Progress, note, printable
from job.runs.layout import RUNS
from job.runs.listing import print_json, print_table, progress_cells, show_run, summary_of
from job.stop import handle_stop_signals
from job.store import open_store


@dataclass(frozen=True)
class Search:
    """Where to look for jobs: on one target, or, where none is named, on all of the file."""

    on: str = ""
    targets_file: Path | None = None

    @property
    def targets(self) -> list[Target]:
        """The targets in question."""
        targets = load_targets(self.targets_file)
        return [chosen_target(targets, self.on)] if self.on else list(targets.values())

    def ask(self, question: Callable[[Backend], list[JobStatus]]) -> Iterator[tuple[Backend, JobStatus]]:
        """Each job in the engines' answers, once; of several engines one that is silent is told of and left out."""
        seen: set[tuple[str, ...]] = set()
        for target in self.targets:
            try:
                with backend_for(target) as backend:
                    for status in question(backend):
                        # Several targets may be one engine.
                        if (identity := backend.identity(status)) not in seen:
                            seen.add(identity)
                            yield backend, status
            except JobError as error:
                if self.on:
                    raise
                # Nobody said that there is a container engine on this machine.
                if target.backend != "container":
                    note(f"{target.name}: {error}")

    def find(self, name: str) -> list[tuple[Backend, JobStatus]]:
        """The engines that know a job of that name, or of which a machine that is gone has left a record."""
        validated_job_name(name)
        found = self.ask(lambda backend: [backend.status(name)])
        return [(backend, status) for backend, status in found if status.state is not State.GONE or status.created]

    def the_one(self, name: str) -> Backend:
        """The engine that knows a job of that name.

        Raises:
            MissingInputError: none does.
            BadRequestError: several do.
        """
        found = self.find(name)
        if not found:
            raise self.unknown(name)
        if len(found) > 1:
            names = ", ".join(backend.target.name for backend, _ in found)
            raise BadRequestError(f"there is a job {name!r} on several targets ({names}): say which with --on")
        return found[0][0]

    def unknown(self, name: str) -> MissingInputError:
        """The error about a job that nobody knows."""
        names = ", ".join(target.name for target in self.targets)
        return MissingInputError(f"no target knows a job {name!r} ({names}): `ddpm jobs list` shows those there are")


def list_jobs(search: Search, *, as_json: bool = False) -> None:
    """Prints a table of the jobs on the targets in question, newest first, with how their runs are going."""
    from rich.table import Table

    _folders_of_runs.cache_clear()
    found = search.ask(lambda backend: backend.jobs())
    ordered = sorted(found, key=lambda one: one[1].created, reverse=True)
    with Progress("reading runs", total=len(ordered), unit="jobs") as bar:
        told = []
        for number, (backend, status) in enumerate(ordered, 1):
            uri = status.bucket or backend.target.usual_bucket
            # One that is away is asked once, and not for each job.
            is_there = _folders_of_runs(uri) is not None
            told.append(_told(status.informed(uri) if is_there else status, backend, uri))
            bar.update(number)
    if as_json:
        print_json(told)
        return
    titles = ("job", "target", "state", "attempts", "exit code", "created", "place")
    of_run = ("epoch", "loss", "images/s", "to the end", "cost so far", "what it says")
    table = Table(*titles, *of_run, box=None)
    for job in told:
        code = "-" if job["exit_code"] is None else str(job["exit_code"])
        engine = (str(job["attempts"] or "-"), code, job["created"] or "-", job["place"] or "-")
        cells = (job["name"], job["target"], job["state"], *engine)
        table.add_row(*cells, *_run_cells(job["run"]), job["message"])
    where = f"on {search.on}" if search.on else "on any target"
    print_table(table, f"no jobs {where}: start one with `ddpm submit train --dataset NAME --on TARGET`")


def _told(status: JobStatus, backend: Backend | None, bucket_uri: str) -> dict[str, Any]:
    """A job as values, with a summary of the run that it works on, if there is one."""
    told = asdict(status) | {"target": backend.target.name if backend else None, "bucket": bucket_uri}
    return told | {"run": _summary(_run_of(status.name, bucket_uri), bucket_uri)}


def _summary(run: str, bucket_uri: str) -> dict[str, Any] | None:
    with suppress(JobError):
        return summary_of(open_store(bucket_uri), run) if run else None
    return None


def _run_cells(run: dict[str, Any] | None) -> list[str]:
    """Epoch, loss, speed, what is left and what it cost."""
    if run is None:
        return ["-"] * 5
    _, epoch, _, *others = progress_cells(run)
    dollars = run["dollars_so_far"]
    return [epoch, *others, "-" if dollars is None else f"about ${dollars:,.2f}"]


def show_job(name: str, search: Search, bucket: str, *, as_json: bool = False) -> None:
    """Prints how a job is going, as its engine and its bucket say; the target's bucket, unless one is named.

    Raises:
        MissingInputError: neither an engine nor a bucket knows it.
    """
    _folders_of_runs.cache_clear()
    found = [
        (backend, status.informed(uri), uri)
        for backend, status in search.find(name)
        for uri in [bucket or status.bucket or backend.target.usual_bucket]
    ]
    gone = [] if found else list(_left_behind(name, search, bucket))
    if not found and not gone:
        raise search.unknown(name)
    if as_json:
        left = [(None, JobStatus(name, State.GONE).informed(uri), uri) for _, uri in gone]
        print_json([_told(status, backend, uri) for backend, status, uri in [*found, *left]])
        return
    for backend, status, uri in found:
        _print_status(status, backend.target.name)
        _print_run(_run_of(name, uri), uri)
    for outcome, uri in gone:
        print(f"job         {name}: no engine knows it any more; this is what its bucket says")
        if outcome:
            print(f"state       {outcome.state}, as of {outcome.updated}")
            _print_ending(outcome.exit_code, outcome.message)
        _print_run(_run_of(name, uri), uri)


def _left_behind(name: str, search: Search, bucket: str) -> Iterator[tuple[Outcome | None, str]]:
    """The buckets that know a job whose machine is gone: what it said is where it was."""
    for uri in dict.fromkeys([bucket] if bucket else [target.usual_bucket for target in search.targets]):
        outcome = read_outcome(name, uri)
        if outcome or _run_of(name, uri):
            yield outcome, uri


def print_logs(name: str, search: Search, *, follow: bool) -> None:
    """Prints what a job said; with `follow` until it is over or a signal comes, which leaves the job alone.

    Raises:
        MissingInputError: no target knows it, or its output is gone.
    """
    backend = search.the_one(name)
    if follow:
        handle_stop_signals(lambda number, frame: sys.exit(0))
    for line in backend.logs(name, follow):
        # A terminal obeys escape sequences, and a carriage return would hide the text before it.
        print("\t".join(map(printable, line.rstrip("\r").split("\t"))), flush=True)


def cancel_job(name: str, search: Search) -> None:
    """Has a job save and end, and says what that meant for it.

    Raises:
        MissingInputError: no target knows it.
    """
    backend = search.the_one(name)
    print(f"{name} on {backend.target.name} {backend.cancel(name)}")


def _print_status(status: JobStatus, target: str) -> None:
    place = f", in {status.place}" if status.place else ""
    started = f", {status.attempts} {'start' if status.attempts == 1 else 'starts'}" if status.attempts else ""
    submitted = f", submitted {status.created}" if status.created else ""
    print(f"job         {status.name}, on {target}{place}\nstate       {status.state}{started}{submitted}")
    _print_ending(status.exit_code, status.message)


def _print_ending(code: int | None, message: str) -> None:
    if code is not None:
        print(f"exit code   {code}: {meaning(code)}")
    if message:
        print(f"it says     {message}")


def _run_of(job_name: str, bucket_uri: str) -> str:
    """The run that a job works on; empty if there is none yet, or if nobody here may see it."""
    for name in _folders_of_runs(bucket_uri) or ():
        # Somebody else may have put a folder there whose name no run can have.
        with suppress(BadRequestError):
            if is_about(job_name, name):
                return name
    return ""


@cache
def _folders_of_runs(bucket_uri: str) -> tuple[str, ...] | None:
    """Asked once for all jobs of a bucket; None if that is away."""
    try:
        return tuple(open_store(bucket_uri).folders(RUNS))
    except MissingInputError:
        return ()
    except JobError as error:
        note(f"the run's folder cannot be read: {error}")
    return None


def _print_run(name: str, bucket_uri: str) -> None:
    """Prints what the folder of a run tells, of its attempts too; nothing if `name` is empty."""
    if not name:
        return
    with suppress(MissingInputError):
        show_run(bucket_uri, name)
