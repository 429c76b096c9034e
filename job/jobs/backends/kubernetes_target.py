"""The keys of a Kubernetes target, and what its nodes cost."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field

from job.jobs import prices
from job.jobs.backends.machines import gpus_of
from job.jobs.backends.target import LabelValue, Name, Target, Terms
from job.jobs.prices import Hourly
from job.jobs.spec import JobSpec

_SIZE = r"^([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[kMGTPE])$"
_Size = Annotated[str, Field(pattern=_SIZE)]
"""As Kubernetes writes it, such as `50Gi` or `1.5T`."""
_Queue = Annotated[str, Field(pattern=r"^([a-z0-9](-*[a-z0-9])*(\.[a-z0-9](-*[a-z0-9])*)*)?$", max_length=63)]


def size_bytes(size: str) -> int:
    """Returns a valid size in bytes."""
    number, unit = re.findall(_SIZE, size)[0]
    return math.ceil(float(number) * (1024 if unit.endswith("i") else 1000) ** ("KMGTPE".index(unit[0].upper()) + 1))


class KubernetesTarget(Target):
    """A Kubernetes cluster, as the current kubeconfig or `context` names it."""

    has_groups = True
    backend: Literal["kubernetes"]
    context: str = ""
    namespace: Name = "default"
    service_account: Name = "default"
    queue: _Queue = ""
    """Kueue's local queue; empty for none."""
    cluster: Literal["gke", "plain"] = "gke"
    """`gke` selects nodes and tolerates taints as GKE labels and taints them; `plain` does neither."""
    node_selector: dict[str, LabelValue] | None = None
    """Replaces what `cluster` and the GPU type give."""
    tolerations: list[dict[str, str | int]] | None = None
    """Replace what `cluster` and `spot` give; the cluster refuses fields that it does not know."""
    grace_seconds: int = Field(15, ge=5, le=600)
    """From the notice to the end: 15 on GKE spot nodes unless the node pool gives more."""
    machine_type: LabelValue = ""
    """The type of the nodes with GPUs, if Compute Engine makes them: a job requests its GPUs' share of such a node."""
    region: LabelValue = ""
    """The region of those nodes, which decides about their price alone."""
    cpus: str = Field("", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)?$")
    """Empty: its share, or 4 for each GPU if `machine_type` is not set or the GPUs are others."""
    memory: _Size = ""
    """Empty: its share, or 16Gi for each GPU."""
    scratch: _Size = "50Gi"
    """The local disk for the cache of images."""
    shared_memory: _Size = ""
    """Part of `memory`; empty: 2Gi for each GPU."""

    @property
    def notice_seconds(self) -> float:
        """See `Target.notice_seconds`."""
        return self.grace_seconds

    @property
    def selects_machines(self) -> bool:
        """Returns whether the GPU type and `spot` decide about the node, and not the target's own selector."""
        return self.cluster == "gke" and self.node_selector is None

    def terms(self, spec: JobSpec) -> Terms:
        """See `Target.terms`: a queue stops a group for good, while Kubernetes counts from each of its starts."""
        place = (*[f"context {self.context}"] * bool(self.context), f"namespace {self.namespace}")
        is_group = spec.nodes > 1 and not self.queue
        start = "from each start of the group" if is_group else "for all attempts together"
        end = "its queue stops it for good" if self.queue else "Kubernetes ends it"
        more = "; preemptions start it without bound" * is_group
        limit = f"{start}, waiting for nodes and pauses included, then {end}{more}"
        kind = "" if self.selects_machines else "spot or on demand, as the target's nodes are"
        return Terms("node", place, limit, None if is_group else 1, kind=kind)

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """See `Target.list_price`: a job pays for its GPUs' share of a node; the type of other nodes is unknown."""
        table, found = prices.load_prices(), gpus_of(self.machine_type)
        dollars = table.machines.get(self.machine_type, {}).get(self.region)
        if dollars is None or found is None or not spec.gpus:
            return None
        share = min(1.0, spec.gpus / found[0])
        part = f"{spec.gpus} of the {found[0]} GPUs of " if share < 1 else ""
        what = f"for {part}{self.machine_type} in {self.region}, without disk, cluster and traffic"
        return table.hourly(dollars * share, what)
