"""`ddpm submit`: shows a job and its highest cost, asks, and sends it. A dry run only prints it.

A job that is interrupted so often that it would lose almost all of its work is refused.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import yaml

from job.config import draft
from job.config.schema import CheckpointConfig
from job.exits import BadConfigError, BadRequestError, JobError, MissingInputError
from job.jobs.backends.base import JsonObject, NoCapacityError, Target
from job.jobs.backends.machines import gpus_of
from job.jobs.building import spec_of
from job.jobs.spec import JobRequest, JobSpec, SubmitRequest
from job.jobs.targets import backend_for, target_on
from job.jobs.watch import Watch
from job.progress import note
from job.requests import TrainRequest
from job.runs.outlook import (
    AttemptSpan,
    attempts_of,
    best_interval_seconds,
    duration,
    interval_seconds,
    is_saved_in,
    killed_every_seconds,
    outlook_of,
    spans_of,
)
from job.runs.records import Status, as_last_changed, load_config, read_status, run_store
from job.stop import Stop
from job.store import open_store

OUTLOOK_SECONDS = 10.0
"""The limit of a look at the run that a job will go on with."""
SPOT_HOURS = 3.0
"""Between two preemptions of a spot machine: 47 in 145 hours on AWS machines with a V100, in the first two days of four
zones of April 2023. Other machines and places differ by a factor of ten: the target's `preempted_every_hours` wins.
github.com/skypilot-org/spot-traces, of Z. Wu et al., Can't Be Late, NSDI 2024."""
GPU_HOURS = 50_000.0
"""Between two failures of one GPU: 419 interruptions of 16,384 GPUs in 54 days.
A. Dubey et al., The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4."""
START_SECONDS, SAVE_SECONDS, EPOCH_SECONDS = 60.0, 10.0, 600.0
"""The durations of a run that has not measured them: guesses, without a source."""
LEAST_CHANCE = 0.1
"""The chance of an attempt to save below which a job is refused."""


def submit_command(request: JobRequest, how: SubmitRequest) -> None:
    """Submits a command; on this machine, in the foreground, this process becomes it.

    Raises:
        BadRequestError: the request cannot be met, or no terminal can confirm it.
        BadConfigError: a setting or a targets file is not valid.
        MissingInputError: a file or a library is missing.
        JobError: the engine's answer; see `Backend`.
    """
    if how.output and not how.dry_run:
        raise BadRequestError(f"-o {how.output} is the format of --dry-run: add that, or leave it out")
    if how.dry_run and how.watch:
        raise BadRequestError("--dry-run sends nothing that --watch could watch: leave one of them out")
    target = target_on(how.on, how.targets, note)
    spec = spec_of(request, target, how)
    if how.slices and not spec.slices:
        note(f"target {target.name!r} is one machine, which makes all {how.slices} slices")
    with backend_for(target) as backend:
        manifests = backend.render(spec)
        outlook = outlook_lines(request, spec, target, reads_run=not how.dry_run) if target.is_remote else []
        if how.dry_run:
            print(formatted(manifests, how.output), end="")
            return
        folder = spec.bucket_folder
        if folder and target.has_files and spec.verb not in ("pack", "index") and not folder.is_dir():
            raise MissingInputError(f"bucket {spec.bucket} is not there: check the path, or pack a dataset first")
        if target.is_remote:
            print("\n".join([*plan_lines(spec, target, is_watched=how.watch), *outlook]), flush=True)
            if not how.yes:
                _ask(spec)
        if how.watch:
            Watch(backend, spec, Stop().install().sleep).run()
        elif target.is_remote or how.detach:
            try:
                backend.submit_where_possible(spec)
            except NoCapacityError as error:
                raise NoCapacityError(f"{error}; --watch tries until there is one") from None
            job = f"{spec.name} --on {target.name}"
            print(f"{spec.name} is submitted: `ddpm jobs logs {job} -f` follows it, `ddpm jobs cancel {job}` stops it")
        else:
            backend.become(spec)


def plan_lines(spec: JobSpec, target: Target, *, is_watched: bool = False) -> list[str]:
    """Returns the facts for a person before a job is sent: command, place, machines, limit and cost."""
    terms = target.terms(spec)
    gpus = f"{spec.gpus} × {spec.gpu_type or 'GPU'} each" if spec.gpus else "no GPU"
    if not spec.gpus and (found := gpus_of(terms.machine)):
        gpus = f"no GPU used: {found[0]} × {found[1]} idle, but paid for"
    kind = terms.kind or ("spot, which may be taken away: nothing is lost" if spec.spot else "on demand")
    again = "; what --watch submits again has what is left of them" if is_watched and not target.limits_attempts else ""
    return [
        f"job       {spec.name}, on {target.name} ({', '.join((target.backend, *terms.place))})",
        f"command   ddpm {shlex.join(spec.argv)}",
        f"image     {spec.image}",
        f"machines  {spec.machines} × {terms.machine}, {gpus}; {kind}",
        f"bucket    {spec.bucket}",
        f"limit     {spec.max_hours:g} hours {terms.limit}{again}; saved work stays (--max-hours)",
        f"cost      {cost_of(spec, target)}",
    ]


def outlook_lines(request: JobRequest, spec: JobSpec, target: Target, *, reads_run: bool = True) -> list[str]:
    """Returns the time and the cost of training to its end on these machines, of a run at its last speed.

    Args:
        request: the command that the job is.
        spec: the job.
        target: where it will run.
        reads_run: whether the settings and measurements of a run that is there count; else those of a new one.

    Raises:
        BadRequestError: the settings let the run hardly get on among interruptions.
        BadConfigError: the run that is there does not permit the changes.
    """
    if not isinstance(request, TrainRequest):
        return []
    request = request.check()
    stored, spans, status = None, list[AttemptSpan](), None
    # Credentials for jobs need not read their bucket.
    with suppress(JobError):
        if reads_run:
            run = run_store(open_store(spec.bucket).within(OUTLOOK_SECONDS), spec.run)
            if config := load_config(run):
                stored = as_last_changed(run, config)
            status = read_status(run)
            spans = spans_of(attempts_of(run), status)
    try:
        config = stored.updated(request.changes) if stored else draft(request.preset_name(), request.changes)
    except BadConfigError:
        if stored or request.from_ is None:
            raise
        # A setting may be one of the parent's network, which is not known here.
        return []
    check_interruptions(spec, target, config.checkpoint, spans, status)
    texts = outlook_of(spans, status, target.dollars_per_hour(spec)).words
    return [f"{what:<10} {text}" for what, text in texts.items()]


def check_interruptions(
    spec: JobSpec,
    target: Target,
    checkpoint: CheckpointConfig,
    spans: Sequence[AttemptSpan] = (),
    status: Status | None = None,
) -> None:
    """Raises BadRequestError if interruptions leave almost none of the job's work.

    Args:
        spec: the job.
        target: where it will run, with the rate of interruptions if its user knows it.
        checkpoint: the run's settings.
        spans: the run's attempts.
        status: of the run, with what it has measured.
    """
    start = save = stall = None
    if status is not None:
        start, save, stall = status.start_seconds, status.save_seconds, status.stall_seconds
    start_seconds, save_seconds = START_SECONDS if start is None else start, SAVE_SECONDS if save is None else save
    is_spot, told = spec.spot and target.selects_machines, target.preempted_every_hours
    hours = told or (SPOT_HOURS if is_spot else GPU_HOURS / max(1, spec.gpus))
    every = max(1.0, hours * 3600 / spec.machines)
    interval = interval_seconds(
        checkpoint.every_minutes, target.notice_seconds, (save_seconds, stall or 0.0), killed_every_seconds(list(spans))
    )
    # At its limit of hours a job saves.
    period = min(interval, checkpoint.every_epochs * EPOCH_SECONDS, spec.max_hours * 3600)
    # The first save shows whether it fits into a notice, so a job must not make it only at its end.
    is_known = save is not None or period < spec.max_hours * 3600
    has_notice = (is_spot or told is not None) and is_saved_in(target.notice_seconds, save_seconds) and is_known
    lost, works = start_seconds + save_seconds, best_interval_seconds(save_seconds, every)
    if _reaches_save(every, lost + period * (not has_notice)) >= LEAST_CHANCE:
        return
    why = f"would save every {_words(period)} (checkpoint.every_minutes, checkpoint.every_epochs)"
    do = f"add --set checkpoint.every_minutes={works / 60:.2g}"
    if _reaches_save(every, lost + works) < LEAST_CHANCE:
        took = f"{_words(start_seconds)} after its start and needs {_words(save_seconds)} for a save"
        why, do = f"begins to train {took}", "use other machines"
    raise BadRequestError(
        f"the job {why}, but is interrupted every {_words(every)}, so it would lose almost all of its work: "
        f"{do}, or tell how rare interruptions are (`preempted_every_hours` of the target)"
    )


def _reaches_save(every_seconds: float, needed_seconds: float) -> float:
    """Returns the chance of an attempt to last so long, among interruptions at random: e^(-t/M)."""
    return math.exp(-needed_seconds / every_seconds)


def _words(seconds: float) -> str:
    return duration(seconds / 3600).removesuffix(" 0 min") if seconds >= 60 else f"{seconds:.2g} s"


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
    return f"at most ${dollars:,.2f} ({words} × {spec.max_hours:g} hours{about}{terms.margin})"


def _ask(spec: JobSpec) -> None:
    # A process whose input was closed has no stdin.
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequestError(f"{spec.name} is not submitted: no terminal can confirm it; --yes submits without")
    print("Submit? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadRequestError(f"{spec.name} is not submitted")


def formatted(manifests: Sequence[JsonObject], output: str = "") -> str:
    """Returns manifests as a stream of YAML documents, or of JSON objects; `kubectl apply -f -` takes both.

    A script is printed as it is, for `sbatch`.

    Raises:
        BadRequestError: `output` is neither `yaml`, `json` nor empty.
    """
    if output not in ("", "yaml", "json"):
        raise BadRequestError(f"-o {output}: use yaml or json")
    if not output and "script" in manifests[0]:
        return "".join(manifest["script"] for manifest in manifests)
    if output == "json":
        return "".join(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n" for manifest in manifests)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    return yaml.dump_all(manifests, Dumper=_Dumper, explicit_start=len(manifests) > 1, **options)


class _Dumper(yaml.SafeDumper):
    """YAML for people, with scripts as blocks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
