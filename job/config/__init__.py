"""The configuration of a run, and which value wins: preset ← dataset ← `--config FILE` ← `--set key=value`.

It is resolved once, when a run begins, and then stored with the run, from which every later attempt starts. `schema`
lists the settings, and has the rules across its sections. `job.verbs.settings` shows the settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic.fields import FieldInfo

from ddpm.catalogue import OneOf
from ddpm.image_size import ImageSize
from job.config.schema import NETWORKS, RunConfig, Section, Size, flatten, is_free, layered, validated
from job.exits import BadConfigError, BadRequestError, MissingInputError, did_you_mean

EMBEDDED = "landscape-sample"
"""The dataset that comes with the program."""
LARGEST_FILE_BYTES = 1 << 18
"""Limit of a file with settings or targets."""
FOLLOWS = ("data.size", "data.channels", "model.num_classes")
"""Keys that the dataset sets if the user does not."""


@cache
def settings() -> dict[str, FieldInfo]:
    """Returns the field of each dotted key; of a key of several kinds of networks, that of the first kind."""
    found: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        for section in NETWORKS.values() if name == "model" else [field.annotation]:
            for leaf, each in getattr(section, "model_fields", {"": field}).items():
                found.setdefault(f"{name}.{leaf}".rstrip("."), each)
    kinds: Any = Annotated[OneOf[str, NETWORKS], "kind of network"]
    return found | {"model.kind": FieldInfo.from_annotated_attribute(kinds, found["model.kind"].default)}


CHOSEN_ELSEWHERE = {
    "preset": "--preset NAME",
    "imported": "ddpm import",
    "data.dataset": "--dataset NAME",
    "data.dataset_id": "--dataset NAME",
    "data.latents": "--dataset NAME",
    "data.bits": "--dataset NAME",
    "data.classes": "ddpm import",
    "data.order": "the program",
    "condition.channels": "--dataset NAME, or condition.derive",
    "condition.vector": "--dataset NAME",
    **dict.fromkeys(
        ("network", "model.file", "model.network", "model.sha256", "model.inputs"), "--network FILE.py:CLASS"
    ),
    **{key: "ddpm sample --autoguidance [RUN@]EPOCH" for key in settings() if "autoguidance" in key},
    "sample.autoguidance_weights": "ddpm sample --autoguidance-weights NAME",
    **{key: "--from RUN[@EPOCH] and --weights" for key in settings() if key.startswith("parent.")},
}
"""Keys that neither `--set` nor a file may set, and the option that sets them instead."""


def parse_yaml(text: str | bytes) -> Any:
    """Returns the plain data of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, is nested too deeply, or has an alias.
    """
    try:
        # By aliases a small file would contain itself, or expand to gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)):
            raise yaml.YAMLError("aliases are not supported")
        # The loader in Python takes 10 ms for a run's configuration, and a bucket has hundreds.
        document = yaml.load(text, yaml.CSafeLoader)
        # An integer of thousands of digits would be an error of each message about it.
        repr(document)
        return document
    except (RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The value contradicts its tag or form: 2020-99-99, !!int x, a number of thousands of digits.
        raise yaml.YAMLError(f"invalid value: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_mapping(text: str, where: str, of: str = "sections such as `train:`") -> dict[str, Any]:
    """Returns a YAML text that is empty or a mapping `of` something; an error begins with `where` it comes from.

    Raises:
        BadConfigError: it is something else, or not valid YAML.
    """
    document = _parsed(text, where)
    if not isinstance(document, dict | None):
        raise BadConfigError(f"{where} must be a mapping of {of}")
    return document or {}


def read_settings(path: Path) -> str:
    """Returns the text of a file that a person writes, such as `targets.yaml`; the path may begin with `~`.

    Raises:
        OSError: the file cannot be read.
        BadConfigError: it is too large; /dev/zero never ends.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 -- a user may have no home
    with path.open("rb") as file:
        text = file.read(LARGEST_FILE_BYTES + 1)
    if len(text) > LARGEST_FILE_BYTES:
        raise BadConfigError(f"{path} is larger than {LARGEST_FILE_BYTES >> 10} KiB: is it the right file?")
    # The parser reports bytes that are not text.
    return text.decode(errors="surrogateescape")


class PackConfig(Section):
    """The section `pack` of a preset: how to pack the dataset that has the preset's name."""

    size: Size
    crop: str = "center"
    resize_filter: str = "lanczos"
    licence: str = ""
    fetch: str = ""
    """Where to get the images."""


def preset_names() -> list[str]:
    """Returns the names of all presets."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir())


def pack_config(name: str) -> PackConfig | None:
    """Returns how the preset `name` packs its dataset; None without a preset of this name."""
    return PackConfig.model_validate(read_preset(name)["pack"]) if name in preset_names() else None


def read_preset(name: str) -> dict[str, Any]:
    """Returns the sections of a preset.

    Raises:
        BadRequestError: there is none of this name.
    """
    if name not in (names := preset_names()):
        raise BadRequestError(f"there is no preset {name!r}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    return parse_mapping((resources.files("job") / "presets" / f"{name}.yaml").read_text(), f"preset {name}")


def description_of(key: str) -> str:
    """Returns the description of a dotted key."""
    if key.startswith("network."):
        return "setting of the run's own network"
    return next(part for part in settings()[key].metadata if isinstance(part, str))


def known_keys() -> list[str]:
    """Returns the dotted keys that a person can set, including those of every kind of network."""
    return [key for key in settings() if key != "data.order"]


def _only_known(flat: dict[str, Any], where: str) -> dict[str, Any]:
    keys = known_keys()
    for key in flat:
        if key.startswith("network."):
            continue
        if key in CHOSEN_ELSEWHERE:
            raise BadConfigError(f"{where}: {key} is set by {CHOSEN_ELSEWHERE[key]}")
        if key not in keys:
            sections = ", ".join(name for name in RunConfig.model_fields if name not in CHOSEN_ELSEWHERE)
            same = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = f"; did you mean {same[0]!r}?" if same else did_you_mean(key, keys) or f" (sections: {sections})"
            raise BadConfigError(f"{where}: unknown key {key!r:.200}{hint}")
    return flat


def parse_sets(assignments: Iterable[str]) -> dict[str, Any]:
    """Returns `{"train.batch_size": 64}` for `["train.batch_size=64"]`; values are YAML.

    Raises:
        BadConfigError: no `=`, an unknown key, or a value that is not YAML.
    """
    flat: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise BadConfigError(f"--set {assignment!r:.200}: write it as key=value, for example train.batch_size=64")
        flat[key.strip()] = _parsed(text, f"--set {assignment!r:.200}")
    return _only_known(flat, "--set")


def read_config_file(path: Path | None) -> dict[str, Any]:
    """Returns the dotted keys of a user's YAML file; none without a file.

    Raises:
        MissingInputError: the file cannot be read.
        BadConfigError: it is not YAML, or has unknown keys.
    """
    if path is None:
        return {}
    try:
        values = parse_mapping(read_settings(path), str(path))
    except OSError as error:
        raise MissingInputError(f"--config {path}: {error.strerror}") from None
    return _only_known(flatten(values), str(path))


def draft(preset: str, changes: dict[str, Any], of_start: dict[str, Any] | None = None) -> RunConfig:
    """Returns the preset with the settings of a `Start` and the user's changes, before the dataset is known.

    Raises:
        BadRequestError, BadConfigError: all errors that need no bucket.
    """
    settings_of_preset = flatten({key: value for key, value in read_preset(preset).items() if key != "pack"})
    return validated(layered(settings_of_preset | {"preset": preset} | (of_start or {}), changes))


@dataclass(frozen=True)
class Start:
    """A row of `starts.yaml`: how a run begins whose command and dataset name no preset."""

    preset: str
    set: dict[str, Any]
    """Settings that differ from the preset, by key."""
    gpu_gib: float = 0.0
    pixels: int = 0
    images: float = math.inf

    @classmethod
    def of(cls, gpu_gib: float, size: ImageSize | None = None, images: int = 0) -> Start:
        """Returns the first row that fits a machine and a dataset.

        Args:
            gpu_gib: memory of the machine's smallest GPU in GiB; 0 without a GPU.
            size: that of the images; None for that which the embedded images have.
            images: their number.
        """
        pixels = max((size or ImageSize.of(32)).shape)
        rows = [cls(**row) for row in parse_yaml((resources.files("job.config") / "starts.yaml").read_text())]
        return next(r for r in rows if gpu_gib >= r.gpu_gib and pixels >= r.pixels and images <= r.images)

    @property
    def words(self) -> str:
        """The row, as a person would type it."""
        return " ".join([f"--preset {self.preset}", *(f"--set {key}={shown(each)}" for key, each in self.set.items())])


def changed_for_attempt(stored: RunConfig, wanted: RunConfig, run: str) -> dict[str, Any]:
    """Returns the keys and values that this attempt changes about its run.

    Raises:
        BadConfigError: a key that decides what is learnt differs; the message has both values and the ways out.
    """
    before = stored.flat()
    changes = {key: value for key, value in wanted.flat().items() if before.get(key) != value and key != "preset"}
    # An imported run leaves its precision to the first machine that trains it.
    is_open = stored.train.precision == "auto"
    # A network with self-conditioning learns from estimates that are clipped like its samples.
    learnt = {"sample.clip"} if stored.diffusion.self_conditioning else set()
    fixed = {
        key: f"{key}: the run has {before.get(key)}, asked for {value}"
        for key, value in changes.items()
        if key in learnt or not (is_free(key) or (key == "train.precision" and is_open))
    }
    if fixed:
        # Another network cannot take its weights.
        weights = "" if any(key.startswith("model.") for key in fixed) else f" (with these weights: --from {run})"
        # Two kinds of networks have different keys.
        others = fixed.get("model.kind") or "; ".join(fixed.values())
        raise BadConfigError(
            f"run {run!r} was started with another configuration ({others}). "
            f"Leave these out to continue it, start another run with --run NAME{weights}, or delete this one "
            f"(ddpm runs delete {run} --yes)"
        )
    return changes


def shown(value: Any) -> str:
    """Returns a value as `--set` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "[]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
