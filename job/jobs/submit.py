"""`ddpm submit`: says what a job would be and what it may cost, asks, and sends it. A dry run only prints it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.exits import BadRequestError, JobError, MissingInputError
from job.jobs.backends import backend_for
from job.jobs.backends.base import JsonObject, NoCapacityError
from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.backends.machines import gpus_of
from job.jobs.building import Resources, spec_of
from job.jobs.command_line import ParsedCommand
from job.jobs.prices import dollars_per_hour, hourly_of
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget, GoogleTarget, KubernetesTarget, Target, VmTarget, chosen_target, load_targets
from job.jobs.watch import Watch
from job.runs.outlook import attempts_of, outlook_of, spans_of
from job.runs.records import read_status, run_store
from job.stop import Stop
from job.store import open_store

OUTLOOK_SECONDS = 10.0
"""For a look at the run that a job will go on with."""


@dataclass(frozen=True)
class SubmitOptions:
    """How a job is to be submitted."""

    dry_run: bool = False
    output: str = ""
    watch: bool = False
    yes: bool = False
    detach: bool = False


def submit(command: ParsedCommand, on: str, targets: Path | None, resources: Resources, options: SubmitOptions) -> None:
    """Submits `command` to the target `on`; on this machine, in the foreground, this process becomes it.

    Raises:
        BadRequestError: a request that cannot be met, or nobody to ask whether it is meant.
        BadConfigError: a setting or a targets file that is not valid.
        MissingInputError: a file is missing, or a library.
        JobError: what the engine says; see `Backend`.
    """
    if options.output and not options.dry_run:
        raise BadRequestError(f"-o {options.output} is the format of --dry-run: add that, or leave it out")
    if options.dry_run and options.watch:
        raise BadRequestError("--dry-run sends nothing that --watch could watch: leave one of them out")
    target = chosen_target(load_targets(targets), on)
    spec = spec_of(command, target, resources)
    with backend_for(target) as backend:
        manifests = backend.render(spec)
        if options.dry_run:
            print(formatted(manifests, options.output), end="")
            return
        if target.is_remote:
            lines = [*plan_lines(spec, target, is_watched=options.watch), *outlook_lines(spec, target)]
            print("\n".join(lines), flush=True)
            if not options.yes:
                _ask(spec)
        elif (folder := spec.bucket_folder) and spec.verb not in ("pack", "index") and not folder.is_dir():
            raise MissingInputError(f"bucket {spec.bucket} is not there: check the path, or pack a dataset first")
        if options.watch:
            Watch(backend, spec, Stop().install().sleep).run()
        elif target.is_remote or options.detach:
            try:
                backend.submit_where_possible(spec)
            except NoCapacityError as error:
                raise NoCapacityError(f"{error}; --watch tries until there is one") from None
            job = f"{spec.name} --on {target.name}"
            print(f"{spec.name} is submitted: `ddpm jobs logs {job} -f` follows it, `ddpm jobs cancel {job}` stops it")
        else:
            backend.become(spec)


def plan_lines(spec: JobSpec, target: Target, *, is_watched: bool = False) -> list[str]:
    """What a person should know before anything is sent: what, where, for how long at most, and for how much."""
    machine = target.machine_type if isinstance(target, GoogleTarget) else "node"
    gpus = f"{spec.gpus} × {spec.gpu_type or 'GPU'} each" if spec.gpus else "no GPU"
    if not spec.gpus and (found := gpus_of(machine)):
        gpus = f"no GPU used: {found[0]} × {found[1]} idle, but paid for"
    kind = "spot, which may be taken away: nothing is lost" if spec.spot else "on demand"
    if isinstance(target, KubernetesTarget) and not target.selects_as_gke:
        kind = "spot or on demand, as the target's nodes are"
    place = [f"{key} {getattr(target, key)}" for key in ("context", "project", "namespace") if getattr(target, key, "")]
    place += [", then ".join(getattr(target, key)) for key in ("zones", "regions") if hasattr(target, key)]
    return [
        f"job       {spec.name}, on {target.name} ({', '.join((target.backend, *place))})",
        f"command   ddpm {shlex.join(spec.argv)}",
        f"image     {spec.image}",
        f"machines  {spec.machines} × {machine}, {gpus}; {kind}",
        f"bucket    {spec.bucket}",
        f"limit     {limit_of(spec, target, is_watched=is_watched)[1]}; what is saved stays (--max-hours)",
        f"cost      {cost_of(spec, target)}",
    ]


def outlook_lines(spec: JobSpec, target: Target) -> list[str]:
    """When a run that is there will end on these machines, and for how much, at the speed that it had last."""
    if spec.verb != "train":
        return []
    try:
        run = run_store(open_store(spec.bucket).within(OUTLOOK_SECONDS), spec.run)
        status = read_status(run)
        outlook = outlook_of(spans_of(attempts_of(run), status), status, dollars_per_hour(spec, target))
    except JobError:
        # Who may submit jobs need not be able to see their bucket.
        return []
    return [f"{what:<10} {said}" for what, said in outlook.words.items()]


def limit_of(spec: JobSpec, target: Target, *, is_watched: bool = False) -> tuple[int | None, str]:
    """What `max_hours` of `spec` mean on `target`: how often they may pass, and the same for a person.

    Nothing bounds that where it is None. With `is_watched` all that `--watch` submits counts together.
    """
    attempts: int | None = 1
    if isinstance(target, BatchTarget):
        attempts = 1 + MAX_RETRIES
        how = f"for each attempt of a task, of which there may be {attempts}, then Batch ends it"
    elif isinstance(target, KubernetesTarget):
        how = "for all attempts together, waiting for nodes and pauses included, then Kubernetes ends it"
        if target.queue:
            how = "for all attempts together, waiting for nodes and pauses included, then its queue stops it for good"
        elif spec.nodes > 1:
            attempts = None
            how = "from each start of the group, waiting for nodes and pauses included, then Kubernetes ends it; "
            how += "preemptions start it without bound"
    else:
        how = "for all attempts together, then the engine ends it"
    again = "; what --watch submits again has what is left of them" if is_watched else ""
    return attempts, f"{spec.max_hours:g} hours {how}{again}"


def cost_of(spec: JobSpec, target: Target) -> str:
    """The most that `spec` can cost on `target`, with where that figure comes from: a target's own price wins."""
    hourly = hourly_of(spec, target)
    if hourly is None:
        return "price unknown: set the target's `price_per_hour`"
    about = f"; {hourly.about}"
    if spec.spot and target.price_per_hour is None:
        about = f"; spot costs less; {hourly.about}"
    attempts = limit_of(spec, target)[0]
    words = f"{spec.machines} × ${hourly.dollars:.4g} per hour"
    if attempts is None:
        return f"{words}, for as long as it runs: nothing bounds that{about}"
    words += f" × {attempts} attempts" * (attempts > 1)
    # A VM's own limit counts from its first minute to its last.
    margin = "" if isinstance(target, VmTarget) else "; machines that start or go cost some minutes more"
    dollars = spec.machines * hourly.dollars * attempts * spec.max_hours
    figure = f"${dollars:,.2f} ({words} × {spec.max_hours:g} hours{about}{margin})"
    if hourly.unknown:
        return f"from {figure}; nothing is known of prices in {', '.join(hourly.unknown)}"
    return f"at most {figure}"


def _ask(spec: JobSpec) -> None:
    # A process whose input was closed has none at all.
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequestError(f"{spec.name} is not submitted: there is no terminal to ask on; --yes submits without")
    print("Submit? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadRequestError(f"{spec.name} is not submitted")


def formatted(manifests: Sequence[JsonObject], output: str = "") -> str:
    """Manifests as text: a stream of YAML documents, or of JSON objects, as `kubectl apply -f -` takes both.

    Raises:
        BadRequestError: `output` is neither `yaml`, `json` nor empty.
    """
    if output not in ("", "yaml", "json"):
        raise BadRequestError(f"-o {output}: use yaml or json")
    if output == "json":
        return "".join(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n" for manifest in manifests)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    return yaml.dump_all(manifests, Dumper=_Dumper, explicit_start=len(manifests) > 1, **options)


class _Dumper(yaml.SafeDumper):
    """YAML for people: scripts as blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
