"""Targets: named places where jobs run, from `targets.yaml`. `local` and `container` are always there."""

from __future__ import annotations

import abc
import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from job import DEFAULT_BUCKET
from job.config_input import parse_yaml
from job.exits import BadConfigError, BadRequestError, MissingInputError, NoPermissionError
from job.jobs.spec import sounds_secret
from job.store import check_uri, is_remote

TARGETS_FILE = "targets.yaml"
VARIABLE = "DDPM_TARGETS"
"""Path of the file, where it is not `targets.yaml` in the working folder."""
BUCKET_VARIABLE = "DDPM_BUCKET"
MAX_HOURS = 24.0
BUILT_IN = ("local", "container")
"""Targets that are there without a file; one that defines them may only change what they say."""
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_SUBNETWORK = re.compile(r"(?:.+/)?regions/([^/]+)/subnetworks/[^/]+")
_TARGET_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

_Zone = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")]
_Region = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
_Project = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
_Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
_LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[kMGTPE])")


def size_bytes(text: str) -> int:
    """A size as Kubernetes writes it, such as `50Gi` or `1.5T`, in bytes.

    Raises:
        ValueError: it is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size: use one like 50Gi")
    unit = match[2]
    return math.ceil(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** ("KMGTPE".index(unit[0].upper()) + 1))


class Target(BaseModel):
    """What all targets have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = ""
    """Its key in the file."""
    backend: Literal["local", "container", "kubernetes", "vm", "batch"]
    image: str = ""
    bucket: str = ""
    """Where datasets and runs lie, unless `--bucket` says otherwise."""
    gpus: int = Field(1, ge=0, le=64)
    """Per node, unless `--gpus` says otherwise."""
    gpu_type: str = ""
    spot: bool = True
    max_hours: float = Field(MAX_HOURS, gt=0, le=720)
    price_per_hour: float | None = Field(None, ge=0)
    """In dollars, of one machine with all its GPUs, as the user pays it."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of the job. Nothing secret: lists and logs show them."""

    @property
    def is_remote(self) -> bool:
        """Whether its machines see no file of this one."""
        return self.backend not in ("local", "container")

    @field_validator("env")
    @classmethod
    def _is_no_secret(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} cannot be a variable: use capital letters, digits and '_'")
            if sounds_secret(name):
                raise ValueError(
                    f"{name} looks like a secret, which lists and logs would show: give the job's service account "
                    "access instead"
                )
        return env


class LocalTarget(Target):
    """Processes of this machine."""

    backend: Literal["local"] = "local"
    gpus: int = 0
    spot: bool = False


class ContainerTarget(Target):
    """A container on this machine, by podman or docker, whichever is there."""

    backend: Literal["container"] = "container"
    image: str = "localhost/ddpm:latest"
    engine: Literal["", "podman", "docker"] = ""
    spot: bool = False
    memory: str = ""
    """Limit, such as `16g`; empty is none."""
    network: str = ""
    """`host` for a bucket server on this machine's loopback; empty is the engine's default."""


class Toleration(BaseModel):
    """As Kubernetes has it (kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    tolerationSeconds: int | None = None  # noqa: N815 -- Kubernetes' own name


class KubernetesTarget(Target):
    """A Kubernetes cluster, as the current kubeconfig or `context` names it."""

    backend: Literal["kubernetes"]
    context: str = ""
    namespace: _Name = "default"
    service_account: _Name = "default"
    queue: _LabelValue = ""
    """Kueue's local queue; empty for none."""
    cluster: Literal["gke", "plain"] = "gke"
    """`gke` selects nodes and tolerates taints as GKE labels and taints them; `plain` does neither."""
    node_selector: dict[_LabelKey, _LabelValue] | None = None
    """Instead of what `cluster` and the GPU type give."""
    tolerations: list[Toleration] | None = None
    """Instead of what `cluster` and `spot` give."""
    grace_seconds: int = Field(15, ge=5, le=600)
    """From the notice to the end: 15 on GKE spot nodes unless the node pool gives more."""
    machine_type: str = ""
    """Of the nodes with GPUs, where Compute Engine makes them: a job asks for its GPUs' share of such a node."""
    cpus: str = Field("", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)?$")
    """Empty: its share, or 4 for each GPU where `machine_type` is not set or the GPUs are others."""
    memory: str = ""
    """Empty: its share, or 16Gi for each GPU."""
    scratch: str = "50Gi"
    """Local disk for the cache of images."""
    shared_memory: str = ""
    """Part of `memory`; empty: 2Gi for each GPU."""

    @field_validator("memory", "scratch", "shared_memory")
    @classmethod
    def _is_size(cls, text: str) -> str:
        size_bytes(text)
        return text

    @property
    def selects_as_gke(self) -> bool:
        """Whether the GPU type and `spot` decide about the node; else the target's own selector does, or nothing."""
        return self.cluster == "gke" and self.node_selector is None


class GoogleTarget(Target, abc.ABC):
    """What targets on Google Cloud have in common."""

    project: _Project
    service_account: str = ""
    """E-mail address of the account the job runs as."""
    network: str = ""
    subnetwork: str = ""
    machine_type: str = "g2-standard-8"
    gpu_type: str = "nvidia-l4"
    boot_disk_gigabytes: int = Field(100, ge=30, le=2000)

    @property
    @abc.abstractmethod
    def all_regions(self) -> tuple[str, ...]:
        """Where a job may run."""


class VmTarget(GoogleTarget):
    """A Compute Engine VM for each job, which deletes itself."""

    backend: Literal["vm"]
    zones: tuple[_Zone, ...] = Field(min_length=1)
    """Tried in this order when one has no machine."""

    @property
    def all_regions(self) -> tuple[str, ...]:
        """Those of the zones."""
        return tuple(dict.fromkeys(zone.rpartition("-")[0] for zone in self.zones))


class BatchTarget(GoogleTarget):
    """Google Batch."""

    backend: Literal["batch"]
    regions: tuple[_Region, ...] = Field(min_length=1)
    """Tried in this order when one has no machine; `region:` is one alone."""

    @property
    def all_regions(self) -> tuple[str, ...]:
        """Where a job may run."""
        return self.regions


_CLASSES: dict[str, type[Target]] = {
    "local": LocalTarget,
    "container": ContainerTarget,
    "kubernetes": KubernetesTarget,
    "vm": VmTarget,
    "batch": BatchTarget,
}


def load_targets(path: Path | None = None) -> dict[str, Target]:
    """All targets by name: those of the file, after `local` and `container`, which are always there.

    Args:
        path: the file; None is `$DDPM_TARGETS`, else `./targets.yaml` if that is there.

    Raises:
        MissingInputError: a file that was named is not there.
        NoPermissionError: it may not be read.
        BadConfigError: it is not valid; the message names the target and the key.
    """
    targets = {name: _target(name, {}, name) for name in BUILT_IN}
    named = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    try:
        text = (named or Path(TARGETS_FILE)).read_text(encoding="utf-8")
    except FileNotFoundError:
        if named is None:
            return targets
        option = "--targets" if path else VARIABLE
        raise MissingInputError(f"{option} {named} is not there: write it, or let setup.sh do so") from None
    except PermissionError:
        raise NoPermissionError(f"{named or TARGETS_FILE} may not be read: give this user access") from None
    except (OSError, UnicodeDecodeError):
        raise BadConfigError(f"{named or TARGETS_FILE} is no text file") from None
    return targets | parse_targets(text, str(named or TARGETS_FILE))


def parse_targets(text: str, where: str) -> dict[str, Target]:
    """The targets of a file's `text`; `where` is the file.

    Raises:
        BadConfigError: naming the target and the key.
    """
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise BadConfigError(f"{where} must be a mapping of names to targets, such as `gke: {{backend: kubernetes}}`")
    return {str(name): _target(str(name), block, f"{where}: target {str(name)!r}") for name, block in document.items()}


def chosen_target(targets: dict[str, Target], name: str) -> Target:
    """The target of that name.

    Raises:
        BadRequestError: there is none; the message names those there are.
    """
    if name not in targets:
        close = difflib.get_close_matches(name, targets, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadRequestError(f"there is no target {name!r}{hint} (there are: {', '.join(targets)})")
    return targets[name]


def bucket_on(name: str, path: Path | None = None) -> str:
    """The bucket of a target, else that of `DDPM_BUCKET`, else the default one.

    Raises:
        BadRequestError, BadConfigError, MissingInputError: see `load_targets` and `chosen_target`.
    """
    return default_bucket(chosen_target(load_targets(path), name))


def default_bucket(target: Target) -> str:
    """Where its datasets and runs lie if nobody says otherwise; a target's own bucket wins over `DDPM_BUCKET`."""
    return target.bucket or os.environ.get(BUCKET_VARIABLE, "") or DEFAULT_BUCKET


def _target(name: str, block: Any, where: str) -> Target:
    if not _TARGET_NAME.fullmatch(name):
        raise BadConfigError(f"{where}: use lower-case letters, digits and '-' for its name, beginning with a letter")
    if not isinstance(block, dict):
        raise BadConfigError(f"{where} must be a mapping of keys such as `backend:`")
    block = {"backend": name} | block if name in BUILT_IN else dict(block)
    backend = block.get("backend")
    if not isinstance(backend, str) or backend not in _CLASSES:
        said = f"there is no backend {backend!r}" if "backend" in block else "it names no backend"
        raise BadConfigError(f"{where}: {said} (there are: {', '.join(_CLASSES)})")
    if name in BUILT_IN and backend != name:
        raise BadConfigError(f"{where} is always the {name} backend: choose another name for one on {backend}")
    if backend == "batch" and "region" in block and "regions" not in block:
        block["regions"] = [block.pop("region")]
    model = _CLASSES[backend]
    keys = [key for key in model.model_fields if key != "name"]
    for key in block:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"{backend} knows {', '.join(keys)}"
            raise BadConfigError(f"{where}: unknown key {key!r}; {hint}")
    try:
        # Through JSON, whose arrays may be tuples where YAML's lists would not be.
        target = model.model_validate_json(json.dumps({**block, "name": name}, default=str))
    except ValidationError as error:
        raise BadConfigError(f"{where}: {_problems(error)}") from None
    return _check_places(target, where)


def _problems(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key, what = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            problems.append(f"{key} is needed")
        else:
            given = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
            problems.append(f"{key}: {what[:1].lower() + what[1:] if given else what}{given}")
    return "; ".join(problems)


def _check_places(target: Target, where: str) -> Target:
    """What a model alone cannot say."""
    if target.bucket:
        try:
            check_uri(target.bucket)
        except BadRequestError as error:
            raise BadConfigError(f"{where}: bucket: {error}") from None
        if target.is_remote and not is_remote(target.bucket):
            raise BadConfigError(
                f"{where}: bucket {target.bucket!r} is a folder of this machine, which its jobs cannot see: use "
                "gs://BUCKET or s3://BUCKET"
            )
    if isinstance(target, GoogleTarget) and (match := _SUBNETWORK.fullmatch(target.subnetwork)):
        for region in target.all_regions:
            if region != match[1]:
                raise BadConfigError(
                    f"{where}: subnetwork {target.subnetwork!r} lies in {match[1]}, and machines in {region} cannot "
                    "use it: leave that region out, or write the name alone if each region has a subnetwork called so"
                )
    if re.search(r"\s", target.image):
        raise BadConfigError(f"{where}: image {target.image!r} has a space in it: use REGISTRY/NAME:TAG or …@sha256:…")
    return target
