"""Targets: named places where jobs run, from `targets.yaml`. `local` and `container` are always there."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from job import DEFAULT_BUCKET
from job.config import parse_mapping, read_settings
from job.exits import BadConfigError, BadRequestError, did_you_mean
from job.store import check_uri, is_remote
from job.store.files import os_errors

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

TARGETS_FILE = "targets.yaml"
TARGETS_VARIABLE = "DDPM_TARGETS"
"""Path of the file, where it is not `targets.yaml` in the working folder."""
BUILT_IN = ("local", "container")
"""Targets that are there without a file; one that defines them may only change what they say."""
_SECRET = re.compile(
    r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!IZ)|PWD|KEYS?(_|$)|SAS_|CONNECTION_STRING|FSSPEC_[A-Z0-9]+$|FSSPEC_\w*(KWARGS|HEADERS|PASS)"
)
_NO_SECRET = re.compile(r"\w+_(FILE|PATH|DIR)|GOOGLE_APPLICATION_CREDENTIALS|(OLD)?PWD")
"""Names that sound like secrets, and say where something is."""
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


def _not_secret(variable: str) -> str:
    if _SECRET.search(variable) and not _NO_SECRET.fullmatch(variable):
        raise ValueError(f"{variable} looks like a secret, which lists would show: use the job's service account")
    return variable


def _uri(text: str) -> str:
    try:
        check_uri(text)
    except BadRequestError as error:
        raise ValueError(str(error)) from None
    return text


def _size(text: str) -> str:
    size_bytes(text)
    return text


_Zone = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")]
_Region = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
_Project = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
_Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
_Queue = Annotated[str, Field(pattern=r"^([a-z0-9](-*[a-z0-9])*(\.[a-z0-9](-*[a-z0-9])*)*)?$", max_length=63)]
_Image = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,400})?$")]
_Word = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@,=-]{0,400})?$")]
"""Part of a command or of a path there: it can be neither an option nor another place."""
_Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$"), AfterValidator(_not_secret)]
_Size = Annotated[str, AfterValidator(_size)]


class Target(BaseModel):
    """What all targets have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    is_remote: ClassVar[bool] = True
    """Whether its machines see no file of this one."""
    name: str = Field("", pattern=r"^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Its key in the file."""
    backend: Literal["local", "container", "kubernetes", "vm", "batch"]
    image: _Image = ""
    """By tag, `REGISTRY/NAME:TAG`, or by digest, `REGISTRY/NAME@sha256:…`."""
    bucket: Annotated[str, AfterValidator(_uri)] = ""
    """Where datasets and runs lie, unless `--bucket` says otherwise."""
    gpus: int = Field(1, ge=0, le=64)
    """Per node, unless `--gpus` says otherwise."""
    gpu_type: _LabelValue = ""
    spot: bool = True
    max_hours: float = Field(24.0, ge=0.017, le=720)
    price_per_hour: float | None = Field(None, ge=0)
    """In dollars, of one machine with all its GPUs, as the user pays it."""
    env: dict[_Variable, str] = Field(default_factory=dict)
    """Variables of the job. Nothing secret: lists and logs show them."""

    @property
    def usual_bucket(self) -> str:
        """Where datasets and runs lie if nobody says otherwise; the target's own bucket wins over `DDPM_BUCKET`."""
        return self.bucket or os.environ.get("DDPM_BUCKET", "") or DEFAULT_BUCKET


class LocalTarget(Target):
    """Processes of this machine."""

    is_remote = False
    backend: Literal["local"] = "local"
    gpus: int = 0
    spot: bool = False


class ContainerTarget(Target):
    """A container on this machine, by podman or docker, whichever is there."""

    is_remote = False
    backend: Literal["container"] = "container"
    image: _Image = "localhost/ddpm:latest"
    engine: Literal["", "podman", "docker"] = ""
    spot: bool = False
    memory: _Word = ""
    """Limit, such as `16g`; empty is none."""
    network: _Word = ""
    """`host` for a bucket server on this machine's loopback; empty is the engine's default."""


class KubernetesTarget(Target):
    """A Kubernetes cluster, as the current kubeconfig or `context` names it."""

    backend: Literal["kubernetes"]
    context: str = ""
    namespace: _Name = "default"
    service_account: _Name = "default"
    queue: _Queue = ""
    """Kueue's local queue; empty for none."""
    cluster: Literal["gke", "plain"] = "gke"
    """`gke` selects nodes and tolerates taints as GKE labels and taints them; `plain` does neither."""
    node_selector: dict[str, _LabelValue] | None = None
    """Instead of what `cluster` and the GPU type give."""
    tolerations: list[dict[str, str | int]] | None = None
    """Instead of what `cluster` and `spot` give; the cluster refuses fields that it does not know."""
    grace_seconds: int = Field(15, ge=5, le=600)
    """From the notice to the end: 15 on GKE spot nodes unless the node pool gives more."""
    machine_type: _LabelValue = ""
    """Of the nodes with GPUs, where Compute Engine makes them: a job asks for its GPUs' share of such a node."""
    region: _LabelValue = ""
    """Of those nodes: it decides about their price alone."""
    cpus: str = Field("", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)?$")
    """Empty: its share, or 4 for each GPU where `machine_type` is not set or the GPUs are others."""
    memory: _Size = ""
    """Empty: its share, or 16Gi for each GPU."""
    scratch: _Size = "50Gi"
    """Local disk for the cache of images."""
    shared_memory: _Size = ""
    """Part of `memory`; empty: 2Gi for each GPU."""

    @property
    def selects_as_gke(self) -> bool:
        """Whether the GPU type and `spot` decide about the node; else the target's own selector does, or nothing."""
        return self.cluster == "gke" and self.node_selector is None


class GoogleTarget(Target):
    """What targets on Google Cloud have in common."""

    project: _Project
    service_account: _Word = ""
    """E-mail address of the account the job runs as."""
    network: _Word = ""
    subnetwork: _Word = ""
    machine_type: _LabelValue = "g2-standard-8"
    gpu_type: _LabelValue = "nvidia-l4"
    boot_disk_gigabytes: int = Field(100, ge=30, le=2000)

    @property
    def places(self) -> tuple[str, ...]:
        """The zones or regions where a job may run."""
        return tuple(getattr(self, "zones" if self.backend == "vm" else "regions"))

    @property
    def all_regions(self) -> tuple[str, ...]:
        """Those of the places."""
        return tuple(dict.fromkeys(re.sub(r"-[a-z]$", "", place) for place in self.places))


class VmTarget(GoogleTarget):
    """A Compute Engine VM for each job, which deletes itself."""

    backend: Literal["vm"]
    zones: tuple[_Zone, ...] = Field(min_length=1)
    """Tried in this order when one has no machine."""


class BatchTarget(GoogleTarget):
    """Google Batch."""

    backend: Literal["batch"]
    regions: tuple[_Region, ...] = Field(min_length=1)
    """Tried in this order when one has no machine."""


_CLASSES = (LocalTarget, ContainerTarget, KubernetesTarget, VmTarget, BatchTarget)
BY_BACKEND = {get_args(model.model_fields["backend"].annotation)[0]: model for model in _CLASSES}


def load_targets(path: Path | None = None) -> dict[str, Target]:
    """All targets by name: those of the file, after `local` and `container`, which are always there.

    Args:
        path: the file; None is `$DDPM_TARGETS`, else `./targets.yaml` if that is there.

    Raises:
        MissingInputError: a file that was named is not there.
        BadConfigError: it is not valid; the message names the target and the key.
    """
    targets = {name: _target(name, {}, name) for name in BUILT_IN}
    variable = os.environ.get(TARGETS_VARIABLE)
    file = path or Path(variable or TARGETS_FILE)
    option = "--targets " if path else f"{TARGETS_VARIABLE} " if variable else ""
    with os_errors(f"{option}{file}"):
        if not option and not file.exists():
            return targets
        text = read_settings(file)
    return targets | parse_targets(text, str(file))


def parse_targets(text: str, where: str) -> dict[str, Target]:
    """The targets of a file's `text`; `where` is the file.

    Raises:
        BadConfigError: naming the target and the key.
    """
    document = parse_mapping(text, where, "names to targets, such as `gke: {backend: kubernetes}`")
    return {str(name): _target(str(name), block, f"{where}: target {str(name)!r}") for name, block in document.items()}


def chosen_target(targets: dict[str, Target], name: str) -> Target:
    """The target of that name.

    Raises:
        BadRequestError: there is none; the message names those there are.
    """
    if name not in targets:
        there = f"(there are: {', '.join(targets)})"
        raise BadRequestError(f"there is no target {name!r}{did_you_mean(name, targets)} {there}")
    return targets[name]


def bucket_on(name: str, path: Path | None = None) -> str:
    """The usual bucket of a target; see `load_targets` for `path`."""
    return chosen_target(load_targets(path), name).usual_bucket


def _target(name: str, block: Any, where: str) -> Target:
    if not isinstance(block, dict):
        raise BadConfigError(f"{where} must be a mapping of keys such as `backend:`")
    backend = str(block.get("backend", name if name in BUILT_IN else ""))
    if backend not in BY_BACKEND:
        raise BadConfigError(f"{where}: `backend:` must be one of {', '.join(BY_BACKEND)} (got {backend!r})")
    if name in BUILT_IN and backend != name:
        raise BadConfigError(f"{where} is always the {name} backend: choose another name for one on {backend}")
    model = BY_BACKEND[backend]
    keys = [key for key in model.model_fields if key != "name"]
    for unknown in (str(key) for key in block if key not in keys):
        said = f"unknown key {unknown!r}{did_you_mean(unknown, keys)} ({backend} has {', '.join(keys)})"
        raise BadConfigError(f"{where}: {said}")
    for key, value in block.items():
        _check_printable(value, f"{where}: {key}")
    try:
        # Through JSON, whose arrays may be tuples where YAML's lists would not be.
        target = model.model_validate_json(json.dumps({**block, "backend": backend, "name": name}, default=str))
    except ValidationError as error:
        raise BadConfigError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from None
    if target.is_remote and target.bucket and not is_remote(target.bucket):
        raise BadConfigError(
            f"{where}: bucket: {target.bucket!r} is a folder of this machine: use gs://, s3:// or az://"
        )
    return target


def _check_printable(value: Any, where: str) -> None:
    """Returns if all text in a value can be a word, a label or a line on a terminal, and all keys are text.

    Raises:
        BadConfigError: what is not.
    """
    if isinstance(value, str) and not value.isprintable():
        raise BadConfigError(f"{where}: {value!r:.200} has characters that cannot be printed: leave them out")
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict) and not isinstance(key, str):
            raise BadConfigError(f"{where}: the key {key} is no text: put it in quotes")
        _check_printable(key, where)
        _check_printable(each, f"{where}.{key}")


def _problem(problem: ErrorDetails) -> str:
    """What pydantic says of one value, beginning with its key."""
    key, what = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r:.200})"
    return f"{key}: {what}{got}"
