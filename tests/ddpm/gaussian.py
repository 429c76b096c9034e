"""Noise by its number, and normal images, of which denoiser and probability flow are known on any process."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.process import Point

SHAPE = (2, 3, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(draw: int) -> Tensor:
    raise AssertionError("noise was asked for")


@dataclass(frozen=True)
class Gaussian:
    """Images of independent pixels from one normal distribution."""

    mean: float = 0.3
    std: float = 0.4

    def std_at(self, point: Point[float]) -> float:
        """The deviation of x_t."""
        return ((point.alpha * self.std) ** 2 + point.sigma**2) ** 0.5

    def denoise(self, x: Tensor, point: Point[float]) -> Tensor:
        """E[x_0 | x_t]."""
        gain = point.alpha * self.std**2 / self.std_at(point) ** 2
        return self.mean + gain * (x - point.alpha * self.mean)

    def flow(self, x: Tensor, start: Point[float], end: Point[float]) -> Tensor:
        """Where the probability flow leads: the same quantile of the distribution at `end`."""
        return end.alpha * self.mean + self.std_at(end) / self.std_at(start) * (x - start.alpha * self.mean)
