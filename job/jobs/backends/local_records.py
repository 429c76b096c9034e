"""What is known of a job that runs in the background of this machine: a small file, and who writes it.

    CACHE/jobs/NAME.json     the newest job of that name
    CACHE/logs/NAME-….log    what it printed

A process of its own, which does nothing else, starts the job, waits for it and notes its exit code: nobody else could
tell later how a process ended.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from job.data.cache import default_cache_dir
from job.jobs.spec import JobSpec
from job.processes.process_identity import ProcessIdentity
from job.runs.records import utc_now
from job.stop import STOP_SIGNALS
from job.store.files import folder_lock, os_errors, sync_file, temporary_beside

JOBS, LOGS = "jobs", "logs"
_TAIL_BYTES = 4096


class LocalRecord(BaseModel):
    """A job in the background. Who it is, is told so that a number that is used again deceives nobody."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    verb: str
    argv: tuple[str, ...]
    bucket: str
    run: str
    created: str
    log: str
    supervisor: ProcessIdentity | None = None
    process: ProcessIdentity | None = None
    """None until it is started."""
    exit_code: int | None = None
    """128 + n after signal n; None while it runs, or where its supervisor died with it."""
    cancelled: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the job, or who would tell how it ended, may still live."""
        if self.exit_code is not None:
            return False
        return any(_may_live(who) for who in (self.supervisor, self.process) if who is not None)

    @property
    def host(self) -> str:
        """The machine it was started on: a cache folder may be shared by several."""
        who = self.process or self.supervisor
        return who.host if who else ""

    def last_line(self) -> str:
        """What it printed last; empty if that cannot be read."""
        with suppress(OSError), Path(self.log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
            return re.sub(r"^ddpm: ", "", lines[-1]) if lines else ""
        return ""


def _may_live(who: ProcessIdentity) -> bool:
    here = ProcessIdentity.of_this_process()
    if who.host == here.host and who.boot_id and here.boot_id and who.boot_id != here.boot_id:
        # The machine was started anew. Who shares its name and this folder with another machine is told wrongly.
        return False
    return not who.certainly_dead()


def folder() -> Path:
    """Where the records lie."""
    return default_cache_dir() / JOBS


def load_record(name: str) -> LocalRecord | None:
    """The newest job of that name, if there was one."""
    path = folder() / f"{name}.json"
    with os_errors(path), suppress(FileNotFoundError, ValidationError):
        return LocalRecord.model_validate_json(path.read_bytes())
    return None


def load_records() -> list[LocalRecord]:
    """The newest job of each name, newest first."""
    found = [load_record(path.stem) for path in folder().glob("*.json")]
    return sorted((record for record in found if record), key=lambda record: record.created, reverse=True)


def begin_record(spec: JobSpec) -> LocalRecord | None:
    """A record for a job that is about to start, and an empty log; None if one of its name may still run."""
    path, log = folder(), default_cache_dir() / LOGS / f"{spec.name}-{_file_time()}-{os.getpid()}.log"
    with os_errors(log):
        path.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        with folder_lock(path):
            before = load_record(spec.name)
            # One on another machine is kept from the run by its lease, and cannot be asked from here.
            if before is not None and before.is_alive and before.host == socket.gethostname():
                log.unlink()
                return None
            record = LocalRecord(
                name=spec.name,
                verb=spec.verb,
                argv=spec.argv,
                bucket=spec.bucket,
                run=spec.run,
                created=utc_now(),
                log=str(log),
                # Until its own process takes over, whoever submits it answers for it.
                supervisor=ProcessIdentity.of_this_process(),
            )
            _write(record)
    return record


def note_in_record(name: str, **changes: object) -> None:
    """Changes the record of a job, one writer at a time."""
    with folder_lock(folder()):
        if (record := load_record(name)) is not None:
            _write(record.model_copy(update=changes))


def _write(record: LocalRecord) -> None:
    path = folder() / f"{record.name}.json"
    with os_errors(path), temporary_beside(path) as (temporary, file):
        file.write(record.model_dump_json(indent=1).encode())
        sync_file(file)
        temporary.replace(path)


def _file_time() -> str:
    return re.sub(r"[-:Z]", "", utc_now()).replace("T", "-")


def supervise(name: str) -> None:
    """Runs the job of that name to its end and notes how that was; in a process and a session of its own."""
    for number in STOP_SIGNALS:
        # Handled, not ignored: what is ignored would be so in the job as well.
        signal.signal(number, lambda number, frame: None)
    record = load_record(name)
    if record is None:
        return
    note_in_record(name, supervisor=ProcessIdentity.of_this_process())
    child = subprocess.Popen([sys.executable, "-P", "-m", "job", *record.argv])
    note_in_record(name, process=ProcessIdentity.of_child(child.pid))
    code = child.wait()
    note_in_record(name, exit_code=code if code >= 0 else 128 - code)


if __name__ == "__main__":
    supervise(sys.argv[1])
