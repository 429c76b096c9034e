"""Where a configuration's values come from: presets, a person's YAML file, and `--set key=value`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import Field

from job.config import RunConfig, Section, flatten, validated
from job.exits import BadConfigError, BadRequestError, MissingInputError


class PackConfig(Section):
    """A preset's `pack` section: what its dataset looks like when packed under the preset's name."""

    size: int = Field(ge=1)
    crop: str = "center"
    resize_filter: str = "lanczos"
    licence: str = ""
    fetch: str = Field(default="", description="where a person gets the images")


EMBEDDED = "landscape-sample"
"""The dataset that comes with the program, and the preset that others begin with."""

CHOSEN_ELSEWHERE = {
    "preset": "--preset NAME",
    "data.dataset": "--dataset NAME",
    "data.dataset_id": "--dataset NAME: the id is the dataset's own",
}
"""Keys that a person does not set, and the option that does."""


def presets() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir())


class _PlainLoader(yaml.SafeLoader):
    """YAML with each key once and without aliases: they can make a small file refer to itself, or be gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # The last one would win without a word.
            ((twice, _),) = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"{twice!r} is there twice, below line {node.start_mark.line + 1}")
        return mapping


def parse_yaml(text: str | bytes | TextIO) -> Any:
    """Plain data from YAML; a file is read no further than it makes sense.

    Raises:
        yaml.YAMLError: not YAML, or with aliases, or a key that is there twice, or nested too deeply.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 -- a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # What a tag or the look of a value promised: 2020-99-99, !!int x, a number of thousands of digits.
        raise yaml.YAMLError(f"not the value it seems to be: {error}") from None


def _load_yaml(text: str | TextIO, where: str) -> dict[str, Any]:
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict | None):
        raise BadConfigError(f"{where} must be a mapping of sections such as `train:`")
    return document or {}


def _preset(name: str) -> dict[str, Any]:
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadRequestError(f"there is no preset {name!r}{hint} (there are: {', '.join(presets())})")
    return _load_yaml((resources.files("job") / "presets" / f"{name}.yaml").read_text(), f"preset {name}")


def pack_config(name: str) -> PackConfig | None:
    """How the dataset `name` is packed, if a preset of that name says so."""
    return PackConfig.model_validate(_preset(name)["pack"]) if name in presets() else None


def _only_known(flat: dict[str, Any], where: str) -> dict[str, Any]:
    keys = list(RunConfig().flat())
    for key in flat:
        if key not in keys:
            leaf = key.rsplit(".", 1)[-1]
            close = [k for k in keys if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f" (sections: {', '.join(RunConfig.model_fields)})"
            raise BadConfigError(f"{where}: unknown key {key!r}{hint}")
        if key in CHOSEN_ELSEWHERE:
            raise BadConfigError(f"{where}: {key} is chosen with {CHOSEN_ELSEWHERE[key]}")
    return flat


def parse_sets(assignments: Iterable[str]) -> dict[str, Any]:
    """`["train.batch_size=64"]` → `{"train.batch_size": 64}`; values are read as YAML.

    Raises:
        BadConfigError: no `=`, an unknown key, or a value that is not YAML.
    """
    flat: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise BadConfigError(f"--set {assignment!r}: write it as key=value, for example train.batch_size=64")
        try:
            flat[key.strip()] = parse_yaml(text)
        except yaml.YAMLError:
            raise BadConfigError(f"--set {assignment!r}: the value is not valid YAML") from None
    return _only_known(flat, "--set")


def read_config_file(path: Path | None) -> dict[str, Any]:
    """Dotted keys of a user's YAML file; empty without one.

    Raises:
        MissingInputError: no such file.
        BadConfigError: not YAML, or unknown keys.
    """
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            values = _load_yaml(file, str(path))
    except OSError as error:
        raise MissingInputError(f"--config {path}: {error.strerror}") from None
    return _only_known(flatten(values), str(path))


def draft(preset: str, changes: dict[str, Any]) -> RunConfig:
    """The preset with the user's changes, before the dataset is known; finds all errors that need no bucket."""
    base = flatten({key: value for key, value in _preset(preset).items() if key != "pack"})
    return validated({**base, "preset": preset, **changes})
