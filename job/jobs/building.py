"""Builds a `JobSpec` from a command, a target and the requested machines, without requests to a bucket or an engine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from job.config import EMBEDDED, draft, parse_sets, read_config_file
from job.data.labels import split_labels
from job.data.pack_request import PackRequest
from job.exits import BadConfigError, BadRequestError
from job.jobs.backends.base import Target
from job.jobs.command_line import AnyRequest, ParsedCommand
from job.jobs.spec import JobSpec, job_name, stop_after
from job.processes.group import GPUS, JOB
from job.processes.lease import EXPIRE_SECONDS
from job.requests import EncodeRequest, EvaluateRequest, SampleRequest, TrainRequest, check_world_size
from job.runs.records import DOLLARS, split_run
from job.stop import duration_seconds
from job.store import check_source, check_uri, is_foreign, is_remote, split_chain, without_queries

_WITHOUT_GPUS = ("pack", "index")
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for two reads of the lease."""


@dataclass(frozen=True)
class Resources:
    """The requested machines; for None and empty values the target decides."""

    gpus: int | None = None
    """Per node."""
    nodes: int = 1
    gpu_type: str = ""
    spot: bool | None = None
    max_hours: float | None = None
    slices: int = 0

    def hours_on(self, target: Target) -> float:
        """Returns `--max-hours`, else the target's; on this machine no limit is the default."""
        if self.max_hours is not None:
            return self.max_hours
        return target.max_hours if target.is_remote or "max_hours" in target.model_fields_set else math.inf


def spec_of(command: ParsedCommand, target: Target, resources: Resources) -> JobSpec:
    """Returns the job that `command` is on `target`. Equal arguments give equal specs.

    Raises:
        BadRequestError: an option is not valid, or not for this target.
        BadConfigError: a setting is not valid, or the target lacks a key that jobs need.
        MissingInputError: a named file does not exist.
    """
    if text := command.values["stop_after"]:
        # It becomes the job's limit: an engine would start a job again that ends itself with 75.
        hours = min(duration_seconds(text) / 3600, resources.hours_on(target))
        command, resources = command.with_values(stop_after=None), replace(resources, max_hours=hours)
    _check_resources(command, target, resources)
    uri = str(command.values["bucket"]) if "bucket" in command.given else target.usual_bucket
    bucket = _uri_for_jobs("--bucket or DDPM_BUCKET:", uri, target)
    command = command.with_values(bucket=bucket)
    request = command.request().check()
    command, reads = _adapted(command, request, target, resources)
    run, subject = ("", request.name) if isinstance(request, PackRequest | EncodeRequest) else (request.run,) * 2
    if not target.is_remote:
        command = _on_this_machine(command, target, resources)
    argv = command.argv()
    # A single machine makes all slices.
    slices = resources.slices if target.is_remote or command.verb == "train" else 0
    words = (*argv, "--slices", str(slices)) if slices else argv
    name = job_name(command.verb, subject, () if command.verb == "train" else words)
    gpus = (0 if command.verb in _WITHOUT_GPUS else target.gpus) if resources.gpus is None else resources.gpus
    # The job itself checks them: a machine with too old a driver would silently compute on its CPU.
    needed_gpus = {GPUS: str(gpus)} if gpus and target.is_remote else {}
    spec = JobSpec(
        name=name,
        verb=command.verb,
        argv=argv,
        image=target.software,
        bucket=bucket,
        run=run,
        gpus=gpus,
        gpu_type=(resources.gpu_type or target.gpu_type) if gpus and target.selects_machines else "",
        nodes=resources.nodes,
        slices=slices,
        spot=target.spot if resources.spot is None else resources.spot,
        max_hours=resources.hours_on(target),
        reads=tuple(map(_path_of, reads)),
        env={JOB: name, **needed_gpus, **target.env},
    )
    if command.verb != "train" or (dollars := target.dollars_per_hour(spec)) is None:
        return spec
    return replace(spec, env={**spec.env, DOLLARS: f"{dollars:.6g}"})


def wait_seconds(target: Target) -> float:
    """Returns how long a job waits for its predecessor, which may save until its machine is gone.

    Otherwise a machine that comes back early would find the run held, and end for good with 76.
    """
    return math.ceil(EXPIRE_SECONDS + target.notice_seconds + WAIT_MARGIN_SECONDS)


def _check_resources(command: ParsedCommand, target: Target, resources: Resources) -> None:
    spot = "" if resources.spot is None else "--spot" if resources.spot else "--on-demand"
    option, on = f"--gpu-type {resources.gpu_type}" if resources.gpu_type else spot, f"target {target.name!r}"
    if resources.max_hours is not None and not 1 / 60 <= resources.max_hours <= 720:
        raise BadRequestError(
            f"--max-hours {resources.max_hours:g}, or --stop-after: a job lasts for 0.017 to 720 hours"
        )
    if resources.nodes > 1 and not target.has_groups:
        raise BadRequestError(
            f"--nodes {resources.nodes}: on {on} no machines train together: use a kubernetes or slurm target"
        )
    if command.verb in _WITHOUT_GPUS and (resources.gpus or resources.gpu_type):
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
    command: ParsedCommand, request: AnyRequest, target: Target, resources: Resources
) -> tuple[ParsedCommand, list[str]]:
    """Returns the command as it runs on the target, and the sources that it reads besides its bucket."""
    if resources.slices and not isinstance(request, TrainRequest) and request.slice:
        raise BadRequestError("--slices gives each machine a --slice of its own: leave one of them out")
    match request:
        case TrainRequest():
            command, run = _training(command, request, target, resources), request.changes.get("parent.run", "")
            if "/" not in run:
                return command, []
            uri, epoch = _uri_for_jobs("--from", run, target), request.changes.get("parent.epoch", "latest")
            return command.with_values(from_=f"{uri}@{epoch}"), [split_run(uri)[0]]
        case SampleRequest():
            _check_files(request, target)
            if resources.slices:
                replace(request, slice=f"0/{resources.slices}").check()
        case EvaluateRequest():
            _check_files(request.sampling, target)
            if file := request.extractor_file:
                file = _uri_for_jobs("--extractor-file", file, target)
                return command.with_values(extractor_file=file), [file]
        case PackRequest() if request.tars:
            tars = [_source(tar, target) for tar in request.tars]
            return command.with_values(tars=tars), tars
        case PackRequest():
            if resources.slices:
                replace(request, slice=f"0/{resources.slices}").check()
            reads = [_source(request.source, target)]
            command = command.with_values(source=reads[0])
            file, column = split_labels(request.labels)
            if file:
                reads.append(_source(file, target, "--labels"))
                command = command.with_values(labels=f"{reads[1]}:{column}" if column else reads[1])
            return command, reads
        case EncodeRequest():
            autoencoder = _uri_for_jobs("--autoencoder", request.autoencoder, target)
            return command.with_values(autoencoder=autoencoder), [autoencoder]
    return command, []


def _check_files(request: SampleRequest, target: Target) -> None:
    for option, name in request.files.items() if not target.is_in_place else ():
        raise BadRequestError(f"{option} {name!r} is a file of this machine, which jobs on {target.name!r} cannot see")


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


def _training(command: ParsedCommand, request: TrainRequest, target: Target, resources: Resources) -> ParsedCommand:
    # Otherwise an existing run keeps its batch size.
    if "train.batch_size" in request.changes:
        gpus = target.gpus if resources.gpus is None and target.is_remote else resources.gpus
        key = "train.batch_size"
        train = draft(request.preset_name(), {key: request.changes[key]}).train
        check_world_size((command.values["processes"] or gpus or 1) * resources.nodes, train)
    if not target.is_in_place:
        if request.open_page:
            how = f"`ddpm report {request.run} --open` opens the page when it is in the bucket"
            raise BadRequestError(f"--open: jobs on {target.name!r} have no browser; {how}")
        if request.changes.get("log.tracker", "none") != "none":
            raise BadRequestError(f"--tracker: jobs on {target.name!r} lack its library and its key: leave it out")
        if request.config_file is not None:
            # The job cannot see the file.
            sets, settings = parse_sets(request.sets), read_config_file(request.config_file)
            inlined = [f"{key}={_as_yaml(value)}" for key, value in settings.items() if key not in sets]
            command = command.with_values(config=None, sets=[*inlined, *request.sets])
    if target.is_remote:
        command = command.with_values(wait=max(request.wait_seconds, wait_seconds(target)))
    return command


def _as_yaml(value: Any) -> str:
    """Returns a value as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _on_this_machine(command: ParsedCommand, target: Target, resources: Resources) -> ParsedCommand:
    # A container has exactly the requested GPUs.
    if target.is_in_place and resources.gpus and "processes" not in command.given:
        command = command.with_values(processes=resources.gpus)
    # No engine would end the job.
    if (hours := resources.hours_on(target)) < math.inf:
        command = command.with_values(stop_after=stop_after(hours))
    return command
