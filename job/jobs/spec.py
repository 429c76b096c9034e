"""A job as data: a command of this program, and the machines that it asks for or needs. Backends render and send it."""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

from job.data.pack_request import EncodeRequest, PackRequest
from job.exits import BadRequestError
from job.options import OnTarget, Targets, option
from job.requests import EvaluateRequest, SampleRequest, TrainRequest

JobRequest = TrainRequest | SampleRequest | EvaluateRequest | PackRequest | EncodeRequest
"""A command that can be a job."""

NAME_CHARACTERS = 46
"""The longest name: JobSet appends `-node-0-999-XXXXX` for pods, whose names are labels of at most 63 characters."""
LABEL_PREFIX = "ddpm"
RETRIES = 4
"""The number of failures that count, such as crashes, after which the engine or `--watch` tries again."""
_HASH_CHARACTERS = 8
_JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class SubmitRequest:
    """The options of `ddpm submit`: where a command becomes a job, and on which machines."""

    on: OnTarget = "local"
    gpus: int | None = option("--gpus N", "GPUs per machine. Default: the target's.", None, min=0, max=64)
    nodes: int = option("--nodes N", "Number of machines that train together.", 1, min=1, max=1000)
    gpu_type: str = option("--gpu-type TYPE", "Type of GPU, such as nvidia-l4. Default: the target's.")
    spot: bool | None = option(
        "--spot/--on-demand", "Use cheap machines that may be preempted, or not. Default: the target's.", None
    )
    max_hours: float | None = option("--max-hours H", "End the job after H hours. Default: the target's.", None)
    slices: int = option("--slices N", "Machines that share the work, such as 8; not for training.", 0, min=0, max=1000)
    targets: Targets = None
    dry_run: bool = option("--dry-run", "Print what would be sent, and send nothing.", False)
    output: str = option("--output -o FORMAT", "Format of --dry-run: yaml or json.")
    watch: bool = option("--watch", "Wait, and submit again after preemptions, failures or lack of machines.", False)
    yes: bool = option("--yes", "Do not ask for confirmation.", False)
    detach: bool = option("--detach", "Return at once; a local or container job runs in the background.", False)


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
        gpu_type: as the backend names it, such as `nvidia-l4`; empty is the target's.
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
        """Refuses a job that no backend could run; the message names the option."""
        validated_job_name(self.name)
        if self.nodes > 1 and self.verb != "train":
            raise BadRequestError(f"--nodes {self.nodes} is for training: use --slices for all other work")
        if self.slices and self.verb == "train":
            raise BadRequestError(f"--slices {self.slices} is not for training: use --nodes")

    @property
    def max_seconds(self) -> int:
        """Returns `max_hours` in whole seconds."""
        return round(self.max_hours * 3600)

    def lasting(self, max_hours: float) -> Self:
        """Returns the same job, of the same name, with another limit, also of a job that keeps its limit itself."""
        if max_hours == self.max_hours:
            return self
        words = pairwise(("", *self.argv))
        argv = (stop_after(max_hours) if option == "--stop-after" else word for option, word in words)
        return replace(self, max_hours=max_hours, argv=tuple(argv))

    @property
    def bucket_folder(self) -> Path | None:
        """Returns the bucket, if it is a folder of this machine."""
        from job.store import is_remote, open_store

        return None if is_remote(self.bucket) else Path(open_store(self.bucket).uri)

    @property
    def machines(self) -> int:
        """Returns the number of its machines at a time."""
        return self.slices or self.nodes

    def argv_of_slice(self, index: int | str) -> tuple[str, ...]:
        """Returns the words of one slice; `index` may be a variable that the engine fills in, such as `$(INDEX)`."""
        if not self.slices:
            return self.argv
        # After `--` it would be an argument.
        end = self.argv.index("--") if "--" in self.argv else len(self.argv)
        return (*self.argv[:end], "--slice", f"{index}/{self.slices}", *self.argv[end:])

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


def stop_after(hours: float) -> str:
    """Returns the value of `--stop-after` with which a job ends itself, if no engine would end it."""
    return f"{max(1, round(hours * 3600))}s"


def validated_job_name(name: str) -> str:
    """Returns `name` if it is valid on every backend."""
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
