"""A job as data: a command of this program, its machines, and what its container gets. Targets render and send it."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from job.exits import BadRequestError
from job.stop import GRACE_VARIABLE
from job.store import is_remote, open_store

NAME_CHARACTERS = 46
"""The longest name: JobSet appends `-node-0-999-XXXXX` for pods, whose names are labels of at most 63 characters."""
LABEL_PREFIX = "ddpm"
RETRIES = 4
"""The number of failures that count, such as crashes, after which the engine or `--watch` tries again."""
IMAGE_USER = 10001
"""User and group of the image, for jobs that touch no file of the machine they run on."""
SCRATCH = "/scratch"
"""The local disk that the program may write; elsewhere /tmp may be memory."""
_HASH_CHARACTERS = 8
_JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class JobSpec:
    """One job. Equal specs give equal manifests, and a job that is submitted twice has the same name.

    Attributes:
        name: a DNS label that begins with a letter, by which engines and people know the job.
        verb: the kind of work.
        argv: the words after `ddpm`, such as `("train", "--dataset", "celeba", "--bucket", "gs://b")`, without secrets,
            because lists and logs show them.
        image: the container image; empty for jobs that are processes of this machine.
        bucket: URI of the bucket.
        run: the run it works on; empty for packing.
        gpus: per node; 0 is a CPU job.
        gpu_type: as the engine names it, such as `nvidia-l4`; empty is the target's.
        nodes: machines that train together; 1 for everything else.
        slices: machines that share the pieces of a job; 0 for one machine.
        spot: whether it may run on machines that are taken away.
        max_hours: the time after which the job is ended, which guards against a forgotten bill. See `Target.terms` for
            what counts, and who ends it. By default infinite on this machine.
        reads: files and folders of this machine that it reads besides its bucket.
        env: variables of the container, without secrets.
        retries: the failures after which its engine may still try again; `--watch` subtracts those it has seen.
    """

    name: str
    verb: str
    argv: tuple[str, ...]
    image: str
    bucket: str
    run: str = ""
    gpus: int = 1
    gpu_type: str = ""
    nodes: int = 1
    slices: int = 0
    spot: bool = True
    max_hours: float = 24.0
    reads: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    retries: int = RETRIES

    def __post_init__(self) -> None:
        """Refuses a job that no engine could run; the message names the option."""
        validated_job_name(self.name)
        if self.nodes > 1 and self.verb != "train":
            raise BadRequestError(f"--nodes {self.nodes} is for training: use --slices for all other work")
        if self.slices and self.verb == "train":
            raise BadRequestError(f"--slices {self.slices} is not for training: use --nodes")

    @property
    def max_seconds(self) -> int:
        """Returns `max_hours` in whole seconds."""
        return round(self.max_hours * 3600)

    @property
    def bucket_folder(self) -> Path | None:
        """Returns the bucket, if it is a folder of this machine."""
        return None if is_remote(self.bucket) else Path(open_store(self.bucket).uri)

    @property
    def machines(self) -> int:
        """Returns the number of its machines at a time."""
        return self.slices or self.nodes

    def argv_with(self, *options: str) -> tuple[str, ...]:
        """Returns the words with these ones among the options: after `--` they would be arguments."""
        end = self.argv.index("--") if "--" in self.argv else len(self.argv)
        return (*self.argv[:end], *options, *self.argv[end:])

    @property
    def argv_that_ends(self) -> tuple[str, ...]:
        """Returns the words of a job that keeps its limit itself, where no engine would end it."""
        return self.argv_with("--stop-after", f"{self.max_seconds}s") if self.max_hours < math.inf else self.argv

    def argv_of_slice(self, index: int | str) -> tuple[str, ...]:
        """Returns the words of one slice; `index` may be a variable that the engine fills in, such as `$(INDEX)`."""
        return self.argv_with("--slice", f"{index}/{self.slices}") if self.slices else self.argv

    def shell_words(self, variable: str) -> list[str]:
        """Returns the words of one slice, quoted for a shell that may expand the `variable` with its number alone."""
        # No word has a zero byte.
        share, filled = f"\0/{self.slices}", f'"{variable}/{self.slices}"'
        return [filled if word == share else shlex.quote(word) for word in self.argv_of_slice("\0")]

    @property
    def all_labels(self) -> dict[str, str]:
        """Returns the labels by which a job is found."""
        own = {"app": LABEL_PREFIX, "ddpm-job": self.name, "ddpm-verb": self.verb}
        return {**own, "ddpm-run": self.run} if self.run else own


def validated_job_name(name: str) -> str:
    """Returns `name` if it is valid on every engine."""
    if not (_JOB_NAME.fullmatch(name) and len(name) <= NAME_CHARACTERS):
        use = f"use a letter and up to {NAME_CHARACTERS - 1} lower-case letters, digits and inner '-'"
        raise BadRequestError(f"{name!r} cannot be a job's name: {use}")
    return name


def job_name(verb: str, subject: str, argv: Sequence[str] = ()) -> str:
    """Returns the name of a job: `train-RUN`, or `sample-RUN-HASH`, `pack-DATASET-HASH`, …, of the words in `argv`.

    The same words give the same name, so that a running job is found and not started twice.
    """
    subject = re.sub(r"[._]", "-", subject).strip("-")
    digest = hashlib.sha256("\0".join(argv).encode()).hexdigest()[:_HASH_CHARACTERS] if argv else ""
    room = NAME_CHARACTERS - len(f"{verb}-") - (len(digest) + 1 if digest else 0)
    if len(subject) > room:
        # Two long names that begin alike must differ.
        own = hashlib.sha256(subject.encode()).hexdigest()[:_HASH_CHARACTERS]
        subject = f"{subject[: room - len(own) - 1].rstrip('-')}-{own}"
    return validated_job_name("-".join(filter(None, (verb, subject, digest))))


def is_about(name: str, run: str) -> bool:
    """Returns whether a job of this name works on `run`."""
    if name == job_name("train", run):
        return True
    words = (job_name(verb, run, ("words",)) for verb in ("sample", "evaluate"))
    return name[:-_HASH_CHARACTERS] in {each[:-_HASH_CHARACTERS] for each in words}


def scratch_variables(grace_seconds: int) -> dict[str, str]:
    """Returns the container's variables for the folders it may write, and for the time it has to save."""
    folders = {"TMPDIR": SCRATCH, "XDG_CACHE_HOME": f"{SCRATCH}/cache", "DDPM_CACHE": f"{SCRATCH}/ddpm"}
    return {**folders, GRACE_VARIABLE: str(grace_seconds)}


def docker_options(user: int, group: int, stop_seconds: int) -> list[str]:
    """Returns options of `docker run`: no rights, only scratch and /tmp to write, and the time until SIGKILL."""
    return [
        f"--stop-timeout={stop_seconds}",
        "--read-only",
        # torch.compile puts libraries there and runs them.
        "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
        f"--user={user}:{group}",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
    ]
