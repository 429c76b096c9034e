"""From the words of a verb, a target and what was asked about machines to a `JobSpec`. Without bucket or engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from job.config_input import parse_sets, read_config_file
from job.data.pack import PackRequest
from job.exits import BadConfigError, BadRequestError
from job.jobs.spec import JobSpec, ends_itself, job_name
from job.jobs.targets import KubernetesTarget, Target, default_bucket
from job.outcome import JOB
from job.processes.gpus import GPUS
from job.requests import SampleRequest, TrainRequest
from job.runs.lease import EXPIRE_SECONDS
from job.stop import SPOT_GRACE_SECONDS
from job.store import check_uri, is_remote

if TYPE_CHECKING:
    from job.cli.words import Words

EMBEDDED = "landscape-sample"
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for the lease to be read in between."""


@dataclass(frozen=True)
class Wishes:
    """What was asked about the machines; None and empty are as the target says."""

    gpus: int | None = None
    """Per node."""
    nodes: int = 1
    gpu_type: str = ""
    spot: bool | None = None
    max_hours: float | None = None
    slices: int = 0


def spec_of(words: Words, target: Target, wishes: Wishes) -> JobSpec:
    """The job that `words` are on `target`. Equal arguments give equal specs.

    Raises:
        BadRequestError: a word that means nothing, or that this target cannot do.
        BadConfigError: a setting that is not valid, or a target that lacks what jobs need.
        MissingInputError: a file that was named is not there.
    """
    _check_wishes(target, wishes)
    bucket = bucket_of(words, target)
    words = words.saying(bucket=bucket)
    request = words.request().check()
    match request:
        case TrainRequest():
            run, subject = request.run, request.run
            words = _training(words, request, target)
        case SampleRequest():
            run, subject = request.run, request.run
            _check_slices(request, wishes.slices)
        case PackRequest():
            run, subject = "", request.name
            words = words.saying(source=_source(request.source, target))
    if not target.is_remote:
        words = _on_this_machine(words, target, wishes)
    argv = words.argv()
    gpus = (0 if words.verb == "pack" else target.gpus) if wishes.gpus is None else wishes.gpus
    if wishes.gpu_type and not gpus:
        raise BadRequestError(
            f"--gpu-type {wishes.gpu_type} decides nothing for a job without GPUs: leave it out, or ask for --gpus"
        )
    slices = ("--slices", str(wishes.slices)) if wishes.slices else ()
    name = job_name(words.verb, subject, () if words.verb == "train" else (*argv, *slices))
    # Elsewhere nobody sees that a machine with a driver too old computes on its CPU.
    needed_gpus = {GPUS: str(gpus)} if gpus and target.is_remote else {}
    return JobSpec(
        name=name,
        verb=words.verb,
        argv=argv,
        image=_image(target),
        bucket=bucket,
        run=run,
        gpus=gpus,
        gpu_type=(wishes.gpu_type or target.gpu_type) if gpus and _selects_by_type(target) else "",
        nodes=wishes.nodes,
        slices=wishes.slices,
        spot=target.spot if wishes.spot is None else wishes.spot,
        max_hours=target.max_hours if wishes.max_hours is None else wishes.max_hours,
        env={JOB: name, **needed_gpus, **target.env},
    )


def bucket_of(words: Words, target: Target) -> str:
    """`--bucket`, else the target's, else `DDPM_BUCKET`, else the default. Folders of this machine become absolute.

    Raises:
        BadRequestError: no URI of a bucket, or a folder that the target's machines cannot see.
    """
    uri = str(words.values["bucket"]) if "bucket" in words.given else default_bucket(target)
    check_uri(uri)
    if target.is_remote and not is_remote(uri):
        raise BadRequestError(
            f"bucket {uri!r} is a folder of this machine, which jobs on {target.name!r} cannot see: use "
            "--bucket gs://NAME, or `bucket:` of the target"
        )
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def hours_named(target: Target, wishes: Wishes) -> float | None:
    """The hours that somebody asked for, by `--max-hours` or in the target; None if nobody did."""
    if wishes.max_hours is not None:
        return wishes.max_hours
    return target.max_hours if "max_hours" in target.model_fields_set else None


def wait_seconds(target: Target) -> float:
    """How long a job waits for its predecessor, which may be saving until its machine is gone.

    Without it a machine that comes back early would find the run held, and end for good with 76.
    """
    grace = float(getattr(target, "grace_seconds", SPOT_GRACE_SECONDS))
    return math.ceil(EXPIRE_SECONDS + grace + WAIT_MARGIN_SECONDS)


def _check_wishes(target: Target, wishes: Wishes) -> None:
    if target.is_remote:
        if not target.image:
            raise BadConfigError(f"target {target.name!r} has no `image:`, which its machines would run")
        given = wishes.gpu_type or wishes.spot is not None
        if given and not _selects_by_type(target):
            spot = "--spot" if wishes.spot else "--on-demand"
            option = f"--gpu-type {wishes.gpu_type}" if wishes.gpu_type else spot
            raise BadRequestError(
                f"{option} decides nothing on {target.name!r}, which chooses nodes by `node_selector:` alone: leave it "
                "out, or use a target for those nodes"
            )
        return
    if wishes.spot or wishes.gpu_type:
        option = "--spot" if wishes.spot else f"--gpu-type {wishes.gpu_type}"
        raise BadRequestError(f"{option} is about machines in a cloud, and {target.name!r} is this one: leave it out")


def _selects_by_type(target: Target) -> bool:
    return not isinstance(target, KubernetesTarget) or target.selects_as_gke


def _training(words: Words, request: TrainRequest, target: Target) -> Words:
    if request.config_file is not None and target.backend != "local":
        # The file is not there where the job runs.
        sets = parse_sets(request.sets)
        inlined = [
            f"{key}={_as_yaml(value)}"
            for key, value in read_config_file(request.config_file).items()
            if key not in sets
        ]
        words = words.without("config").saying(sets=[*inlined, *request.sets])
    if target.is_remote:
        words = words.saying(wait=max(request.wait_seconds, wait_seconds(target)))
    return words


def _as_yaml(value: Any) -> str:
    """A value as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_slices(request: SampleRequest, slices: int) -> None:
    if not slices:
        return
    if request.slice:
        raise BadRequestError(
            f"--slice {request.slice} is one of the slices that --slices {slices} makes: leave it out"
        )
    replace(request, slice=f"0/{slices}").check()


def _source(source: str, target: Target) -> str:
    if is_remote(source):
        check_uri(source)
        return source
    if source == EMBEDDED:
        return source
    if target.is_remote:
        raise BadRequestError(
            f"SOURCE {source!r} is a path of this machine, which jobs on {target.name!r} cannot see: upload it and "
            "give its URI, or pack here with `ddpm data pack`"
        )
    return source if "://" in source else str(Path(source).expanduser().absolute())


def _on_this_machine(words: Words, target: Target, wishes: Wishes) -> Words:
    # In a container are the GPUs that were asked for, and no others.
    if target.backend == "local" and wishes.gpus and words.verb != "pack" and "processes" not in words.given:
        words = words.saying(processes=wishes.gpus)
    limit = hours_named(target, wishes)
    # There is no engine that would end it; a limit that makes no sense is refused with the rest of the job.
    if limit is not None and 0 < limit < math.inf and "stop_after" not in words.given:
        words = words.saying(stop_after=ends_itself(limit)[1])
    return words


def _image(target: Target) -> str:
    return "" if target.backend == "local" else target.image
