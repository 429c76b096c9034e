"""From a command, a target and the machines that were asked for to a `JobSpec`. Without bucket or engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from job.config import EMBEDDED, draft, parse_sets, read_config_file
from job.data.pack_request import PackRequest
from job.exits import BadConfigError, BadRequestError
from job.jobs.command_line import ParsedCommand
from job.jobs.prices import dollars_per_hour
from job.jobs.spec import JobSpec, job_name, stop_after
from job.jobs.targets import KubernetesTarget, Target
from job.outcome import JOB
from job.processes.group import GPUS
from job.processes.lease import EXPIRE_SECONDS
from job.requests import EncodeRequest, EvaluateRequest, SampleRequest, TrainRequest, check_world_size
from job.runs.records import DOLLARS
from job.stop import SPOT_GRACE_SECONDS, duration_seconds
from job.store import check_source, check_uri, is_foreign, is_remote, split_chain, without_queries

_WITHOUT_GPUS = ("pack", "index")
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for the lease to be read in between."""


@dataclass(frozen=True)
class Resources:
    """The machines that were asked for; None and empty are as the target says."""

    gpus: int | None = None
    """Per node."""
    nodes: int = 1
    gpu_type: str = ""
    spot: bool | None = None
    max_hours: float | None = None
    slices: int = 0

    def hours_on(self, target: Target) -> float:
        """Those of `--max-hours`, else the target's; on this machine without bound where nobody named any."""
        if self.max_hours is not None:
            return self.max_hours
        return target.max_hours if target.is_remote or "max_hours" in target.model_fields_set else math.inf


def spec_of(command: ParsedCommand, target: Target, resources: Resources) -> JobSpec:
    """The job that `command` is on `target`. Equal arguments give equal specs.

    Raises:
        BadRequestError: a word that means nothing, or that this target cannot do.
        BadConfigError: a setting that is not valid, or a target that lacks what jobs need.
        MissingInputError: a file that was named is not there.
    """
    if text := command.values["stop_after"]:
        # As the job's limit: one that ended itself with 75 would be started again.
        hours = min(duration_seconds(text, "--stop-after") / 3600, resources.hours_on(target))
        command, resources = command.with_values(stop_after=None), replace(resources, max_hours=hours)
    _check_resources(command, target, resources)
    uri = str(command.values["bucket"]) if "bucket" in command.given else target.usual_bucket
    bucket = _seen("bucket", uri, target)
    command = command.with_values(bucket=bucket)
    request, reads = command.request().check(), list[str]()
    if resources.slices and not isinstance(request, TrainRequest) and request.slice:
        raise BadRequestError("--slices gives each machine a --slice of its own: leave one of them out")
    match request:
        case TrainRequest():
            command = _training(command, request, target, resources)
        case SampleRequest():
            _check_files(request, target)
            if resources.slices:
                replace(request, slice=f"0/{resources.slices}").check()
        case EvaluateRequest():
            _check_files(request.sampling, target)
            if request.extractor_file:
                file = _seen("--extractor-file", request.extractor_file, target)
                command = command.with_values(extractor_file=file)
        case PackRequest() if request.tars:
            reads = [_source(tar, target) for tar in request.tars]
            command = command.with_values(tars=reads)
        case PackRequest():
            reads = [_source(request.source, target)]
            command = command.with_values(source=reads[0])
        case EncodeRequest():
            reads = [_seen("--autoencoder", request.autoencoder, target)]
            command = command.with_values(autoencoder=reads[0])
    subject = request.name if isinstance(request, PackRequest | EncodeRequest) else request.run
    if not target.is_remote:
        command = _on_this_machine(command, target, resources)
    argv = command.argv()
    slices = ("--slices", str(resources.slices)) if resources.slices else ()
    name = job_name(command.verb, subject, () if command.verb == "train" else (*argv, *slices))
    gpus = (0 if command.verb in _WITHOUT_GPUS else target.gpus) if resources.gpus is None else resources.gpus
    # Elsewhere nobody sees that a machine with a driver too old computes on its CPU.
    needed_gpus = {GPUS: str(gpus)} if gpus and target.is_remote else {}
    spec = JobSpec(
        name=name,
        verb=command.verb,
        argv=argv,
        image="" if target.backend == "local" else target.image,
        bucket=bucket,
        run="" if isinstance(request, PackRequest | EncodeRequest) else request.run,
        gpus=gpus,
        gpu_type=(resources.gpu_type or target.gpu_type) if gpus and _selects_by_type(target) else "",
        nodes=resources.nodes,
        slices=resources.slices,
        spot=target.spot if resources.spot is None else resources.spot,
        max_hours=resources.hours_on(target),
        reads=tuple(map(_path_of, reads)),
        env={JOB: name, **needed_gpus, **target.env},
    )
    if command.verb != "train" or (dollars := dollars_per_hour(spec, target)) is None:
        return spec
    return replace(spec, env={**spec.env, DOLLARS: f"{dollars:.6g}"})


def wait_seconds(target: Target) -> float:
    """How long a job waits for its predecessor, which may be saving until its machine is gone.

    Without it a machine that comes back early would find the run held, and end for good with 76.
    """
    grace = float(getattr(target, "grace_seconds", SPOT_GRACE_SECONDS))
    return math.ceil(EXPIRE_SECONDS + grace + WAIT_MARGIN_SECONDS)


def _check_resources(command: ParsedCommand, target: Target, resources: Resources) -> None:
    spot = "" if resources.spot is None else "--spot" if resources.spot else "--on-demand"
    option = f"--gpu-type {resources.gpu_type}" if resources.gpu_type else spot
    if resources.max_hours is not None and not 1 / 60 <= resources.max_hours <= 720:
        given = f"--max-hours {resources.max_hours:g}, or --stop-after"
        raise BadRequestError(f"{given}: a job lasts for at least a minute (0.017) and at most 720 hours")
    if resources.nodes > 1 and target.backend != "kubernetes":
        several = f"--nodes {resources.nodes} needs several machines that train together, and {target.name!r} has none"
        raise BadRequestError(f"{several}: use a kubernetes target, or one machine with more GPUs (--gpus 8)")
    if resources.slices and not target.is_remote:
        raise BadRequestError(f"--slices {resources.slices} needs several machines, and {target.name!r} is this one")
    if command.verb in _WITHOUT_GPUS and (resources.gpus or resources.gpu_type):
        raise BadRequestError("packing uses no GPUs: leave --gpus and --gpu-type out")
    if target.is_remote and not target.image:
        raise BadConfigError(f"target {target.name!r} has no `image:`, which its machines would run")
    if target.is_remote and option and not _selects_by_type(target):
        chooses = f"{target.name!r}, which chooses nodes by `node_selector:` alone"
        raise BadRequestError(f"{option} decides nothing on {chooses}: leave it out")
    if not target.is_remote and option not in ("", "--on-demand"):
        raise BadRequestError(f"{option} is about machines in a cloud, and {target.name!r} is this one: leave it out")


def _selects_by_type(target: Target) -> bool:
    return not isinstance(target, KubernetesTarget) or target.selects_as_gke


def _seen(what: str, uri: str, target: Target) -> str:
    """Returns a URI or a path that the jobs of a target can see. Folders of this machine become absolute."""
    check_uri(uri)
    if is_remote(uri):
        return uri
    if target.is_remote:
        here = f"{what} {uri!r} is a path of this machine"
        raise BadRequestError(f"{here}, which jobs on {target.name!r} cannot see: use a URI, such as gs://NAME")
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _check_files(request: SampleRequest, target: Target) -> None:
    for option, name in request.files.items() if target.backend != "local" else ():
        raise BadRequestError(f"{option} {name!r} is a file of this machine, which jobs on {target.name!r} cannot see")


def _source(source: str, target: Target) -> str:
    """Returns what is packed, as the jobs of a target can see it."""
    inside, archive = split_chain(source)
    if is_foreign(archive):
        check_source(archive)
        if target.is_remote and (shown := without_queries(archive)) != archive:
            raise BadRequestError(f"{shown}?…: its query, which may be a signature, would stand in the job's words")
    elif archive != EMBEDDED:
        archive = _seen("SOURCE", archive, target)
    return f"{inside}::{archive}" if inside else archive


def _path_of(source: str) -> str:
    """Returns the file or folder of this machine in which a source lies; empty if it lies elsewhere."""
    path = split_chain(source)[1].removeprefix("file://")
    # A pattern of tars lies in a folder.
    return "" if not path.startswith("/") else str(Path(path.partition("{")[0]).parent) if "{" in path else path


def _training(command: ParsedCommand, request: TrainRequest, target: Target, resources: Resources) -> ParsedCommand:
    # Without that word a run that is there has the batch it began with.
    if "train.batch_size" in request.changes:
        gpus = target.gpus if resources.gpus is None and target.is_remote else resources.gpus
        batch_size = draft(request.preset_name, request.changes).train.batch_size
        check_world_size((command.values["processes"] or gpus or 1) * resources.nodes, batch_size)
    if request.config_file is not None and target.backend != "local":
        # The file is not there where the job runs.
        sets, settings = parse_sets(request.sets), read_config_file(request.config_file)
        inlined = [f"{key}={_as_yaml(value)}" for key, value in settings.items() if key not in sets]
        command = command.with_values(config=None, sets=[*inlined, *request.sets])
    if target.backend != "local" and request.changes.get("log.tracker", "none") != "none":
        raise BadRequestError(
            f"--tracker: jobs on {target.name!r} have no key for one, and their image no such library"
        )
    if target.is_remote:
        command = command.with_values(wait=max(request.wait_seconds, wait_seconds(target)))
    return command


def _as_yaml(value: Any) -> str:
    """A value as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _on_this_machine(command: ParsedCommand, target: Target, resources: Resources) -> ParsedCommand:
    # In a container are the GPUs that were asked for, and no others.
    if target.backend == "local" and resources.gpus and "processes" not in command.given:
        command = command.with_values(processes=resources.gpus)
    # There is no engine that would end it.
    if (hours := resources.hours_on(target)) < math.inf:
        command = command.with_values(stop_after=stop_after(hours))
    return command
