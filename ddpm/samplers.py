"""Samplers: from noise to images, as flat functions of a denoiser and the points to visit.

A denoiser maps (x_t, point) to an estimate of x_0, so the samplers know neither what the network predicts nor how the
process is called. Coefficients are float64 on the host: no step waits for the device. Noise is asked for by the number
of the draw, from 1; draw 0 is what sampling begins with.
"""

from collections.abc import Callable, Sequence
from itertools import count, pairwise
from math import sqrt
from typing import Literal

from torch import Tensor

from ddpm.process import Point

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
"""Variance of an ancestral step: the posterior's β̃_t, β_t (Ho et al. 2020, section 3.2), or learnt, between them."""

SHARES = {"fixed_small": 0.0, "fixed_large": 1.0}
"""How far the variance lies from β̃_t to β_t, on a logarithmic scale (Nichol & Dhariwal 2021, equation 15)."""

Denoiser = Callable[[Tensor, Point[float]], Tensor]
"""(x_t [B, C, H, W], point) → the estimated x_0, float32 [B, C, H, W]; for `learned_range` [B, 2C, H, W]: x_0 and the
share of β_t."""

NoiseAt = Callable[[int], Tensor]
"""Number of a draw → standard normal noise, float32 [B, C, H, W]."""

Sampler = Callable[[Denoiser, Tensor, Sequence[Point[float]], NoiseAt], Tensor]
"""(denoiser, x at the first point, points, noise) → x at the last point."""


def ancestral(
    denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt, variance: Variance = "fixed_small"
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_s ~ q(x_s | x_t, x_0), on any grid of any process.

    Args:
        denoise: the denoiser.
        x: what sampling begins with, float32 [B, C, H, W].
        points: from that of x to where to end, with less noise each.
        noise_at: the noise of each step that does not end at the clean image.
        variance: how much of it is added.

    Returns:
        x at the last point, float32 [B, C, H, W].
    """
    draws = count(1)
    for point, after in pairwise(points):
        answer, channels = denoise(x, point), x.shape[1]
        x_start, share = answer[:, :channels], SHARES.get(variance, answer[:, channels:])
        # q(x_t | x_s) has mean (α_t/α_s) x_s and this variance, which is β_t where no timestep is left out.
        alpha = point.alpha / after.alpha
        beta = point.sigma**2 - (alpha * after.sigma) ** 2
        x = (after.alpha * beta / point.sigma**2) * x_start + (alpha * after.sigma**2 / point.sigma**2) * x
        if after.sigma:
            x = x + sqrt(beta) * (after.sigma / point.sigma) ** (1 - share) * noise_at(next(draws))
    return x


def ddim(denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16), with ε derived from x_t and the (clipped) x_0.

    It is Euler's method on the probability-flow ODE in σ/α, and for η = 1 Euler's ancestral one (Karras et al. 2022;
    k-diffusion); for η = 1 on the full grid of a table of β it is `ancestral` with `fixed_small`.

    Args:
        denoise: the denoiser.
        x: float32 [B, C, H, W], at the first point.
        points: from that of x to where to end; growing noise, with η = 0, finds the noise of an image.
        noise_at: the noise of each step that does not end at the clean image; not asked for η = 0.
        eta: η in [0, 1], the share of random noise.

    Returns:
        x at the last point, float32 [B, C, H, W].
    """
    draws = count(1)
    for point, after in pairwise(points):
        x_start = denoise(x, point)
        epsilon = (x - point.alpha * x_start) / point.sigma
        sigma_up = 0.0
        if eta and after.sigma:
            beta = point.sigma**2 - (point.alpha / after.alpha * after.sigma) ** 2
            sigma_up = eta * after.sigma / point.sigma * sqrt(beta)
        # Rounding may leave -1e-17 under the root where almost no signal is left.
        x = after.alpha * x_start + sqrt(max(after.sigma**2 - sigma_up**2, 0.0)) * epsilon
        if sigma_up:
            x = x + sigma_up * noise_at(next(draws))
    return x
