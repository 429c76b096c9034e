"""The presets that come with the program; their files are in `job/presets/`."""

from __future__ import annotations

from importlib import resources
from typing import Any

from pydantic import Field

from job.config.fields import LARGEST_SIZE, Section
from job.config.schema import flatten
from job.config.yaml_files import parse_mapping
from job.exits import BadRequestError, did_you_mean

EMBEDDED = "landscape-sample"
"""The dataset that comes with the program, and the preset that others begin with."""


class PackConfig(Section):
    """A preset's `pack` section: what its dataset looks like when packed under the preset's name."""

    size: int = Field(ge=1, le=LARGEST_SIZE)
    crop: str = "center"
    resize_filter: str = "lanczos"
    licence: str = ""
    fetch: str = Field(default="", description="where a person gets the images")


class UsualConfig(Section):
    """A preset's `usual` section: between which losses its runs are, whatever their seed."""

    dataset_id: str
    epochs: tuple[float, ...] = Field(min_length=1)
    low: tuple[float, ...]
    high: tuple[float, ...]


def preset_names() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir())


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        there = f"(there are: {', '.join(preset_names())})"
        raise BadRequestError(f"there is no preset {name!r}{did_you_mean(name, preset_names())} {there}")
    return parse_mapping((resources.files("job") / "presets" / f"{name}.yaml").read_text(), f"preset {name}")


def preset_keys(name: str) -> dict[str, Any]:
    """What a preset says, by dotted keys.

    Raises:
        BadRequestError: there is none of this name.
    """
    return flatten({key: value for key, value in _preset(name).items() if key not in ("pack", "usual")})


def pack_config(name: str) -> PackConfig | None:
    """How the dataset `name` is packed, if a preset of that name says so."""
    return PackConfig.model_validate(_preset(name)["pack"]) if name in preset_names() else None


def usual_of(name: str) -> UsualConfig | None:
    """What is usual for runs of this preset, if somebody measured it."""
    usual = _preset(name).get("usual") if name in preset_names() else None
    return UsualConfig.model_validate(usual) if usual else None
