"""The presets that come with the program, from the files in `job/presets/`."""

from __future__ import annotations

from importlib import resources
from typing import Any

from pydantic import Field

from job.config.fields import Section, Size
from job.config.schema import flatten
from job.config.yaml_files import parse_mapping
from job.exits import BadRequestError, did_you_mean

EMBEDDED = "landscape-sample"
"""The dataset that comes with the program; its preset is the default for all other datasets."""


class PackConfig(Section):
    """The section `pack` of a preset: how to pack the dataset that has the preset's name."""

    size: Size
    crop: str = "center"
    resize_filter: str = "lanczos"
    licence: str = ""
    fetch: str = Field(default="", description="where to get the images")


def preset_names() -> list[str]:
    """Returns the names of all presets."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir())


def preset_keys(name: str) -> dict[str, Any]:
    """Returns the settings of a preset by their dotted keys.

    Raises:
        BadRequestError: there is no preset of this name.
    """
    return flatten({key: value for key, value in _preset(name).items() if key != "pack"})


def pack_config(name: str) -> PackConfig | None:
    """Returns how the preset `name` packs its dataset; None without a preset of this name."""
    return PackConfig.model_validate(_preset(name)["pack"]) if name in preset_names() else None


def _preset(name: str) -> dict[str, Any]:
    if name not in (names := preset_names()):
        raise BadRequestError(f"there is no preset {name!r}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    return parse_mapping((resources.files("job") / "presets" / f"{name}.yaml").read_text(), f"preset {name}")
