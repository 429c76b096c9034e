"""The types of fields: limits of numbers, and lists that `--set` may write as text."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def split_list(value: Any) -> Any:
    """Lets `--set model.channel_mults=1,2,2` stand for a list."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return [value] if isinstance(value, int | float) else value


def _split_in_two(value: Any) -> Any:
    parts = split_list(value)
    if isinstance(parts, list) and len(parts) != 2:
        raise ValueError("two numbers, such as 0.3,5")
    return parts


def _grows(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError("from less to more, such as 0.3,5")
    return interval


LARGEST = 10**9
"""Of a number without a limit of its own: nobody means more, and arithmetic with 1e300 overflows."""
LARGEST_SIZE = 4096
"""Of images, in pixels: height and width."""
Mults = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], BeforeValidator(split_list)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=LARGEST)], ...], BeforeValidator(split_list)]
Labels = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST)], ...], BeforeValidator(split_list)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=LARGEST)]
Interval = Annotated[tuple[Ratio, Ratio], BeforeValidator(_split_in_two), AfterValidator(_grows)]
Share = Annotated[float, Field(gt=0, le=1)]
SMALLEST_STD, LARGEST_STD = 0.001, 0.28
"""Of a power-function average: at 1/√12 all weights would count alike."""
Stds = Annotated[tuple[Annotated[float, Field(ge=SMALLEST_STD, le=LARGEST_STD)], ...], BeforeValidator(split_list)]


def average_name(std: float) -> str:
    """What the power-function average of this std is called."""
    return f"ema-{std:g}"


def _weights(value: Any) -> Any:
    """`ema-0.10` is `ema-0.1`."""
    if value in ("ema", "model"):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"ema-0\.[0-9]{1,6}", value):
        raise ValueError("input should be 'ema', 'model', or with a std of ema.stds or `ddpm ema`, such as 'ema-0.05'")
    return average_name(float(value.removeprefix("ema-")))


Weights = Annotated[str, BeforeValidator(_weights)]


class Section(BaseModel):
    """A group of keys: nothing unknown, no infinity, no number beyond reason, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
