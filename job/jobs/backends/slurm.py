"""Slurm: a batch job for each job, or an array for slices, by Slurm's commands here or, through ssh, on a login node.

The job's script (`slurm_script`) notes in the job's comment, which Slurm keeps, how each attempt ended, and requeues
the job as the table of exit codes says.

    FOLDER/NAME-JOBID.log     the output of all attempts; NAME-JOBID_INDEX.log of a slice. All nodes share the folder
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError, State
from job.jobs.backends.base import Backend, Cause, Check, JobStatus, JsonObject
from job.jobs.backends.slurm_script import SlurmTarget, script_of
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.sealed import MOMENT_FORMAT

ANSWER_SECONDS = 60.0
NODE_SECONDS = 20
"""How long `ddpm doctor` waits for a free node."""
FOLLOW_POLL_SECONDS = 5.0
_QUEUE = (
    *("env", "SLURM_TIME_FORMAT=%s", "squeue", "--me", "--array", "--states=all", "--noheader"),
    "--format=%i|%T|%r|%N|%V|%j|%k",
)
_ACCOUNTS = (
    *("env", "SLURM_TIME_FORMAT=%s", "sacct", "--array", "--allocations", "--noheader", "--parsable2"),
    *("--starttime=now-30days", "--format=JobID,State,Reason,NodeList,Submit,JobName,Comment"),
)
"""Both give the same columns."""
_NOTES = re.compile(rf"{LABEL_PREFIX}(?: began=(\d+) failures=(\d+) code=(\d*))?(?: bucket=(.*))?")
_STATES = {"PENDING": State.WAITING, "CONFIGURING": State.WAITING, "COMPLETED": State.FINISHED} | dict.fromkeys(
    ("CANCELLED", "REVOKED"), State.CANCELLED
)
_FAILED = {
    "FAILED": (None, ""),
    "TIMEOUT": (None, "killed at its time limit: it did not save within the target's grace_seconds"),
    "OUT_OF_MEMORY": (None, "killed because memory ran out; `memory:` of the target is the limit"),
    "DEADLINE": (Cause.OUT_OF_TIME, "Slurm's deadline for it has passed"),
    "NODE_FAIL": (Cause.TAKEN_AWAY, "its node failed"),
    "BOOT_FAIL": (Cause.TAKEN_AWAY, "its node failed to start"),
    "LAUNCH_FAILED": (Cause.TAKEN_AWAY, "its node failed to start it"),
    "PREEMPTED": (Cause.TAKEN_AWAY, "it was preempted"),
}
"""In every other state than these a job runs, or is about to end."""


class _Task(NamedTuple):
    """A job, or a slice of one, as Slurm knows it."""

    number: int
    slice: int
    """-1 for a job without slices."""
    status: JobStatus

    @property
    def output(self) -> str:
        """Returns the name of the file with its output."""
        return f"{self.status.name}-{self.number}{f'_{self.slice}' if self.slice >= 0 else ''}.log"


class SlurmBackend(Backend):
    """See `Backend`. Slurm forgets a job some minutes after its end: its bucket and its output remain."""

    target: SlurmTarget

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns the script, which `sbatch` reads."""
        return [{"script": script_of(spec, self.target)}]

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`."""
        (made,) = self.render(spec)
        if not (before := self.status(spec.name)).state.is_over:
            raise self.runs_already(spec.name, f"on {before.place}" if before.place else "or waits")
        self._ask("mkdir", "-p", "--", self.target.folder)
        self._ask("sbatch", "--parsable", script=made["script"])

    def find(self, name: str) -> list[_Task]:
        """Returns the newest job of that name, by slices; one that is long over only where Slurm accounts for jobs."""
        tasks = _tasks(self._ask(*_QUEUE, f"--name={name}"))
        if not tasks:
            answer = self._run([*_ACCOUNTS, f"--name={name}"])
            tasks = [] if answer.returncode else _tasks(answer.stdout, is_noted=False)
        return _newest(tasks)

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`; a job that Slurm has forgotten still has its output."""
        tasks = self.find(name) or _newest(self._outputs(name))
        return _whole(tasks) if tasks else JobStatus(name, State.GONE, "Slurm does not know it")

    def jobs(self) -> list[JobStatus]:
        """Returns the jobs that Slurm still knows, also those that other targets submitted to the same cluster."""
        by_name: dict[str, list[_Task]] = {}
        for task in _tasks(self._ask(*_QUEUE)):
            by_name.setdefault(task.status.name, []).append(task)
        return [_whole(_newest(tasks)) for tasks in by_name.values()]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: several targets are partitions of one cluster, and differ in the folder at most."""
        return ("slurm", self.target.host, self.target.folder, status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Backend.logs`: the output lies in the target's folder until a person deletes it."""
        if not (tasks := self.find(name) or _newest(self._outputs(name))):
            raise self.unknown(name)
        paths = [f"{self.target.folder}/{task.output}" for task in tasks]
        words = ["tail", "--lines=+1", "--verbose" if len(paths) > 1 else "--quiet", *["-F"] * follow, "--", *paths]
        lines, is_empty = self._output_of(words, lambda: self.status(name).state.is_over), True
        for line in _with_indices(lines) if len(paths) > 1 else lines:
            is_empty = False
            yield line
        if is_empty:
            raise MissingInputError(f"{name} has printed nothing: `ddpm jobs status {name}` shows why")

    def _outputs(self, name: str) -> list[_Task]:
        """Returns the jobs and slices of that name whose output is there, as jobs that are gone."""
        files = ["find", self.target.folder, "-maxdepth", "1", "-name", f"{name}-[0-9]*.log"]
        first_lines = ["-exec", "grep", "-H", "-m", "1", "^ddpm-slurm: job", "{}", "+"]
        line = rf"^.*/{name}-(\d+)(?:_(\d+))?\.log:ddpm-slurm: job .* at (\S+)$"
        found = re.findall(line, self._run([*files, *first_lines]).stdout, re.MULTILINE)
        why = "Slurm has forgotten it"
        return [
            _Task(int(number), int(index or -1), JobStatus(name, State.GONE, why, created=began))
            for number, index, began in found
        ]

    def _output_of(self, words: Sequence[str], is_over: Callable[[], bool]) -> Iterator[str]:
        """Yields the lines that a command prints, until it ends, or prints no more after `is_over`."""
        was_over, part = False, ""
        with subprocess.Popen(
            self._there(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                while True:
                    ready = select.select([process.stdout], [], [], FOLLOW_POLL_SECONDS)[0]
                    data = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
                    *lines, part = (part + data.decode(errors="replace")).split("\n")
                    yield from lines
                    if not data and (ready or was_over):
                        yield from filter(None, [part])
                        return
                    # Looked at before the next read, so that it has all output until the end.
                    was_over = not data and is_over()
            finally:
                process.kill()

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: Slurm tells the program to stop, and kills it after the cluster's `KillWait`."""
        tasks = self.known(name)
        if (state := _whole(tasks).state).is_over:
            raise BadRequestError(f"job {name!r} is {state} already")
        self._ask("scancel", str(tasks[0].number))
        return self.effect_of_cancelling(state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Backend.checks`: Slurm's own judgement of a job, and what a short job finds on a node."""
        target = self.target
        words = ("doctor", "--on", "local", "--json", *(("--bucket", bucket) if bucket else ("--no-bucket",)))
        usual = {"gpus": target.gpus, "gpu_type": target.gpu_type, "spot": False, "env": target.env, "retries": 0}
        job = JobSpec("ddpm-doctor", "train", words, target.software, bucket or "gs://none", **usual)  # type: ignore[arg-type]
        yield (slurm := Check.of("slurm", lambda: self._ask("sbatch", "--version").strip()))
        if not slurm.passed:
            return
        yield (possible := Check.of("job", partial(self._judged, job.lasting(target.max_hours))))
        if possible.passed:
            yield from self._found_on_node(job.lasting(1 / 30))

    def _judged(self, job: JobSpec) -> str:
        """Returns when Slurm would start a job, which may otherwise wait for ever for GPUs or time that no node has."""
        answer = self._run(["sbatch", "--test-only"], self.render(job)[0]["script"])
        if answer.returncode:
            raise self._refusal(answer)
        return _last_line(answer).removeprefix("sbatch: ")

    def _found_on_node(self, job: JobSpec) -> Iterator[Check]:
        """Yields the checks that the program makes on a node, or that no node was free."""
        try:
            self.submit(job)
            until = time.monotonic() + NODE_SECONDS
            while (status := self.status(job.name)).state is State.WAITING and time.monotonic() < until:
                time.sleep(1)
            if status.state is State.WAITING:
                self.cancel(job.name)
                yield Check("node", True, f"not looked at: none was free within {NODE_SECONDS} s ({status.message})")
                return
            output = list(self.logs(job.name, follow=True))
        except JobError as error:
            yield Check.of_error("node", error)
            return
        for line in output:
            if line.startswith("[{"):
                for inside in json.loads(line):
                    yield Check(**inside | {"name": f"{inside['name']} (node)", "exit_code": Exit(inside["exit_code"])})
                return
        yield Check("node", False, f"the program does not start there: {output[-1]}", "see docs/slurm.md")

    def _there(self, words: Sequence[str]) -> list[str]:
        """Returns the command that runs `words` where Slurm's commands are."""
        if not self.target.host:
            return [*words]
        # Slurm's commands may lie where only the profile of a login shell looks.
        login = shlex.join(["bash", "-lc", shlex.join(words)])
        return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "--", self.target.host, login]

    def _ask(self, *words: str, script: str = "") -> str:
        """Returns the output of a command, which must succeed."""
        answer = self._run(words, script)
        if answer.returncode:
            raise self._refusal(answer)
        return answer.stdout

    def _run(self, words: Sequence[str], script: str = "") -> subprocess.CompletedProcess[str]:
        how: dict[str, Any] = {"text": True, "errors": "replace", "timeout": ANSWER_SECONDS, "capture_output": True}
        command = self._there(words)
        try:
            return subprocess.run(command, input=script, check=False, **how)
        except FileNotFoundError:
            raise self._missing(command[0]) from None
        except subprocess.TimeoutExpired:
            raise BucketAwayError(f"{command[0]} did not answer within {ANSWER_SECONDS:g} s") from None

    def _missing(self, program: str) -> MissingInputError:
        where = f"on {self.target.host}" if self.target.host else "here: set the login node as the target's `host:`"
        return MissingInputError(f"{program} is not installed {where}")

    def _refusal(self, answer: subprocess.CompletedProcess[str]) -> JobError:
        host, why = self.target.host, _last_line(answer)
        if answer.returncode == 127:
            named = re.search(r"([\w./-]+)['’]?: (command not found|No such file)", why)
            return self._missing(named[1] if named else why)
        if host and answer.returncode == 255:
            if re.search("denied|verification", why):
                return NoPermissionError(f"{why}: let `ssh {host}` log in without a question, as docs/slurm.md shows")
            return BucketAwayError(f"{host} does not answer ({why})")
        if re.search("contact slurm controller|timed? ?out|connect", why, re.IGNORECASE):
            return BucketAwayError(f"Slurm does not answer ({why})")
        kind = NoPermissionError if "ermission denied" in why else BadRequestError
        return kind(f"target {self.target.name!r}: {why}")


def _tasks(table: str, *, is_noted: bool = True) -> list[_Task]:
    """Returns the jobs and slices in Slurm's answer; with `is_noted` those alone that this program submitted."""
    found = []
    for line in table.splitlines():
        number, state, reason, nodes, submitted, name, comment = line.split("|", 6)
        notes = _NOTES.fullmatch(comment)
        if is_noted and not notes:
            continue
        began, failures, code, bucket = notes.groups() if notes else (None,) * 4
        number, _, index = number.partition("_")
        status = replace(
            _status(name, state.split()[0], reason, int(code) if code else None),
            failures=int(failures or 0),
            created=datetime.fromtimestamp(int(began or submitted), UTC).strftime(MOMENT_FORMAT),
            place=nodes,
            bucket=bucket or "",
        )
        found.append(_Task(int(number), int(index or -1), status))
    return found


def _newest(tasks: list[_Task]) -> list[_Task]:
    """Returns the slices of the newest job, in order."""
    return sorted(task for task in tasks if task.number == max(one.number for one in tasks))


def _whole(tasks: Sequence[_Task]) -> JobStatus:
    """Returns the status of a job from those of its slices."""
    return JobStatus.of_slices([task.status for task in tasks])


def _status(name: str, state: str, reason: str, code: int | None) -> JobStatus:
    """Returns the state of a job from Slurm's word for it, and from the exit code of the last attempt that ended."""
    if state in _FAILED:
        cause, why = _FAILED[state]
        if code and not why:
            return JobStatus.of_code(name, code)
        return JobStatus(name, State.FAILED, why or reason, code, cause=cause)
    found = _STATES.get(state, State.RUNNING)
    message = reason if found is State.WAITING else state.lower() * (found is State.RUNNING and state != "RUNNING")
    return JobStatus(name, found, message, 0 if found is State.FINISHED else None, has_machine=state == "CONFIGURING")


def _with_indices(lines: Iterable[str]) -> Iterator[str]:
    """Puts the number of its slice before each line; `tail` prints an empty line and the name before each part."""
    index, is_empty = "", False
    for line in lines:
        if header := re.fullmatch(r"==> .*_(\d+)\.log <==", line):
            index, is_empty = header[1], False
            continue
        if is_empty:
            yield f"[{index}] "
        if line:
            yield f"[{index}] {line}"
        is_empty = not line


def _last_line(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: |fatal: )*", "", lines[-1]) if lines else f"it ended with {answer.returncode}"
