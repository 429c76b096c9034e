"""Samplers: from noise x_T to images x_0, as flat functions of a denoiser.

A denoiser maps (x_t, t) to an estimate of x_0, so the samplers know nothing of what the network predicts. A grid is the
descending list of timesteps to visit. Coefficients are float64 on the host: no step waits for the device.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ddpm.objective import Network
from ddpm.schedule import NoiseSchedule, Prediction

Spacing = Literal["leading", "trailing", "quadratic"]

Variance = Literal["fixed_small", "fixed_large"]
"""Variance of an ancestral step: the posterior's β̃_t, or β_t (Ho et al. 2020, section 3.2)."""

Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t [B, C, H, W], t) → the estimated x_0, float32 [B, C, H, W]."""

NoiseAt = Callable[[int], Tensor]
"""t → the standard normal noise of the step that leaves t, float32 [B, C, H, W]."""

Callback = Callable[[int, Tensor, Tensor], None]
"""Called at every timestep with (t, x_t, the estimated x_0)."""


def timestep_grid(num_timesteps: int, steps: int, spacing: Spacing) -> list[int]:
    """The timesteps to visit; all of them when steps = num_timesteps.

    Args:
        num_timesteps: T.
        steps: how many to visit, 1..T.
        spacing: `leading`: 0, c, 2c … with c = T // steps. `trailing`: T-1, T-1-T/steps …, rounded; it alone always
            begins at T-1, where x_T is the noise the network was trained on (Lin et al. 2024, table 2). `quadratic`:
            squares of evenly spaced numbers up to √(0.8 T), rounded down (Song et al. 2021, appendix D.2), but the
            i-th at least i, so that no timestep comes twice.

    Returns:
        `steps` different timesteps, descending.

    Raises:
        ValueError: for steps outside 1..T or an unknown spacing.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be between 1 and {num_timesteps}, the timesteps of the schedule, not {steps}")
    if spacing == "leading":
        ascending = [i * (num_timesteps // steps) for i in range(steps)]
    elif spacing == "trailing":
        ascending = [round(num_timesteps * (i + 1) / steps) - 1 for i in range(steps)]
    elif spacing == "quadratic":
        gap = math.sqrt(0.8 * num_timesteps) / max(steps - 1, 1)
        ascending = [max(i, int((i * gap) ** 2)) for i in range(steps)]
    else:
        raise ValueError(f"unknown spacing {spacing!r}: choose leading, trailing or quadratic")
    return ascending[::-1]


def make_denoiser(
    model: Network, schedule: NoiseSchedule, prediction: Prediction, labels: Tensor | None = None, clip: bool = True
) -> Denoiser:
    """Turn a network into a denoiser.

    Args:
        model: the network, in evaluation mode.
        schedule: the schedule it was trained with, on the device of the images.
        prediction: what its output means.
        labels: class indices, int64 [B], for a network with classes.
        clip: whether to clip the estimated x_0 to [-1, 1] (as Ho et al.'s code does).

    Returns:
        A function (x_t, t) → x_0, float32, without gradients.
    """

    @torch.no_grad()
    def denoise(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        output = model(x_t, timesteps, labels).float()
        x_start = schedule.x_start_from(output, x_t, timesteps, prediction)
        return x_start.clamp(-1, 1) if clip else x_start

    return denoise


def sample_ancestral(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: list[int],
    noise_at: NoiseAt,
    variance: Variance,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any grid.

    Args:
        denoise: the denoiser.
        x_T: standard normal noise, float32 [B, C, H, W].
        schedule: the noise schedule.
        timesteps: the grid, descending.
        noise_at: the noise of each step but the last, which takes none.
        variance: how much of it is added.
        callback: sees every step.

    Returns:
        x_0, float32 [B, C, H, W].
    """
    x_t = x_T
    for t, t_prev in pairwise([*timesteps, -1]):
        x_start = denoise(x_t, t)
        if callback is not None:
            callback(t, x_t, x_start)
        noise = noise_at(t) if t_prev >= 0 else None
        x_t = ancestral_step(schedule, x_t, x_start, t, t_prev, noise, variance)
    return x_t


def sample_ddim(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: list[int],
    noise_at: NoiseAt,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021), deterministic for η = 0; on the full grid with η = 1 it is ancestral `fixed_small`.

    Args:
        denoise: the denoiser.
        x_T: standard normal noise, float32 [B, C, H, W].
        schedule: the noise schedule.
        timesteps: the grid, descending.
        noise_at: the noise of each step but the last; not asked for η = 0.
        eta: η in [0, 1], the share of random noise.
        callback: sees every step.

    Returns:
        x_0, float32 [B, C, H, W].

    Raises:
        ValueError: for η outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    x_t = x_T
    for t, t_prev in pairwise([*timesteps, -1]):
        x_start = denoise(x_t, t)
        if callback is not None:
            callback(t, x_t, x_start)
        noise = noise_at(t) if eta > 0 and t_prev >= 0 else None
        x_t = ddim_step(schedule, x_t, x_start, t, t_prev, eta, noise)
    return x_t


def ancestral_step(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x_start: Tensor,
    t: int,
    t_prev: int,
    noise: Tensor | None,
    variance: Variance,
) -> Tensor:
    """Sample q(x_prev | x_t, x_0) (Ho et al. 2020, equations 6 and 7), with β = 1 - ᾱ_t/ᾱ_prev where steps are skipped.

    Args:
        schedule: the noise schedule.
        x_t: float32 [B, C, H, W].
        x_start: the estimated x_0, of the same shape.
        t: the timestep of x_t.
        t_prev: the timestep to go to; -1 is the clean image, which equals `x_start`.
        noise: standard normal noise of the same shape; not used for t_prev = -1.
        variance: β̃ or β.

    Returns:
        x_prev, float32 [B, C, H, W].

    Raises:
        ValueError: for an unknown variance, or noise that is needed and missing.
    """
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    if variance == "fixed_small":
        sigma = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * beta)
    elif variance == "fixed_large":
        sigma = math.sqrt(beta) if t_prev >= 0 else 0.0
    else:
        raise ValueError(f"unknown variance {variance!r}: choose fixed_small or fixed_large")
    mean = (math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)) * x_start
    mean += (math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)) * x_t
    return _add_noise(mean, sigma, noise)


def ddim_step(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x_start: Tensor,
    t: int,
    t_prev: int,
    eta: float,
    noise: Tensor | None,
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equations 12 and 16), with ε derived from x_t and the (clipped) x_0.

    Args:
        schedule: the noise schedule.
        x_t: float32 [B, C, H, W].
        x_start: the estimated x_0, of the same shape.
        t: the timestep of x_t.
        t_prev: the timestep to go to; -1 is the clean image, which equals `x_start`.
        eta: η in [0, 1].
        noise: standard normal noise of the same shape; not used for η = 0 or t_prev = -1.

    Returns:
        x_prev, float32 [B, C, H, W].

    Raises:
        ValueError: for noise that is needed and missing.
    """
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * math.sqrt(variance)
    epsilon = (x_t - math.sqrt(alpha_bar) * x_start) / math.sqrt(1 - alpha_bar)
    # Rounding may leave -1e-17 under the root where almost no signal is left at t.
    mean = math.sqrt(alpha_bar_prev) * x_start + math.sqrt(max(1 - alpha_bar_prev - sigma**2, 0.0)) * epsilon
    return _add_noise(mean, sigma, noise)


def _add_noise(mean: Tensor, sigma: float, noise: Tensor | None) -> Tensor:
    if sigma == 0:
        return mean
    if noise is None:
        raise ValueError("this step needs noise: only steps to t_prev = -1, and DDIM steps with eta 0, do without")
    return mean + sigma * noise
