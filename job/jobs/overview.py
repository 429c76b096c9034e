"""`ddpm jobs`: how jobs are going, from their engines, and from their runs' folders when the machines are long gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.exits import TABLE, BadRequestError, Exit, JobError, MissingInputError
from job.jobs.backends import backend_for, extra_named
from job.jobs.backends.base import Backend, JobStatus, State
from job.jobs.spec import is_about, validated_job_name
from job.jobs.submit import check_format, formatted
from job.jobs.targets import Target, chosen_target, default_bucket, load_targets
from job.progress import note
from job.runs import records
from job.runs.checkpoints import list_checkpoints
from job.runs.layout import RUNS
from job.runs.overview import print_table, state_of
from job.store import Store, open_store


@dataclass(frozen=True)
class Asked:
    """Which targets are meant: one, or, where none is named, all of the file."""

    on: str = ""
    targets: Path | None = None

    def candidates(self) -> list[Target]:
        """The targets in question.

        Raises:
            BadRequestError: there is no such target.
            BadConfigError, MissingInputError: see `load_targets`.
        """
        targets = load_targets(self.targets)
        return [chosen_target(targets, self.on)] if self.on else list(targets.values())

    def ask(self, target: Target, question: Any) -> Any:
        """What `question(backend)` gives; None, with a note, if one of several engines does not answer."""
        try:
            with extra_named(target):
                return question(backend_for(target))
        except JobError as error:
            if self.on:
                raise
            # Nobody said that there is a container engine on this machine.
            if target.backend != "container":
                note(f"{target.name}: {error}")
            return None


def list_jobs(asked: Asked) -> None:
    """Prints a table of the jobs on the targets in question."""
    from rich.table import Table

    table = Table("job", "target", "state", "attempts", "exit code", "created", "place", "what it says", box=None)
    shown: set[tuple[str, ...]] = set()
    for target in asked.candidates():
        found = asked.ask(target, lambda backend: [(backend.identity(status), status) for status in backend.jobs()])
        for identity, status in found or ():
            if identity in shown:
                continue
            shown.add(identity)
            table.add_row(
                status.name,
                target.name,
                status.state.value,
                str(status.attempts or "-"),
                "-" if status.exit_code is None else str(status.exit_code),
                status.created or "-",
                status.place or "-",
                status.message,
            )
    if table.row_count:
        print_table(table)
    else:
        where = f"on {asked.on}" if asked.on else "on any target"
        print(f"no jobs {where}: start one with `ddpm submit train --dataset NAME --on TARGET`")


def show_job(name: str, asked: Asked, bucket: str) -> None:
    """Prints how a job is going, as its engine and its run's folder in the bucket say.

    Args:
        name: of the job.
        asked: where it may be.
        bucket: where its run lies; empty is the target's bucket.

    Raises:
        MissingInputError: neither an engine nor a bucket knows it.
    """
    found = _find(name, asked)
    lines: list[str] = []
    shown: set[tuple[str, ...]] = set()
    for target, status, backend in found:
        identity, uri = backend.identity(status), bucket or _bucket_of(target, backend, name)
        lines += [] if identity in shown else _status_lines(status, target)
        # One job on several targets has its run in the bucket of one of them.
        lines += [] if (*identity, uri) in shown else _story(uri, name)
        shown |= {identity, (*identity, uri)}
    if not found:
        # Its machine is gone; its run is where it was.
        uris = [bucket] if bucket else [_bucket_of(target) for target in asked.candidates()]
        for uri in dict.fromkeys(uris):
            lines += _story(uri, name)
        if not lines:
            raise _unknown(name, asked)
        lines.insert(0, f"job         {name}: no engine knows it any more; this is what its run's folder says")
    print("\n".join(lines))


def print_logs(name: str, asked: Asked, *, follow: bool) -> None:
    """Prints what a job said.

    Raises:
        MissingInputError: no target knows it, or its output is gone.
    """
    from job.jobs import following

    target, backend = _the_one(name, asked)
    with extra_named(target):
        following.print_logs(backend, name, follow=follow)


def cancel_job(name: str, asked: Asked) -> None:
    """Has a job save and end, and says what that meant for it.

    Raises:
        MissingInputError: no target knows it.
    """
    target, backend = _the_one(name, asked)
    with extra_named(target):
        done = backend.cancel(name)
    print(f"{name} on {target.name} {done}")


def describe_job(name: str, asked: Asked, output: str) -> None:
    """Prints what the engine itself holds about a job.

    Raises:
        MissingInputError: no target knows it.
    """
    check_format(output)
    target, backend = _the_one(name, asked)
    with extra_named(target):
        print(formatted([backend.describe(name)], output), end="")


def _find(name: str, asked: Asked) -> list[tuple[Target, JobStatus, Backend]]:
    """The targets whose engines know a job of that name."""
    validated_job_name(name)
    found = []
    for target in asked.candidates():
        answer = asked.ask(target, lambda backend: (backend.status(name), backend))
        if answer is not None and _is_known(*answer):
            found.append((target, *answer))
    return found


def _is_known(status: JobStatus, backend: Backend) -> bool:
    """Whether there is anything to tell: a machine that is gone may have left a record."""
    return status.state is not State.GONE or bool(status.created)


def _the_one(name: str, asked: Asked) -> tuple[Target, Backend]:
    found = _find(name, asked)
    if not found:
        raise _unknown(name, asked)
    if len({backend.identity(status) for _, status, backend in found}) > 1:
        names = ", ".join(target.name for target, *_ in found)
        raise BadRequestError(f"there is a job {name!r} on several targets ({names}): say which with --on")
    target, _, backend = found[0]
    return target, backend


def _unknown(name: str, asked: Asked) -> MissingInputError:
    where = f"target {asked.on!r} knows" if asked.on else f"no target knows ({_names(asked.candidates())})"
    what = f"{where} no job {name!r}" if asked.on else f"{where} a job {name!r}"
    return MissingInputError(f"{what}: `ddpm jobs list` shows those there are")


def _names(targets: Iterable[Target]) -> str:
    return ", ".join(target.name for target in targets)


def _bucket_of(target: Target, backend: Backend | None = None, name: str = "") -> str:
    """Where the run of a job lies: as the job itself was told, if this machine remembers, else as the target says."""
    from job.jobs.backends.local import LocalBackend

    if isinstance(backend, LocalBackend):
        return str(backend.describe(name)["bucket"])
    return default_bucket(target)


def _status_lines(status: JobStatus, target: Target) -> list[str]:
    place = f", in {status.place}" if status.place else ""
    started = f", {status.attempts} {'start' if status.attempts == 1 else 'starts'}" if status.attempts else ""
    lines = [
        f"job         {status.name}, on {target.name}{place}",
        f"state       {status.state.value}{started}{f', submitted {status.created}' if status.created else ''}",
    ]
    if status.exit_code is not None:
        meaning = TABLE[Exit(status.exit_code)].text if status.exit_code in TABLE else "a crash or a signal"
        lines.append(f"exit code   {status.exit_code}: {meaning}")
    if status.message:
        lines.append(f"it says     {status.message}")
    return lines


def _story(bucket_uri: str, name: str) -> list[str]:
    """What the folder of the job's run tells; nothing if there is none, or if nobody here may read it."""
    try:
        bucket = open_store(bucket_uri)
        runs = [run for run in bucket.folders(RUNS) if _can_be_about(name, run)]
        return [line for run in runs for line in _run_lines(records.run_store(bucket, run), run)]
    except MissingInputError:
        return []
    except JobError as error:
        note(f"the run's folder cannot be read: {error}")
        return []


def _can_be_about(name: str, run: str) -> bool:
    try:
        return is_about(name, records.validated_run_name(run))
    except BadRequestError:
        return False


def _run_lines(run: Store, name: str) -> list[str]:
    lines = [f"run         {name}  ({run.uri})"]
    if (status := records.read_status(run)) is not None:
        lines.append(f"run's state {state_of(status)}, as of {status.updated}, attempt {status.fence}")
        lines.append(f"images seen {status.images_seen:,} of {status.target_images:,} (epoch {status.epoch:.2f})")
    if refs := list_checkpoints(run):
        lines.append(f"newest      {max(refs).key}, {max(refs).images_seen:,} images seen")
    for fence in records.attempt_fences(run):
        attempt = records.load_attempt(run, fence)
        lines.append(
            f"attempt {fence:<3} {attempt.started} on {attempt.host}, {attempt.world_size} × {attempt.device}, "
            f"code {attempt.code_version}"
        )
    return lines
