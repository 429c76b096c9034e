"""The whole configuration of a run, the rules across its sections, and its form as dotted keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, ValidationError

from ddpm.catalogue import GRIDS, METRICS, OF_CLASSES
from ddpm.image_size import ImageSize
from job.config.schema import (
    NETWORKS,
    CheckpointConfig,
    ConfigSection,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvaluateConfig,
    LogConfig,
    Network,
    ParentConfig,
    SampleConfig,
    TrainConfig,
    UNetSection,
)
from job.exits import BadConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class RunConfig(ConfigSection):
    """The whole configuration of a run."""

    preset: str = Field(default="", description="preset that the run began with")
    imported: bool = Field(default=False, description="the run began with an imported checkpoint")
    data: DataConfig = DataConfig()
    model: Annotated[Network, Field(discriminator="kind")] = UNetSection()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    parent: ParentConfig = ParentConfig()

    @property
    def image_size(self) -> ImageSize:
        """The size of the network's images, once the dataset is known."""
        assert self.data.size is not None
        return self.data.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's images, once the dataset is known."""
        assert self.data.channels is not None
        return self.data.channels, *self.image_size.shape

    def check(self) -> None:
        """Raises ValueError for the first broken rule."""
        self.model.check_size(self.data.size)
        for rule in RULES:
            rule(self)

    def to_yaml(self) -> str:
        """Returns the text of `config.yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Returns all values by their dotted keys, such as `train.batch_size`."""
        return flatten(self.model_dump(mode="json"))

    def updated(self, changes: dict[str, Any]) -> RunConfig:
        """Returns a copy with other values of some dotted keys; raises as `validated`."""
        return validated(layered(self.flat(), changes))


def network_takes_its_inputs(config: RunConfig) -> None:
    """The network has inputs for the noise level, augmentation labels and own estimates that training gives it."""
    model, diffusion = config.model, config.diffusion
    if model.schedule not in ("", diffusion.schedule):
        raise ValueError(f"model.kind={model.kind} needs diffusion.schedule={model.schedule}, and a prediction for it")
    if not model.takes_estimates and (diffusion.self_conditioning or config.data.augment):
        raise ValueError(f"model.kind={model.kind} cannot take diffusion.self_conditioning and data.augment")


def something_is_learnt(config: RunConfig) -> None:
    """The frozen parts are some of the network's, and leave one to learn."""
    frozen, kind, parts = config.train.freeze, config.model.kind, config.model.parts.split()
    if unknown := [name for name in frozen if not any(part.startswith(name) for part in parts)]:
        raise ValueError(f"train.freeze: model.kind={kind} has no part {unknown[0]!r:.100}, but {', '.join(parts)}")
    # Alone, these cannot learn an image.
    minor = ("augmentation_embedding", "uncertainty", *(OF_CLASSES * (config.model.num_classes == 0)))
    if all(part.startswith((*frozen, *minor)) for part in parts):
        raise ValueError(f"train.freeze={','.join(frozen)} freezes the whole network: leave out a part")


def each_class_has_a_name(config: RunConfig) -> None:
    """The names of the classes are those of the network's, if there are names."""
    names, classes = len(config.data.classes), config.model.num_classes
    if names and classes is not None and names != classes:
        raise ValueError(f"data.classes (of id2label.json) has {names:,} names, but the network {classes:,} classes")


def best_checkpoint_has_a_score(config: RunConfig) -> None:
    """One score decides which checkpoint is the best."""
    if config.checkpoint.keep_best and not config.evaluate.every_epochs:
        raise ValueError("checkpoint.keep_best needs scores: set evaluate.every_epochs")
    if config.checkpoint.keep_best and METRICS[first := config.evaluate.metrics[0]].scores:
        raise ValueError(f"checkpoint.keep_best needs one score, and {first} has several: put another metric first")


def samples_use_what_is_learnt(config: RunConfig) -> None:
    """The network learns the classes, the variance and the unconditional images that sampling asks it for."""
    sample, classes = config.sample, config.model.num_classes
    if config.model.label_dropout and classes == 0:
        raise ValueError("model.label_dropout needs classes, and model.num_classes=0: set it to 0, or leave that out")
    if sample.variance == "learned_range" and not config.diffusion.learns_variance:
        raise ValueError("sample.variance=learned_range needs a network with diffusion.variance=learned_range")
    if sample.guidance != 1 and not (config.model.label_dropout or sample.autoguidance):
        unlearnt = "needs a run that began with model.label_dropout=0.1, or --autoguidance [RUN@]EPOCH"
        raise ValueError(f"sample.guidance={sample.guidance:g} {unlearnt}")
    if sample.autoguidance and sample.guidance == 1:
        raise ValueError(f"autoguidance from epoch {sample.autoguidance} needs a guidance other than 1, such as 2")
    if sample.labels and classes is not None and max(sample.labels) >= classes:
        raise ValueError(f"sample.labels: class {max(sample.labels)} does not exist, the network has {classes}")


def steps_suffice(config: RunConfig) -> None:
    """There are no more steps than timesteps, and enough for the order of the sampler."""
    sample, timesteps = config.sample, config.diffusion.timesteps
    if sample.steps > timesteps:
        raise ValueError(f"sample.steps={sample.steps} exceeds diffusion.timesteps={timesteps}")
    if sample.steps < (order := sample.sampler_order):
        raise ValueError(
            f"sample.sampler={sample.sampler} is of order {order}, above sample.steps={sample.steps}: use more"
        )


def grid_starts_at_noise(config: RunConfig) -> None:
    """The first point of the grid is nearly pure noise, and is not exactly that where the grid cannot take it."""
    sample, diffusion = config.sample, config.diffusion
    steps, timesteps, is_flow = sample.steps, diffusion.timesteps, diffusion.schedule == "flow"
    if GRIDS[sample.grid].by_ratio and (is_flow or diffusion.zero_terminal_snr):
        start = "schedule=flow" if is_flow else "zero_terminal_snr"
        raise ValueError(
            f"sample.grid={sample.grid} cannot start at pure noise, as diffusion.{start} does: choose another"
        )
    if sample.shift != 1 and (not is_flow or sample.grid == "found"):
        raise ValueError(f"sample.shift={sample.shift:g} needs diffusion.schedule=flow and a grid other than found")
    if sample.grid == "quadratic" and (diffusion.schedule != "linear" or steps == 1):
        # It starts at 0.8 T, where other processes still show much of the image.
        raise ValueError("sample.grid=quadratic needs diffusion.schedule=linear and at least two steps: choose another")
    if sample.grid == "leading" and (first := (steps - 1) * (timesteps // steps)) < 0.8 * timesteps:
        shows = "where the image still shows through the noise: use steps that divide it, or another grid"
        raise ValueError(f"sample.steps={steps} with sample.grid=leading starts at t={first} of {timesteps}, {shows}")


RULES = (
    network_takes_its_inputs,
    something_is_learnt,
    each_class_has_a_name,
    best_checkpoint_has_a_score,
    samples_use_what_is_learnt,
    steps_suffice,
    grid_starts_at_noise,
)
"""Each takes a `RunConfig` and raises ValueError if it is broken; the first one that is broken is reported."""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def layered(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` overridden by `changes`, both by dotted keys; another kind of network drops the base's `model`."""
    kind = base.get("model.kind", "unet")
    if changes.get("model.kind", kind) != kind:
        base = {key: value for key, value in base.items() if not key.startswith("model.")}
    return base | changes


def validated(flat: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Returns the `RunConfig` of dotted keys; an error begins with `where` these come from.

    Raises:
        BadConfigError: for each bad key its name, the fault and the value.
    """
    sections: dict[str, Any] = {"model": {"kind": "unet"}}
    for key, value in flat.items():
        section, dot, leaf = key.partition(".")
        if dot:
            sections.setdefault(section, {})[leaf] = value
    nested = sections | {key: value for key, value in flat.items() if "." not in key}
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        problems: dict[Any, str] = {}
        for problem in error.errors():
            # A list whose elements are all wrong is reported once, by its first element.
            setting = tuple(part for part in problem["loc"] if isinstance(part, str))
            problems.setdefault(setting, _message(problem, nested["model"]))
        raise BadConfigError(f"{where}: {'; '.join(problems.values())}") from None


def _message(problem: ErrorDetails, model: Any) -> str:
    """Returns the message of one problem: key, fault and value; a rule between keys names them itself."""
    loc, fault, value = problem["loc"], problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "value_error" and len(loc) < 2:
        return fault
    if problem["type"] == "union_tag_invalid":
        loc, fault, value = ("model", "kind"), f"choose one of {', '.join(NETWORKS)}", model["kind"]
    elif loc[0] == "model":
        # pydantic puts the kind of the network between section and key.
        loc = (*loc[:1], *loc[2:])
        if problem["type"] == "extra_forbidden":
            fault = f"not an option of model.kind={model['kind']}"
    return f"{'.'.join(map(str, loc))}: {fault[:1].lower()}{fault[1:]}{nearest_name(problem)} (got {value!r:.200})"


def nearest_name(problem: ErrorDetails) -> str:
    """Returns the end of a message about a setting that takes one of some names: the nearest one, if any is near."""
    if problem["type"] != "literal_error":
        return ""
    return did_you_mean(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"]))
