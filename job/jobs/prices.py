"""What a job may cost at most: from the target's own price, else from a small dated table; else nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from job.config_input import parse_yaml
from job.exits import BadDataError
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, Target

UNKNOWN = "price unknown"


class Price(BaseModel):
    """One row of the table: what one machine costs by the hour, who says so, and since when."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    machine_type: str = ""
    gpu_type: str = ""
    """Of a machine with one such GPU."""
    spot: bool
    dollars_per_hour: float = Field(ge=0)
    source: str = Field(pattern=r"^https://\S+$")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")

    @model_validator(mode="after")
    def _names_one_thing(self) -> Price:
        if bool(self.machine_type) == bool(self.gpu_type):
            raise ValueError("a row names either a machine_type or a gpu_type")
        return self


@dataclass(frozen=True)
class Estimate:
    """The most a job can cost, if that is known."""

    dollars: float | None
    """For all machines until `max_hours` are over."""
    why: str
    """Where the figure comes from, or that there is none."""

    def __str__(self) -> str:
        return UNKNOWN if self.dollars is None else f"at most ${self.dollars:,.2f} ({self.why})"


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
    machines = spec.machines
    if target.price_per_hour is not None:
        why = f"{machines} × ${target.price_per_hour:g} per hour, as the target says, × {spec.max_hours:g} hours"
        return Estimate(machines * target.price_per_hour * spec.max_hours, why)
    machine_type = target.machine_type if isinstance(target, GoogleTarget) else ""
    for row in load_prices() if prices is None else prices:
        by_machine = bool(row.machine_type) and row.machine_type == machine_type
        by_gpu = bool(row.gpu_type) and row.gpu_type == spec.gpu_type and spec.gpus == 1
        if row.spot == spec.spot and (by_machine or by_gpu):
            why = (
                f"{machines} × ${row.dollars_per_hour:g} per hour × {spec.max_hours:g} hours; {row.source}, {row.date}"
            )
            return Estimate(machines * row.dollars_per_hour * spec.max_hours, why)
    return Estimate(None, UNKNOWN)
