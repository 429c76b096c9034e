"""Processes: the way from an image to noise, as points (t, α, σ) with x_t = α x_0 + σ ε; and predictions there.

Objectives and samplers need nothing of a process but its points, so they work for DDPM, EDM and rectified flow alike.
The host computes points in float64 and rounds once: no step waits for the device, and 1 - ᾱ, as small as 4e-5, keeps
its digits. Half precision is never used for them: in bfloat16 the first ten ᾱ of the linear schedule are 1.
"""

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm.catalogue import PREDICTIONS, SCHEDULES, Diffusion

Number = TypeVar("Number", float, Tensor)
TIMESTEPS = Diffusion.timesteps
MAX_BETA = 0.999
"""Cap on β of the curves of ᾱ."""
CONSTANT = {"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}
"""(q, p) of the predictions that have the same at all points."""


class Point(NamedTuple, Generic[Number]):
    """A noise level: numbers for a sampler, tensors [B] for a batch of images."""

    t: Number
    """The network's input for the noise level."""
    alpha: Number
    """Factor on the image; 0 for pure noise."""
    sigma: Number
    """Standard deviation of the noise; 0 for the clean image."""


CLEAN = Point(-1.0, 1.0, 0.0)
"""The end of sampling, where no network is evaluated."""


class Process(Protocol):
    """T numbered points of growing noise, and all points between them."""

    @property
    def num_timesteps(self) -> int:
        """T."""

    def numbered(self, numbers: Tensor) -> Point[Tensor]:
        """Returns the points of these numbers, int64 [B] in 0..T-1; float64 [B]."""

    def uniform(self, u: Tensor) -> Point[Tensor]:
        """Returns points spread evenly over the process, for u in (0, 1), float64 [B]."""

    def with_ratio(self, ratio: Tensor) -> Point[Tensor]:
        """Returns the points where σ/α is `ratio`, float64 [B]."""

    def input_scale(self, sigma: Number) -> Number:
        """Returns the factor on x_t for the network's input, at points of these σ."""


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """α² + σ² = 1, by a table of ᾱ_t = α² (Ho et al. 2020); `betas` and `alphas_cumprod` are float64 [T]."""

    betas: Tensor
    alphas_cumprod: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> "VariancePreserving":
        """Returns the process of a table of β.

        Args:
            betas: float64 [T], each in (0, 1); the last may be 1.

        Raises:
            ValueError: for an empty table, or another β.
        """
        if betas.numel() == 0 or not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise ValueError("a noise schedule needs at least one timestep, and every beta between 0 and 1")
        return cls(betas.double(), (1 - betas.double()).cumprod(0))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def numbered(self, numbers: Tensor) -> Point[Tensor]:
        """Returns points whose t is the number."""
        alphas_cumprod = self.alphas_cumprod[numbers]
        return Point(numbers.double(), alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    def uniform(self, u: Tensor) -> Point[Tensor]:
        """Returns whole timesteps, which are the network's inputs when a sampler visits all of them."""
        return self.numbered((u * self.num_timesteps).long())

    def with_ratio(self, ratio: Tensor) -> Point[Tensor]:
        """Returns points with t between whole timesteps, by ln(σ/α), as in k-diffusion, and within the table."""
        known = ((1 - self.alphas_cumprod) / self.alphas_cumprod).log() / 2
        t = torch.from_numpy(np.interp(ratio.log().numpy(), known.numpy(), np.arange(self.num_timesteps)))
        alpha = (1 + ratio.square()).rsqrt()
        return Point(t, alpha, ratio * alpha)

    def input_scale(self, sigma: Number) -> Number:
        """Returns 1, since x_t has the variance of the images."""
        return sigma * 0 + 1

    def with_zero_terminal_snr(self) -> "VariancePreserving":
        """Returns the table with √ᾱ shifted and scaled to 0 at T-1 (Lin et al. 2024, algorithm 1)."""
        roots = self.alphas_cumprod.sqrt()
        alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return VariancePreserving(1 - alphas_cumprod / before, alphas_cumprod)


@dataclass(frozen=True)
class VarianceExploding:
    """α = 1 (Karras et al. 2022, table 1). The network's inputs are ln(σ)/4, and x_t at unit variance."""

    num_timesteps: int = TIMESTEPS
    """Number of points, evenly spaced in ln σ."""
    sigma_min: float = Diffusion.sigma_min
    sigma_max: float = Diffusion.sigma_max
    sigma_data: float = Diffusion.sigma_data
    """Standard deviation of the images."""

    def numbered(self, numbers: Tensor) -> Point[Tensor]:
        """Returns points from σ_min to σ_max."""
        return self.uniform(numbers.double() / (self.num_timesteps - 1))

    def uniform(self, u: Tensor) -> Point[Tensor]:
        """Returns points evenly spaced in ln σ."""
        return self.with_ratio(self.sigma_min * (self.sigma_max / self.sigma_min) ** u)

    def with_ratio(self, ratio: Tensor) -> Point[Tensor]:
        """Returns points whose σ is the ratio."""
        return Point(ratio.log() / 4, torch.ones_like(ratio), ratio)

    def input_scale(self, sigma: Number) -> Number:
        """Returns c_in = 1/√(σ² + σ_data²)."""
        return (sigma**2 + self.sigma_data**2) ** -0.5


@dataclass(frozen=True)
class RectifiedFlow:
    """α = 1 - σ: a straight line (Liu et al. 2023; Lipman et al. 2023). The network's input is 1000 σ."""

    num_timesteps: int = TIMESTEPS
    """Number of points, evenly spaced in σ; the last is pure noise."""

    def numbered(self, numbers: Tensor) -> Point[Tensor]:
        """Returns points with σ from 1/T to 1."""
        return self.uniform((numbers.double() + 1) / self.num_timesteps)

    def uniform(self, u: Tensor) -> Point[Tensor]:
        """Returns points whose σ is u."""
        return Point(1000 * u, 1 - u, u)

    def with_ratio(self, ratio: Tensor) -> Point[Tensor]:
        """Returns σ = r/(1 + r); a normal ln(σ/α) is a logit-normal σ (Esser et al. 2024, section 3.1)."""
        return self.uniform(ratio / (1 + ratio))

    def input_scale(self, sigma: Number) -> Number:
        """Returns 1, as is usual."""
        return sigma * 0 + 1


def linear_schedule(
    num_timesteps: int = TIMESTEPS, beta_start: float = 1e-4, beta_end: float = 0.02
) -> VariancePreserving:
    """Returns evenly spaced β (Ho et al. 2020, section 4). The ends are not rescaled for another T than 1000.

    Raises:
        ValueError: for fewer than one timestep or a β outside (0, 1).
    """
    betas = torch.linspace(beta_start, beta_end, max(num_timesteps, 0), dtype=torch.float64)
    return VariancePreserving.from_betas(betas)


def scaled_linear_schedule(num_timesteps: int = TIMESTEPS) -> VariancePreserving:
    """Returns evenly spaced √β from 0.00085 to 0.012, which latent-diffusion's code calls linear (Rombach et al. 2022).

    Raises:
        ValueError: for fewer than one timestep.
    """
    ends = math.sqrt(0.00085), math.sqrt(0.012)
    return VariancePreserving.from_betas(torch.linspace(*ends, max(num_timesteps, 0), dtype=torch.float64).square())


def cosine_schedule(num_timesteps: int = TIMESTEPS) -> VariancePreserving:
    """Returns ᾱ(u) ∝ cos²(π/2 · (u+s)/(1+s)), u = t/T (Nichol & Dhariwal 2021, equation 17).

    β_t is 1 - ᾱ((t+1)/T)/ᾱ(t/T). The offset s = 0.008 keeps the first β from vanishing, and β has a cap, which it
    reaches at the last timestep only.

    Raises:
        ValueError: for fewer than one timestep.
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / max(num_timesteps, 1)
    return _from_curve(((u + 0.008) / 1.008 * math.pi / 2).cos().square())


def sigmoid_schedule(num_timesteps: int = TIMESTEPS) -> VariancePreserving:
    """Returns ᾱ(u) along a sigmoid from -3 to 3, scaled to 1 … 0 (Jabri et al. 2023), with β as in `cosine_schedule`.

    Raises:
        ValueError: for fewer than one timestep.
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / max(num_timesteps, 1)
    stretch = (u * 6 - 3).sigmoid()
    return _from_curve((stretch[-1] - stretch) / (stretch[-1] - stretch[0]))


TABLES = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
    "sigmoid": sigmoid_schedule,
}
"""The processes that are a table of β, by name."""


def make_process(diffusion: Diffusion) -> Process:
    """Returns the process of these settings, with the constants of its paper.

    Raises:
        ValueError: for an unknown schedule, fewer than one timestep, or `zero_terminal_snr` without a table of ᾱ.
    """
    schedule, timesteps = diffusion.schedule, diffusion.timesteps
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if schedule in TABLES:
        table = TABLES[schedule](timesteps)
        return table.with_zero_terminal_snr() if diffusion.zero_terminal_snr else table
    if diffusion.zero_terminal_snr:
        raise ValueError(f"zero_terminal_snr rescales a table of betas, which the process {schedule!r} does not have")
    if schedule == "edm":
        return VarianceExploding(timesteps, diffusion.sigma_min, diffusion.sigma_max, diffusion.sigma_data)
    return RectifiedFlow(timesteps)


def _from_curve(alphas_cumprod: Tensor) -> VariancePreserving:
    """Returns the table of ᾱ at the T + 1 ends of the timesteps, float64, with a cap on β."""
    return VariancePreserving.from_betas((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA))


def points_of(points: Point[Tensor]) -> list[Point[float]]:
    """Returns a batch of points as a list, for a sampler."""
    return [Point(*numbers) for numbers in zip(*(part.tolist() for part in points), strict=True)]


@dataclass(frozen=True)
class Prediction:
    """The meaning of a network's output: q x_0 + p ε, for a prediction of ε, x_0, v, the flow or EDM's F.

    With x_t = α x_0 + σ ε this is one linear system, so one line recovers x_0 and one factor relates the errors. Points
    have floats, or tensors that broadcast against the images.
    """

    kind: str
    sigma_data: float = Diffusion.sigma_data
    """Standard deviation of the images, for `edm`."""

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.kind!r}: choose one of {', '.join(PREDICTIONS)}")

    def coefficients(self, point: Point[Number]) -> tuple[Number | float, Number | float]:
        """Returns (q, p) at a point; for F those of Karras et al. 2022, table 1, for any α."""
        if self.kind in CONSTANT:
            return CONSTANT[self.kind]
        if self.kind == "v":
            return -point.sigma, point.alpha
        signal = point.alpha * self.sigma_data
        inverse_root = (point.sigma**2 + signal**2) ** -0.5
        return point.sigma * inverse_root / self.sigma_data, -signal * inverse_root

    def target(self, x_start: Tensor, noise: Tensor, point: Point[Number]) -> Tensor:
        """Returns the target of the output, in the images' shape [B, C, H, W]."""
        q, p = self.coefficients(point)
        return q * x_start + p * noise

    def x_start(self, output: Tensor, x_t: Tensor, point: Point[Number]) -> Tensor:
        """Returns the x_0 that an output for x_t implies, float32 [B, C, H, W]; ε implies no x_0 where α is 0."""
        q, p = self.coefficients(point)
        return (p * x_t - point.sigma * output) / (p * point.alpha - point.sigma * q)

    def error_factor(self, point: Point[Number]) -> Number | float:
        """Returns |output - target|² over |x̂_0 - x_0|²: SNR for ε, SNR + 1 for v, EDM's λ for F."""
        q, p = self.coefficients(point)
        return (q - p * point.alpha / point.sigma) ** 2
