"""Groups of settings, and lists that `--set` may write as text."""

from __future__ import annotations

from typing import Any, Self, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST_SIZE = 4096
"""Limit of the height and width of images, in pixels."""


class Section(BaseModel):
    """A group of values; refuses unknown keys and infinite numbers, and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(Section):
    """A section of a configuration; its lists may be text such as `1,2,2`, or a single number."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: split(value) if cls._takes_list(key) else value for key, value in values.items()}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        # A section inherits `check` from the catalogue, or defines it.
        if check := getattr(self, "check", None):
            check()
        return self

    @classmethod
    def _takes_list(cls, key: str) -> bool:
        return key in cls.model_fields and get_origin(cls.model_fields[key].annotation) is tuple


def split(value: Any) -> Any:
    """Returns a list for text such as `1,2,2`, and for a single number."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return [value] if isinstance(value, int | float) else value


def average_name(std: float) -> str:
    """Returns the name of the power-function average with this standard deviation."""
    return f"ema-{std:g}"
