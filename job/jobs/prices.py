"""What a job costs by the hour, and at most: the target's own price, or that of its machines, disks and addresses."""

from __future__ import annotations

import datetime
import importlib.resources
from dataclasses import dataclass
from functools import cache

from job.config import parse_yaml
from job.jobs.backends.machines import gpus_of, machine_for
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, KubernetesTarget, Target

HOURS_OF_MONTH = 730
"""By which Google's prices for a month are those of an hour."""


@dataclass(frozen=True)
class Prices:
    """The table that comes with the program, in dollars; who says so, and of which day that is."""

    source: str
    date: datetime.date
    machines: dict[str, dict[str, float]]
    """On demand, for an hour, by machine type and region."""
    disks: dict[str, dict[str, float]]
    """For a gigabyte and month, by type and region."""
    address: float
    """For an hour."""


@cache
def load_prices() -> Prices:
    """The table."""
    text = (importlib.resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8")
    return Prices(**parse_yaml(text))


@dataclass(frozen=True)
class Hourly:
    """What one machine of a job costs for an hour."""

    dollars: float
    about: str
    """Whose figure it is, and what is in it."""
    unknown: tuple[str, ...] = ()
    """Regions where the job may run and the price is not known: it may cost more there."""


def hourly_of(spec: JobSpec, target: Target) -> Hourly | None:
    """The price of one machine, in the dearest of the regions that the job may run in; None where nobody knows it."""
    if target.price_per_hour is not None:
        return Hourly(target.price_per_hour, "as the target says")
    prices = load_prices()
    if isinstance(target, KubernetesTarget):
        return _share_of_node(spec, target, prices)
    if not isinstance(target, GoogleTarget):
        return None
    of_machine = prices.machines.get(target.machine_type, {})
    known = [region for region in target.all_regions if region in of_machine]
    if not known:
        return None
    disk = prices.disks.get(machine_for(target.machine_type, "", 0).disk_type, {})
    gigabytes, address = target.boot_disk_gigabytes, 0.0 if target.network else prices.address

    def dollars(region: str) -> float:
        return of_machine[region] + gigabytes * disk.get(region, 0.0) / HOURS_OF_MONTH + address

    dearest = max(known, key=dollars)
    parts = [f"a disk of {gigabytes} GB" * (dearest in disk), "an address" * bool(address)]
    beside = "".join(f" and {part}" for part in parts if part)
    without = "disk and traffic" if dearest not in disk else "traffic"
    said = f"on demand with {target.machine_type}{beside} in {dearest}, without {without}"
    unknown = tuple(region for region in target.all_regions if region not in of_machine)
    return Hourly(dollars(dearest), f"{said}; {prices.source}, {prices.date}", unknown)


def _share_of_node(spec: JobSpec, target: KubernetesTarget, prices: Prices) -> Hourly | None:
    """Of a node with GPUs a job pays for those that it uses; nodes without are of whatever type the cluster has."""
    dollars = prices.machines.get(target.machine_type, {}).get(target.region)
    found = gpus_of(target.machine_type)
    if dollars is None or found is None or not spec.gpus:
        return None
    share = min(1.0, spec.gpus / found[0])
    whose = f"{spec.gpus} of the {found[0]} GPUs of " if share < 1 else ""
    said = f"on demand for {whose}{target.machine_type} in {target.region}, without disk, cluster and traffic"
    return Hourly(dollars * share, f"{said}; {prices.source}, {prices.date}")


def dollars_per_hour(spec: JobSpec, target: Target) -> float | None:
    """Of all machines of a job together, at most; None where nobody knows that."""
    hourly = hourly_of(spec, target)
    return spec.machines * hourly.dollars if hourly and not hourly.unknown else None
