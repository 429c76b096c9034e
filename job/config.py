"""What a run is made of: which keys exist, what is valid, what an attempt may change, and where the values come from.

A configuration is resolved once, when a run begins: preset ← dataset ← `--config FILE` ← `--set key=value`. It is then
stored with the run and is the base of every later attempt. Numbers are in `presets/`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from job.exits import BadConfigError, BadRequestError, MissingInputError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def _split(value: Any) -> Any:
    """Lets `--set model.channel_mults=1,2,2` stand for a list."""
    if isinstance(value, str):
        return [part for part in value.replace(" ", "").split(",") if part]
    return [value] if isinstance(value, int | float) else value


def _split_in_two(value: Any) -> Any:
    parts = _split(value)
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
Mults = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], BeforeValidator(_split)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=LARGEST)], ...], BeforeValidator(_split)]
Labels = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST)], ...], BeforeValidator(_split)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=LARGEST)]
Interval = Annotated[tuple[Ratio, Ratio], BeforeValidator(_split_in_two), AfterValidator(_grows)]
Share = Annotated[float, Field(gt=0, le=1)]
SMALLEST_STD, LARGEST_STD = 0.001, 0.28
"""Of a power-function average: at 1/√12 all weights would count alike."""
Stds = Annotated[tuple[Annotated[float, Field(ge=SMALLEST_STD, le=LARGEST_STD)], ...], BeforeValidator(_split)]


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


class DataConfig(Section):
    """Which images, in which order."""

    dataset: str = Field("", description="its name")
    dataset_id: str = Field("", description="what its images are, as a hash")
    size: int | None = Field(None, ge=1, le=LARGEST_SIZE, description="pixels; follows the dataset")
    channels: int | None = Field(None, ge=1, le=256, description="follows the dataset")
    latents: bool = Field(False, description="whether the images are encoded; follows the dataset")
    flip: bool = Field(True, description="mirror half of the images, drawn per image number")
    crop_scale: Annotated[tuple[Share, Share], BeforeValidator(_split)] = Field(
        (1.0, 1.0), description="share of an image's area, from and to, that a random box has which is enlarged to all"
    )
    augment: float = Field(0.0, ge=0, le=1, description="probability of each transform of EDM, told to the network")
    shuffle_block_images: int = Field(0, ge=0, le=LARGEST, description="shuffle within blocks of so many; 0: of all")
    order: Literal["feistel-1"] = Field("feistel-1", description="version of the shuffling algorithm")
    cache_gigabytes: float = Field(32.0, gt=0, le=LARGEST, description="local disk that a node may use for the images")

    @model_validator(mode="after")
    def _is_possible(self) -> DataConfig:
        if self.latents and (self.flip or self.augment or self.crop_scale != (1.0, 1.0)):
            raise ValueError("data.flip, data.crop_scale and data.augment are about pixels: the dataset holds latents")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={self.crop_scale}: the smaller share comes first")
        return self


class NetworkConfig(Section):
    """What all networks have."""

    kind: str
    num_classes: int | None = Field(None, ge=0, le=LARGEST, description="follows the dataset; 0: unconditional")
    label_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the images that are learnt without their class, for guidance"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep less in memory and compute more, for larger batches or images; the same to the bit"
    )

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""


_CHANNELS = "width of the first level, before its multiplier"
_MULTS = "one multiplier for each level; every level halves the size"
_ATTENTION = "pixels; levels of these sizes have attention"
_LAYERS = "residual blocks of a level on the way down"
_DROPOUT = "probability, within the residual blocks"


class UNetConfig(NetworkConfig):
    """The U-Net of Ho et al. (2020), appendix B; with its switches that of Dhariwal & Nichol (2021)."""

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=4, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 2, 2), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16,), description=_ATTENTION)
    layers_per_level: int = Field(2, ge=1, le=64, description=_LAYERS)
    norm_groups: int = Field(32, ge=1, le=LARGEST, description="of the group normalisations")
    heads: int = Field(1, ge=1, le=LARGEST, description="of the attention")
    head_channels: int | None = Field(None, ge=1, le=LARGEST, description="width of a head, in the place of heads")
    scale_shift: bool = Field(False, description="the timestep scales as well as shifts")
    resample_in_blocks: bool = Field(False, description="residual blocks change the size, and not convolutions")
    conventions: Literal["ho", "diffusers"] = Field(
        "ho", description="diffusers: its defaults for the timestep's sinusoids, the norms and the padding"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        _check_halvings(size, len(self.channel_mults) - 1)
        if self.channels % self.norm_groups:
            raise ValueError(
                f"model.channels={self.channels} cannot be split into model.norm_groups={self.norm_groups} groups"
            )
        if self.channels % 2:
            raise ValueError(f"model.channels={self.channels} must be even, for sines and cosines of the timestep")
        key = "head_channels" if self.head_channels else "heads"
        _check_heads(self, size, self.head_channels or self.heads, f"model.{key}={self.head_channels or self.heads}")


class EDM2Config(NetworkConfig):
    """The magnitude-preserving U-Net of Karras et al. (2024), configuration G; by default EDM2-S."""

    kind: Literal["edm2"] = "edm2"
    channels: int = Field(192, ge=1, le=4096, description=_CHANNELS)
    channel_mults: Mults = Field((1, 2, 3, 4), min_length=1, max_length=12, description=_MULTS)
    attention_sizes: Counts = Field((16, 8), description=_ATTENTION)
    layers_per_level: int = Field(3, ge=1, le=64, description=_LAYERS)
    head_channels: int = Field(64, ge=1, le=LARGEST, description="width of a head of the attention")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    uncertainty: bool = Field(False, description="learn which error to expect at each noise level, and weigh by it")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        _check_halvings(size, len(self.channel_mults) - 1)
        _check_heads(self, size, self.head_channels, f"model.head_channels={self.head_channels}")


class DiTConfig(NetworkConfig):
    """The transformer of Peebles & Xie (2023); by default DiT-S/2."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, ge=1, le=LARGEST, description="pixels")
    width: int = Field(384, ge=4, le=65536, description="channels of a patch")
    depth: int = Field(12, ge=1, le=1024, description="blocks")
    heads: int = Field(6, ge=1, le=LARGEST, description="of the attention")
    dropout: float = Field(0.0, ge=0, lt=1, description=_DROPOUT)
    qk_norm: bool = Field(False, description="RMSNorm, with a learnt scale, of queries and keys")
    rms_norm: bool = Field(False, description="RMSNorm in the place of layer normalisation")
    rope: bool = Field(False, description="rotary embedding of rows and columns in the attention")

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        if (size or 0) % self.patch_size:
            raise ValueError(f"data.size={size} is not a multiple of model.patch_size={self.patch_size}: change one")
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} cannot be split into model.heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be a multiple of 4, for sines and cosines of two axes")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"model.rope: model.width={self.width} / model.heads={self.heads} must be a multiple of 4")


class DomeConfig(NetworkConfig):
    """The U-Net of dome272's and ErenGurs' ddpm."""

    kind: Literal["dome"] = "dome"
    dropout: ClassVar[float] = 0.0

    def check(self, size: int | None) -> None:
        """Raises ValueError if the network cannot take images of this size, or cannot be built at all."""
        if (size or 0) % 8:
            raise ValueError(f"data.size={size} cannot be halved 3 times, as model.kind=dome does: use a multiple of 8")


Network = Annotated[UNetConfig | EDM2Config | DiTConfig | DomeConfig, Field(discriminator="kind")]
NETWORKS: dict[str, type[NetworkConfig]] = {
    "unet": UNetConfig,
    "edm2": EDM2Config,
    "dit": DiTConfig,
    "dome": DomeConfig,
}


def _check_halvings(size: int | None, halvings: int) -> None:
    # Without a size yet, any will do.
    if (size or 0) % 2**halvings:
        raise ValueError(
            f"data.size={size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.channel_mults need: pack at a multiple of {2**halvings}, or use fewer levels"
        )


def _check_heads(model: UNetConfig | EDM2Config, size: int | None, divisor: int, said: str) -> None:
    widths = [model.channels * mult for mult in model.channel_mults]
    has_attention = [(size or 0) / 2**level in model.attention_sizes for level in range(len(widths))]
    for width in [*(width for width, has in zip(widths, has_attention, strict=True) if has), widths[-1]]:
        if width % divisor:
            raise ValueError(f"{width} channels, as the attention has, cannot be split into heads by {said}")


class DiffusionConfig(Section):
    """The process, what the network predicts, and how much each point counts."""

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "edm", "flow"] = Field(
        "linear", description="the way from image to noise: four tables of betas, EDM, or rectified flow"
    )
    timesteps: int = Field(1000, ge=2, le=10_000, description="numbered points of that way")
    zero_terminal_snr: bool = Field(False, description="rescale the betas so that the last timestep is pure noise")
    sigma_min: float = Field(0.002, gt=0, le=LARGEST, description="of edm")
    sigma_max: float = Field(80.0, gt=0, le=LARGEST, description="of edm")
    sigma_data: float = Field(0.5, gt=0, le=LARGEST, description="standard deviation of the images, for edm")
    prediction: Literal["epsilon", "x0", "v", "flow", "edm"] = Field(
        "epsilon", description="what the network gives: the noise, the image, or a mixture of both"
    )
    weighting: Literal["plain", "snr", "min_snr", "soft_min_snr", "edm", "flow"] = Field(
        "plain", description="plain: the squared error as it is; the others say what it counts on x_0"
    )
    gamma: float = Field(5.0, gt=0, le=LARGEST, description="of min_snr and soft_min_snr")
    draws: Literal["uniform", "log_normal"] = Field("uniform", description="of the points, or of their sigma/alpha")
    draws_mean: float = Field(-1.2, ge=-100, le=100, description="of ln(sigma/alpha)")
    draws_std: float = Field(1.2, gt=0, le=100, description="likewise, its standard deviation")
    stratified: bool = Field(False, description="each image of a batch draws from its own part")
    variance: Literal["fixed", "learned_range"] = Field(
        "fixed", description="learned_range: the network gives the variance of a step as well, by the hybrid loss"
    )
    self_conditioning: bool = Field(False, description="in half of the batches it sees its own estimate of the images")
    offset_noise: float = Field(0.0, ge=0, le=1, description="standard deviation of a shift of each channel's noise")

    @model_validator(mode="after")
    def _is_possible(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.schedule in ("edm", "flow"):
            raise ValueError(f"diffusion.zero_terminal_snr rescales betas, and schedule={self.schedule} has none")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            raise ValueError(
                "diffusion.prediction=epsilon says nothing about the image where only noise is left, as "
                f"{'zero_terminal_snr' if self.zero_terminal_snr else 'schedule=flow'} has it: use v, x0 or flow"
            )
        if self.variance == "learned_range":
            reasons = {
                f"schedule={self.schedule}": self.schedule in ("edm", "flow"),
                f"draws={self.draws}": self.draws != "uniform",
                f"offset_noise={self.offset_noise}": self.offset_noise > 0,
            }
            if why := [reason for reason, applies in reasons.items() if applies]:
                raise ValueError(
                    f"diffusion.variance=learned_range is about steps of a table of betas that are drawn uniformly and "
                    f"whose noise is the same in all pixels: {why[0]} does not go with it"
                )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"diffusion.sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        return self


class TrainConfig(Section):
    """Optimisation. All lengths are in images, so that they mean the same on any number of GPUs."""

    batch_size: int = Field(128, ge=1, le=1_000_000, description="images per optimiser step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, le=LARGEST, description="images at a time and process; none: all")
    learning_rate: float = Field(2e-4, gt=0, le=LARGEST, description="after the warm-up, before any decay")
    warmup_images: int = Field(0, ge=0, le=LARGEST, description="linear warm-up of the learning rate")
    learning_rate_decay: Literal["constant", "inverse_root", "cosine"] = Field(
        "constant", description="what becomes of it after the warm-up"
    )
    decay_images: int = Field(
        0, ge=0, le=LARGEST, description="where inverse_root begins, where cosine reaches 0; fixed, unlike epochs"
    )
    adam_betas: Annotated[tuple[Beta, Beta], BeforeValidator(_split)] = Field(
        (0.9, 0.999), description="decay of the two moments, per step"
    )
    adam_eps: float = Field(1e-8, gt=0, le=LARGEST, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST, description="AdamW's, times the learning rate per step; 0: Adam")
    clip_norm: float = Field(1.0, gt=0, le=LARGEST, description="limit of the gradient's global L2 norm")
    epochs: int = Field(1, ge=1, le=1_000_000, description="passes over the dataset, in all")
    seed: int = Field(0, ge=0, lt=2**63, description="of initial weights, order, noise, points and dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    deterministic: bool = Field(False, description="bit-equal results on one kind of GPU, at some speed")
    compile: bool = Field(True, description="torch.compile on CUDA")

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> TrainConfig:
        after = self.warmup_images if self.learning_rate_decay == "cosine" else 0
        if self.learning_rate_decay != "constant" and self.decay_images <= after:
            raise ValueError(
                f"train.learning_rate_decay={self.learning_rate_decay} needs train.decay_images, in images"
                + ", beyond train.warmup_images" * bool(after)
            )
        return self


class EmaConfig(Section):
    """Averaged weights: `ema`, and one called ema-STD for each of `stds`. Each takes 4 bytes a weight on every GPU."""

    decay: float = Field(
        0.9999, ge=0, lt=1, description="of ema, per optimiser step; a half-life of H images is 0.5^(batch_size/H)"
    )
    warmup: Literal["none", "ratio", "power", "edm"] = Field(
        "ratio",
        description="at step n at most: ratio: (1+n)/(10+n); power: 1-(1+(n-1)/inv_gamma)^-power; "
        "edm: a half-life of a twentieth of the steps so far",
    )
    inv_gamma: float = Field(1.0, gt=0, le=LARGEST, description="of warmup=power")
    power: float = Field(2 / 3, gt=0, le=LARGEST, description="of warmup=power")
    stds: Stds = Field(
        (), description="more averages, of EDM2's power functions of relative standard deviation, such as 0.05,0.10"
    )
    snapshot_epochs: int = Field(
        0, ge=0, le=LARGEST, description="keep these in half precision every so many epochs, for `ddpm ema`; 0: never"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the power-function averages."""
        return tuple(map(average_name, self.stds))

    @model_validator(mode="after")
    def _is_possible(self) -> EmaConfig:
        if len({*self.names}) < len(self.stds):
            raise ValueError("ema.stds has one of them twice")
        if self.snapshot_epochs and not self.stds:
            raise ValueError("ema.snapshot_epochs keeps the averages of ema.stds: say which, such as 0.05,0.10")
        return self


class CheckpointConfig(Section):
    """When to commit, and what to keep."""

    every_epochs: int = Field(1, ge=1, le=LARGEST, description="at the end of every so many epochs")
    every_minutes: float = Field(10.0, gt=0, le=LARGEST, description="and when the last one is so many minutes old")
    keep_last: int = Field(3, ge=1, le=LARGEST, description="the newest so many stay")
    keep_every_epochs: int = Field(0, ge=0, le=LARGEST, description="0: none beyond keep_last and keep_epochs")
    keep_epochs: Counts = Field((), description="those at the end of these epochs stay, such as 30,80,490")
    keep_best: bool = Field(False, description="also the one with the best score: the first of evaluate.metrics")


OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "ddpm": ("variance",),
    "ddim": ("eta",),
    "euler": (),
    "euler_ancestral": (),
    "heun": ("churn",),
    "dpmpp_2m": (),
    "dpmpp_3m": (),
    "dpmpp_sde_2m": (),
    "unipc": ("order",),
    "ipndm": ("order",),
    "deis": ("order",),
    "own": (),
}
"""The samplers, and what only some of them take; `own` is somebody's own, which a command names."""
_ORDERS = {"dpmpp_2m": 2, "dpmpp_3m": 3, "dpmpp_sde_2m": 2}
"""Of the multistep samplers that do not take it as an option."""


class Drawing(Section):
    """All that decides the picture of a seed, beside the weights' own checkpoint."""

    sampler: Literal[
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "heun",
        "dpmpp_2m",
        "dpmpp_3m",
        "dpmpp_sde_2m",
        "unipc",
        "ipndm",
        "deis",
        "own",
    ] = Field("ddim", description="own: `ddpm sample --sampler module:function` alone")
    steps: int = Field(100, ge=1, le=LARGEST, description="points that are visited")
    grid: Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "found"] = Field(
        "trailing", description="found: on the run's own network, by `ddpm sample` alone"
    )
    shift: float = Field(1.0, gt=0, le=100, description="of schedule=flow: moves the grid to more noise; 1: off")
    eta: float = Field(0.0, ge=0, le=1, description="of ddim: the share of random noise")
    order: int = Field(3, ge=1, le=4, description="of unipc, ipndm and deis: how many estimates make a step")
    churn: float = Field(0.0, ge=0, le=LARGEST, description="of heun: noise added before steps; EDM's S_churn")
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = Field("fixed_large", description="of ddpm")
    clip: bool = Field(True, description="keep the estimated image within [-1, 1]")
    guidance: float = Field(1.0, ge=0, le=LARGEST, description="away from images of no class; 1: none")
    guidance_interval: Interval | None = Field(None, description="from and to which sigma/alpha; none: everywhere")
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the contrast that guidance adds taken back")
    autoguidance: int = Field(0, ge=0, le=LARGEST, description="guide away from this epoch's network instead; 0: no")
    autoguidance_run: str = Field("", description="whose network that is; empty: the run's own")
    labels: Labels = Field((), description="numbers of the classes that seeds take in turn; none: all")
    weights: Weights = Field("ema", description="ema, ema-STD (averaged) or model (raw)")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: that of the training")

    @property
    def drawing(self) -> Drawing:
        """This part alone, with the values of options that its sampler does not take as they are by default."""
        unused = {option for options in OPTIONS_OF.values() for option in options} - {*OPTIONS_OF[self.sampler]}
        if self.guidance == 1:
            unused |= {"guidance_interval", "guidance_rescale"}
        return Drawing(**self.model_dump(include=Drawing.model_fields.keys() - unused))

    def name(self, own: Drawing) -> str:
        """Part of a picture's name: sampler and steps, then where this differs from the run's `own`."""
        words = [f"{key}-{value}" for key, value in self._differing(own).items()]
        return "-".join([self.sampler, str(self.steps), *words])

    def words(self, own: Drawing) -> str:
        """The same for people, but for the classes, which a picture names: `ddim, 50 steps, eta 1`."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self._differing(own).items() if key != "labels"]
        return ", ".join([self.sampler, f"{self.steps:,} steps", *words])

    def _differing(self, own: Drawing) -> dict[str, str]:
        ours, theirs = self.drawing.model_dump(exclude={"sampler", "steps"}), own.drawing.model_dump()
        return {key: _word(value) for key, value in ours.items() if value != theirs[key]}


class SampleConfig(Drawing):
    """Defaults of `ddpm sample`, and the pictures that training makes."""

    images: int = Field(64, ge=1, le=10_000, description="images of the grid made at the end and every `every_epochs`")
    every_epochs: int = Field(0, ge=0, le=LARGEST, description="0: only at the end")
    batch_size: int = Field(64, ge=1, le=10_000, description="images that are drawn at a time, on each process")
    nearest: bool = Field(False, description="show the nearest training image beside each sample")


class EvaluateConfig(Section):
    """Scores of what the run draws while it trains: see `ddpm evaluate`."""

    every_epochs: int = Field(0, ge=0, le=LARGEST, description="0: never")
    images: int = Field(1000, ge=12, le=1_000_000, description="drawn each time, by the section sample")
    references: int = Field(50_000, ge=12, le=1_000_000, description="real images that they are compared with, at most")
    metrics: Annotated[
        tuple[Literal["fid", "kid", "prdc", "mind"], ...], BeforeValidator(_split), Field(min_length=1)
    ] = Field(("kid", "fid"), description="the first of them says which checkpoint is the best")
    extractor: Literal["inception", "mobilenet", "dinov2"] = Field(
        "inception", description="whose features are compared"
    )


class LogConfig(Section):
    """Metrics."""

    every_images: int = Field(12_800, ge=1, le=LARGEST, description="a row at least once an epoch, whatever this is")
    validate_epochs: int = Field(1, ge=0, le=LARGEST, description="val_loss of held-out images so often; 0: never")
    validate_images: int = Field(2048, ge=1, le=LARGEST, description="of the held-out images, at most")
    tracker: Literal["none", "wandb", "mlflow"] = Field("none", description="a service that is told the rows as well")


class RunConfig(Section):
    """The whole configuration of a run."""

    preset: str = Field(default="", description="whose settings the run began with")
    imported: bool = Field(default=False, description="whether it began with somebody else's checkpoint")
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    model: Network = UNetConfig()  # type: ignore[call-arg]
    diffusion: DiffusionConfig = DiffusionConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    ema: EmaConfig = EmaConfig()  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    sample: SampleConfig = SampleConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]
    log: LogConfig = LogConfig()  # type: ignore[call-arg]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network sees, once the dataset is known."""
        assert self.data.size is not None and self.data.channels is not None
        return self.data.channels, self.data.size, self.data.size

    @model_validator(mode="after")
    def _network_fits(self) -> RunConfig:
        self.model.check(self.data.size)
        return self

    @model_validator(mode="after")
    def _network_is_told_what_it_knows(self) -> RunConfig:
        if self.model.kind == "edm2" and self.diffusion.schedule != "edm":
            raise ValueError(
                "model.kind=edm2 is told ln(sigma)/4, not timesteps: set diffusion.schedule=edm and "
                "diffusion.prediction=edm, or choose another network"
            )
        if self.model.kind == "dome" and (self.diffusion.self_conditioning or self.data.augment):
            raise ValueError(
                "model.kind=dome is told the timestep and the class alone, as in its checkpoints: leave out "
                "diffusion.self_conditioning and data.augment, or choose another network"
            )
        return self

    @model_validator(mode="after")
    def _knows_its_best(self) -> RunConfig:
        if self.checkpoint.keep_best and not self.evaluate.every_epochs:
            raise ValueError("checkpoint.keep_best needs scores: set evaluate.every_epochs")
        if self.checkpoint.keep_best and self.evaluate.metrics[0] == "prdc":
            raise ValueError("checkpoint.keep_best goes by the first of evaluate.metrics, and prdc is four scores")
        return self

    @model_validator(mode="after")
    def _draws_what_is_learnt(self) -> RunConfig:
        sample, classes = self.sample, self.model.num_classes
        if self.model.label_dropout and classes == 0:
            raise ValueError(
                f"model.label_dropout={self.model.label_dropout:g} leaves classes out, and the network learns none: "
                "leave it at 0, or train on a dataset with classes"
            )
        if sample.variance == "learned_range" and self.diffusion.variance != "learned_range":
            raise ValueError("sample.variance=learned_range needs a network that learnt it: diffusion.variance")
        if sample.guidance != 1 and not (self.model.label_dropout or sample.autoguidance):
            raise ValueError(
                f"sample.guidance={sample.guidance:g} needs a network that has also learnt images without their class "
                "(model.label_dropout=0.1 when the run begins), or --autoguidance [RUN@]EPOCH"
            )
        if sample.autoguidance and sample.guidance == 1:
            raise ValueError(f"autoguidance from epoch {sample.autoguidance} needs a guidance other than 1, such as 2")
        if sample.labels and classes is not None and max(sample.labels) >= classes:
            raise ValueError(f"sample.labels: there is no class {max(sample.labels)}, of the {classes} of the network")
        return self

    @model_validator(mode="after")
    def _steps_begin_at_noise(self) -> RunConfig:
        steps, timesteps = self.sample.steps, self.diffusion.timesteps
        if steps > timesteps:
            raise ValueError(f"sample.steps={steps} exceeds diffusion.timesteps={timesteps}")
        order = self.sample.order if "order" in OPTIONS_OF[self.sample.sampler] else _ORDERS.get(self.sample.sampler, 1)
        if order > steps:
            raise ValueError(
                f"sample.sampler={self.sample.sampler} is of order {order}, above sample.steps={steps}: take more "
                "steps, a lower sample.order, or another sampler"
            )
        grid, diffusion = self.sample.grid, self.diffusion
        if grid in ("karras", "log_snr") and (diffusion.schedule == "flow" or diffusion.zero_terminal_snr):
            raise ValueError(f"sample.grid={grid} needs a process that leaves something of the image: choose another")
        if self.sample.shift != 1 and (self.diffusion.schedule != "flow" or self.sample.grid == "found"):
            raise ValueError(f"sample.shift={self.sample.shift:g} needs diffusion.schedule=flow and a grid but found")
        if self.sample.grid == "quadratic" and (self.diffusion.schedule != "linear" or steps == 1):
            # It begins at 0.8 T, where other processes have much of the image left.
            raise ValueError(
                "sample.grid=quadratic is for diffusion.schedule=linear and two steps or more: use another"
            )
        stride = timesteps // steps
        if self.sample.grid == "leading" and (first := (steps - 1) * stride) < 0.8 * timesteps:
            fitting = f"{timesteps // stride} or {timesteps // (stride + 1)}" if stride > 1 and steps > 5 else "more"
            raise ValueError(
                f"sample.steps={steps} with sample.grid=leading would begin at t={first} of {timesteps}, where "
                f"images are no noise yet: use {fitting} steps, or another grid"
            )
        return self

    def to_yaml(self) -> str:
        """The text of `config.yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """All values by their dotted keys, such as `train.batch_size`."""
        return flatten(self.model_dump(mode="json"))

    def updated(self, changes: dict[str, Any]) -> RunConfig:
        """The same with other values of some dotted keys; raises as `validated`."""
        return validated(layered(self.flat(), changes))


def _word(value: Any) -> str:
    """A value as part of a file's name."""
    if isinstance(value, tuple):
        words = "_".join(map(_word, value))
        # File systems end names at 255 bytes.
        return words if len(words) <= 40 else hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


FREE = {
    "train.epochs",
    "train.micro_batch_size",
    "train.compile",
    "data.cache_gigabytes",
    "ema.snapshot_epochs",
    "model.gradient_checkpointing",
}
FREE_SECTIONS = {"checkpoint", "sample", "evaluate", "log"}
"""Keys and sections that an attempt may change: they decide when and how something is done, never what is learnt."""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def layered(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes over the base, both of dotted keys; another kind of network begins with its own defaults."""
    kind = base.get("model.kind", "unet")
    if changes.get("model.kind", kind) != kind:
        base = {key: value for key, value in base.items() if not key.startswith("model.")}
    return base | changes


def validated(flat: dict[str, Any], where: str = "configuration") -> RunConfig:
    """A `RunConfig` from dotted keys; `where` they come from is named if something is wrong.

    Raises:
        BadConfigError: naming each bad key, what is wrong with it, and its value.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, leaf = key.partition(".")
        if leaf:
            nested.setdefault(section, {}).update({leaf: value})
        else:
            nested[section] = value
    model = nested.setdefault("model", {})
    if isinstance(model, dict):
        model.setdefault("kind", "unet")
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        problems: dict[tuple[str, ...] | str, str] = {}
        for problem in error.errors():
            loc, what, got = problem["loc"], problem["msg"].removeprefix("Value error, "), problem["input"]
            if problem["type"] == "union_tag_invalid":
                loc, what, got = ("model", "kind"), f"choose one of {', '.join(NETWORKS)}", model["kind"]
            elif loc[0:1] == ("model",):
                # The second is the kind, by which pydantic chose among the networks.
                loc = (*loc[:1], *loc[2:])
                if problem["type"] == "extra_forbidden":
                    what = f"is no option of model.kind={model['kind']}"
            key = ".".join(map(str, loc))
            # A rule between keys names them itself; in a list, whose elements may all be wrong, the first one is named.
            setting = tuple(part for part in loc if isinstance(part, str)) or what
            problems.setdefault(setting, f"{key}: {what.lower()} (got {got!r:.200})" if key else what)
        raise BadConfigError(f"{where}: {'; '.join(problems.values())}") from None


def changed_for_attempt(stored: RunConfig, wanted: RunConfig, run: str) -> dict[str, Any]:
    """What this attempt changes about its run.

    Raises:
        BadConfigError: a difference in a key that decides what is learnt, with both values and the way out.
    """
    before = stored.flat()
    now = wanted.flat()
    if wanted.model.kind != stored.model.kind:
        # Of two kinds of networks there is nothing else to compare.
        now = {key: value for key, value in now.items() if key == "model.kind" or not key.startswith("model.")}
    changes = {key: value for key, value in now.items() if before[key] != value and key != "preset"}
    # What a run that was imported computes in, the first machine that trains it decides.
    free = FREE | ({"train.precision"} if stored.train.precision == "auto" else set())
    # A network with self-conditioning learns from estimates that are clipped as its samples are.
    learnt = {"sample.clip"} if stored.diffusion.self_conditioning else set()
    fixed = [
        f"{key}: the run has {before[key]}, asked for {value}"
        for key, value in changes.items()
        if key in learnt or (key not in free and key.split(".")[0] not in FREE_SECTIONS)
    ]
    if fixed:
        raise BadConfigError(
            f"run {run!r} was started with another configuration ({'; '.join(fixed)}). "
            "Leave these out to go on with it, start another run with --run NAME, or delete this one "
            f"(ddpm runs delete {run} --yes)"
        )
    return changes


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


EMBEDDED = "landscape-sample"
"""The dataset that comes with the program, and the preset that others begin with."""

MOST_SETTINGS_BYTES = 1 << 18
"""Of a file with settings or targets."""

FOLLOWS = ("data.size", "data.channels", "model.num_classes")
"""Keys that the dataset decides, unless somebody does."""
CHOSEN_ELSEWHERE = {
    "preset": "--preset NAME",
    "imported": "ddpm import",
    "data.dataset": "--dataset NAME",
    "data.dataset_id": "--dataset NAME",
    "data.latents": "--dataset NAME",
    **dict.fromkeys(("sample.autoguidance", "sample.autoguidance_run"), "ddpm sample --autoguidance [RUN@]EPOCH"),
}
"""Keys that a person does not set, and the option that does."""


def preset_names() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir())


class _PlainLoader(yaml.CSafeLoader):
    """YAML with each key once and without aliases: they can make a small file refer to itself, or be gigabytes.

    It is libyaml's: the loader in Python takes 10 ms for a run's configuration, and a bucket has hundreds.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node in self.constructed_objects or node in self.recursive_objects:
            raise yaml.YAMLError(f"aliases are not supported, as of line {node.start_mark.line + 1}")
        value = super().construct_object(node, deep)
        if isinstance(value, int) and value.bit_length() > 64:
            # Thousands of hexadecimal digits would be one that no message can repeat.
            raise yaml.YAMLError("a number is beyond 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # The last one would win without a word.
            ((twice, _),) = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"{twice!r} is there twice, below line {node.start_mark.line + 1}")
        return mapping


def parse_yaml(text: str | bytes) -> Any:
    """Plain data from YAML.

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


def parse_mapping(text: str, where: str, of: str = "sections such as `train:`") -> dict[str, Any]:
    """A YAML file that is a mapping `of` something, or empty; `where` it lies is named if it is neither.

    Raises:
        BadConfigError: it is something else, or not valid.
    """
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict | None):
        raise BadConfigError(f"{where} must be a mapping of {of}")
    return document or {}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known; nothing if none is like it."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_settings(path: Path) -> str:
    """A file that somebody wrote by hand, such as `targets.yaml`.

    Raises:
        OSError: it cannot be read.
        BadConfigError: it is a pipe, or longer than such a file can be; /dev/zero never ends.
    """
    if path.is_fifo():
        raise BadConfigError(f"{path} is a pipe, and each process of a command reads it anew: name a file")
    with path.open("rb") as file:
        text = file.read(MOST_SETTINGS_BYTES + 1)
    if len(text) > MOST_SETTINGS_BYTES:
        raise BadConfigError(f"{path} has more than {MOST_SETTINGS_BYTES >> 10} KiB: is it the file that you mean?")
    # What is no text is no YAML either, which says so.
    return text.decode(errors="surrogateescape")


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        there = f"(there are: {', '.join(preset_names())})"
        raise BadRequestError(f"there is no preset {name!r}{did_you_mean(name, preset_names())} {there}")
    return parse_mapping((resources.files("job") / "presets" / f"{name}.yaml").read_text(), f"preset {name}")


def pack_config(name: str) -> PackConfig | None:
    """How the dataset `name` is packed, if a preset of that name says so."""
    return PackConfig.model_validate(_preset(name)["pack"]) if name in preset_names() else None


def usual_of(name: str) -> UsualConfig | None:
    """What is usual for runs of this preset, if somebody measured it."""
    usual = _preset(name).get("usual") if name in preset_names() else None
    return UsualConfig.model_validate(usual) if usual else None


def field_of(key: str, kind: str = "unet") -> FieldInfo:
    """What is known of a dotted key, of this kind of network: type, default, description."""
    section, _, leaf = key.rpartition(".")
    if not section:
        return RunConfig.model_fields[leaf]
    annotation: Any = NETWORKS[kind] if section == "model" else RunConfig.model_fields[section].annotation
    return annotation.model_fields[leaf]


def known_keys() -> list[str]:
    """All dotted keys, those of every kind of network among them."""
    of_networks = (f"model.{key}" for network in NETWORKS.values() for key in network.model_fields)
    return list(dict.fromkeys([*RunConfig().flat(), *of_networks]))


def _only_known(flat: dict[str, Any], where: str) -> dict[str, Any]:
    keys = known_keys()
    for key in flat:
        if key not in keys:
            leaf = key.rsplit(".", 1)[-1]
            close = [k for k in keys if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(key, keys, n=1)
            sections = ", ".join(name for name in RunConfig.model_fields if name not in CHOSEN_ELSEWHERE)
            hint = f"; did you mean {close[0]!r}?" if close else f" (sections: {sections})"
            raise BadConfigError(f"{where}: unknown key {key!r:.200}{hint}")
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
            raise BadConfigError(f"--set {assignment!r:.200}: write it as key=value, for example train.batch_size=64")
        try:
            flat[key.strip()] = parse_yaml(text)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise BadConfigError(f"--set {assignment!r:.200}: the value is not valid YAML ({why:.200})") from None
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
        values = parse_mapping(read_settings(path), str(path))
    except OSError as error:
        raise MissingInputError(f"--config {path}: {error.strerror}") from None
    return _only_known(flatten(values), str(path))


def preset_keys(name: str) -> dict[str, Any]:
    """What a preset says, by dotted keys.

    Raises:
        BadRequestError: there is none of this name.
    """
    return flatten({key: value for key, value in _preset(name).items() if key not in ("pack", "usual")})


def draft(preset: str, changes: dict[str, Any]) -> RunConfig:
    """The preset with the user's changes, before the dataset is known; finds all errors that need no bucket."""
    return validated(layered(preset_keys(preset) | {"preset": preset}, changes))
