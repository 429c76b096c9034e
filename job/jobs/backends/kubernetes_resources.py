"""What a pod of a job asks for: what the target says, else what belongs to so many GPUs of a node."""

from __future__ import annotations

import math

from job.exits import BadRequestError
from job.jobs.backends.kubernetes_rules import quantity
from job.jobs.backends.machines import Machine, gpus_of
from job.jobs.spec import JobSpec
from job.jobs.targets import KubernetesTarget

TMP = "8Gi"
SPARE_DISK = "2Gi"
"""For the output of the program, which counts as the container's disk, too."""
CPUS, GIBIBYTES, SHARED_GIBIBYTES = 4, 16, 2
"""For each GPU of a node whose size is not known, and for a job without any."""


def requests(spec: JobSpec, target: KubernetesTarget) -> dict[str, str]:
    """Processors, memory and disk of the container, as quantities.

    Raises:
        BadRequestError: nodes of the target's `machine_type` cannot run such a job, or `scratch` is no size.
    """
    cpus, memory = target.cpus, target.memory
    if not (cpus and memory):
        share = _share(spec, target)
        cpus, memory = cpus or share[0], memory or share[1]
    return {"cpu": cpus, "memory": memory, "ephemeral-storage": _disk(target)}


def shared_memory(spec: JobSpec, target: KubernetesTarget) -> str:
    """How large /dev/shm may become, which counts as memory."""
    return target.shared_memory or f"{SHARED_GIBIBYTES * max(spec.gpus, 1)}Gi"


def _share(spec: JobSpec, target: KubernetesTarget) -> tuple[str, str]:
    """Processors and memory."""
    if not (spec.gpus and target.machine_type and spec.gpu_type in ("", target.gpu_type)):
        count = max(spec.gpus, 1)
        return str(CPUS * count), f"{GIBIBYTES * count}Gi"
    bundled, shape = gpus_of(target.machine_type), Machine(target.machine_type).shape
    gpus = bundled[0] if bundled else max(target.gpus, 1)
    about = f"nodes of target {target.name!r} are {target.machine_type}"
    if spec.gpus > gpus:
        raise BadRequestError(
            f"--gpus {spec.gpus}: {about}, with {gpus}: ask for at most so many, or for more --nodes, or set the "
            "target's machine_type"
        )
    if shape is None or shape[0] < 2:
        raise BadRequestError(f"{about}, whose room for jobs is not known here: set cpus and memory of the target")
    # GKE and its own pods need the rest (kubernetes-engine/docs/concepts/plan-node-sizes).
    millis, gibibytes = 1000 * (shape[0] - max(1, shape[0] // 32)), shape[1] * 3 // 4 // 1024
    millis = millis * spec.gpus // gpus
    return f"{millis}m" if millis % 1000 else str(millis // 1000), f"{gibibytes * spec.gpus // gpus}Gi"


def _disk(target: KubernetesTarget) -> str:
    parts = [quantity(text) for text in (target.scratch, TMP, SPARE_DISK)]
    if None in parts:
        raise BadRequestError(f"scratch: {target.scratch!r} of target {target.name!r} is no size: use one like 50Gi")
    return f"{math.ceil(sum(part for part in parts if part is not None) / 2**30)}Gi"
