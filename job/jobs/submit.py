"""`ddpm submit`: builds the job that a command is on a target, shows it with its highest cost, asks, and sends it."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from job.config import EMBEDDED, draft, parse_sets, read_config_file
from job.coordination.lease import EXPIRE_SECONDS
from job.data.pack_request import EncodeRequest, IndexRequest, PackRequest
from job.data.source.labels import split_labels
from job.exits import BadConfigError, BadRequestError, JobError, MissingInputError
from job.jobs.backends import JsonObject, Target
from job.jobs.machines import gpus_of
from job.jobs.spec import JobSpec, job_name
from job.jobs.targets import BACKENDS, target_class, target_on
from job.jobs.watch import Watch
from job.own_code import keep_network, named_network
from job.processes.group import GPUS, JOB
from job.progress import note
from job.requests import EvaluateRequest, JobRequest, SampleRequest, SubmitRequest, TrainRequest, check_world_size
from job.runs.outlook import attempts_of, best_interval_seconds, interval_seconds, outlook_of, spans_of
from job.runs.records import DOLLARS, read_status, run_store, split_run
from job.stop import Stop, duration_seconds
from job.store import check_source, check_uri, is_foreign, is_remote, open_store, split_chain, without_queries

_WITHOUT_GPUS = ("pack", "index")
WAIT_MARGIN_SECONDS = 30.0
"""For a predecessor's last save to arrive, and for two reads of the lease."""
OUTLOOK_SECONDS = 10.0
"""The limit of a look at the run that a job will go on with."""
SPOT_HOURS = 3.0
"""Between two preemptions of a spot machine: 47 in 145 hours on AWS machines with a V100, in the first two days of four
zones of April 2023. Other machines and places differ by a factor of ten.
github.com/skypilot-org/spot-traces, of Z. Wu et al., Can't Be Late, NSDI 2024."""
SAVE_SECONDS, EPOCH_SECONDS = 10.0, 600.0
"""The durations of a save and an epoch: guesses, without a source."""
LEAST_CHANCE = 0.1
"""The chance of an attempt to reach its end below which a job is refused that saves only then."""


def submit_command(request: JobRequest, how: SubmitRequest) -> None:
    """Submits a command; on this machine, in the foreground, this process becomes it.

    Raises:
        BadRequestError: the request cannot be met, or no terminal can confirm it.
        BadConfigError: a setting or a targets file is not valid.
        MissingInputError: a file or a library is missing.
        JobError: the engine's answer; see `Target`.
    """
    target = target_on(how.on, how.targets, note)
    spec = spec_of(request, target, how)
    if how.slices and not spec.slices:
        note(f"target {target.name!r} is one machine, which makes all {how.slices} slices")
    manifests = target.render(spec)
    if target.is_remote and isinstance(request, TrainRequest):
        check_interruptions(spec, target, request)
    if how.dry_run:
        print(formatted(manifests), end="")
        return
    folder = spec.bucket_folder
    if folder and target.has_files and spec.verb not in ("pack", "index") and not folder.is_dir():
        raise MissingInputError(f"bucket {spec.bucket} is not there: check the path, or pack a dataset first")
    if target.is_remote:
        print("\n".join([*plan_lines(spec, target), *outlook_lines(spec, target)]), flush=True)
        if not how.yes:
            _ask(spec)
    if isinstance(request, TrainRequest | SampleRequest) and request.network:
        keep_network(open_store(spec.bucket), named_network(request.network, spec.bucket))
    if how.watch:
        Watch(target, spec, Stop().install().sleep).run()
    elif target.is_remote or how.detach:
        target.submit_where_possible(spec)
        job = f"{spec.name} --on {target.name}"
        print(f"{spec.name} is submitted: `ddpm jobs logs {job} -f` follows it, `ddpm jobs cancel {job}` stops it")
    else:
        target.become(spec)


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
    if isinstance(request, TrainRequest | SampleRequest) and request.network:
        request = replace(request, network=named_network(request.network, bucket).named)
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
        groups = " or ".join(backend for backend in BACKENDS if target_class(backend).has_groups)
        raise BadRequestError(f"--nodes {how.nodes}: on {on} no machines train together: use a {groups} target")
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
            tables = {"labels": request.labels, "vector": request.vector}
            for name, (file, column) in {name: split_labels(text) for name, text in tables.items()}.items():
                if file:
                    reads.append(_source(file, target, f"--{name}"))
                    tables[name] = f"{reads[-1]}:{column}" if column else reads[-1]
            request = replace(request, labels=tables["labels"], vector=tables["vector"])
            if request.condition and not request.condition.startswith(":"):
                reads.append(_source(request.condition, target, "--condition"))
                request = replace(request, condition=reads[-1])
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


def plan_lines(spec: JobSpec, target: Target) -> list[str]:
    """Returns the facts for a person before a job is sent: command, place, machines, limit and cost."""
    terms = target.terms(spec)
    gpus = f"{spec.gpus} × {spec.gpu_type or 'GPU'} each" if spec.gpus else "no GPU"
    if not spec.gpus and (found := gpus_of(terms.machine)):
        gpus = f"no GPU used: {found[0]} × {found[1]} idle, but paid for"
    kind = terms.kind or ("spot, which may be taken away: nothing is lost" if spec.spot else "on demand")
    return [
        f"job       {spec.name}, on {target.name} ({', '.join((target.backend, *terms.place))})",
        f"command   ddpm {shlex.join(spec.argv)}",
        f"image     {spec.image}",
        f"machines  {spec.machines} × {terms.machine}, {gpus}; {kind}",
        f"bucket    {spec.bucket}",
        f"limit     {spec.max_hours:g} hours {terms.limit}; saved work stays (--max-hours)",
        f"cost      {cost_of(spec, target)}",
    ]


def outlook_lines(spec: JobSpec, target: Target) -> list[str]:
    """Returns the hours and dollars to the end of a run that is there, at its last speed; none for other jobs."""
    if spec.verb != "train":
        return []
    hourly = target.hourly(spec)
    # Credentials for jobs need not read their bucket.
    with suppress(JobError):
        run = run_store(open_store(spec.bucket).within(OUTLOOK_SECONDS), spec.run)
        status = read_status(run)
        dollars_per_hour = hourly.dollars * spec.machines if hourly else None
        texts = outlook_of(spans_of(attempts_of(run), status), status, dollars_per_hour).words
        return [f"{what:<10} {text}" for what, text in texts.items()]
    return []


def check_interruptions(spec: JobSpec, target: Target, request: TrainRequest) -> None:
    """Refuses a job on spot machines that would save only at its end, which hardly any attempt would reach.

    Interruptions come at random: an attempt lasts for t with a chance of e^(-t/M), M being the mean time between two.
    """
    request = request.check()
    keys = ("checkpoint.every_minutes", "checkpoint.every_epochs")
    changes = {key: request.changes[key] for key in keys if key in request.changes}
    saves, every = draft(request.preset_name(), changes).checkpoint, SPOT_HOURS * 3600 / spec.machines
    interval = interval_seconds(saves.every_minutes, target.notice_seconds, (SAVE_SECONDS, 0.0), None)
    is_saved = min(interval, saves.every_epochs * EPOCH_SECONDS) < spec.max_seconds
    is_spot = spec.spot and target.selects_machines
    if is_spot and not is_saved and math.exp(-spec.max_seconds / every) < LEAST_CHANCE:
        works = best_interval_seconds(SAVE_SECONDS, every) / 60
        raise BadRequestError(
            f"the job would not save within its {spec.max_hours:g} hours ({', '.join(keys)}), but loses a spot machine "
            f"every {every / 3600:.2g} hours: add --set {keys[0]}={works:.2g}, or --on-demand"
        )


def cost_of(spec: JobSpec, target: Target) -> str:
    """Returns the highest cost of `spec` on `target`, and the source of that figure."""
    hourly, terms = target.hourly(spec), target.terms(spec)
    if hourly is None:
        return "price unknown: set the target's `price_per_hour`"
    about = f"{'; spot costs less' * (spec.spot and target.price_per_hour is None)}; {hourly.about}"
    words = f"{spec.machines} × ${hourly.dollars:.4g} per hour"
    if terms.attempts is None:
        return f"{words}, for as long as it runs, without a limit{about}"
    words += f" × {terms.attempts} attempts" * (terms.attempts > 1)
    dollars = spec.machines * hourly.dollars * terms.attempts * spec.max_hours
    return f"at most ${dollars:,.2f} ({words} × {spec.max_hours:g} hours{about})"


def _ask(spec: JobSpec) -> None:
    # A process whose input was closed has no stdin.
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequestError(f"{spec.name} is not submitted: no terminal can confirm it; --yes submits without")
    print("Submit? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadRequestError(f"{spec.name} is not submitted")


def formatted(manifests: Sequence[JsonObject]) -> str:
    """Returns manifests as YAML documents, which `kubectl apply -f -` takes; a script as it is, for `sbatch`."""
    if "script" in manifests[0]:
        return "".join(manifest["script"] for manifest in manifests)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    return yaml.dump_all(manifests, Dumper=_Dumper, explicit_start=len(manifests) > 1, **options)


class _Dumper(yaml.SafeDumper):
    """YAML for people, with scripts as blocks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
