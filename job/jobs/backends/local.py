"""Processes of this machine: this process becomes the job, or starts it in the background.

    CACHE/jobs/HOST/NAME.json    the newest job of that name: a process, by its id and its start
                    NAME.log     its output, unless that went to a terminal

The job itself writes into its bucket how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import psutil

from job.coordination.sealed import utc_now
from job.exits import BadRequestError, MissingInputError, State
from job.jobs.backends import FOLLOW_SECONDS, Check, JobStatus, JsonObject, Target, output_of
from job.jobs.spec import JobSpec
from job.store.files import folder_lock, os_errors

SAME_START_SECONDS = 2.0
"""The tolerance of a process's start, because the clock may have been set meanwhile."""


@dataclass(frozen=True)
class LocalRecord:
    """A job of this machine; `process_began`, in seconds since 1970, tells it from a later process of the same id."""

    name: str
    bucket: str
    created: str
    pid: int
    process_began: float

    def process(self) -> psutil.Process | None:
        """Returns the process; None if it has ended."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_began) < SAME_START_SECONDS
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        return None


class LocalTarget(Target):
    """Jobs that are processes of this machine, with records in the cache folder."""

    is_remote = False
    is_in_place = True
    backend: Literal["local"] = "local"
    gpus: int = 0
    spot: bool = False

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns the one command, and its variables."""
        return [{"name": spec.name, "command": ["ddpm", *spec.argv_that_ends], "environment": dict(spec.env)}]

    def become(self, spec: JobSpec) -> NoReturn:
        """See `Target.become`; its record shows the job to commands in other terminals, which may cancel it."""
        with _records() as folder:
            # The record of a job in the background must not be lost: no other command could cancel it.
            if not ((before := self.find(spec.name)) and before.process()):
                _log_path(spec.name).unlink(missing_ok=True)
                _write_record(folder, spec, os.getpid(), utc_now())
        sys.stdout.flush()
        os.execve(sys.executable, _command(spec), {**os.environ, **spec.env})  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the job in the background, in a session of its own, with a log file for its output."""
        with _records() as folder:
            if (before := self.find(spec.name)) and before.process():
                raise self.runs_already(spec.name, "on this machine")
            created = utc_now()
            with _log_path(spec.name).open("wb") as log:
                child = subprocess.Popen(
                    _command(spec),
                    env={**os.environ, **spec.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            _write_record(folder, spec, child.pid, created)

    def find(self, name: str) -> LocalRecord | None:
        """Returns the record of the newest job of that name; None if it is missing or damaged."""
        with suppress(OSError, ValueError, TypeError):
            return LocalRecord(**json.loads((_folder() / f"{name}.json").read_bytes()))
        return None

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`."""
        if not (record := self.find(name)):
            return JobStatus(name, State.GONE, "it was not started here")
        alive = JobStatus(name, State.RUNNING, created=record.created, bucket=record.bucket)
        if record.process() is not None:
            return alive
        see = f": see `ddpm jobs logs {name}`" * _log_path(name).exists()
        return replace(alive, state=State.FAILED, message=f"its process ended, or was killed{see}")

    def jobs(self) -> list[JobStatus]:
        """Returns the newest job of each name that was started here."""
        return [self.alive(path.stem) for path in _folder().glob("*.json") if self.find(path.stem)]

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Target.logs`."""
        record, path = self.known(name), _log_path(name)
        if not path.exists():
            raise MissingInputError(f"{name} prints to the terminal that it was started from, and has no log")
        tail = ["tail", "--lines=+1", *["--follow"] * follow, "--", str(path)]
        yield from output_of(tail, FOLLOW_SECONDS, lambda: record.process() is None)

    def cancel(self, name: str) -> str:
        """Makes the job save and end, as Ctrl-C would."""
        process = self.known(name).process()
        if process is None:
            raise BadRequestError(f"{name} is over already: `ddpm jobs status {name}` shows how it ended")
        # It may end in this moment.
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        return self.effect_of_cancelling(State.RUNNING)

    def checks(self, bucket: str) -> Iterable[Check]:
        """See `Target.checks`: the machine itself."""
        from job.jobs.doctor import machine_checks

        return machine_checks()


def _command(spec: JobSpec) -> list[str]:
    # -P: a job.py in the working folder must not stand in for the program.
    return [sys.executable, "-P", "-m", "job", *spec.argv_that_ends]


def _folder() -> Path:
    from job.store.files import default_cache_dir

    # Several machines may share a cache, and their process ids mean nothing here.
    return default_cache_dir() / "jobs" / socket.gethostname()


@contextmanager
def _records() -> Iterator[Path]:
    """Opens the folder of the records for one process at a time."""
    folder = _folder()
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            yield folder


def _write_record(folder: Path, spec: JobSpec, pid: int, created: str) -> None:
    record = LocalRecord(spec.name, spec.bucket, created, pid, psutil.Process(pid).create_time())
    (folder / f"{spec.name}.json").write_text(json.dumps(asdict(record)), encoding="utf-8")


def _log_path(name: str) -> Path:
    return _folder() / f"{name}.log"
