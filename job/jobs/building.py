"""The job that a command is on a target, built without requests to a bucket or an engine."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from job.config import EMBEDDED, draft, parse_sets, read_config_file
from job.coordination.lease import EXPIRE_SECONDS
from job.data.pack_request import EncodeRequest, IndexRequest, PackRequest
from job.data.source.labels import split_labels
from job.exits import BadConfigError, BadRequestError
from job.jobs.backends import Target
from job.jobs.spec import JobSpec, job_name
from job.processes.group import GPUS, JOB
from job.requests import EvaluateRequest, JobRequest, SampleRequest, SubmitRequest, TrainRequest, check_world_size
from job.runs.records import DOLLARS, split_run
from job.stop import duration_seconds
from job.store import check_source, check_uri, is_foreign, is_remote, split_chain, without_queries

_WITHOUT_GPUS = ("pack", "index")
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for two reads of the lease."""


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
