"""The settings of a run with their limits and descriptions, the rules across sections, and dotted keys."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ddpm import catalogue
from ddpm.catalogue import EXTRACTORS, GRIDS, METRICS, OF_CLASSES, OF_NUMBERS, Count, CountOrNone, OneOf, takers
from ddpm.image_size import ImageSize
from job.exits import BadConfigError, did_you_mean

Share = Annotated[float, Field(gt=0, le=1)]
ClassName = Annotated[str, Field(min_length=1, max_length=255)]
# A power-function average with a standard deviation of 1/√12 = 0.289 would weight all steps alike.
Std = Annotated[float, Field(ge=0.001, le=0.28)]
_COMPARISONS = [name for name, metric in METRICS.items() if metric.of == "features"]
LARGEST_SIZE = 4096
"""Limit of the height and width of images, in pixels."""
FREE = {
    *("checkpoint", "sample", "evaluate", "log"),
    *("train.epochs", "train.micro_batch_size", "train.exact", "train.slots", "train.slot_threads", "train.compile"),
    *("data.cache_gigabytes", "ema.snapshot_epochs", "ema.device", "model.gradient_checkpointing"),
    "train.shard_optimizer",
}
"""Keys, and whole sections, that an attempt may change: they decide when and how something is done, never what is
learnt."""


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


class ConfigSection(Section):
    """A section of a configuration; its lists may be text such as `1,2,2`, or a single number."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kinds = {key: (field.annotation, *get_args(field.annotation)) for key, field in cls.model_fields.items()}
        lists = [key for key, those in kinds.items() if any(get_origin(kind) is tuple for kind in those)]
        return {key: split(value) if key in lists else value for key, value in values.items()}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        # A section inherits `check` from the catalogue, or defines it.
        if check := getattr(self, "check", None):
            check()
        return self


def split(value: Any) -> Any:
    """Returns a list for text such as `1,2,2`, and for a single number."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return [value] if isinstance(value, int | float) else value


def is_free(key: str) -> bool:
    """Returns whether each attempt of a run may change a key."""
    return key in FREE or key.partition(".")[0] in FREE


def average_name(std: float) -> str:
    """Returns the name of the power-function average with this standard deviation."""
    return f"ema-{std:g}"


class DataConfig(ConfigSection):
    """The images, their augmentation and their order."""

    dataset: Annotated[str, "name of the dataset"] = ""
    dataset_id: Annotated[str, "hash of the dataset's images"] = ""
    size: Annotated[Size | None, "pixels of a side, or width x height such as 96x64; null: as in the dataset"] = None
    channels: Annotated[int | None, Field(ge=1, le=256), "channels of the images; null: as in the dataset"] = None
    bits: Annotated[Literal[8, 16], "bits of a value of the images"] = 8
    latents: Annotated[bool, "the images are latents of an autoencoder"] = False
    classes: Annotated[tuple[ClassName, ...], "names of the classes of an imported run without a dataset"] = ()
    flip: Annotated[bool, "mirror half of the images, chosen at random"] = True
    crop_scale: Annotated[
        tuple[Share, Share], "random crops: smallest and largest share of the image's area; 1,1: no crops"
    ] = (1.0, 1.0)
    augment: Annotated[catalogue.Share, "probability of each augmentation of EDM, given to the network"] = 0.0
    shuffle_block_images: Annotated[CountOrNone, "images per shuffled block; 0: all of them"] = 0
    order: Annotated[Literal["feistel-1"], "version of the shuffling algorithm"] = "feistel-1"
    cache_gigabytes: Annotated[catalogue.Positive, "local disk space per node for cached images"] = 32.0

    def check(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        if self.latents and (self.flip or self.augment or self.crop_scale != (1.0, 1.0)):
            raise ValueError("data.flip, data.crop_scale and data.augment need pixels, and the dataset holds latents")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={self.crop_scale}: the smaller share comes first")


class UNetSection(ConfigSection, catalogue.UNetConfig):
    """A U-Net of Ho et al. and its successors."""


class EDM2Section(ConfigSection, catalogue.EDM2Config):
    """The magnitude-preserving U-Net of EDM2."""


class DiTSection(ConfigSection, catalogue.DiTConfig):
    """A transformer on patches."""


class DomeUNetSection(ConfigSection, catalogue.DomeUNetConfig):
    """The U-Net of dome272 and ErenGurs."""


class OwnSection(ConfigSection, catalogue.NetworkConfig):
    """A network of the user: a class in a file whose text lies with the run; the section `network` has its settings."""

    kind: Literal["own"] = "own"
    file: Annotated[str, "name of the file"] = ""
    network: Annotated[str, "name of the class"] = ""
    sha256: Annotated[str, "SHA-256 of the file"] = ""
    inputs: Annotated[tuple[str, ...], "inputs of forward beside x and t"] = ()

    def check(self) -> None:
        """Raises ValueError without a file."""
        if not self.sha256:
            raise ValueError("model.kind=own is for a network of yours: name it by --network FILE.py:CLASS")
        if self.num_classes and "labels" not in self.inputs:
            raise ValueError(
                f"forward of {self.network} takes no labels: add labels=None, or --set model.num_classes=0"
            )


Network = UNetSection | EDM2Section | DiTSection | DomeUNetSection | OwnSection
NETWORKS: dict[str, type[Network]] = {kind.model_fields["kind"].default: kind for kind in get_args(Network)}


class DiffusionConfig(ConfigSection, catalogue.Diffusion):
    """The process, the network's output, and the weight of each noise level."""


class ConsistencyConfig(ConfigSection, catalogue.Consistency):
    """The two points of `diffusion.objective=consistency`."""


class TrainConfig(ConfigSection, catalogue.Train):
    """Optimisation. All lengths are in images, so that they mean the same on any number of GPUs."""


class EmaConfig(ConfigSection, catalogue.ExponentialAverage):
    """Averages of the weights: `ema`, and `ema-STD` for each of `stds`; each takes 4 bytes a weight on every device."""

    stds: Annotated[tuple[Std, ...], "relative widths of further averages, as in EDM2; such as 0.05,0.10"] = ()
    snapshot_epochs: Annotated[CountOrNone, "store stds every N epochs, for `ddpm ema`; 0: never"] = 0
    device: Annotated[
        Literal["cpu"] | None, "cpu: averages lie in host memory, updated beside the next step; null: with the network"
    ] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the power-function averages."""
        return tuple(map(average_name, self.stds))

    def check(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        if len({*self.names}) < len(self.stds):
            raise ValueError("ema.stds has the same value twice")
        if self.snapshot_epochs and not self.stds:
            raise ValueError("ema.snapshot_epochs stores the averages of ema.stds: set these, for example to 0.05,0.10")


class CheckpointConfig(ConfigSection):
    """When checkpoints are saved, and which ones are kept."""

    every_epochs: Annotated[Count, "save every N epochs"] = 1
    every_minutes: Annotated[
        catalogue.Positive | None,
        "also save N minutes after the last save; null: as often as loses least time, within 10 minutes if a save takes"
        " less than one",
    ] = None
    keep_last: Annotated[Count, "keep the newest N checkpoints of every_epochs, and the two newest saves; 1: one"] = 3
    keep_every_epochs: Annotated[CountOrNone, "also keep one checkpoint every N epochs; 0: none"] = 0
    keep_epochs: Annotated[tuple[Count, ...], "also keep the checkpoints of these epochs, such as 30,80,490"] = ()
    keep_best: Annotated[bool, "also keep the checkpoint with the best score; see evaluate.metrics"] = False


class SamplerConfig(ConfigSection, catalogue.SampleOptions):
    """The settings that decide which image a seed gives, for the same checkpoint."""

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _ascends(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and (len(value) != 2 or float(value[0]) >= float(value[1])):
            raise ValueError("give two numbers, the smaller number first, such as 0.3,5")
        return value

    @field_validator("weights", "autoguidance_weights", mode="before")
    @classmethod
    def _has_one_name(cls, value: Any, info: ValidationInfo) -> Any:
        """Returns the one name that weights have: `ema-0.10` becomes `ema-0.1`."""
        if value in ("ema", "model") or (not value and info.field_name != "weights"):
            return value
        if not isinstance(value, str) or not re.fullmatch(r"ema-0\.[0-9]{1,6}", value):
            raise ValueError("input should be 'ema', 'model', or 'ema-' and a std, such as 'ema-0.05'")
        return average_name(float(value.removeprefix("ema-")))

    @property
    def effective(self) -> SamplerConfig:
        """Only the settings of `SamplerConfig`; options that the sampler does not take have their defaults."""
        unused = {key for key in SamplerConfig.model_fields if takers(key) and self.sampler not in takers(key)}
        if self.guidance == 1:
            unused |= {"guidance_interval", "guidance_rescale"}
        return SamplerConfig(**self.model_dump(include=SamplerConfig.model_fields.keys() - unused))

    def name(self, first: SamplerConfig) -> str:
        """Returns a part of a picture's file name: sampler, steps, and what differs from the run's `first` settings."""
        # As the options are called.
        words = [f"{key.replace('labels', 'classes')}-{value}" for key, value in self._differing(first).items()]
        return "-".join([self.sampler, str(self.steps), *words])

    def words(self, first: SamplerConfig) -> str:
        """Returns the same for people, without the classes, which a picture shows: `ddim, 50 steps, eta 1`."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self._differing(first).items() if key != "labels"]
        return ", ".join([self.sampler, f"{self.steps:,} step{'s' * (self.steps > 1)}", *words])

    def _differing(self, first: SamplerConfig) -> dict[str, str]:
        ours, theirs = self.effective.model_dump(exclude={"sampler", "steps"}), first.effective.model_dump()
        return {key: _word(value) for key, value in ours.items() if value != theirs[key]}


def _word(value: Any) -> str:
    """Returns a value as part of a file name."""
    if isinstance(value, tuple):
        words = "_".join(map(_word, value))
        # File systems limit names to 255 bytes.
        return words if len(words) <= 40 else hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


class SampleConfig(SamplerConfig):
    """The defaults of `ddpm sample`, and the pictures that training makes."""

    images: Annotated[int, Field(ge=1, le=10_000), "number of images in a sample grid"] = 64
    every_epochs: Annotated[
        CountOrNone | None,
        "sample grid every N epochs; null: after 1, 2, 4, 8, … in a tenth of the time; 0: at the end alone",
    ] = None
    batch_size: Annotated[int, Field(ge=1, le=10_000), "images at once on each process"] = 64
    nearest: Annotated[bool, "show the nearest training image beside each sample"] = False
    show: Annotated[
        tuple[Count, ...], "channels that grids show as red, green and blue, such as 3,2,1; or one; empty: the first"
    ] = ()

    @field_validator("show")
    @classmethod
    def _is_shown(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (0, 1, 3):
            raise ValueError("name one channel, or three such as 3,2,1")
        return value


class EvaluateConfig(ConfigSection):
    """The scores that a run computes while it trains; see `ddpm evaluate`."""

    every_epochs: Annotated[CountOrNone, "compute scores every N epochs; 0: never"] = 0
    images: Annotated[int, Field(ge=12, le=1_000_000), "number of samples to score"] = 1000
    references: Annotated[int, Field(ge=12, le=1_000_000), "largest number of real images to compare with"] = 50_000
    metrics: Annotated[
        tuple[OneOf[str, _COMPARISONS], ...],
        Field(min_length=1),
        "scores to compute; the first decides which checkpoint is the best",
    ] = ("kid", "fid")
    extractor: Annotated[OneOf[str, EXTRACTORS], "network of the features"] = "inception"


class LogConfig(ConfigSection):
    """The metrics."""

    every_images: Annotated[Count, "log every N images, and at least once an epoch"] = 12_800
    validate_epochs: Annotated[CountOrNone, "log val_loss every N epochs; 0: never"] = 1
    validate_images: Annotated[Count, "largest number of held-out images for val_loss"] = 2048
    tracker: Annotated[Literal["none", "wandb", "mlflow"], "service that also gets the metrics"] = "none"
    project: Annotated[str, Field(min_length=1, max_length=128), "project of wandb, experiment of mlflow"] = "ddpm"
    entity: Annotated[str | None, Field(max_length=128), "user or team of wandb; null: your own"] = None


class ConditionConfig(ConfigSection, catalogue.Conditioning):
    """The condition image and the condition vector; their sizes follow from the dataset."""


class ParentConfig(ConfigSection):
    """The checkpoint of another run with whose weights the run began; all null without `ddpm train --from`."""

    run: Annotated[str | None, "run that gave the first weights: a name in this bucket, or a URI"] = None
    epoch: Annotated[CountOrNone | None, "epoch that its checkpoint ends, if it ends one"] = None
    weights: Annotated[str | None, "which of its weights: ema, ema-STD or model"] = None
    checkpoint: Annotated[str | None, Field(pattern="^[0-9]{6}-[0-9]{12}$"), "name of the checkpoint"] = None
    sha256: Annotated[str | None, "SHA-256 of the record that names the files of the weights"] = None

    @property
    def name(self) -> str:
        """The checkpoint as `--from` takes it, such as `celeba@490`."""
        return str(self.run) if self.epoch is None else f"{self.run}@{self.epoch}"

    @property
    def words(self) -> str:
        """The origin of the weights, for people: `celeba@490 (ema)`."""
        return f"{self.name} ({self.weights})"


class RunConfig(ConfigSection):
    """The whole configuration of a run."""

    preset: Annotated[str, "preset that the run began with"] = ""
    imported: Annotated[bool, "the run began with an imported checkpoint"] = False
    data: DataConfig = DataConfig()
    model: Annotated[Network, Field(discriminator="kind")] = UNetSection()
    network: Annotated[dict[str, Any], "settings of a network of yours: --set network.width=96"] = {}
    condition: ConditionConfig = ConditionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
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

    @property
    def has_teacher(self) -> bool:
        """Whether training keeps the weights of the parent, whose guidance the network learns."""
        return self.consistency.guidance != 1 and self.parent.run is not None

    @property
    def is_conditioned(self) -> bool:
        """Whether the network gets a condition image or vector."""
        return bool(self.condition.derive or self.condition.channels or self.condition.vector)

    def check(self) -> None:
        """Raises ValueError for the first broken rule."""
        self.model.check_size(self.data.size)
        network_takes_its_inputs(self)
        condition_can_be_made(self)
        something_is_learnt(self)
        best_checkpoint_has_a_score(self)
        samples_use_what_is_learnt(self)
        shown_channels_exist(self)
        grid_starts_at_noise(self)

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
    if isinstance(model, OwnSection):
        needed = {"x_start": diffusion.self_conditioning, "augmentation": config.data.augment}
        needed |= {"image": config.condition.channels, "vector": config.condition.vector}
        needed |= {"image_noise": config.condition.noise}
        if lacking := [name for name, needs in needed.items() if needs and name not in model.inputs]:
            raise ValueError(f"forward of {model.network} takes no {lacking[0]}: add {lacking[0]}=None")
    if not model.takes_estimates and (diffusion.self_conditioning or config.data.augment or config.is_conditioned):
        raise ValueError(
            f"model.kind={model.kind} cannot take diffusion.self_conditioning, data.augment or a condition"
        )


def condition_can_be_made(config: RunConfig) -> None:
    """The condition can be made from the images, and has the noise that samples ask for."""
    condition, data, sample = config.condition, config.data, config.sample
    if condition.derive and data.latents:
        raise ValueError(f"condition.derive={condition.derive} needs pixels, and the dataset holds latents")
    if condition.derive and data.size and data.channels:
        condition.check_images(data.channels, data.size)
    if condition.noise and not (condition.derive or condition.channels) and data.size:
        raise ValueError("condition.noise needs a condition image: set condition.derive, or take a dataset of pairs")
    if sample.condition_noise > condition.noise:
        raise ValueError(
            f"sample.condition_noise={sample.condition_noise:g} exceeds condition.noise={condition.noise:g}"
        )
    there = {"class": config.model.num_classes, "condition": condition.channels, "vector": condition.vector}
    # Images without each condition alone, beside those without any: see `drops_conditions`.
    parts, dropout = 1 + sum(map(bool, there.values())), config.model.label_dropout
    if parts > 2 and dropout * parts > 1:
        raise ValueError(f"model.label_dropout={dropout:g}: with {parts - 1} conditions at most 1/{parts}")
    if data.size and sample.guidance != 1 and there.get(sample.guidance_by) == 0:
        raise ValueError(f"sample.guidance_by={sample.guidance_by}: the network has no {sample.guidance_by}")


def shown_channels_exist(config: RunConfig) -> None:
    """Grids show channels that the images have."""
    if config.data.channels and max(config.sample.show, default=0) > config.data.channels:
        raise ValueError(f"sample.show={config.sample.show}: the images have {config.data.channels} channels")


def something_is_learnt(config: RunConfig) -> None:
    """The frozen parts are some of the network's, and leave one to learn."""
    frozen, kind, parts = config.train.freeze, config.model.kind, config.model.parts.split()
    if kind == "own":
        # Its parts are known once it is built.
        return
    if unknown := [name for name in frozen if not any(part.startswith(name) for part in parts)]:
        raise ValueError(f"train.freeze: model.kind={kind} has no part {unknown[0]!r:.100}, but {', '.join(parts)}")
    # Alone, these cannot learn an image.
    minor = ("augmentation_embedding", "uncertainty", *OF_NUMBERS, *(OF_CLASSES * (config.model.num_classes == 0)))
    if all(part.startswith((*frozen, *minor)) for part in parts):
        raise ValueError(f"train.freeze={','.join(frozen)} freezes the whole network: leave out a part")


def best_checkpoint_has_a_score(config: RunConfig) -> None:
    """One score decides which checkpoint is the best."""
    if config.checkpoint.keep_best and not config.evaluate.every_epochs:
        raise ValueError("checkpoint.keep_best needs scores: set evaluate.every_epochs")
    if config.checkpoint.keep_best and METRICS[first := config.evaluate.metrics[0]].scores:
        raise ValueError(f"checkpoint.keep_best needs one score, and {first} has several: put another metric first")


def samples_use_what_is_learnt(config: RunConfig) -> None:
    """The network learns the classes, the variance and the unconditional images that sampling asks it for."""
    sample, classes, names = config.sample, config.model.num_classes, len(config.data.classes)
    jumps, distilled = config.diffusion.objective == "consistency", config.consistency.guidance
    if names and classes is not None and names != classes:
        raise ValueError(f"data.classes (of id2label.json) has {names:,} names, but the network {classes:,} classes")
    if config.model.label_dropout and classes == 0 and not config.is_conditioned:
        raise ValueError(
            "model.label_dropout needs a network with classes or a condition: set it to 0, or drop model.num_classes=0"
        )
    if sample.variance == "learned_range" and not config.diffusion.learns_variance:
        raise ValueError("sample.variance=learned_range needs a network with diffusion.variance=learned_range")
    if sample.guidance != 1 and not (config.model.label_dropout or sample.autoguidance):
        unlearnt = "needs a run that began with model.label_dropout=0.1, or --autoguidance [RUN@]EPOCH"
        raise ValueError(f"sample.guidance={sample.guidance:g} {unlearnt}")
    if distilled != 1 and not (jumps and config.model.label_dropout):
        needs = "needs diffusion.objective=consistency, and --from a run that began with model.label_dropout=0.1"
        raise ValueError(f"consistency.guidance={distilled:g} {needs}")
    if sample.autoguidance and sample.guidance == 1:
        raise ValueError(f"autoguidance from epoch {sample.autoguidance} needs a guidance other than 1, such as 2")
    if sample.labels and classes is not None and max(sample.labels) >= classes:
        raise ValueError(f"sample.labels: class {max(sample.labels)} does not exist, the network has {classes}")


def grid_starts_at_noise(config: RunConfig) -> None:
    """The first of enough points is nearly pure noise, and is not exactly that where the grid cannot take it."""
    sample, diffusion = config.sample, config.diffusion
    steps, timesteps, is_flow = sample.steps, diffusion.timesteps, diffusion.schedule == "flow"
    if steps > timesteps:
        raise ValueError(f"sample.steps={steps} exceeds diffusion.timesteps={timesteps}")
    if steps < (order := sample.sampler_order):
        raise ValueError(f"{sample.sampler} is of order {order}, above sample.steps={steps}: use more steps")
    if GRIDS[sample.grid].by_ratio and (is_flow or diffusion.zero_terminal_snr):
        raise ValueError(f"sample.grid={sample.grid} cannot start at pure noise, as this process does: choose another")
    if sample.shift != 1 and (not is_flow or sample.grid == "found"):
        raise ValueError(f"sample.shift={sample.shift:g} needs diffusion.schedule=flow and a grid other than found")
    if sample.grid == "quadratic" and (diffusion.schedule != "linear" or steps == 1):
        # It starts at 0.8 T, where other processes still show much of the image.
        raise ValueError("sample.grid=quadratic needs diffusion.schedule=linear and at least two steps: choose another")
    if sample.grid == "leading" and (first := (steps - 1) * (timesteps // steps)) < 0.8 * timesteps:
        shows = "where the image still shows through the noise: use steps that divide it, or another grid"
        raise ValueError(f"sample.steps={steps} with sample.grid=leading starts at t={first} of {timesteps}, {shows}")


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a mapping of sections as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
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
