"""The keys of a Slurm target, and the script that `sbatch` reads (slurm.schedmd.com/sbatch.html), by a pure function.

`srun` in the script starts the program once on each node, where it starts a process for each GPU. The options come
first, then what differs between jobs, then `slurm_job.sh`, which is the same for all.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from job.exits import TABLE, BadRequestError, Exit, Restart
from job.jobs.backends.target import Target, Terms, Word
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.stop import GRACE_VARIABLE

CPUS_PER_GPU = 4
"""A job without GPUs gets as many as one with a single GPU."""
INDEX = "$SLURM_ARRAY_TASK_ID"
_Option = Annotated[str, Field(pattern=r"^([A-Za-z0-9(\[][A-Za-z0-9._:,=|&*()\[\]!/+-]{0,400})?$")]


class SlurmTarget(Target):
    """A Slurm cluster, whose commands are on this machine or on the login node `host`."""

    has_groups = True
    limits_attempts = True
    backend: Literal["slurm"]
    host: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._@:%-]{0,255})?$")] = ""
    """As ssh knows it, such as `me@login.example.org`; empty if Slurm's commands are on this machine."""
    folder: Annotated[str, Field(pattern=r"^/[^\\]+$")]
    """For the output of jobs: the login node and all nodes share it."""
    venv: Annotated[str, Field(pattern=r"^(/.*)?$")] = ""
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
        return Terms("node", place, limit, None, "", "which other jobs may take if the partition allows that")


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
        "signal": f"B:TERM@{target.grace_seconds}",
        **_resources(spec, target),
    }
    fatal = sorted(code for code, row in TABLE.items() if row.restart is Restart.NEVER and code != Exit.FINISHED)
    own = {"bucket": spec.bucket, "retries": spec.retries, "stopped": int(Exit.STOPPED)}
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}".removesuffix("=") for key, value in options.items()),
        *(f"{key}={shlex.quote(str(value))}" for key, value in own.items()),
        f"fatal='{' '.join(map(str, fatal))}'",
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
    share = f"{INDEX}/{spec.slices}"
    return words + [f'"{word}"' if word == share else shlex.quote(word) for word in spec.argv_of_slice(INDEX)]


def _mounts(spec: JobSpec, target: SlurmTarget) -> list[str]:
    """Returns the paths that a container needs besides the user's home, quoted for the shell."""
    paths = dict.fromkeys(filter(None, (target.folder, str(spec.bucket_folder or ""), *spec.reads)))
    if target.image and (odd := next((path for path in paths if re.search("[:,]", path)), None)):
        raise BadRequestError(f"{odd!r} has a colon or a comma: no container can mount it; rename it")
    return [*map(shlex.quote, paths), *[f'"{target.scratch}"'] * bool(target.scratch)]


def _quoted(text: str) -> str:
    """Returns a value for a line `#SBATCH`, which sbatch itself reads: no shell does."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
