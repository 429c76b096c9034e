"""`ddpm submit`: says what a job would be and what it may cost, asks, and sends it. A dry run only prints it."""

from __future__ import annotations

import datetime
import importlib.resources
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.config import parse_yaml
from job.exits import BadRequestError, MissingInputError
from job.jobs.backends import backend_for
from job.jobs.backends.base import JsonObject, NoCapacityError
from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.backends.machines import gpus_of
from job.jobs.building import Resources, spec_of
from job.jobs.command_line import ParsedCommand
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget, GoogleTarget, KubernetesTarget, Target, VmTarget, chosen_target, load_targets
from job.jobs.watch import Watch
from job.stop import Stop


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
            print("\n".join(plan_lines(spec, target, is_watched=options.watch)), flush=True)
            if not options.yes:
                _ask(spec)
        elif (folder := spec.bucket_folder) and spec.verb != "pack" and not folder.is_dir():
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


@dataclass(frozen=True)
class Price:
    """One row of the table: what one machine costs on demand by the hour, who says so, and of which day."""

    machine_type: str
    region: str
    dollars_per_hour: float
    source: str
    date: datetime.date


def load_prices() -> list[Price]:
    """The table that comes with the program."""
    text = (importlib.resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8")
    return [Price(**row) for row in parse_yaml(text)["prices"]]


def cost_of(spec: JobSpec, target: Target) -> str:
    """The most that `spec` can cost on `target`, with where that figure comes from: a target's own price wins."""
    about, source = ", as the target says,", ""
    per_hour = target.price_per_hour
    if per_hour is None:
        if not isinstance(target, GoogleTarget):
            return "price unknown"
        rows = {row.region: row for row in load_prices() if row.machine_type == target.machine_type}
        if not all(region in rows for region in target.all_regions):
            return "price unknown"
        # It may end up in any of them.
        dearest = max((rows[region] for region in target.all_regions), key=lambda row: row.dollars_per_hour)
        per_hour = dearest.dollars_per_hour
        source = f", without disk, address and traffic; {dearest.source}, {dearest.date}"
        about = " on demand, and spot costs less," if spec.spot else ""
    attempts = limit_of(spec, target)[0]
    words = f"{spec.machines} × ${per_hour:g} per hour{about}"
    if attempts is None:
        return f"{words.rstrip(',')}, for as long as it runs: nothing bounds that{source}"
    words += f" × {attempts} attempts" * (attempts > 1)
    # A VM's own limit counts from its first minute to its last.
    margin = "" if isinstance(target, VmTarget) else "; machines that start or go cost some minutes more"
    dollars = spec.machines * per_hour * attempts * spec.max_hours
    return f"at most ${dollars:,.2f} ({words} × {spec.max_hours:g} hours{source}{margin})"


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
