"""Which GPUs a machine type of Compute Engine has, so that a wrong pair is refused before anything is sent.

The table holds what the accelerator-optimised families bundle
(docs.cloud.google.com/compute/docs/accelerator-optimized-machines, as of 2026-04-13). N1 is the one family that takes
GPUs as an extra; all others have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from job.exits import BadRequestError

_BUNDLED: dict[str, tuple[str, int]] = {
    **{f"g2-standard-{cpus}": ("nvidia-l4", 1) for cpus in (4, 8, 12, 16, 32)},
    "g2-standard-24": ("nvidia-l4", 2),
    "g2-standard-48": ("nvidia-l4", 4),
    "g2-standard-96": ("nvidia-l4", 8),
    **{f"g4-standard-{48 * count}": ("nvidia-rtx-pro-6000", count) for count in (1, 2, 4, 8)},
    **{f"a2-highgpu-{count}g": ("nvidia-tesla-a100", count) for count in (1, 2, 4, 8)},
    "a2-megagpu-16g": ("nvidia-tesla-a100", 16),
    **{f"a2-ultragpu-{count}g": ("nvidia-a100-80gb", count) for count in (1, 2, 4, 8)},
    **{f"a3-highgpu-{count}g": ("nvidia-h100-80gb", count) for count in (1, 2, 4, 8)},
    "a3-edgegpu-8g": ("nvidia-h100-80gb", 8),
    "a3-megagpu-8g": ("nvidia-h100-mega-80gb", 8),
    "a3-ultragpu-8g": ("nvidia-h200-141gb", 8),
    "a4-highgpu-8g": ("nvidia-b200", 8),
}
_EXTRA: dict[str, tuple[int, ...]] = {
    "nvidia-tesla-t4": (1, 2, 4),
    "nvidia-tesla-p4": (1, 2, 4),
    "nvidia-tesla-p100": (1, 2, 4),
    "nvidia-tesla-v100": (1, 2, 4, 8),
}
"""What N1 takes, and how many of them."""
GKE_GPU_TYPES = tuple(sorted({*(name for name, _ in _BUNDLED.values()), *_EXTRA, "nvidia-gb200", "nvidia-gb300"}))
"""Values of the label `cloud.google.com/gke-accelerator`."""
_MACHINE_TYPE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+")
_SHAPES: dict[str, tuple[float, float]] = {
    "a2-highgpu": (12, 85),
    "a2-ultragpu": (12, 170),
    "a2-megagpu": (6, 85),
    "a3-highgpu": (26, 234),
    "a3-edgegpu": (26, 234),
    "a3-megagpu": (26, 234),
    "a3-ultragpu": (28, 369),
    "a4-highgpu": (28, 496),
}
"""Processors and gigabytes for each GPU, where the name counts GPUs."""
_GIGABYTES_PER_CPU = {"n1-standard": 3.75, "n1-highmem": 6.5, "g4-standard": 3.75, "standard": 4.0, "highmem": 8.0}
"""Where the name counts processors."""
_HYPERDISK_ONLY = (
    *("g4-", "a3-ultragpu-", "a4-", "a4x-"),
    *("c4-", "c4a-", "c4d-", "n4-", "n4a-", "n4d-", "h4d-"),
)
_SPOT_ONLY = ("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g")
"""Compute Engine makes these on demand for nobody."""


@dataclass(frozen=True)
class Machine:
    """A machine type with the GPUs that a job uses.

    Attributes:
        machine_type: as Compute Engine names it.
        gpu_type: what the job gets; empty for none.
        gpus: how many of them.
        extra: whether the request has to name them, because the machine type does not.
    """

    machine_type: str
    gpu_type: str = ""
    gpus: int = 0
    extra: bool = False

    @property
    def disk_type(self) -> str:
        """The boot disk that the family takes; the newest ones refuse all but Hyperdisk."""
        return "hyperdisk-balanced" if self.machine_type.startswith(_HYPERDISK_ONLY) else "pd-balanced"

    @property
    def shape(self) -> tuple[int, int] | None:
        """Processors, and MiB of memory less what the system needs; None for a machine type that is not known here."""
        stem, _, count = self.machine_type.rpartition("-")
        if match := re.fullmatch(r"(\d+)g", count):
            per_gpu = _SHAPES.get(stem)
            cpus, gigabytes = (int(match[1]) * part for part in per_gpu) if per_gpu else (0.0, 0.0)
        else:
            per_cpu = _GIGABYTES_PER_CPU.get(stem, _GIGABYTES_PER_CPU.get(stem.rpartition("-")[2]))
            cpus = float(count) if count.isdecimal() and per_cpu else 0.0
            gigabytes = cpus * (per_cpu or 0.0)
        return (int(cpus), int(gigabytes * 1024 * 0.85)) if cpus else None


def gpus_of(machine_type: str) -> tuple[int, str] | None:
    """How many GPUs every machine of the type has, and which; None if it has none of its own."""
    gpu_type, count = _BUNDLED.get(machine_type, ("", 0))
    return (count, gpu_type) if count else None


def machine_for(machine_type: str, gpu_type: str, gpus: int, spot: bool = True) -> Machine:
    """The machine for a job with `gpus` GPUs of type `gpu_type`, or of the machine's own type if that is empty.

    A CPU job may run on a machine that has GPUs; it uses none of them.

    Raises:
        BadRequestError: there is no such pair, or not on demand; the message names what there is.
    """
    if machine_type in _SPOT_ONLY and not spot:
        raise BadRequestError(
            f"{machine_type} is not to be had on demand: use --spot, or set machine_type: a3-highgpu-8g in the target"
        )
    if not _MACHINE_TYPE.fullmatch(machine_type):
        raise BadRequestError(f"machine_type {machine_type!r}: use a name such as g2-standard-8 or n1-standard-8")
    if gpus == 0:
        return Machine(machine_type)
    bundled, count = _BUNDLED.get(machine_type, ("", 0))
    if gpus == count and gpu_type in ("", bundled):
        return Machine(machine_type, bundled, gpus)
    if machine_type.startswith("n1-") and gpus in _EXTRA.get(gpu_type, ()):
        return Machine(machine_type, gpu_type, gpus, extra=True)
    has = f"has {count} {bundled}" if count else "has no GPUs of its own"
    asked = gpu_type or bundled
    raise BadRequestError(
        f"{machine_type} {has}, and the job asks for {gpus} {asked or 'of no named type'}: "
        + _way_out(machine_type, asked, gpus)
    )


def _way_out(machine_type: str, gpu_type: str, gpus: int) -> str:
    """What to write instead: the smallest machine with these GPUs, one of the same family first."""
    fitting = [name for name, pair in _BUNDLED.items() if pair == (gpu_type, gpus)]
    fitting.sort(key=lambda name: name.split("-")[0] != machine_type.split("-")[0])
    extra = _EXTRA.get(gpu_type, ())
    if gpus in extra:
        fitting.append(f"n1-standard-{8 * max(1, gpus // 2)}")
    if fitting:
        return f"set machine_type: {fitting[0]} in the target"
    if counts := sorted({*(count for name, count in _BUNDLED.values() if name == gpu_type), *extra}):
        return f"there are machines with {', '.join(map(str, counts))} {gpu_type}: choose --gpus so"
    types = sorted({name for name, _ in _BUNDLED.values()} | {*_EXTRA})
    return f"use --gpu-type {'|'.join(types)}"
