"""Processes of this machine: in the foreground this process becomes the job, in the background another one does it.

    CACHE/jobs/HOST/NAME.json    the newest job of that name: a process, by its id and when it began
    CACHE/logs/NAME-….log        what it printed

How it ended it says itself, in its bucket.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from job.data.cache import default_cache_dir
from job.exits import BadRequestError, Exit, MissingInputError
from job.jobs.backends.base import Backend, JobStatus, Manifest, State, cancelled
from job.jobs.outcome import informed, read_outcome
from job.jobs.spec import JobSpec
from job.runs.records import utc_now
from job.store.files import folder_lock, os_errors

LOOK_SECONDS = 0.2
SAME_START_SECONDS = 2.0
"""By so much may the start of one process be told differently, since the clock was set right meanwhile."""
_TAIL_BYTES = 4096


class LocalRecord(BaseModel):
    """A job in the background."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    argv: tuple[str, ...]
    bucket: str
    created: str
    log: str
    pid: int
    process_began: float
    """In seconds since 1970: a number that another process has by now began at another time."""

    def process(self) -> psutil.Process | None:
        """The very process, unless it has ended."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_began) < SAME_START_SECONDS
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def status(self) -> JobStatus:
        """How the job is going, or ended."""
        running = JobStatus(self.name, State.RUNNING, attempts=1, created=self.created)
        if self.process() is not None:
            return running
        outcome = read_outcome(self)
        if outcome is not None and outcome.updated < self.created:
            # An earlier job's of this name.
            outcome = None
        said = self._last_line()
        status = informed(replace(running, state=State.GONE), outcome)
        if status.exit_code is None:
            return replace(status, message=f"it ended without a word to its bucket; its last line is {said!r}")
        # Nobody but a person, or the job's own deadline, stops a process of this machine.
        how = {int(Exit.FINISHED): State.FINISHED, int(Exit.STOPPED): State.CANCELLED}.get(status.exit_code)
        return replace(status, state=how or State.FAILED, message=status.message or ("" if how else said))

    def _last_line(self) -> str:
        with suppress(OSError), Path(self.log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
            return lines[-1].removeprefix("ddpm: ") if lines else ""
        return ""


class LocalBackend(Backend):
    """Jobs that are processes of this machine; those in the background are remembered in the cache folder."""

    def render(self, spec: JobSpec) -> list[Manifest]:
        """The one command, and its variables.

        Raises:
            BadRequestError: several machines are asked for.
        """
        if spec.nodes > 1 or spec.slices:
            option = f"--nodes {spec.nodes}" if spec.nodes > 1 else f"--slices {spec.slices}"
            raise BadRequestError(
                f"{option} needs several machines, and target {self.target.name!r} is this one: use --processes N, or "
                "another target"
            )
        return [{"name": spec.name, "command": ["ddpm", *spec.argv], "environment": dict(spec.env)}]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the job: its terminal, signals and exit code are the job's own."""
        sys.stdout.flush()
        os.execve(sys.executable, _command(spec), {**os.environ, **spec.env})  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the job in the background, in a session of its own, with a log file for what it prints."""
        self.render(spec)
        created = utc_now()
        log = default_cache_dir() / "logs" / f"{spec.name}-{re.sub('[^0-9]', '', created)}-{os.getpid()}.log"
        with os_errors(log.parent.parent):
            _folder().mkdir(parents=True, exist_ok=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            with folder_lock(_folder()):
                before = _record(spec.name)
                if before is not None and before.process() is not None:
                    raise BadRequestError(
                        f"{spec.name} runs on this machine already: `ddpm jobs status {spec.name}` tells how it is "
                        f"going, `ddpm jobs cancel {spec.name}` stops it"
                    )
                with log.open("wb") as file:
                    child = subprocess.Popen(
                        _command(spec),
                        env={**os.environ, **spec.env},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                record = LocalRecord(
                    name=spec.name,
                    argv=spec.argv,
                    bucket=spec.bucket,
                    created=created,
                    log=str(log),
                    pid=child.pid,
                    process_began=psutil.Process(child.pid).create_time(),
                )
                (_folder() / f"{spec.name}.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")

    def describe_start(self, name: str) -> str:
        """Which process does it, and where its words go."""
        record = self._existing(name)
        return f"process {record.pid} does it in the background and writes {record.log}; `kill {record.pid}` stops it"

    def status(self, name: str) -> JobStatus:
        """How a job in the background is going."""
        record = _record(name)
        return record.status() if record else JobStatus(name, State.GONE, "it was not started here")

    def jobs(self) -> list[JobStatus]:
        """The newest job of each name that was started here, newest first."""
        records = [_record(path.stem) for path in _folder().glob("*.json")]
        statuses = [record.status() for record in records if record]
        return sorted(statuses, key=lambda status: status.created, reverse=True)

    def bucket_of(self, name: str) -> str:
        """See `Backend.bucket_of`: the record says it."""
        return self._existing(name).bucket

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: all targets are this machine."""
        return ("local", status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """What the job printed."""
        record = self._existing(name)
        with os_errors(record.log), Path(record.log).open(encoding="utf-8", errors="replace", newline="\n") as file:
            part = ""
            while True:
                # Asked before reading, so that nothing is missed that was printed in between.
                is_over = not follow or record.process() is None
                while line := file.readline():
                    part += line
                    if part.endswith("\n"):
                        yield part.removesuffix("\n")
                        part = ""
                if is_over:
                    break
                time.sleep(LOOK_SECONDS)
            if part:
                yield part

    def cancel(self, name: str) -> str:
        """Has the job save and end, as Ctrl-C would.

        Raises:
            BadRequestError: it is over.
        """
        process = self._existing(name).process()
        if process is None:
            raise BadRequestError(f"{name} is over already: `ddpm jobs status {name}` tells how it ended")
        # It may end in this moment.
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        return cancelled(State.RUNNING)

    def describe(self, name: str) -> Manifest:
        """The job's record."""
        return self._existing(name).model_dump(mode="json")

    def _existing(self, name: str) -> LocalRecord:
        record = _record(name)
        if record is None:
            raise MissingInputError(f"no job {name!r} was started in the background here: `ddpm jobs list` shows those")
        return record


def _command(spec: JobSpec) -> list[str]:
    # -P: a job.py in the working folder must not stand in for the program.
    return [sys.executable, "-P", "-m", "job", *spec.argv]


def _folder() -> Path:
    # A cache may be shared by several machines, whose numbers of processes mean nothing here.
    return default_cache_dir() / "jobs" / socket.gethostname()


def _record(name: str) -> LocalRecord | None:
    """The newest job of that name, if there was one that can be read."""
    with suppress(OSError, ValidationError):
        return LocalRecord.model_validate_json((_folder() / f"{name}.json").read_bytes())
    return None
