"""For how long a job may run, and what that may cost at most.

Engines bound hours each in their own way. Prices come from the target, or from a small dated table.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from job.config import parse_yaml
from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget, GoogleTarget, KubernetesTarget, Target, VmTarget


def limit_of(spec: JobSpec, target: Target, *, is_watched: bool = False) -> tuple[int | None, str]:
    """What `max_hours` of `spec` mean on `target`: how often they may pass, and the same for a person.

    Nothing bounds that where it is None. With `is_watched` all that `--watch` submits counts together.
    """
    attempts: int | None = 1
    if isinstance(target, BatchTarget):
        attempts = 1 + MAX_RETRIES
        how = f"for each attempt of a task, of which there may be {attempts}, then Batch ends it"
    elif isinstance(target, KubernetesTarget):
        what = "waiting for nodes included" if spec.machines > 1 else "waiting for a node included"
        how = f"for all attempts together, {what}, then Kubernetes ends it"
        if target.queue:
            how = f"for all attempts together, {what}, then its queue stops it for good"
        elif spec.nodes > 1:
            attempts = None
            how = f"from each start of the group, {what}, then Kubernetes ends it; preemptions start it without bound"
    else:
        how = "for all attempts together, then the engine ends it"
    again = "; what --watch submits again has what is left of them" if is_watched else ""
    return attempts, f"{spec.max_hours:g} hours {how}{again}"


@dataclass(frozen=True)
class Price:
    """One row of the table: what one machine costs on demand by the hour, who says so, and of which day."""

    machine_type: str
    region: str
    dollars_per_hour: float
    source: str
    date: datetime.date


def load_prices() -> list[Price]:
    """The table that comes with the program."""
    text = (resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8")
    return [Price(**row) for row in parse_yaml(text)["prices"]]


def cost_of(spec: JobSpec, target: Target, prices: Sequence[Price] | None = None) -> str:
    """The most that `spec` can cost on `target`, with where that figure comes from: a target's own price wins."""
    about, source = ", as the target says,", ""
    per_hour = target.price_per_hour
    if per_hour is None:
        if not isinstance(target, GoogleTarget):
            return "price unknown"
        table = load_prices() if prices is None else prices
        rows = {row.region: row for row in table if row.machine_type == target.machine_type}
        if not all(region in rows for region in target.all_regions):
            return "price unknown"
        # It may end up in any of them.
        dearest = max((rows[region] for region in target.all_regions), key=lambda row: row.dollars_per_hour)
        per_hour, source = dearest.dollars_per_hour, f"; {dearest.source}, {dearest.date}"
        about = " on demand, and spot costs less," if spec.spot else ""
    attempts = limit_of(spec, target)[0]
    words = f"{spec.machines} × ${per_hour:g} per hour{about}"
    if attempts is None:
        return f"{words.rstrip(',')}, for as long as it runs: nothing bounds that{source}"
    words += f" × {attempts} attempts" * (attempts > 1)
    # A VM's own limit counts from its first minute to its last.
    margin = "" if isinstance(target, VmTarget) else "; machines that start or go cost some minutes more"
    dollars = spec.machines * per_hour * attempts * spec.max_hours
    return f"at most ${dollars:,.2f} ({words} × {spec.max_hours:g} hours{source}{margin})"
