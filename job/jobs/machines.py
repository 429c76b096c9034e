"""The GPUs, processors, memory and prices of Compute Engine's machine types, by which a wrong pair is refused at once.

The table holds the accelerator-optimised families (docs.cloud.google.com/compute/docs/accelerator-optimized-machines,
as of 2026-04-13). N1 is the one family that takes GPUs as an extra; all others have none.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from job.config import parse_yaml
from job.exits import BadRequestError


@dataclass(frozen=True)
class _Family:
    """Machine types that differ in the number at their end: that of processors, or, in `8g`, of GPUs."""

    cpus: float = 1
    """For each of that number, like `gigabytes`."""
    gigabytes: float = 4
    gpu_type: str = ""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """Their number, by the end of the name."""


_EACH = {"1g": 1, "2g": 2, "4g": 4, "8g": 8}
_EIGHT = {"8g": 8}
_FAMILIES = {
    "g2-standard": _Family(1, 4, "nvidia-l4", {"4": 1, "8": 1, "12": 1, "16": 1, "24": 2, "32": 1, "48": 4, "96": 8}),
    "g4-standard": _Family(1, 3.75, "nvidia-rtx-pro-6000", {"48": 1, "96": 2, "192": 4, "384": 8}),
    "a2-highgpu": _Family(12, 85, "nvidia-tesla-a100", _EACH),
    "a2-megagpu": _Family(6, 85, "nvidia-tesla-a100", {"16g": 16}),
    "a2-ultragpu": _Family(12, 170, "nvidia-a100-80gb", _EACH),
    "a3-highgpu": _Family(26, 234, "nvidia-h100-80gb", _EACH),
    "a3-edgegpu": _Family(26, 234, "nvidia-h100-80gb", _EIGHT),
    "a3-megagpu": _Family(26, 234, "nvidia-h100-mega-80gb", _EIGHT),
    "a3-ultragpu": _Family(28, 369, "nvidia-h200-141gb", _EIGHT),
    "a4-highgpu": _Family(28, 496, "nvidia-b200", _EIGHT),
    "n1-standard": _Family(1, 3.75),
    "n1-highmem": _Family(1, 6.5),
}
_OTHER_FAMILIES = {"standard": _Family(1, 4), "highmem": _Family(1, 8)}
"""By the last part of the family's name."""
_EXTRA: dict[str, tuple[int, ...]] = {
    "nvidia-tesla-t4": (1, 2, 4),
    "nvidia-tesla-p4": (1, 2, 4),
    "nvidia-tesla-p100": (1, 2, 4),
    "nvidia-tesla-v100": (1, 2, 4, 8),
}
"""The GPUs that N1 takes, and in which numbers."""
_GPU_TYPES = sorted({*(family.gpu_type for family in _FAMILIES.values() if family.gpu_type), *_EXTRA})
GKE_GPU_TYPES = tuple(sorted([*_GPU_TYPES, "nvidia-gb200", "nvidia-gb300"]))
"""Values of the label `cloud.google.com/gke-accelerator`."""
_HYPERDISK_ONLY = re.compile(r"(g4|a3-ultragpu|a4x?|[cn]4[ad]?|h4d)-")


@dataclass(frozen=True)
class Machine:
    """A machine type with the GPUs that a job uses.

    Attributes:
        machine_type: as Compute Engine names it.
        gpu_type: of the job; empty for none.
        gpus: their number.
        extra: whether the request must name them, because the machine type has none of its own.
    """

    machine_type: str
    gpu_type: str = ""
    gpus: int = 0
    extra: bool = False

    @property
    def disk_type(self) -> str:
        """Returns the boot disk that the family takes; the newest families refuse all but Hyperdisk."""
        return "hyperdisk-balanced" if _HYPERDISK_ONLY.match(self.machine_type) else "pd-balanced"

    @property
    def shape(self) -> tuple[int, int] | None:
        """Returns processors, and MiB of memory without the system's own; None for an unknown machine type."""
        family, end = _family_and_end(self.machine_type)
        number = end.removesuffix("g")
        if family is None or not number.isdecimal():
            return None
        return int(family.cpus * int(number)), int(family.gigabytes * int(number) * 1024 * 0.85)


def _family_and_end(machine_type: str) -> tuple[_Family | None, str]:
    name, _, end = machine_type.rpartition("-")
    return _FAMILIES.get(name) or _OTHER_FAMILIES.get(name.rpartition("-")[2]), end


def gpus_of(machine_type: str) -> tuple[int, str] | None:
    """Returns the number and the type of the GPUs of a machine type; None if it has none of its own."""
    family, end = _family_and_end(machine_type)
    return (family.gpus[end], family.gpu_type) if family and end in family.gpus else None


def machine_for(machine_type: str, gpu_type: str, gpus: int) -> Machine:
    """Returns the machine for a job with `gpus` GPUs of `gpu_type`, or of the machine's own type if that is empty.

    A CPU job may run on a machine with GPUs, and uses none of them.

    Raises:
        BadRequestError: no such pair exists; the message names those that do.
    """
    count, bundled = gpus_of(machine_type) or (0, "")
    if gpus == 0:
        return Machine(machine_type)
    if gpus == count and gpu_type in ("", bundled):
        return Machine(machine_type, bundled, gpus)
    if machine_type.startswith("n1-") and gpus in _EXTRA.get(gpu_type, ()):
        return Machine(machine_type, gpu_type, gpus, extra=True)
    has = f"has {count} {bundled}" if count else "has no GPUs of its own"
    wrong, types = f"{machine_type} {has}, not {gpus} {gpu_type or bundled}".strip(), "|".join(_GPU_TYPES)
    raise BadRequestError(f"{wrong}: use another machine_type, or --gpu-type {types}")


class Hourly(NamedTuple):
    """The price of one machine of a job for an hour.

    Attributes:
        dollars: the figure.
        about: its source, and what it includes.
    """

    dollars: float
    about: str


@cache
def load_prices() -> dict[str, Any]:
    """Returns the table: `source`, `date`, and the dollars of `machines` on demand, by machine type and region."""
    return parse_yaml((importlib.resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8"))


def listed_price(machine_type: str, regions: Sequence[str], share: float = 1.0, part: str = "") -> Hourly | None:
    """Returns the price of a machine in the dearest of these regions; None if the table lacks one.

    Args:
        machine_type: as Compute Engine names it.
        regions: at least one.
        share: of the machine.
        part: what that is, such as `1 of the 2 GPUs of `.
    """
    table = load_prices()
    dollars = table["machines"].get(machine_type, {})
    if not {*regions} <= dollars.keys():
        return None
    dearest = max(regions, key=dollars.__getitem__)
    about = f"on demand for {part}{machine_type} in {dearest}, without disk, address and traffic"
    return Hourly(dollars[dearest] * share, f"{about}; {table['source']}, {table['date']}")
