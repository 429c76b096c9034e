"""Groups of settings, and lists that `--set` may write as text."""

from __future__ import annotations

from typing import Annotated, Any, Self, get_origin

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from ddpm.image_size import ImageSize

LARGEST_SIZE = 4096
"""Limit of the height and width of images, in pixels."""


def image_size(stated: object) -> ImageSize:
    """Returns the size that a value or a text states.

    Raises:
        ValueError: it states none, or one beyond `LARGEST_SIZE`.
    """
    size = ImageSize.of(stated)
    if not all(1 <= side <= LARGEST_SIZE for side in size.shape):
        raise ValueError(f"sides have 1 to {LARGEST_SIZE:,} pixels")
    return size


Size = Annotated[
    ImageSize,
    PlainValidator(image_size),
    PlainSerializer(lambda size: size.stated),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": LARGEST_SIZE}, {"type": "string"}]}),
]
"""A size in a configuration or a record, which has `ImageSize.stated`."""


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
