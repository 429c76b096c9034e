"""Types of settings: numbers with limits, and lists that `--set` may write as text."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A group of settings; refuses unknown keys and infinite numbers, and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _split(value: Any) -> Any:
    """Returns a list for text such as `1,2,2`, and for a single number."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return [value] if isinstance(value, int | float) else value


def _split_in_two(value: Any) -> Any:
    parts = _split(value)
    if isinstance(parts, list) and len(parts) != 2:
        raise ValueError("give two numbers, such as 0.3,5")
    return parts


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError("give the smaller number first, such as 0.3,5")
    return interval


LARGEST = 10**9
"""Limit of every number without a narrower one: arithmetic with 1e300 overflows."""
LARGEST_SIZE = 4096
"""Limit of the height and width of images, in pixels."""
AsList = BeforeValidator(_split)
Mults = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], AsList]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=LARGEST)], ...], AsList]
Ratio = Annotated[float, Field(ge=0, le=LARGEST)]
Interval = Annotated[tuple[Ratio, Ratio], BeforeValidator(_split_in_two), AfterValidator(_ascending)]
# A power-function average with a standard deviation of 1/√12 = 0.289 would weight all steps alike.
Stds = Annotated[tuple[Annotated[float, Field(ge=0.001, le=0.28)], ...], AsList]


def average_name(std: float) -> str:
    """Returns the name of the power-function average with this standard deviation."""
    return f"ema-{std:g}"


def _weights(value: Any) -> Any:
    """Returns the one name that weights have: `ema-0.10` becomes `ema-0.1`."""
    if value in ("ema", "model"):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"ema-0\.[0-9]{1,6}", value):
        raise ValueError("input should be 'ema', 'model', or 'ema-' and a std, such as 'ema-0.05'")
    return average_name(float(value.removeprefix("ema-")))


Weights = Annotated[str, BeforeValidator(_weights)]
