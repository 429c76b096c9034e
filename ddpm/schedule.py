"""Noise schedules: β → ᾱ and SNR, the forward process q(x_t | x_0), and what a network may predict about it.

Notation of Ho et al. 2020: α_t = 1 - β_t, ᾱ_t = α_0 ⋯ α_t with t in 0..T-1, and x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v"]
"""What the network's output means: the noise ε (Ho et al. 2020) or the velocity v (Salimans & Ho 2022)."""

ScheduleKind = Literal["linear", "cosine"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance schedule as tables over the timestep: float32 [T], computed in float64 and rounded once.

    Half precision must not touch them: in bfloat16 the first ten ᾱ of the linear schedule are 1, no noise at all.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    """ᾱ_t: the part of the signal's variance that is left at t."""
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    snr: Tensor
    """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t)."""
    alphas_cumprod_host: tuple[float, ...] = field(repr=False)
    """ᾱ_t in float64. Samplers take their coefficients from here, so that no step waits for the device, and 1 - ᾱ_t,
    as small as 4e-5, keeps its digits."""

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """Build the tables.

        Args:
            betas: float64 [T], each in (0, 1).

        Raises:
            ValueError: for a β outside (0, 1), or none.
        """
        if betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("a noise schedule needs at least one timestep, and every beta between 0 and 1")
        alphas_cumprod = (1 - betas.double()).cumprod(0)
        return cls(
            betas=betas.float(),
            alphas_cumprod=alphas_cumprod.float(),
            sqrt_alphas_cumprod=alphas_cumprod.sqrt().float(),
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt().float(),
            snr=(alphas_cumprod / (1 - alphas_cumprod)).float(),
            alphas_cumprod_host=tuple(alphas_cumprod.tolist()),
        )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod_host)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its tables on `device`."""
        return NoiseSchedule(
            betas=self.betas.to(device),
            alphas_cumprod=self.alphas_cumprod.to(device),
            sqrt_alphas_cumprod=self.sqrt_alphas_cumprod.to(device),
            sqrt_one_minus_alphas_cumprod=self.sqrt_one_minus_alphas_cumprod.to(device),
            snr=self.snr.to(device),
            alphas_cumprod_host=self.alphas_cumprod_host,
        )

    def alpha_bar(self, t: int) -> float:
        """ᾱ_t in float64 on the host; 1 for t = -1, the clean image."""
        return self.alphas_cumprod_host[t] if t >= 0 else 1.0

    def add_noise(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Sample q(x_t | x_0): √ᾱ_t x_0 + √(1-ᾱ_t) ε (Ho et al. 2020, equation 4).

        Args:
            x_start: [B, C, H, W] in [-1, 1].
            noise: standard normal ε, [B, C, H, W].
            timesteps: int64 [B].

        Returns:
            float32 [B, C, H, W].
        """
        sqrt_alpha_bar, sqrt_one_minus = self._coefficients(timesteps)
        return sqrt_alpha_bar * x_start + sqrt_one_minus * noise

    def velocity(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction: √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans & Ho 2022, section 4); shapes as `add_noise`."""
        sqrt_alpha_bar, sqrt_one_minus = self._coefficients(timesteps)
        return sqrt_alpha_bar * noise - sqrt_one_minus * x_start

    def x_start_from(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, kind: Prediction) -> Tensor:
        """The x_0 that a network's output implies (Ho et al. 2020, equation 15; Salimans & Ho 2022, appendix D).

        Args:
            prediction: the network's output, [B, C, H, W].
            x_t: its input, [B, C, H, W].
            timesteps: int64 [B].
            kind: what the output means.

        Returns:
            float32 [B, C, H, W].

        Raises:
            ValueError: for an unknown kind.
        """
        sqrt_alpha_bar, sqrt_one_minus = self._coefficients(timesteps)
        if kind == "epsilon":
            return (x_t - sqrt_one_minus * prediction) / sqrt_alpha_bar
        if kind == "v":
            return sqrt_alpha_bar * x_t - sqrt_one_minus * prediction
        raise ValueError(f"unknown prediction {kind!r}: choose epsilon or v")

    def noise_from(self, x_start: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The ε that leads from x_0 to x_t, float32 [B, C, H, W]: `add_noise` solved for the noise."""
        sqrt_alpha_bar, sqrt_one_minus = self._coefficients(timesteps)
        return (x_t - sqrt_alpha_bar * x_start) / sqrt_one_minus

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.sqrt_alphas_cumprod[timesteps].view(-1, 1, 1, 1),
            self.sqrt_one_minus_alphas_cumprod[timesteps].view(-1, 1, 1, 1),
        )


def linear_schedule(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Evenly spaced β (Ho et al. 2020, section 4). The ends are not rescaled when T is not 1000.

    Raises:
        ValueError: for fewer than one timestep or a β outside (0, 1).
    """
    return NoiseSchedule.from_betas(torch.linspace(beta_start, beta_end, max(num_timesteps, 0), dtype=torch.float64))


def cosine_schedule(num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """ᾱ(u) ∝ cos²(π/2 · (u+s)/(1+s)), u = t/T, with β_t = 1 - ᾱ((t+1)/T)/ᾱ(t/T) (Nichol & Dhariwal 2021, equation 17).

    Args:
        num_timesteps: T.
        s: offset that keeps the first β from vanishing.
        max_beta: cap on β, reached at the last timestep only.

    Raises:
        ValueError: for fewer than one timestep.
    """

    def alpha_bar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    T = num_timesteps
    betas = [min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), max_beta) for t in range(T)]
    return NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64))


def make_schedule(kind: ScheduleKind, num_timesteps: int) -> NoiseSchedule:
    """The schedule of this name with its paper's constants.

    Raises:
        ValueError: for an unknown name or fewer than one timestep.
    """
    if kind == "linear":
        return linear_schedule(num_timesteps)
    if kind == "cosine":
        return cosine_schedule(num_timesteps)
    raise ValueError(f"unknown schedule {kind!r}: choose linear or cosine")
