"""Processes of this machine: in the foreground this process becomes the job, in the background another one does it.

    CACHE/jobs/HOST/NAME.json    the newest job of that name: a process, by its id and when it began
                    NAME.log     what it printed

How it ended it says itself, in its bucket.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import psutil

from job.data.cache import default_cache_dir
from job.exits import BadRequestError
from job.jobs.backends.base import FOLLOW_POLL_SECONDS, Backend, JobStatus, JsonObject, State
from job.jobs.spec import JobSpec
from job.sealed import utc_now
from job.store.files import folder_lock, os_errors

SAME_START_SECONDS = 2.0
"""By so much the start of one process may be told differently, since the clock was set right meanwhile."""


@dataclass(frozen=True)
class LocalRecord:
    """A job in the background; `process_began`, in seconds since 1970, tells it from a later process of its number."""

    name: str
    bucket: str
    created: str
    pid: int
    process_began: float

    def process(self) -> psutil.Process | None:
        """The very process, unless it has ended."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_began) < SAME_START_SECONDS
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def status(self) -> JobStatus:
        """How the job is going, or ended."""
        status = JobStatus(self.name, State.RUNNING, attempts=1, created=self.created, bucket=self.bucket)
        if self.process() is not None:
            return status
        why = f"its process ended, or was killed: see `ddpm jobs logs {self.name}`"
        status = replace(status, state=State.GONE, message=why).informed(self.bucket)
        return status if status.exit_code is None else replace(status, state=State.of_code(status.exit_code))


class LocalBackend(Backend):
    """Jobs that are processes of this machine; those in the background are remembered in the cache folder."""

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """The one command, and its variables."""
        return [{"name": spec.name, "command": ["ddpm", *spec.argv], "environment": dict(spec.env)}]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the job: its terminal, signals and exit code are the job's own."""
        sys.stdout.flush()
        os.execve(sys.executable, _command(spec), {**os.environ, **spec.env})  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the job in the background, in a session of its own, with a log file for what it prints."""
        folder = _folder()
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(folder):
                if (before := _record(spec.name)) and before.process():
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
                began = psutil.Process(child.pid).create_time()
                record = LocalRecord(spec.name, spec.bucket, created, child.pid, began)
                (folder / f"{spec.name}.json").write_text(json.dumps(asdict(record)), encoding="utf-8")

    def status(self, name: str) -> JobStatus:
        """How a job in the background is going."""
        record = _record(name)
        return record.status() if record else JobStatus(name, State.GONE, "it was not started here")

    def jobs(self) -> list[JobStatus]:
        """The newest job of each name that was started here."""
        return [record.status() for path in _folder().glob("*.json") if (record := _record(path.stem))]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: all targets are this machine."""
        return ("local", status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """What the job printed."""
        record, part = self._known(name), ""
        with os_errors(_log_path(name)), _log_path(name).open(encoding="utf-8", errors="replace", newline="\n") as file:
            while True:
                # Asked before reading, so that nothing is missed that was printed in between.
                is_over = not follow or record.process() is None
                *lines, part = (part + file.read()).split("\n")
                yield from lines
                if is_over:
                    yield from filter(None, [part])
                    return
                time.sleep(FOLLOW_POLL_SECONDS)

    def cancel(self, name: str) -> str:
        """Has the job save and end, as Ctrl-C would."""
        process = self._known(name).process()
        if process is None:
            raise BadRequestError(f"{name} is over already: `ddpm jobs status {name}` tells how it ended")
        # It may end in this moment.
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        return State.RUNNING.when_cancelled

    def _known(self, name: str) -> LocalRecord:
        if record := _record(name):
            return record
        raise self.unknown(name)


def _command(spec: JobSpec) -> list[str]:
    # -P: a job.py in the working folder must not stand in for the program.
    return [sys.executable, "-P", "-m", "job", *spec.argv]


def _folder() -> Path:
    # A cache may be shared by several machines, whose numbers of processes mean nothing here.
    return default_cache_dir() / "jobs" / socket.gethostname()


def _log_path(name: str) -> Path:
    return _folder() / f"{name}.log"


def _record(name: str) -> LocalRecord | None:
    """The newest job of that name, if there was one, and its record is whole."""
    with suppress(OSError, ValueError, TypeError):
        return LocalRecord(**json.loads((_folder() / f"{name}.json").read_bytes()))
    return None
