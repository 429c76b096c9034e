"""Guidance: moves an estimate away from a worse one, of the network without a class or of a worse network."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ddpm.catalogue import Drawing
from ddpm.process import Point
from ddpm.samplers import Denoiser

Pair = Callable[[Tensor, Point[float]], tuple[Tensor, Tensor]]
"""(x_t, point) → a denoiser's result, and a worse one."""


@dataclass(frozen=True)
class Guidance:
    """The scale, the range of noise levels and the rescaling of guidance."""

    scale: float = Drawing.guidance
    """Factor on the difference of the estimates: 1 + w of Ho & Salimans 2022, w of Karras et al. 2024; 1: off."""
    interval: tuple[float, float] = (0.0, inf)
    """Guidance is on for σ/α above the first and up to the second (Kynkäänniemi et al. 2024, equation 5)."""
    rescale: float = Drawing.guidance_rescale
    """φ of Lin et al. 2024, equation 16: 1 gives a guided estimate the contrast of the unguided one."""


UNGUIDED = Guidance()


def guided(denoise: Denoiser, both: Pair, guidance: Guidance) -> Denoiser:
    """Returns a guided denoiser; x_0 is an affine function of the network's output for every prediction.

    The worse estimate is that of the null class (Ho & Salimans 2022, equation 6) or that of a network with less
    training (Karras et al. 2024, equation 4). Within the interval it calls `both`, and else `denoise`. The share of β,
    if there is one, is that of the better estimate.
    """
    low, high = guidance.interval

    def denoise_guided(x_t: Tensor, point: Point[float]) -> Tensor:
        if not low < (point.sigma / point.alpha if point.alpha else inf) <= high:
            return denoise(x_t, point)
        (better, share), (worse, _) = (answer.tensor_split([x_t.shape[1]], dim=1) for answer in both(x_t, point))
        estimate = worse + guidance.scale * (better - worse)
        if guidance.rescale:
            contrast = better.std(dim=(1, 2, 3), keepdim=True) / estimate.std(dim=(1, 2, 3), keepdim=True)
            estimate = estimate * (guidance.rescale * contrast + 1 - guidance.rescale)
        return torch.cat([estimate, share], dim=1)

    return denoise_guided
