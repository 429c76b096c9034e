"""The settings of a run: all sections but the network's, and `RunConfig`, the whole."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from job.config.fields import LARGEST, LARGEST_SIZE, AsList, Counts, Interval, Section, Stds, Weights, average_name
from job.config.networks import NETWORKS, Network, UNetConfig
from job.config.rules import RULES
from job.exits import BadConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Labels = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST)], ...], AsList]


class DataConfig(Section):
    """The images, their augmentation and their order."""

    dataset: str = Field("", description="name of the dataset")
    dataset_id: str = Field("", description="hash of the dataset's images")
    size: int | None = Field(None, ge=1, le=LARGEST_SIZE, description="pixels per side; null: as in the dataset")
    channels: int | None = Field(None, ge=1, le=256, description="channels of the images; null: as in the dataset")
    latents: bool = Field(False, description="the images are latents of an autoencoder")
    flip: bool = Field(True, description="mirror half of the images, chosen at random")
    crop_scale: Annotated[tuple[Share, Share], AsList] = Field(
        (1.0, 1.0), description="random crops: smallest and largest share of the image's area; 1,1: no crops"
    )
    augment: float = Field(0.0, ge=0, le=1, description="probability of each augmentation of EDM, given to the network")
    shuffle_block_images: int = Field(0, ge=0, le=LARGEST, description="images per shuffled block; 0: all of them")
    order: Literal["feistel-1"] = Field("feistel-1", description="version of the shuffling algorithm")
    cache_gigabytes: float = Field(32.0, gt=0, le=LARGEST, description="local disk space per node for cached images")

    @model_validator(mode="after")
    def _is_possible(self) -> DataConfig:
        if self.latents and (self.flip or self.augment or self.crop_scale != (1.0, 1.0)):
            raise ValueError("data.flip, data.crop_scale and data.augment need pixels, and the dataset holds latents")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={self.crop_scale}: the smaller share comes first")
        return self


class DiffusionConfig(Section):
    """The process, the network's output, and the weight of each noise level."""

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "edm", "flow"] = Field(
        "linear", description="noise schedule: one of four tables of betas, EDM, or rectified flow"
    )
    timesteps: int = Field(1000, ge=2, le=10_000, description="number of timesteps")
    zero_terminal_snr: bool = Field(False, description="rescale the betas so that the last timestep is pure noise")
    sigma_min: float = Field(0.002, gt=0, le=LARGEST, description="smallest sigma of schedule=edm")
    sigma_max: float = Field(80.0, gt=0, le=LARGEST, description="largest sigma of schedule=edm")
    sigma_data: float = Field(0.5, gt=0, le=LARGEST, description="standard deviation of the images; for EDM's formulas")
    prediction: Literal["epsilon", "x0", "v", "flow", "edm"] = Field(
        "epsilon", description="output of the network: the noise, the image, or a mixture of both"
    )
    weighting: Literal["plain", "snr", "min_snr", "soft_min_snr", "edm", "flow"] = Field(
        "plain", description="weight of the loss at each noise level; plain: squared error of the network's output"
    )
    gamma: float = Field(5.0, gt=0, le=LARGEST, description="limit of the SNR, for weighting=min_snr or soft_min_snr")
    draws: Literal["uniform", "log_normal"] = Field("uniform", description="training distribution of t or sigma/alpha")
    draws_mean: float = Field(-1.2, ge=-100, le=100, description="mean of ln(sigma/alpha), with draws=log_normal")
    draws_std: float = Field(1.2, gt=0, le=100, description="standard deviation of ln(sigma/alpha), likewise")
    stratified: bool = Field(False, description="spread the noise levels of a batch evenly over their distribution")
    variance: Literal["fixed", "learned_range"] = Field("fixed", description="learned_range: predicted by the network")
    self_conditioning: bool = Field(False, description="half of the batches give the network its own estimate of x_0")
    offset_noise: float = Field(0.0, ge=0, le=1, description="standard deviation of a noise offset in each channel")

    @model_validator(mode="after")
    def _is_possible(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.schedule in ("edm", "flow"):
            raise ValueError(f"diffusion.zero_terminal_snr rescales betas, and schedule={self.schedule} has none")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            raise ValueError(
                "diffusion.prediction=epsilon cannot recover an image from pure noise, where "
                f"{'zero_terminal_snr' if self.zero_terminal_snr else 'schedule=flow'} starts: use v, x0 or flow"
            )
        if self.variance == "learned_range":
            no_betas = self.schedule in ("edm", "flow")
            wrong = {"schedule": no_betas, "draws": self.draws != "uniform", "offset_noise": self.offset_noise > 0}
            if keys := [key for key, is_wrong in wrong.items() if is_wrong]:
                raise ValueError(
                    "diffusion.variance=learned_range needs a table of betas, uniform draws and no offset noise: "
                    f"change diffusion.{keys[0]}"
                )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"diffusion.sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        return self


class TrainConfig(Section):
    """Optimisation. All lengths are in images, so that they mean the same on any number of GPUs."""

    batch_size: int = Field(128, ge=1, le=1_000_000, description="images per optimiser step, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, le=LARGEST, description="images at once per process; null: all")
    learning_rate: float = Field(2e-4, gt=0, le=LARGEST, description="learning rate after the warm-up")
    warmup_images: int = Field(0, ge=0, le=LARGEST, description="images over which the learning rate rises linearly")
    learning_rate_decay: Literal["constant", "inverse_root", "cosine"] = Field(
        "constant", description="decay of the learning rate after the warm-up"
    )
    decay_images: int = Field(0, ge=0, le=LARGEST, description="images seen when inverse_root starts or cosine ends")
    adam_betas: Annotated[tuple[Beta, Beta], AsList] = Field((0.9, 0.999), description="decay of Adam's two moments")
    adam_eps: float = Field(1e-8, gt=0, le=LARGEST, description="Adam's epsilon, added to the second moment's root")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST, description="AdamW's decay, times the learning rate; 0: Adam")
    clip_norm: float = Field(1.0, gt=0, le=LARGEST, description="largest L2 norm of the whole gradient")
    epochs: int = Field(1, ge=1, le=1_000_000, description="number of passes over the dataset, in total")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers: weights, data order, noise, dropout")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 if the hardware has it")
    deterministic: bool = Field(False, description="bit-identical results on GPUs of one kind; slower")
    compile: bool = Field(True, description="use torch.compile on CUDA")

    @model_validator(mode="after")
    def _decays_after_warmup(self) -> TrainConfig:
        decay, after = self.learning_rate_decay, self.warmup_images if self.learning_rate_decay == "cosine" else 0
        if decay != "constant" and self.decay_images <= after:
            than = f"train.warmup_images={after}" if after else "0"
            raise ValueError(f"train.learning_rate_decay={decay} needs a train.decay_images above {than}")
        return self


class EmaConfig(Section):
    """Averages of the weights: `ema`, and `ema-STD` for each of `stds`; each takes 4 bytes a weight on every GPU."""

    decay: float = Field(
        0.9999, ge=0, lt=1, description="decay per step: 0.5^(batch_size/H) for a half-life of H images"
    )
    warmup: Literal["none", "ratio", "power", "edm"] = Field(
        "ratio",
        description="limit of the decay at step n: ratio: (1+n)/(10+n); power: 1-(1+(n-1)/inv_gamma)^-power; "
        "edm: a half-life of a twentieth of the steps so far",
    )
    inv_gamma: float = Field(1.0, gt=0, le=LARGEST, description="parameter of warmup=power")
    power: float = Field(2 / 3, gt=0, le=LARGEST, description="parameter of warmup=power")
    stds: Stds = Field((), description="relative widths of further averages, as in EDM2; such as 0.05,0.10")
    snapshot_epochs: int = Field(0, ge=0, le=LARGEST, description="store stds every N epochs, for `ddpm ema`; 0: never")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the power-function averages."""
        return tuple(map(average_name, self.stds))

    @model_validator(mode="after")
    def _is_possible(self) -> EmaConfig:
        if len({*self.names}) < len(self.stds):
            raise ValueError("ema.stds has the same value twice")
        if self.snapshot_epochs and not self.stds:
            raise ValueError("ema.snapshot_epochs stores the averages of ema.stds: set these, for example to 0.05,0.10")
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved, and which ones are kept."""

    every_epochs: int = Field(1, ge=1, le=LARGEST, description="save every N epochs")
    every_minutes: float = Field(10.0, gt=0, le=LARGEST, description="also save N minutes after the last save")
    keep_last: int = Field(3, ge=1, le=LARGEST, description="keep the newest N checkpoints")
    keep_every_epochs: int = Field(0, ge=0, le=LARGEST, description="also keep one checkpoint every N epochs; 0: none")
    keep_epochs: Counts = Field((), description="also keep the checkpoints of these epochs, such as 30,80,490")
    keep_best: bool = Field(False, description="also keep the checkpoint with the best score; see evaluate.metrics")


_Multistep = Literal["dpmpp_2m", "dpmpp_3m", "dpmpp_sde_2m", "unipc", "ipndm", "deis"]
Sampler = Literal["ddpm", "ddim", "euler", "euler_ancestral", "heun", _Multistep, "own"]
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(get_args(Sampler), ()),
    "ddpm": ("variance",),
    "ddim": ("eta",),
    "heun": ("churn",),
    **dict.fromkeys(("unipc", "ipndm", "deis"), ("order",)),
}
"""The options that only some samplers take, by sampler; `own` is a function that a command names."""
_ORDERS = {"dpmpp_2m": 2, "dpmpp_3m": 3, "dpmpp_sde_2m": 2}
"""The orders of the multistep samplers whose order cannot be chosen."""


class Drawing(Section):
    """The settings that decide which image a seed gives, for the same checkpoint."""

    sampler: Sampler = Field("ddim", description="sampling algorithm; own: a function, only with `ddpm sample`")
    steps: int = Field(100, ge=1, le=LARGEST, description="number of sampling steps")
    grid: Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "found"] = Field(
        "trailing", description="spacing of the steps; found: optimised for the network, only with `ddpm sample`"
    )
    shift: float = Field(1.0, gt=0, le=100, description="shift of the grid to more noise, for schedule=flow; 1: off")
    eta: float = Field(0.0, ge=0, le=1, description="share of random noise in a step of ddim; 0: deterministic")
    order: int = Field(3, ge=1, le=4, description="order of unipc, ipndm and deis: estimates used per step")
    churn: float = Field(0.0, ge=0, le=LARGEST, description="noise added before the steps of heun: S_churn of EDM")
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = Field("fixed_large", description="only for ddpm")
    clip: bool = Field(True, description="clip the estimated image to [-1, 1]")
    guidance: float = Field(1.0, ge=0, le=LARGEST, description="guidance scale, for example 2; 1 turns guidance off")
    guidance_interval: Interval | None = Field(None, description="range of sigma/alpha with guidance; null: all")
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of guidance's added contrast that is removed")
    autoguidance: int = Field(0, ge=0, le=LARGEST, description="guide away from this epoch's network; 0: from no class")
    autoguidance_run: str = Field("", description="run of that network; empty: the run itself")
    labels: Labels = Field((), description="class numbers that the seeds take in turn; empty: all")
    weights: Weights = Field("ema", description="weights to use: ema, ema-STD (other averages) or model (raw)")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: as in training")

    @property
    def drawing(self) -> Drawing:
        """Only the settings of `Drawing`; options that the sampler does not take have their defaults."""
        unused = {option for options in OPTIONS_OF.values() for option in options} - {*OPTIONS_OF[self.sampler]}
        if self.guidance == 1:
            unused |= {"guidance_interval", "guidance_rescale"}
        return Drawing(**self.model_dump(include=Drawing.model_fields.keys() - unused))

    @property
    def sampler_order(self) -> int:
        """The order of the sampler, which is also its smallest number of steps."""
        return self.order if "order" in OPTIONS_OF[self.sampler] else _ORDERS.get(self.sampler, 1)

    def name(self, own: Drawing) -> str:
        """Returns a part of a picture's file name: sampler, steps, and what differs from the run's `own` settings."""
        words = [f"{key}-{value}" for key, value in self._differing(own).items()]
        return "-".join([self.sampler, str(self.steps), *words])

    def words(self, own: Drawing) -> str:
        """Returns the same for people, without the classes, which a picture shows: `ddim, 50 steps, eta 1`."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self._differing(own).items() if key != "labels"]
        return ", ".join([self.sampler, f"{self.steps:,} steps", *words])

    def _differing(self, own: Drawing) -> dict[str, str]:
        ours, theirs = self.drawing.model_dump(exclude={"sampler", "steps"}), own.drawing.model_dump()
        return {key: _word(value) for key, value in ours.items() if value != theirs[key]}


def _word(value: Any) -> str:
    """Returns a value as part of a file name."""
    if isinstance(value, tuple):
        words = "_".join(map(_word, value))
        # File systems limit names to 255 bytes.
        return words if len(words) <= 40 else hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


class SampleConfig(Drawing):
    """The defaults of `ddpm sample`, and the pictures that training makes."""

    images: int = Field(64, ge=1, le=10_000, description="number of images in a sample grid")
    every_epochs: int = Field(0, ge=0, le=LARGEST, description="make a sample grid every N epochs; 0: only at the end")
    batch_size: int = Field(64, ge=1, le=10_000, description="images at once on each process")
    nearest: bool = Field(False, description="show the nearest training image beside each sample")


class EvaluateConfig(Section):
    """The scores that a run computes while it trains; see `ddpm evaluate`."""

    every_epochs: int = Field(0, ge=0, le=LARGEST, description="compute scores every N epochs; 0: never")
    images: int = Field(1000, ge=12, le=1_000_000, description="number of samples to score")
    references: int = Field(50_000, ge=12, le=1_000_000, description="largest number of real images to compare with")
    metrics: Annotated[tuple[Literal["fid", "kid", "prdc", "mind"], ...], AsList, Field(min_length=1)] = Field(
        ("kid", "fid"), description="scores to compute; the first decides which checkpoint is the best"
    )
    extractor: Literal["inception", "mobilenet", "dinov2"] = Field("inception", description="network of the features")


class LogConfig(Section):
    """The metrics."""

    every_images: int = Field(12_800, ge=1, le=LARGEST, description="log every N images, and at least once an epoch")
    validate_epochs: int = Field(1, ge=0, le=LARGEST, description="log val_loss every N epochs; 0: never")
    validate_images: int = Field(2048, ge=1, le=LARGEST, description="largest number of held-out images for val_loss")
    tracker: Literal["none", "wandb", "mlflow"] = Field("none", description="service that also gets the metrics")


class RunConfig(Section):
    """The whole configuration of a run."""

    preset: str = Field(default="", description="preset that the run began with")
    imported: bool = Field(default=False, description="the run began with an imported checkpoint")
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
        """Channels, height and width of the network's images, once the dataset is known."""
        assert self.data.size is not None and self.data.channels is not None
        return self.data.channels, self.data.size, self.data.size

    @model_validator(mode="after")
    def _follows_rules(self) -> RunConfig:
        for rule in RULES:
            rule(self)
        return self

    def to_yaml(self) -> str:
        """Returns the text of `config.yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Returns all values by their dotted keys, such as `train.batch_size`."""
        return flatten(self.model_dump(mode="json"))

    def updated(self, changes: dict[str, Any]) -> RunConfig:
        """Returns a copy with other values of some dotted keys; raises as `validated`."""
        return validated(layered(self.flat(), changes))


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
    return f"{'.'.join(map(str, loc))}: {fault[:1].lower()}{fault[1:]} (got {value!r:.200})"
