"""The sections of a run's configuration: their settings, limits and descriptions."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal, Self, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ddpm import catalogue
from ddpm.catalogue import EXTRACTORS, LARGEST, METRICS, OneOf, takers
from ddpm.image_size import ImageSize

Share = Annotated[float, Field(gt=0, le=1)]
ClassName = Annotated[str, Field(min_length=1, max_length=255)]
# A power-function average with a standard deviation of 1/√12 = 0.289 would weight all steps alike.
Std = Annotated[float, Field(ge=0.001, le=0.28)]
_COMPARISONS = [name for name, metric in METRICS.items() if metric.of == "features"]
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


class ConfigSection(Section):
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


class DataConfig(ConfigSection):
    """The images, their augmentation and their order."""

    dataset: str = Field("", description="name of the dataset")
    dataset_id: str = Field("", description="hash of the dataset's images")
    size: Size | None = Field(
        None, description="pixels of a side, or width x height such as 96x64; null: as in the dataset"
    )
    channels: int | None = Field(None, ge=1, le=256, description="channels of the images; null: as in the dataset")
    latents: bool = Field(False, description="the images are latents of an autoencoder")
    classes: tuple[ClassName, ...] = Field((), description="names of the classes of an imported run without a dataset")
    flip: bool = Field(True, description="mirror half of the images, chosen at random")
    crop_scale: tuple[Share, Share] = Field(
        (1.0, 1.0), description="random crops: smallest and largest share of the image's area; 1,1: no crops"
    )
    augment: float = Field(0.0, ge=0, le=1, description="probability of each augmentation of EDM, given to the network")
    shuffle_block_images: int = Field(0, ge=0, le=LARGEST, description="images per shuffled block; 0: all of them")
    order: Literal["feistel-1"] = Field("feistel-1", description="version of the shuffling algorithm")
    cache_gigabytes: float = Field(32.0, gt=0, le=LARGEST, description="local disk space per node for cached images")

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


Network = UNetSection | EDM2Section | DiTSection | DomeUNetSection
NETWORKS: dict[str, type[Network]] = {
    "unet": UNetSection,
    "edm2": EDM2Section,
    "dit": DiTSection,
    "dome": DomeUNetSection,
}


class DiffusionConfig(ConfigSection, catalogue.Diffusion):
    """The process, the network's output, and the weight of each noise level."""


class TrainConfig(ConfigSection, catalogue.Train):
    """Optimisation. All lengths are in images, so that they mean the same on any number of GPUs."""


class EmaConfig(ConfigSection, catalogue.ExponentialAverage):
    """Averages of the weights: `ema`, and `ema-STD` for each of `stds`; each takes 4 bytes a weight on every GPU."""

    stds: tuple[Std, ...] = Field((), description="relative widths of further averages, as in EDM2; such as 0.05,0.10")
    snapshot_epochs: int = Field(0, ge=0, le=LARGEST, description="store stds every N epochs, for `ddpm ema`; 0: never")

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

    every_epochs: int = Field(1, ge=1, le=LARGEST, description="save every N epochs")
    every_minutes: float | None = Field(
        None,
        gt=0,
        le=LARGEST,
        description="also save N minutes after the last save; null: as often as loses least time, within 10 minutes if "
        "a save takes less than one",
    )
    keep_last: int = Field(
        3,
        ge=1,
        le=LARGEST,
        description="keep the newest N checkpoints of every_epochs, and the two newest saves; 1: one",
    )
    keep_every_epochs: int = Field(0, ge=0, le=LARGEST, description="also keep one checkpoint every N epochs; 0: none")
    keep_epochs: tuple[catalogue.Count, ...] = Field(
        (), description="also keep the checkpoints of these epochs, such as 30,80,490"
    )
    keep_best: bool = Field(False, description="also keep the checkpoint with the best score; see evaluate.metrics")


class SamplerConfig(ConfigSection, catalogue.SampleOptions):
    """The settings that decide which image a seed gives, for the same checkpoint."""

    @field_validator("guidance_interval", mode="wrap")
    @classmethod
    def _ascends(cls, value: Any, validated: ValidatorFunctionWrapHandler) -> Any:
        parts = split(value)
        if isinstance(parts, list) and len(parts) != 2:
            raise ValueError("give two numbers, such as 0.3,5")
        interval = validated(parts)
        if interval and interval[0] >= interval[1]:
            raise ValueError("give the smaller number first, such as 0.3,5")
        return interval

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
        return ", ".join([self.sampler, f"{self.steps:,} steps", *words])

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

    images: int = Field(64, ge=1, le=10_000, description="number of images in a sample grid")
    every_epochs: int | None = Field(
        None,
        ge=0,
        le=LARGEST,
        description="sample grid every N epochs; null: after 1, 2, 4, 8, …; 0: at the end alone",
    )
    batch_size: int = Field(64, ge=1, le=10_000, description="images at once on each process")
    nearest: bool = Field(False, description="show the nearest training image beside each sample")


class EvaluateConfig(ConfigSection):
    """The scores that a run computes while it trains; see `ddpm evaluate`."""

    every_epochs: int = Field(0, ge=0, le=LARGEST, description="compute scores every N epochs; 0: never")
    images: int = Field(1000, ge=12, le=1_000_000, description="number of samples to score")
    references: int = Field(50_000, ge=12, le=1_000_000, description="largest number of real images to compare with")
    metrics: tuple[OneOf[str, _COMPARISONS], ...] = Field(
        ("kid", "fid"), min_length=1, description="scores to compute; the first decides which checkpoint is the best"
    )
    extractor: OneOf[str, EXTRACTORS] = Field("inception", description="network of the features")


class LogConfig(ConfigSection):
    """The metrics."""

    every_images: int = Field(12_800, ge=1, le=LARGEST, description="log every N images, and at least once an epoch")
    validate_epochs: int = Field(1, ge=0, le=LARGEST, description="log val_loss every N epochs; 0: never")
    validate_images: int = Field(2048, ge=1, le=LARGEST, description="largest number of held-out images for val_loss")
    tracker: Literal["none", "wandb", "mlflow"] = Field("none", description="service that also gets the metrics")


class ParentConfig(ConfigSection):
    """The checkpoint of another run with whose weights the run began; all null without `ddpm train --from`."""

    run: str | None = Field(None, description="run that gave the first weights: a name in this bucket, or a URI")
    epoch: int | None = Field(None, ge=0, le=LARGEST, description="epoch that its checkpoint ends, if it ends one")
    weights: str | None = Field(None, description="which of its weights: ema, ema-STD or model")
    checkpoint: str | None = Field(None, pattern="^[0-9]{6}-[0-9]{12}$", description="name of the checkpoint")
    sha256: str | None = Field(None, description="SHA-256 of the record that names the files of the weights")

    @property
    def name(self) -> str:
        """The checkpoint as `--from` takes it, such as `celeba@490`."""
        return str(self.run) if self.epoch is None else f"{self.run}@{self.epoch}"

    @property
    def words(self) -> str:
        """The origin of the weights, for people: `celeba@490 (ema)`."""
        return f"{self.name} ({self.weights})"
