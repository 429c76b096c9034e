"""The variance of an ancestral step, and the variational bound that says what it is worth, in bits per dimension.

What is learnt is where the variance lies between the posterior's and β, on a logarithmic scale: the share of β (Nichol
& Dhariwal 2021, equation 15). The bound is a sum over the steps (equations 4 to 7) that holds for any points of any
process: fewer of them are a bound of their own. Logarithms are natural until the last line.
"""

import math
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from ddpm.process import Number


class Posterior(NamedTuple, Generic[Number]):
    """q(x_s | x_t, x_0) of a step from x_t to x_s, the next point with less noise (Ho et al. 2020, equation 7)."""

    on_x_start: Number
    """What its mean has of x_0, beside its part of x_t."""
    log_small: Number
    """Logarithm of its variance β̃; at the last step, where that is 0, of the one before (Nichol & Dhariwal's code)."""
    log_large: Number
    """Logarithm of β, the variance of q(x_t | x_s)."""


def posteriors(alpha: Tensor, sigma: Tensor) -> Posterior[Tensor]:
    """The step from each of N > 1 points of growing noise to the one before, the clean image at last; float64."""
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
    """KL divergence of a normal distribution from one of another mean, and of the `other` logarithm of its variance."""
    log_ratio = log_variance - other
    return (_exp(log_ratio) - 1 - log_ratio + difference.square() * _exp(-other)) / 2


def log_likelihood_of_levels(x: Tensor, mean: Tensor, log_variance: Tensor | float) -> Tensor:
    """Log-probability that a normal distribution falls into the level of each pixel (Ho et al. 2020, equation 13).

    Pixels `x` have 256 levels in [-1, 1], of which the outermost reach to infinity. It is exact as far as float32 goes:
    Ho et al.'s code has tanh for the error function, and stops at ln 1e-12.
    """
    scale = _exp(-log_variance / 2)
    z, half = (x - mean) * scale, scale / 255
    # In the left tail, where the logarithm of a small probability keeps its digits: the distribution is symmetric.
    upper, lower = torch.special.log_ndtr(half - z.abs()), torch.special.log_ndtr(-half - z.abs())
    inside = upper + (-torch.expm1(lower - upper)).log()
    darkest, brightest = torch.special.log_ndtr(half + z), torch.special.log_ndtr(half - z)
    return torch.where(x < -1 + 1 / 255, darkest, torch.where(x > 1 - 1 / 255, brightest, inside))


def bits(nats: Tensor) -> Tensor:
    """Nats of each value [B, C, H, W] as bits per dimension [B]."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def spread_over_steps(num_timesteps: int, images: int) -> tuple[Tensor, Tensor]:
    """Which step of the bound each of some images gives, and of how many steps that one takes the place.

    The fewer images, the coarser: a step stands for its neighbours, for the fewer the less noise there is, since the
    first steps are most of the bound.

    Returns:
        Numbers of points, int64 [images], and float32 [images]: the mean over the images of bits times that is the sum
        over all steps.
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
