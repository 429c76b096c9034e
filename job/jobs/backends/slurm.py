"""Slurm: a batch job for each job, or an array for slices, by Slurm's commands here or, through ssh, on a login node.

The job's script (slurm.schedmd.com/sbatch.html) has options for `sbatch` first, then what differs between jobs, then
`slurm_job.sh`. `srun` in it starts the program once on each node, where that starts a process for each GPU. The script
notes in the job's comment, which Slurm keeps, how each attempt ended, and requeues the job as the table of exit codes
says.

    FOLDER/NAME-JOBID.log     the output of all attempts; NAME-JOBID_INDEX.log of a slice. All nodes share the folder
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from job.coordination.sealed import MOMENT_FORMAT
from job.exits import (
    CRASHED,
    BadRequestError,
    BucketAwayError,
    Exit,
    JobError,
    MissingInputError,
    NoPermissionError,
    Restart,
    State,
    failures,
    state_after,
)
from job.jobs.backends import Cause, Check, JobStatus, JsonObject, Target, Terms, Word, last_line, output_of
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.processes.group import GPUS
from job.stop import GRACE_VARIABLE

ANSWER_SECONDS = 60.0
NODE_SECONDS = 20
"""How long `ddpm doctor` waits for a free node."""
FOLLOW_POLL_SECONDS = 5.0
_QUEUE = ("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r|%N|%V|%j|%k")
_ROW = re.compile(r"(\d+)(?:_(\d+))?" + r"\|([^|]*)" * 5 + r"\|(.*)")
_PLAINLY = (
    "for name in ${!SLURM_*} ${!SBATCH_*} ${!SQUEUE_*} ${!SACCT_*}; do [[ $name == SLURM_CONF ]] || unset $name; done; "
    'SLURM_TIME_FORMAT=%s exec "$@"'
)
"""Runs a command without the variables that would win over the target's keys, or are those of a job around it."""
_IMPOSSIBLE = re.compile("Partition(Node|Time)Limit|Per(Job|Node)|QOSMin|Invalid|BadConstraints")
"""The reasons for which a job waits for ever; all others, such as a node in maintenance, pass."""
_NOTES = re.compile(rf"{LABEL_PREFIX}(?: began=(\d+) failures=(\d+) code=(\d*))?(?: bucket=(.*))?")
_STATES = {
    "PENDING": State.WAITING,
    "COMPLETED": State.FINISHED,
    "CANCELLED": State.CANCELLED,
}
_FAILED = {
    "FAILED": (None, ""),
    "TIMEOUT": (None, "killed at its time limit: it did not save within the target's grace_seconds"),
    "OUT_OF_MEMORY": (None, "killed because memory ran out; `memory:` of the target is the limit"),
    "NODE_FAIL": (Cause.TAKEN_AWAY, "its node failed"),
    "BOOT_FAIL": (Cause.TAKEN_AWAY, "its node failed to start"),
    "PREEMPTED": (Cause.TAKEN_AWAY, "it was preempted"),
}
"""In every other state than these a job runs, or is about to end."""

CPUS_PER_GPU = 4
"""A job without GPUs gets as many as one with a single GPU."""
INDEX = "$SLURM_ARRAY_TASK_ID"
_Option = Annotated[str, Field(pattern=r"^([A-Za-z0-9(\[][A-Za-z0-9._:,=|&*()\[\]!/+-]{0,400})?$")]


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


class SlurmTarget(Target):
    """A Slurm cluster, whose commands are on this machine or on the login node `host`.

    Slurm forgets a job some minutes after its end: its bucket and its output remain.
    """

    has_groups = True
    limits_attempts = True
    backend: Literal["slurm"]
    host: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._@:%-]{0,255})?$")] = ""
    """As ssh knows it, such as `me@login.example.org`; empty if Slurm's commands are on this machine."""
    folder: Annotated[str, Field(pattern=r"^/[^\\\p{C}\p{Zl}\p{Zp}]+$")]
    """For the output of jobs: the login node and all nodes share it."""
    venv: Annotated[str, Field(pattern=r"^(/[^\p{C}\p{Zl}\p{Zp}]*)?$")] = ""
    """The virtual environment on a disk that all nodes share, if the program is not in an image."""
    image: Annotated[str, Field(pattern=r"^([A-Za-z0-9/][A-Za-z0-9._:/@#+~-]{0,400})?$")] = ""
    """As `container` takes it, such as `/shared/ddpm.sif` or `docker://REGISTRY/NAME:TAG`."""
    container: Literal["apptainer", "pyxis"] = "apptainer"
    partition: _Option = ""
    account: _Option = ""
    qos: _Option = ""
    constraint: _Option = ""
    gres: _Option = ""
    """More of each node than its GPUs, such as `lscratch:200`."""
    cpus: int = Field(0, ge=0, le=1024)
    """Per node; 0: 4 for each GPU."""
    memory: Word = ""
    """Per node, such as `64G`; empty is the cluster's default."""
    scratch: Annotated[str, Field(pattern=r"^([/$][A-Za-z0-9._/$@-]+)?$")] = ""
    """The local disk of a node, for the cache of images, such as `/scratch` or `/lscratch/$SLURM_JOB_ID`."""
    grace_seconds: int = Field(30, ge=5, le=3600)
    """From the notice to the end: a preempted job has its partition's `GraceTime`, then the cluster's `KillWait`."""
    spot: Literal[False] = False

    @model_validator(mode="after")
    def _has_program(self) -> SlurmTarget:
        if bool(self.venv) == bool(self.image):
            raise ValueError("set either `venv` or `image`, where the nodes find the program")
        return self

    @property
    def software(self) -> str:
        """See `Target.software`."""
        return self.venv or self.image

    @property
    def has_files(self) -> bool:
        """See `Target.has_files`: a login node shares its disks with the nodes."""
        return not self.host

    @property
    def notice_seconds(self) -> float:
        """See `Target.notice_seconds`."""
        return self.grace_seconds

    def terms(self, spec: JobSpec) -> Terms:
        """See `Target.terms`."""
        place = tuple(f"{key} {getattr(self, key)}" for key in ("host", "partition") if getattr(self, key))
        limit = "for each attempt, then it saves and waits in the queue for the next"
        return Terms("node", place, limit, None, "which other jobs may take if the partition allows that")

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns the script, which `sbatch` reads."""
        return [{"script": script_of(spec, self)}]

    def submit(self, spec: JobSpec) -> None:
        """See `Target.submit`."""
        (made,) = self.render(spec)
        if not (before := self.alive(spec.name)).state.is_over:
            raise self.runs_already(spec.name, f"on {before.place}" if before.place else "or waits")
        # No container can mount a bucket that is not there yet.
        self._ask("mkdir", "-p", "--", self.folder, *map(str, filter(None, [spec.bucket_folder])))
        self._ask("sbatch", script=made["script"])

    def find(self, name: str) -> list[_Task]:
        """Returns the newest job of that name, by slices; one that Slurm has forgotten has its output."""
        return _newest(_tasks(self._ask(*_QUEUE, f"--name={name}")) or self._outputs(name))

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`."""
        tasks = self.find(name)
        return _whole(tasks) if tasks else JobStatus(name, State.GONE, "Slurm does not know it")

    def jobs(self) -> list[JobStatus]:
        """Returns the jobs that Slurm still knows, also those that other targets submitted to the same cluster."""
        by_name: dict[str, list[_Task]] = {}
        for task in _tasks(self._ask(*_QUEUE)):
            by_name.setdefault(task.status.name, []).append(task)
        return [_whole(_newest(tasks)) for tasks in by_name.values()]

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Target.logs`: files that stay until a person deletes them; `tail` names that of each slice."""
        paths = [f"{self.folder}/{task.output}" for task in self.known(name)]
        words = ["tail", "--lines=+1", "--verbose" if len(paths) > 1 else "--quiet", *["-F"] * follow, "--", *paths]
        lines = output_of(self._there(words), FOLLOW_POLL_SECONDS, lambda: self.alive(name).state.is_over)
        if (first := next(lines, None)) is None:
            raise MissingInputError(f"{name} has printed nothing: `ddpm jobs status {name}` shows why")
        yield first
        yield from lines

    def _outputs(self, name: str) -> list[_Task]:
        """Returns the jobs and slices of that name whose output is there, as jobs that are gone."""
        files = ["find", self.folder, "-maxdepth", "1", "-name", f"{name}-[0-9]*.log"]
        first_lines = ["-exec", "grep", "-H", "-m", "1", "^ddpm-slurm: job", "{}", "+"]
        line = rf"^.*/{name}-(\d+)(?:_(\d+))?\.log:ddpm-slurm: job .* at (\S+)$"
        found = re.findall(line, self._ask(*files, *first_lines, may_fail=True), re.MULTILINE)
        gone = JobStatus(name, State.GONE, "Slurm has forgotten it")
        return [_Task(int(number), int(index or -1), replace(gone, created=began)) for number, index, began in found]

    def cancel(self, name: str) -> str:
        """See `Target.cancel`: Slurm tells the program to stop, and kills it after the cluster's `KillWait`."""
        tasks = self.known(name)
        if (state := _whole(tasks).state).is_over:
            raise BadRequestError(f"job {name!r} is {state} already")
        self._ask("scancel", str(tasks[0].number))
        return self.effect_of_cancelling(state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Target.checks`: a job looks around that asks for what jobs of this target ask for."""
        name = "doctor"
        words = (name, "--on", "local", "--json", *(("--bucket", bucket) if bucket else ("--no-bucket",)))
        env = {**self.env, GPUS: str(self.gpus)} if self.gpus else self.env
        job = JobSpec(name, "train", words, self.software, bucket or self.usual_bucket, spot=False, retries=0, env=env)
        job = replace(job, gpus=self.gpus, gpu_type=self.gpu_type, max_hours=self.max_hours)
        self.submit(job)
        until = time.monotonic() + NODE_SECONDS
        while not (status := self.alive(name)).state.is_over:
            # Slurm keeps a job whose GPUs, time or account its partition never allows.
            is_possible = not _IMPOSSIBLE.search(status.message)
            if status.state is State.WAITING and (time.monotonic() > until or not is_possible):
                self.cancel(name)
                remedy = "see JOB REASON CODES in `man squeue`, and change the target's keys"
                yield Check("job", is_possible, f"no node yet ({status.message})", remedy)
                return
            time.sleep(1)
        output = list(self.logs(name, follow=False))
        found = Check.inside("\n".join(output), "node")
        why = output[0] if found else "; ".join(line for line in output if "error" in line)
        yield from [Check("job", bool(found), why, f"`ddpm jobs logs {name}` shows the rest"), *found]

    def _there(self, words: Sequence[str]) -> list[str]:
        """Returns the command that runs `words` where Slurm's commands are, and ends with 127 if one is missing."""
        if not self.host:
            return ["env", "bash", "-c", _PLAINLY, "bash", *words]
        # Slurm's commands may lie where only the profile of a login shell looks, which may print a greeting.
        command = f"exec bash -lc {shlex.quote(f'{_PLAINLY} >&3')} bash {shlex.join(words)} 3>&1 >&2"
        login = shlex.join(["bash", "-c", command])
        return ["env", "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "--", self.host, login]

    def _ask(self, *words: str, script: str = "", may_fail: bool = False) -> str:
        """Returns the output of a command, which must succeed unless it `may_fail`."""
        how: dict[str, Any] = {"text": True, "errors": "replace", "timeout": ANSWER_SECONDS, "capture_output": True}
        try:
            answer = subprocess.run(self._there(words), input=script, check=False, **how)
        except subprocess.TimeoutExpired:
            where = self.host or words[0]
            raise BucketAwayError(f"{where} did not answer within {ANSWER_SECONDS:g} s") from None
        if answer.returncode and not may_fail:
            raise self._refusal(answer)
        return str(answer.stdout)

    def _refusal(self, answer: subprocess.CompletedProcess[str]) -> JobError:
        host, why = self.host, last_line(answer)
        is_ssh = bool(host) and answer.returncode == 255
        if answer.returncode == 127:
            where = f"on {host}" if host else "here: set the login node as the target's `host:`"
            return MissingInputError(f"Slurm is not installed {where} ({why})")
        if is_ssh and re.search("denied|verification", why):
            return NoPermissionError(f"{why}: let `ssh {host}` log in without a question, as docs/slurm.md shows")
        if is_ssh or re.search("contact slurm controller|timed? ?out|connect", why, re.IGNORECASE):
            return BucketAwayError(f"{host if is_ssh else 'Slurm'} does not answer ({why})")
        return (NoPermissionError if "ermission denied" in why else BadRequestError)(f"target {self.name!r}: {why}")


def _tasks(table: str) -> list[_Task]:
    """Returns the jobs and slices in Slurm's answer that this program submitted."""
    found = []
    # A person's other jobs may have comments of several lines.
    for row in filter(None, map(_ROW.fullmatch, table.splitlines())):
        number, index, state, reason, nodes, submitted, name, comment = row.groups()
        if not (notes := _NOTES.fullmatch(comment)):
            continue
        began, counted, code, bucket = notes.groups()
        status = replace(
            _alive(name, state.split()[0], reason, int(code) if code else None),
            failures=int(counted or 0),
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


def _alive(name: str, word: str, reason: str, code: int | None) -> JobStatus:
    """Returns whether a job lives by Slurm's word for it, with the exit code of the last attempt that ended."""
    if word not in _FAILED:
        state = _STATES.get(word, State.RUNNING)
        reason = reason.replace("None", "") if state is State.WAITING else ""
        is_odd = state is State.RUNNING and word != "RUNNING"
        codes = {State.FINISHED: int(Exit.FINISHED), State.WAITING: code}
        return JobStatus(name, state, word.lower() if is_odd else reason, codes.get(state))
    cause, why = _FAILED[word]
    if reason.startswith("RaisedSignal:53"):
        why = "its node could not write its output: put the target's `folder` on a disk that all nodes share"
    return JobStatus(
        name, state_after(CRASHED if code is None else code), why or reason * (not code), code, cause=cause
    )


def script_of(spec: JobSpec, target: SlurmTarget) -> str:
    """Returns the script of a job; equal arguments give equal scripts.

    Raises:
        BadRequestError: Slurm cannot run the job; the message names the option or the path.
    """
    if spec.spot:
        raise BadRequestError("--spot: on Slurm the partition decides which jobs are preempted: leave it out")
    if spec.max_seconds <= target.grace_seconds:
        raise BadRequestError(f"--max-hours {spec.max_hours:g}: an attempt must last longer than its grace_seconds")
    output = f"{target.folder}/".replace("%", "%%") + f"{spec.name}-{'%A_%a' if spec.slices else '%j'}.log"
    minutes, seconds = divmod(spec.max_seconds, 60)
    options = {
        "job-name": spec.name,
        "comment": _quoted(f"{LABEL_PREFIX} bucket={spec.bucket}"),
        "output": _quoted(output),
        "open-mode": "append",
        # The variables of a login shell, and not of the one that submits, which may hold secrets.
        "export": "NONE",
        "requeue": "",
        "time": f"{minutes // 60}:{minutes % 60:02}:{seconds:02}",
        "signal": f"TERM@{target.grace_seconds}",
        **_resources(spec, target),
    }
    again, never = (" ".join(map(str, failures(rule))) for rule in (Restart.ALWAYS, Restart.NEVER))
    own = {"bucket": spec.bucket, "retries": spec.retries, "uncounted": again, "never": never}
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}".removesuffix("=") for key, value in options.items()),
        *(f"{key}={shlex.quote(str(value))}" for key, value in own.items()),
        f'job="{f"${{SLURM_ARRAY_JOB_ID}}_{INDEX}" if spec.slices else "$SLURM_JOB_ID"}"',
        *_exports(spec, target),
        f"words=({' '.join(_words(spec, target))})",
        Path(__file__).with_name("slurm_job.sh").read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def _resources(spec: JobSpec, target: SlurmTarget) -> dict[str, str]:
    gpus = ":".join(filter(None, ("gpu", spec.gpu_type, str(spec.gpus)))) if spec.gpus else ""
    values = {
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(target.cpus or CPUS_PER_GPU * max(spec.gpus, 1)),
        "gres": ",".join(filter(None, (gpus, target.gres))),
        "mem": target.memory,
        "array": f"0-{spec.slices - 1}" if spec.slices else "",
        **{key: getattr(target, key) for key in ("partition", "account", "qos", "constraint")},
    }
    return {key: value for key, value in values.items() if value}


def _exports(spec: JobSpec, target: SlurmTarget) -> list[str]:
    values = {**spec.env, GRACE_VARIABLE: str(target.grace_seconds)}
    if target.image:
        # A program in an image must not import what lies in the user's home.
        values["PYTHONNOUSERSITE"] = "1"
    lines = [f"export {key}={shlex.quote(value)}" for key, value in sorted(values.items())]
    if target.scratch:
        lines.append(f'export DDPM_CACHE="{target.scratch}/ddpm-$UID"')
    if spec.nodes > 1:
        lines.append('export NNODES="$SLURM_JOB_NUM_NODES" MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"')
    return lines


def _words(spec: JobSpec, target: SlurmTarget) -> list[str]:
    """Returns the words of `srun` and of the program, quoted for a shell that may expand Slurm's variables alone."""
    mounts, is_pyxis = _mounts(spec, target), bool(target.image) and target.container == "pyxis"
    # srun takes no CPUs from the job, and PMI would describe another group than this program's.
    words = ["srun", "--export=ALL", "--mpi=none", f"--cpus-per-task={_resources(spec, target)['cpus-per-task']}"]
    words += ["--kill-on-bad-exit=0", "--wait=0"]
    if is_pyxis:
        words += [f"--container-image={shlex.quote(target.image)}", "--container-readonly", "--container-mount-home"]
        words += ["--no-container-entrypoint", f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}"]
    if spec.nodes > 1:
        place = 'NODE_RANK="$SLURM_NODEID" MASTER_ADDR="$SLURM_LAUNCH_NODE_IPADDR" exec "$@"'
        words += ["bash", "-c", shlex.quote(place), "bash"]
    if target.venv:
        words += [shlex.quote(f"{target.venv}/bin/ddpm")]
    elif is_pyxis:
        words += ["ddpm"]
    else:
        binds = (word for path in mounts for word in ("--bind", path))
        words += ["apptainer", "run", *["--nv"] * bool(spec.gpus), *binds, shlex.quote(target.image)]
    return words + spec.shell_words(INDEX)


def _mounts(spec: JobSpec, target: SlurmTarget) -> list[str]:
    """Returns the paths that a container needs besides the user's home, quoted for the shell."""
    paths = dict.fromkeys(filter(None, (target.folder, str(spec.bucket_folder or ""), *spec.reads)))
    if target.image and (odd := next((path for path in paths if re.search("[:,]", path)), None)):
        raise BadRequestError(f"{odd!r} has a colon or a comma: no container can mount it; rename it")
    return [*map(shlex.quote, paths), *[f'"{target.scratch}"'] * bool(target.scratch)]


def _quoted(text: str) -> str:
    """Returns a value for a line `#SBATCH`, which sbatch itself reads: no shell does."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
