"""`ddpm jobs`: how jobs are going, from their engines and, also when the machines are long gone, from their bucket."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from job.exits import TABLE, BadRequestError, Exit, JobError, MissingInputError
from job.jobs.backends import backend_for
from job.jobs.backends.base import Backend, JobStatus, State
from job.jobs.outcome import informed, read_outcome
from job.jobs.spec import is_about, validated_job_name
from job.jobs.submit import formatted
from job.jobs.targets import Target, chosen_target, load_targets
from job.progress import note
from job.runs import records
from job.runs.checkpoints import list_checkpoints
from job.runs.layout import RUNS
from job.runs.overview import print_table, state_of
from job.stop import handle_stop_signals
from job.store import Store, open_store


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
        what = f"target {self.on!r} knows no job {name!r}" if self.on else f"no target knows a job {name!r} ({names})"
        return MissingInputError(f"{what}: `ddpm jobs list` shows those there are")


def list_jobs(search: Search) -> None:
    """Prints a table of the jobs on the targets in question."""
    from rich.table import Table

    table = Table("job", "target", "state", "attempts", "exit code", "created", "place", "what it says", box=None)
    for backend, status in search.ask(lambda backend: backend.jobs()):
        code = "-" if status.exit_code is None else str(status.exit_code)
        numbers = (str(status.attempts or "-"), code, status.created or "-", status.place or "-")
        table.add_row(status.name, backend.target.name, status.state.value, *numbers, status.message)
    if table.row_count:
        print_table(table)
    else:
        where = f"on {search.on}" if search.on else "on any target"
        print(f"no jobs {where}: start one with `ddpm submit train --dataset NAME --on TARGET`")


def show_job(name: str, search: Search, bucket: str) -> None:
    """Prints how a job is going, as its engine and its bucket say; the target's bucket, unless one is named.

    Raises:
        MissingInputError: neither an engine nor a bucket knows it.
    """
    lines: list[str] = []
    for backend, status in search.find(name):
        uri = bucket or status.bucket or backend.target.usual_bucket
        lines += _status_lines(informed(status, uri), backend.target.name) + _run_lines(name, uri)
    if not lines:
        # Its machine is gone; what it said is where it was.
        uris = [bucket] if bucket else [target.usual_bucket for target in search.targets]
        for uri in dict.fromkeys(uris):
            if outcome := read_outcome(name, uri):
                lines.append(f"state       {outcome.state}, as of {outcome.updated}")
                lines += _ending_lines(outcome.exit_code, outcome.message)
            lines += _run_lines(name, uri)
        if not lines:
            raise search.unknown(name)
        lines.insert(0, f"job         {name}: no engine knows it any more; this is what its bucket says")
    print("\n".join(lines))


def print_logs(name: str, search: Search, *, follow: bool) -> None:
    """Prints what a job said; with `follow` until it is over or a signal comes, which leaves the job alone.

    Raises:
        MissingInputError: no target knows it, or its output is gone.
    """
    backend = search.the_one(name)
    if follow:
        handle_stop_signals(lambda number, frame: sys.exit(0))
    for line in backend.logs(name, follow):
        print(line, flush=True)


def cancel_job(name: str, search: Search) -> None:
    """Has a job save and end, and says what that meant for it.

    Raises:
        MissingInputError: no target knows it.
    """
    backend = search.the_one(name)
    print(f"{name} on {backend.target.name} {backend.cancel(name)}")


def describe_job(name: str, search: Search, output: str) -> None:
    """Prints what the engine itself holds about a job.

    Raises:
        MissingInputError: no target knows it.
    """
    print(formatted([search.the_one(name).describe(name)], output), end="")


def _status_lines(status: JobStatus, target: str) -> list[str]:
    place = f", in {status.place}" if status.place else ""
    started = f", {status.attempts} {'start' if status.attempts == 1 else 'starts'}" if status.attempts else ""
    submitted = f", submitted {status.created}" if status.created else ""
    return [
        f"job         {status.name}, on {target}{place}",
        f"state       {status.state.value}{started}{submitted}",
        *_ending_lines(status.exit_code, status.message),
    ]


def _ending_lines(code: int | None, message: str) -> list[str]:
    lines = []
    if code is not None:
        lines.append(f"exit code   {code}: {TABLE[Exit(code)].text if code in TABLE else 'a crash or a signal'}")
    return lines + ([f"it says     {message}"] if message else [])


def _run_lines(job_name: str, bucket_uri: str) -> list[str]:
    """What the folder of the job's run tells; nothing if there is none, or if nobody here may read it."""
    try:
        bucket = open_store(bucket_uri)
        for name in bucket.folders(RUNS):
            # Somebody else may have put a folder there whose name no run can have.
            with suppress(BadRequestError):
                if is_about(job_name, name):
                    return _lines_of_run(records.run_store(bucket, name), name)
    except MissingInputError:
        pass
    except JobError as error:
        note(f"the run's folder cannot be read: {error}")
    return []


def _lines_of_run(run: Store, name: str) -> list[str]:
    lines = [f"run         {name}  ({run.uri})"]
    if (status := records.read_status(run)) is not None:
        lines.append(f"run's state {state_of(status)}, as of {status.updated}, attempt {status.fence}")
        lines.append(f"images seen {status.images_seen:,} of {status.target_images:,} (epoch {status.epoch:.2f})")
    if refs := list_checkpoints(run):
        lines.append(f"newest      {max(refs).key}, {max(refs).images_seen:,} images seen")
    for fence in records.attempt_fences(run):
        attempt = records.load_attempt(run, fence)
        device = f"{attempt.world_size} × {attempt.device}"
        lines.append(f"attempt {fence:<3} {attempt.started} on {attempt.host}, {device}, code {attempt.code_version}")
    return lines
