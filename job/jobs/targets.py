"""Targets: named places where jobs run, from `targets.yaml`. `local` and `container` are always there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TARGETS_FILE = "targets.yaml"
VARIABLE = "DDPM_TARGETS"
"""Path of the file, where it is not `targets.yaml` in the working folder."""
MAX_HOURS = 24.0

_Zone = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")]
_Region = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
_Project = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
_Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Target(BaseModel):
    """What all targets have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

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


class KubernetesTarget(Target):
    """A Kubernetes cluster, as the current kubeconfig or `context` names it."""

    backend: Literal["kubernetes"]
    context: str = ""
    namespace: _Name = "default"
    service_account: _Name = "default"
    queue: str = ""
    """Kueue's local queue; empty for none."""
    cluster: Literal["gke", "plain"] = "gke"
    """`gke` selects nodes and tolerates taints as GKE labels and taints them; `plain` does neither."""
    node_selector: dict[str, str] | None = None
    """Instead of what `cluster` and the GPU type give."""
    tolerations: list[dict[str, str]] | None = None
    """Instead of what `cluster` and `spot` give."""
    grace_seconds: int = Field(15, ge=5, le=600)
    """From the notice to the end: 15 on GKE spot nodes unless the node pool gives more."""
    cpus: str = "4"
    memory: str = "16Gi"
    scratch: str = "50Gi"
    """Local disk for the cache of images."""
    shared_memory: str = "2Gi"


class GoogleTarget(Target):
    """What targets on Google Cloud have in common."""

    project: _Project
    service_account: str = ""
    """E-mail address of the account the job runs as."""
    network: str = ""
    subnetwork: str = ""
    machine_type: str = "g2-standard-8"
    gpu_type: str = "nvidia-l4"
    boot_disk_gigabytes: int = Field(100, ge=30, le=2000)


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


_CLASSES: dict[str, type[Target]] = {
    "local": LocalTarget,
    "container": ContainerTarget,
    "kubernetes": KubernetesTarget,
    "vm": VmTarget,
    "batch": BatchTarget,
}
