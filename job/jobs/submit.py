"""`ddpm submit`: says what a job would be and what it may cost, asks, and sends it. A dry run only prints it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from job.exits import BadRequestError, JobError
from job.jobs.backends import backend_for, extra_named
from job.jobs.backends.base import Backend, Manifest, NoCapacityError
from job.jobs.backends.machines import gpus_of
from job.jobs.building import Wishes, hours_named, spec_of
from job.jobs.limits import limit_of
from job.jobs.prices import estimate
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, KubernetesTarget, Target, chosen_target, load_targets
from job.progress import note

if TYPE_CHECKING:
    from job.cli.words import Words
    from job.runs.records import Status

FORMATS = ("yaml", "json")


@dataclass(frozen=True)
class Manner:
    """How a job is to be submitted."""

    dry_run: bool = False
    output: str = ""
    watch: bool = False
    yes: bool = False
    detach: bool = False

    def check(self) -> Manner:
        """Returns it if its options go together.

        Raises:
            BadRequestError: they do not.
        """
        check_format(self.output)
        if self.output and not self.dry_run:
            raise BadRequestError(f"-o {self.output} is the format of --dry-run: add that, or leave it out")
        if self.dry_run and self.watch:
            raise BadRequestError("--dry-run sends nothing that --watch could watch: leave one of them out")
        return self


def submit(words: Words, on: str, targets: Path | None, wishes: Wishes, manner: Manner) -> None:
    """Submits what `words` ask for to the target `on`; on this machine, in the foreground, this process becomes it.

    Raises:
        BadRequestError: a request that cannot be met, or nobody to ask whether it is meant.
        BadConfigError: a setting or a targets file that is not valid.
        MissingInputError: a file is missing, or a library.
        JobError: what the engine says; see `Backend`.
    """
    manner.check()
    target = chosen_target(load_targets(targets), on)
    spec = spec_of(words, target, wishes)
    with extra_named(target):
        backend = backend_for(target)
        manifests = backend.render(spec)
        if manner.dry_run:
            print(formatted(manifests, manner.output), end="")
            return
        if target.is_remote:
            print("\n".join(plan_lines(spec, target, is_watched=manner.watch)), flush=True)
            if not manner.yes:
                _ask(spec)
        _send(backend, spec, manner, hours_named(target, wishes) is not None)


def plan_lines(spec: JobSpec, target: Target, *, is_watched: bool = False) -> list[str]:
    """What a person should know before anything is sent: what, where, for how long at most, and for how much."""
    machine = target.machine_type if isinstance(target, GoogleTarget) else "node"
    gpus = f"{spec.gpus} × {spec.gpu_type or 'GPU'} each" if spec.gpus else "no GPU"
    if not spec.gpus and (found := gpus_of(machine)):
        gpus = f"no GPU used: {found[0]} × {found[1]} idle, but paid for"
    kind = "spot, which may be taken away: nothing is lost" if spec.spot else "on demand"
    if isinstance(target, KubernetesTarget) and not target.selects_as_gke:
        kind = "spot or on demand, as the target's nodes are"
    return [
        f"job       {spec.name}, on {target.name} ({_where(target)})",
        f"command   ddpm {shlex.join(spec.argv)}",
        f"image     {spec.image}",
        f"machines  {spec.machines} × {machine}, {gpus}; {kind}",
        f"bucket    {spec.bucket}",
        f"limit     {limit_of(spec, target, is_watched=is_watched).text}; what is saved stays (--max-hours)",
        f"cost      {estimate(spec, target)}",
    ]


def _where(target: Target) -> str:
    """The backend and the place, in a few words."""
    words: list[str] = [target.backend]
    for key in ("context", "project", "namespace", "zones", "regions"):
        if value := getattr(target, key, ""):
            words.append(", then ".join(value) if isinstance(value, tuple) else f"{key} {value}")
    return ", ".join(words)


def _ask(spec: JobSpec) -> None:
    # A process whose input was closed has none at all.
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequestError(f"{spec.name} is not submitted: there is no terminal to ask on; --yes submits without")
    print("Submit? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadRequestError(f"{spec.name} is not submitted")


def _send(backend: Backend, spec: JobSpec, manner: Manner, hours_are_named: bool) -> None:
    if manner.watch:
        _watch(backend, spec, has_limit=backend.target.is_remote or hours_are_named)
    elif backend.target.is_remote or manner.detach:
        print(submit_somewhere(backend, spec).describe_start(spec.name))
    else:
        backend.become(spec)


def submit_somewhere(backend: Backend, spec: JobSpec) -> Backend:
    """Submits to the first place of the target that has a machine, and returns that.

    Raises:
        NoCapacityError: none has.
        JobError: see `Backend`.
    """
    here: Backend = backend
    while True:
        try:
            here.submit(spec)
            return here
        except NoCapacityError as error:
            following = here.elsewhere()
            if following is None:
                raise NoCapacityError(f"{error}; --watch tries until there is one") from None
            note(f"{error}; trying the next place")
            here = following


def _watch(backend: Backend, spec: JobSpec, *, has_limit: bool) -> None:
    from job.jobs.following import StopSignals
    from job.jobs.watch import BootClock, Watch

    before = _run_status(spec)

    def is_finished() -> bool:
        status = _run_status(spec)
        # A run that was finished before may have been given more epochs.
        return status is not None and status.state == "finished" and status != before

    Watch(backend, spec, BootClock(StopSignals().wait), note, is_finished, has_limit).run()


def _run_status(spec: JobSpec) -> Status | None:
    """What the run's folder says about a training job; None for others, and where nobody can tell."""
    from job.runs.records import read_status, run_store
    from job.store import open_store

    if spec.verb == "train":
        with suppress(JobError):
            return read_status(run_store(open_store(spec.bucket), spec.run))
    return None


def check_format(output: str) -> None:
    """Returns if there is such a format; empty is YAML.

    Raises:
        BadRequestError: there is none.
    """
    if output and output not in FORMATS:
        raise BadRequestError(f"-o {output}: use {' or '.join(FORMATS)}")


def formatted(manifests: Sequence[Manifest], output: str = "") -> str:
    """Manifests as text: a stream of YAML documents, or of JSON objects, as `kubectl apply -f -` takes both."""
    if output == "json":
        return "".join(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n" for manifest in manifests)
    return yaml.dump_all(
        manifests,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        explicit_start=len(manifests) > 1,
        width=120,
    )


class _Dumper(yaml.SafeDumper):
    """YAML for people: scripts as blocks, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
