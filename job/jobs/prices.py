"""What a job may cost at most: from the target's own price, else from a small dated table; else nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from job.config_input import parse_yaml
from job.exits import BadDataError
from job.jobs.limits import limit_of
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, Target, VmTarget

UNKNOWN = "price unknown"


class Price(BaseModel):
    """One row of the table: what one machine costs on demand by the hour, who says so, and of which day."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    machine_type: str
    region: str
    dollars_per_hour: float = Field(ge=0)
    source: str = Field(pattern=r"^https://\S+$")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True)
class Estimate:
    """The most a job can cost, if that is known."""

    dollars: float | None
    """For all machines, as long as the engine lets them run; None where nobody knows, or nothing bounds it."""
    why: str
    """Where the figure comes from, or why there is none."""

    def __str__(self) -> str:
        return self.why if self.dollars is None else f"at most ${self.dollars:,.2f} ({self.why})"


def load_prices(text: str | None = None) -> tuple[Price, ...]:
    """The table that comes with the program, or that in `text`.

    Raises:
        BadDataError: it is not such a table.
    """
    if text is None:
        text = (resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8")
    document = parse_yaml(text)
    rows = document.get("prices") if isinstance(document, dict) else None
    for row in rows if isinstance(rows, list) else ():
        # YAML takes an unquoted day for a date.
        if isinstance(row, dict) and "date" in row:
            row["date"] = str(row["date"])
    try:
        return tuple(TypeAdapter(list[Price]).validate_python(rows))
    except ValidationError as error:
        problem = error.errors()[0]
        raise BadDataError(f"prices.yaml: row {problem['loc']}: {problem['msg']}") from None


def estimate(spec: JobSpec, target: Target, prices: Sequence[Price] | None = None) -> Estimate:
    """The most that `spec` can cost on `target`: a target's own price wins; what is not known is not guessed."""
    if target.price_per_hour is not None:
        return _bounded(spec, target, target.price_per_hour, ", as the target says,")
    if not isinstance(target, GoogleTarget):
        return Estimate(None, UNKNOWN)
    table = load_prices() if prices is None else prices
    rows = {row.region: row for row in table if row.machine_type == target.machine_type}
    if not all(region in rows for region in target.all_regions):
        return Estimate(None, UNKNOWN)
    # It may end up in any of them.
    row = max((rows[region] for region in target.all_regions), key=lambda row: row.dollars_per_hour)
    on_demand = " on demand, and spot costs less," if spec.spot else ""
    return _bounded(spec, target, row.dollars_per_hour, on_demand, f"; {row.source}, {row.date}")


def _bounded(spec: JobSpec, target: Target, per_hour: float, about: str, source: str = "") -> Estimate:
    attempts = limit_of(spec, target).attempts
    words = f"{spec.machines} × ${per_hour:g} per hour{about}"
    if attempts is None:
        return Estimate(None, f"{words.rstrip(',')}, for as long as it runs: nothing bounds that{source}")
    if attempts > 1:
        words += f" × {attempts} attempts"
    # A VM's own limit counts from its first minute to its last.
    margin = "" if isinstance(target, VmTarget) else "; machines that start or go cost some minutes more"
    hours = f"{spec.max_hours:g} hours"
    return Estimate(spec.machines * per_hour * attempts * spec.max_hours, f"{words} × {hours}{source}{margin}")
