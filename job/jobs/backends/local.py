"""Processes of this machine: in the foreground this process becomes the job, in the background another one does it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from job.exits import TABLE, BadRequestError, Exit, MissingInputError
from job.jobs.backends.base import Backend, JobStatus, Manifest, State, cancelled
from job.jobs.backends.local_records import (
    LocalRecord,
    begin_record,
    load_record,
    load_records,
    note_in_record,
)
from job.jobs.spec import JobSpec
from job.store.files import os_errors

START_SECONDS = 30.0
LOOK_SECONDS = 0.2


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
        command = [sys.executable, "-P", "-m", "job", *spec.argv]
        os.execve(sys.executable, command, {**os.environ, **spec.env})  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the job in the background, in a session of its own, with a log file for what it prints.

        Raises:
            BadRequestError: a job of this name runs, or its process could not be started.
        """
        self.render(spec)
        record = begin_record(spec)
        if record is None:
            raise BadRequestError(
                f"{spec.name} runs on this machine already: `ddpm jobs status {spec.name}` tells how it is going, "
                f"`ddpm jobs cancel {spec.name}` stops it"
            )
        with os_errors(record.log), Path(record.log).open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "job.jobs.backends.local_records", spec.name],
                env={**os.environ, **spec.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while self._existing(spec.name).process is None:
            if time.monotonic() > deadline:
                raise BadRequestError(f"{spec.name} did not start within {START_SECONDS:g} s: see {record.log}")
            time.sleep(LOOK_SECONDS / 4)

    def describe_start(self, name: str) -> str:
        """Which process does it, and where its words go."""
        record = self._existing(name)
        assert record.process is not None
        pid = record.process.pid
        return f"process {pid} does it in the background and writes {record.log}; `kill {pid}` stops it"

    def status(self, name: str) -> JobStatus:
        """How a job in the background is going."""
        record = load_record(name)
        return JobStatus(name, State.GONE, "it was not started here") if record is None else _status(record)

    def jobs(self) -> list[JobStatus]:
        """The newest job of each name that was started here."""
        return [_status(record) for record in load_records()]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: all targets are this machine."""
        return ("local", status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool]) -> Iterator[str]:
        """What the job printed.

        Raises:
            MissingInputError: there is no such job, or somebody deleted its log.
        """
        record = self._existing(name)
        with os_errors(record.log), Path(record.log).open(encoding="utf-8", errors="replace", newline="\n") as file:
            part = ""
            while not should_stop():
                # Asked before reading, so that nothing is missed that was printed in between.
                is_over = not follow or not self._existing(name).is_alive
                while line := file.readline():
                    part += line
                    if part.endswith("\n"):
                        yield part[:-1]
                        part = ""
                if is_over:
                    break
                time.sleep(LOOK_SECONDS)
            if part:
                yield part

    def cancel(self, name: str) -> str:
        """Has the job save and end, as Ctrl-C would.

        Raises:
            MissingInputError: there is no such job.
            BadRequestError: it is over, or runs on another machine.
        """
        record = self._existing(name)
        if record.is_alive:
            if record.host != socket.gethostname():
                raise BadRequestError(f"{name} runs on {record.host!r}: cancel it there")
            note_in_record(name, cancelled=True)
            if record.process is not None and record.process.send(signal.SIGTERM):
                return cancelled(State.RUNNING)
        raise BadRequestError(f"{name} is over already: `ddpm jobs status {name}` tells how it ended")

    def describe(self, name: str) -> Manifest:
        """The job's record.

        Raises:
            MissingInputError: there is no such job.
        """
        return self._existing(name).model_dump(mode="json")

    def _existing(self, name: str) -> LocalRecord:
        record = load_record(name)
        if record is None:
            raise MissingInputError(f"no job {name!r} was started in the background here: `ddpm jobs list` shows those")
        return record


def _status(record: LocalRecord) -> JobStatus:
    state, message = State.RUNNING, ""
    if record.exit_code == Exit.FINISHED:
        state = State.FINISHED
    elif record.exit_code == Exit.STOPPED and record.cancelled:
        state, message = State.CANCELLED, TABLE[Exit.STOPPED].text
    elif record.exit_code is not None:
        state, message = State.FAILED, record.last_line()
    elif not record.is_alive:
        state, message = State.GONE, "its process was killed, or the machine was restarted"
    elif record.process is None:
        state = State.WAITING
    return JobStatus(record.name, state, message, record.exit_code, 1, record.created, record.host)
