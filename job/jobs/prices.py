"""The prices of machines, disks and addresses that come with the program."""

from __future__ import annotations

import datetime
import importlib.resources
from dataclasses import dataclass
from functools import cache

from job.config import parse_yaml

HOURS_OF_MONTH = 730
"""By which Google converts its monthly prices."""


@dataclass(frozen=True)
class Hourly:
    """The price of one machine of a job for an hour."""

    dollars: float
    about: str
    """The source of the figure, and what it includes."""
    unknown: tuple[str, ...] = ()
    """Regions where the job may run and the price is not known: it may cost more there."""


@dataclass(frozen=True)
class Prices:
    """The table, in dollars, with its source and its day."""

    source: str
    date: datetime.date
    machines: dict[str, dict[str, float]]
    """On demand, for an hour, by machine type and region."""
    disks: dict[str, dict[str, float]]
    """For a gigabyte and month, by type and region."""
    address: float
    """For an hour."""

    def hourly(self, dollars: float, what: str, unknown: tuple[str, ...] = ()) -> Hourly:
        """Returns a price of this table, with its source; `what` goes on after "on demand"."""
        return Hourly(dollars, f"on demand {what}; {self.source}, {self.date}", unknown)


@cache
def load_prices() -> Prices:
    """Returns the table."""
    text = (importlib.resources.files("job.jobs") / "prices.yaml").read_text(encoding="utf-8")
    return Prices(**parse_yaml(text))
