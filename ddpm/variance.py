"""The variance of an ancestral step, and the variational bound, in bits per dimension.

The network learns the place of the variance between the posterior's and β, on a logarithmic scale: the share of β
(Nichol & Dhariwal 2021, equation 15). The bound is a sum over the steps (equations 4 to 7) and holds for any points of
any process, also for a part of them. Logarithms are natural except in `bits`.
"""

import math
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from ddpm.process import Number

SHARES = {"fixed_small": 0.0, "fixed_large": 1.0}
"""Place of the variance between β̃_t (0) and β_t (1), on a logarithmic scale (Nichol & Dhariwal 2021, equation 15)."""


class Posterior(NamedTuple, Generic[Number]):
    """q(x_s | x_t, x_0) of a step from x_t to x_s, the next point with less noise (Ho et al. 2020, equation 7)."""

    on_x_start: Number
    """Factor on x_0 in its mean."""
    log_small: Number
    """Logarithm of its variance β̃; at the last step, where β̃ is 0, of that before (Nichol & Dhariwal's code)."""
    log_large: Number
    """Logarithm of β, the variance of q(x_t | x_s)."""


def posteriors(alpha: Tensor, sigma: Tensor) -> Posterior[Tensor]:
    """Returns the step from each of N > 1 points of growing noise to the point before or the clean image; float64."""
    ones, zeros = torch.ones_like(alpha[:1]), torch.zeros_like(sigma[:1])
    alpha_before, sigma_before = torch.cat([ones, alpha[:-1]]), torch.cat([zeros, sigma[:-1]])
    beta = sigma.square() - (alpha / alpha_before * sigma_before).square()
    small = beta * (sigma_before / sigma).square()
    return Posterior(
        on_x_start=alpha_before * beta / sigma.square(),
        log_small=torch.cat([small[1:2], small[1:]]).log(),
        log_large=beta.log(),
    )


def normal_kl(difference: Tensor, log_variance: Tensor | float, other: Tensor | float) -> Tensor:
    """Returns the KL divergence of normal distributions with this difference of means and these log-variances."""
    log_ratio = log_variance - other
    return (_exp(log_ratio) - 1 - log_ratio + difference.square() * _exp(-other)) / 2


def log_likelihood_of_levels(x: Tensor, mean: Tensor, log_variance: Tensor | float) -> Tensor:
    """Returns the log-probability of each pixel's level in a normal distribution (Ho et al. 2020, equation 13).

    Pixels `x` have 256 levels in [-1, 1], of which the outermost extend to infinity. It is exact to float32's
    precision, where Ho et al.'s code approximates the error function by tanh, and stops at ln 1e-12.
    """
    scale = _exp(-log_variance / 2)
    z, half = (x - mean) * scale, scale / 255
    # By symmetry in the left tail, where the logarithm of a small probability keeps its digits.
    upper, lower = torch.special.log_ndtr(half - z.abs()), torch.special.log_ndtr(-half - z.abs())
    inside = upper + (-torch.expm1(lower - upper)).log()
    darkest, brightest = torch.special.log_ndtr(half + z), torch.special.log_ndtr(half - z)
    return torch.where(x < -1 + 1 / 255, darkest, torch.where(x > 1 - 1 / 255, brightest, inside))


def bits(nats: Tensor) -> Tensor:
    """Returns nats of each value [B, C, H, W] as bits per dimension [B]."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def spread_over_steps(num_timesteps: int, images: int) -> tuple[Tensor, Tensor]:
    """Returns the step of the bound for each image, and the number of steps that it represents.

    With fewer images than steps, a step represents its neighbours: fewer of them at little noise, since the first steps
    are most of the bound.

    Returns:
        Numbers of points, int64 [images], and weights, float32 [images]: the mean over the images of bits times weights
        estimates the sum over all steps.
    """
    cells, edges = min(images, num_timesteps), [1]
    for cell in range(1, cells + 1):
        edges.append(max(edges[-1] + 1, round((num_timesteps + 1) ** (cell / cells))))
    firsts, ends = torch.tensor(edges[:-1]) - 1, torch.tensor(edges[1:]) - 1
    mine = torch.arange(images) % cells
    shares = images / mine.bincount()
    return ((firsts + ends - 1) // 2)[mine], ((ends - firsts) * shares)[mine].float()


def _exp(x: Tensor | float) -> Tensor | float:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)
