"""The configuration of a run: its sections, and the whole."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from job.config.fields import (
    LARGEST,
    LARGEST_SIZE,
    Beta,
    Counts,
    Interval,
    Labels,
    Section,
    Share,
    Stds,
    Weights,
    average_name,
    split_list,
)
from job.config.networks import NETWORKS, Network, UNetConfig
from job.config.rules import RULES
from job.exits import BadConfigError


class DataConfig(Section):
    """Which images, in which order."""

    dataset: str = Field("", description="its name")
    dataset_id: str = Field("", description="what its images are, as a hash")
    size: int | None = Field(None, ge=1, le=LARGEST_SIZE, description="pixels; follows the dataset")
    channels: int | None = Field(None, ge=1, le=256, description="follows the dataset")
    latents: bool = Field(False, description="whether the images are encoded; follows the dataset")
    flip: bool = Field(True, description="mirror half of the images, drawn per image number")
    crop_scale: Annotated[tuple[Share, Share], BeforeValidator(split_list)] = Field(
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
    adam_betas: Annotated[tuple[Beta, Beta], BeforeValidator(split_list)] = Field(
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

    @property
    def sampler_order(self) -> int:
        """How many estimates of the image make one step, and so the least number of steps."""
        return self.order if "order" in OPTIONS_OF[self.sampler] else _ORDERS.get(self.sampler, 1)

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
        tuple[Literal["fid", "kid", "prdc", "mind"], ...], BeforeValidator(split_list), Field(min_length=1)
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
    def _follows_rules(self) -> RunConfig:
        for rule in RULES:
            rule(self)
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
