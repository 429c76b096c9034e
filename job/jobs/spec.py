"""A job as data: a command of this program, and what it needs of a machine. Backends render it; none is sent here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from job.exits import BadRequestError
from job.store import is_remote, open_store

Verb = Literal["train", "sample", "evaluate", "pack", "index", "encode"]

NAME_CHARACTERS = 52
"""Longest name: Kubernetes appends `-INDEX-XXXXX` for pods, whose names are labels of 63 characters at most."""
LABEL_PREFIX = "ddpm"
RETRIES = 4
"""How many failures that count, such as crashes, are followed by another attempt of the engine or of `--watch`."""
_HASH_CHARACTERS = 8
_JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class JobSpec:
    """One job. Equal specs give equal manifests, and a job that is submitted twice has the same name.

    Attributes:
        name: a DNS label that begins with a letter; what engines and people call the job.
        verb: what it does.
        argv: the words after `ddpm`, such as `("train", "--dataset", "celeba", "--bucket", "gs://b")`. Nothing
            secret: they are shown in lists and logs.
        image: the container image; empty for jobs that are processes of this machine.
        bucket: URI of the bucket.
        run: the run it works on; empty for packing.
        gpus: per node; 0 is a CPU job.
        gpu_type: as the backend names it, such as `nvidia-l4`; empty is whatever the target says.
        nodes: machines that train together; 1 for everything else.
        slices: machines that share the pieces of a job; 0 for one machine.
        spot: whether it may run on machines that are taken away.
        max_hours: after so long the job is ended, whatever it does: the guard against a forgotten bill. See `limit_of`
            for by whom, and what counts. Infinite on this machine, unless somebody says otherwise.
        reads: files and folders of this machine that it reads besides its bucket.
        env: variables of the container. Nothing secret.
        retries: failures that its engine may still follow with another attempt; `--watch` subtracts those it has seen.
    """

    name: str
    verb: Verb
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
        """Refuses what no backend could run, naming the field."""
        validated_job_name(self.name)
        if self.nodes > 1 and self.verb != "train":
            raise BadRequestError(f"--nodes {self.nodes} is for training: all other work uses --slices")
        if self.slices and self.verb == "train":
            raise BadRequestError(f"--slices {self.slices} is not for training, which uses --nodes")

    @property
    def max_seconds(self) -> int:
        """`max_hours` in whole seconds."""
        return round(self.max_hours * 3600)

    def lasting(self, max_hours: float) -> JobSpec:
        """The same job, by the same name, with another limit; also where it keeps to that itself."""
        if max_hours == self.max_hours:
            return self
        words = pairwise(("", *self.argv))
        argv = (stop_after(max_hours) if option == "--stop-after" else word for option, word in words)
        return replace(self, max_hours=max_hours, argv=tuple(argv))

    @property
    def bucket_folder(self) -> Path | None:
        """The bucket, if it is a folder of this machine."""
        return None if is_remote(self.bucket) else Path(open_store(self.bucket).uri)

    @property
    def machines(self) -> int:
        """How many run at a time, at most."""
        return self.slices or self.nodes

    def argv_of_slice(self, index: int | str) -> tuple[str, ...]:
        """The words of one slice; `index` may be a variable that the engine fills in, such as `$(INDEX)`."""
        if not self.slices:
            return self.argv
        # Behind `--` it would be an argument.
        end = self.argv.index("--") if "--" in self.argv else len(self.argv)
        return (*self.argv[:end], "--slice", f"{index}/{self.slices}", *self.argv[end:])

    @property
    def all_labels(self) -> dict[str, str]:
        """Labels by which a job is found again, whoever made it."""
        own = {"app": LABEL_PREFIX, "ddpm-job": self.name, "ddpm-verb": self.verb}
        return {**own, "ddpm-run": self.run} if self.run else own


def stop_after(hours: float) -> str:
    """The value of `--stop-after` with which a job ends itself, where there is no engine that would end it."""
    return f"{max(1, round(hours * 3600))}s"


def validated_job_name(name: str) -> str:
    """Returns `name` if every backend can call a job so."""
    if not (_JOB_NAME.fullmatch(name) and len(name) <= NAME_CHARACTERS):
        wanted = f"at most {NAME_CHARACTERS} lower-case letters, digits and '-', beginning with a letter"
        raise BadRequestError(f"{name!r} cannot be a job's name: use {wanted}")
    return name


def job_name(verb: Verb, subject: str, argv: Sequence[str] = ()) -> str:
    """What the job is called: `train-RUN`, or `sample-RUN-HASH`, `pack-DATASET-HASH`, …, of the words in `argv`.

    The same words give the same name, so that a job that runs already is found and not started twice.
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
    """Whether a job of this name works on `run`."""
    if name == job_name("train", run):
        return True
    about: tuple[Verb, ...] = ("sample", "evaluate")
    return name[:-_HASH_CHARACTERS] in {job_name(verb, run, ("words",))[:-_HASH_CHARACTERS] for verb in about}
