"""A job as data: a command of this program, and the machines that it asks for or needs. Backends render and send it.

`spec_of` builds it without requests to a bucket or an engine.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from job.config import EMBEDDED, draft, parse_sets, read_config_file
from job.coordination.lease import EXPIRE_SECONDS
from job.data.pack_request import EncodeRequest, IndexRequest, PackRequest
from job.data.source.labels import split_labels
from job.exits import BadConfigError, BadRequestError
from job.processes.group import GPUS, JOB
from job.requests import EvaluateRequest, JobRequest, SampleRequest, SubmitRequest, TrainRequest, check_world_size
from job.runs.records import DOLLARS, split_run
from job.stop import duration_seconds
from job.store import check_source, check_uri, is_foreign, is_remote, open_store, split_chain, without_queries

if TYPE_CHECKING:
    from job.jobs.backends import Target

NAME_CHARACTERS = 46
"""The longest name: JobSet appends `-node-0-999-XXXXX` for pods, whose names are labels of at most 63 characters."""
LABEL_PREFIX = "ddpm"
RETRIES = 4
"""The number of failures that count, such as crashes, after which the engine or `--watch` tries again."""
_HASH_CHARACTERS = 8
_JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_WITHOUT_GPUS = ("pack", "index")
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for two reads of the lease."""


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


def spec_of(request: JobRequest, target: Target, how: SubmitRequest) -> JobSpec:
    """Returns the job that a command is on `target`. Equal arguments give equal specs.

    Raises:
        BadRequestError: an option is not valid, or not for this target.
        BadConfigError: a setting is not valid, or the target lacks a key that jobs need.
        MissingInputError: a named file does not exist.
    """
    if request.stop_after:
        # It becomes the job's limit: an engine would start a job again that ends itself with 75.
        hours = min(duration_seconds(request.stop_after) / 3600, _hours(how, target))
        request, how = replace(request, stop_after=""), replace(how, max_hours=hours)
    verb = request.command[-1]
    _check_machines(verb, target, how)
    bucket = _uri_for_jobs("--bucket or DDPM_BUCKET:", request.bucket, target)
    request = replace(request, bucket=bucket)
    checked = request.check()
    request, reads = _adapted(request, checked, target, how)
    run, subject = ("", checked.name) if isinstance(checked, PackRequest | EncodeRequest) else (checked.run,) * 2
    # A container has exactly the requested GPUs.
    if target.is_in_place and not isinstance(request, PackRequest | EncodeRequest):
        request = replace(request, processes=request.processes or how.gpus or None)
    words = request.argv()
    # A single machine makes all slices.
    slices = how.slices if target.is_remote or verb == "train" else 0
    of_name = (*words, "--slices", str(slices)) if slices else words
    name = job_name(verb, subject, () if verb == "train" else of_name)
    gpus = (0 if verb in _WITHOUT_GPUS else target.gpus) if how.gpus is None else how.gpus
    spec = JobSpec(
        name=name,
        verb=verb,
        argv=words,
        image=target.software,
        bucket=bucket,
        run=run,
        gpus=gpus,
        gpu_type=(how.gpu_type or target.gpu_type) if gpus and target.selects_machines else "",
        nodes=how.nodes,
        slices=slices,
        spot=target.spot if how.spot is None else how.spot,
        max_hours=_hours(how, target),
        reads=tuple(map(_path_of, reads)),
        # The job itself checks its GPUs: a machine with too old a driver would silently compute on its CPU.
        env={JOB: name, **({GPUS: str(gpus)} if gpus and target.is_remote else {}), **target.env},
    )
    if verb == "train" and (hourly := target.hourly(spec)):
        return replace(spec, env={**spec.env, DOLLARS: f"{spec.machines * hourly.dollars:.6g}"})
    return spec


def _hours(how: SubmitRequest, target: Target) -> float:
    """Returns `--max-hours`, else the target's; on this machine no limit is the default."""
    if how.max_hours is not None:
        return how.max_hours
    return target.max_hours if target.is_remote or "max_hours" in target.model_fields_set else math.inf


def wait_seconds(target: Target) -> float:
    """Returns how long a job waits for its predecessor, which may save until its machine is gone.

    Otherwise a machine that comes back early would find the run held, and end for good with 76.
    """
    return math.ceil(EXPIRE_SECONDS + target.notice_seconds + WAIT_MARGIN_SECONDS)


def _check_machines(verb: str, target: Target, how: SubmitRequest) -> None:
    spot = "" if how.spot is None else "--spot" if how.spot else "--on-demand"
    option, on = f"--gpu-type {how.gpu_type}" if how.gpu_type else spot, f"target {target.name!r}"
    if how.max_hours is not None and not 1 / 60 <= how.max_hours <= 720:
        raise BadRequestError(f"--max-hours {how.max_hours:g}, or --stop-after: a job lasts for 0.017 to 720 hours")
    if how.nodes > 1 and not target.has_groups:
        raise BadRequestError(
            f"--nodes {how.nodes}: on {on} no machines train together: use a kubernetes or slurm target"
        )
    if verb in _WITHOUT_GPUS and (how.gpus or how.gpu_type):
        raise BadRequestError("packing uses no GPUs: leave --gpus and --gpu-type out")
    if target.is_remote and not target.software:
        raise BadConfigError(f"{on} has no `image:`, which its machines would run")
    if target.is_remote and option and not target.selects_machines:
        raise BadRequestError(f"{option} decides nothing on {on}, which has its own `node_selector:`: leave it out")
    if not target.is_remote and option not in ("", "--on-demand"):
        raise BadRequestError(f"{option} is about machines in a cloud, and {on} is this one: leave it out")


def _uri_for_jobs(what: str, uri: str, target: Target) -> str:
    """Returns a URI or a path that the jobs of a target can see. Folders of this machine become absolute."""
    check_uri(uri)
    if is_remote(uri):
        return uri
    if not target.has_files:
        raise BadRequestError(f"{what} {uri!r} is a path of this machine, which jobs on {target.name!r} cannot see")
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _adapted(
    request: JobRequest, checked: JobRequest, target: Target, how: SubmitRequest
) -> tuple[JobRequest, list[str]]:
    """Returns the command as it runs on the target, and the sources that it reads besides its bucket."""
    if how.slices and not isinstance(request, TrainRequest):
        if request.slice:
            raise BadRequestError("--slices gives each machine a --slice of its own: leave one of them out")
        replace(request, slice=f"0/{how.slices}").check()
    match request:
        case TrainRequest():
            assert isinstance(checked, TrainRequest)
            request, run = _training(request, checked, target, how), checked.changes.get("parent.run", "")
            if "/" not in run:
                return request, []
            uri, epoch = _uri_for_jobs("--from", run, target), checked.changes.get("parent.epoch", "latest")
            return replace(request, from_=f"{uri}@{epoch}"), [split_run(uri)[0]]
        case SampleRequest():
            for option, name in request.files.items() if not target.is_in_place else ():
                there = f"is a file of this machine, which jobs on {target.name!r} cannot see"
                raise BadRequestError(f"{option} {name!r} {there}")
            if isinstance(request, EvaluateRequest) and request.extractor_file:
                file = _uri_for_jobs("--extractor-file", request.extractor_file, target)
                return replace(request, extractor_file=file), [file]
        case IndexRequest():
            tars = [_source(tar, target) for tar in request.tars]
            return replace(request, tars=tuple(tars)), tars
        case PackRequest():
            reads = [_source(request.source, target)]
            request = replace(request, source=reads[0])
            file, column = split_labels(request.labels)
            if file:
                reads.append(_source(file, target, "--labels"))
                request = replace(request, labels=f"{reads[1]}:{column}" if column else reads[1])
            return request, reads
        case EncodeRequest():
            autoencoder = _uri_for_jobs("--autoencoder", request.autoencoder, target)
            return replace(request, autoencoder=autoencoder), [autoencoder]
    return request, []


def _source(source: str, target: Target, what: str = "SOURCE") -> str:
    """Returns a source of a dataset, as the jobs of a target can see it."""
    inside, archive = split_chain(source)
    if is_foreign(archive):
        check_source(archive)
        if target.is_remote and (shown := without_queries(archive)) != archive:
            raise BadRequestError(f"{shown}?…: lists and logs would show its query, which may be a signature")
    elif archive != EMBEDDED:
        archive = _uri_for_jobs(what, archive, target)
    return f"{inside}::{archive}" if inside else archive


def _path_of(source: str) -> str:
    """Returns the file or folder of this machine that contains a source; empty if the source is remote."""
    path = split_chain(source)[1].removeprefix("file://")
    # The files of a pattern lie in a folder.
    start = re.split(r"[{*]", path)[0]
    return "" if not path.startswith("/") else path if start == path else str(Path(f"{start}x").parent)


def _training(request: TrainRequest, checked: TrainRequest, target: Target, how: SubmitRequest) -> TrainRequest:
    # Otherwise an existing run keeps its batch size.
    if "train.batch_size" in checked.changes:
        gpus = target.gpus if how.gpus is None and target.is_remote else how.gpus
        key = "train.batch_size"
        train = draft(request.preset_name(), {key: checked.changes[key]}).train
        check_world_size((request.processes or gpus or 1) * how.nodes, train)
    if not target.is_in_place:
        if request.open_page:
            how_to = f"`ddpm report {checked.run} --open` opens the page when it is in the bucket"
            raise BadRequestError(f"--open: jobs on {target.name!r} have no browser; {how_to}")
        if checked.changes.get("log.tracker", "none") != "none":
            raise BadRequestError(f"--tracker: jobs on {target.name!r} lack its library and its key: leave it out")
        if request.config_file is not None:
            # The job cannot see the file.
            sets, settings = parse_sets(request.sets), read_config_file(request.config_file)
            inlined = [f"{key}={_as_yaml(value)}" for key, value in settings.items() if key not in sets]
            request = replace(request, config_file=None, sets=(*inlined, *request.sets))
    if target.is_remote:
        request = replace(request, wait_seconds=max(request.wait_seconds, wait_seconds(target)))
    return request


def _as_yaml(value: Any) -> str:
    """Returns a value as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
