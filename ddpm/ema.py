"""Averaged weights, the ones to sample from: while training, and put together afterwards from stored averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Exponential:
    """A fixed factor, below it while it warms up, so that the random initial weights are forgotten early.

    After n batches the factor is at most (1 + n)/(10 + n) with `ratio`, as in latent-diffusion;
    1 - (1 + (n-1)/inv_gamma)^-power with `power`, as diffusers has it; and with `edm` the half-life is at most a
    twentieth of the batches before (Karras et al. 2022).
    """

    decay: float
    """Of the old average in one update, as it is reached in the end; a half-life of H images is 0.5^(batch/H)."""
    warmup: Literal["none", "ratio", "power", "edm"] = "none"
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def decay_at(self, images_seen: int, batch_size_images: int) -> float:
        """The factor on the old average, for the update after `images_seen` images, the present batch included."""
        n = images_seen / batch_size_images
        if self.warmup == "ratio":
            return min(self.decay, (1 + n) / (10 + n))
        if self.warmup == "power":
            return min(self.decay, 1 - (1 + (n - 1) / self.inv_gamma) ** -self.power)
        if self.warmup == "edm":
            return min(self.decay, 0.5 ** (20 / (n - 1))) if n > 1 else 0.0
        return self.decay


@dataclass(frozen=True)
class PowerFunction:
    """Weights at time τ count as τ^γ, up to now (Karras et al. 2024, section 3.1): it is as wide as training is long.

    The first update takes the weights as they are, and each needs to know nothing but the time.
    """

    std: float
    """σ_rel: standard deviation of the profile, as a share of the time since training began; below 1/√12."""

    @cached_property
    def gamma(self) -> float:
        """γ, the largest root of σ_rel² (γ+2)² (γ+3) = γ+1 (algorithm 2)."""
        inverse = self.std**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def decay_at(self, images_seen: int, batch_size_images: int) -> float:
        """β = (1 - Δt/t)^(γ+1); arguments are those of `Exponential.decay_at`."""
        return float((1 - batch_size_images / images_seen) ** (self.gamma + 1))


Profile = Exponential | PowerFunction


class Stored(NamedTuple):
    """A power-function average at some moment of training."""

    std: float
    images_seen: int


def reconstruct(stored: Sequence[Stored], wanted: Stored) -> tuple[np.ndarray, float]:
    """Post-hoc EMA: which sum of stored averages has the profile nearest to another (Karras et al. 2024, section 3.2).

    The factors add up to one, which the paper leaves to chance: weights that never change are their own average.

    Args:
        stored: averages up to the wanted moment, of different ones.
        wanted: need not be among them.

    Returns:
        The factors, float64, and the norm of what their profile lacks, as a share of that of the profile wanted.
    """
    products = _inner_products([*stored, wanted])
    products /= products[-1, -1]
    # The last row and column are those of the multiplier that has the factors add up.
    system, right = np.ones_like(products), np.append(products[:-1, -1], 1.0)
    system[:-1, :-1], system[-1, -1] = products[:-1, :-1], 0.0
    factors = np.linalg.lstsq(system, right)[0][:-1]
    difference = np.append(factors, -1.0)
    return factors, float(max(difference @ products @ difference, 0.0) ** 0.5)


def _inner_products(averages: Sequence[Stored]) -> np.ndarray:
    """Of the profiles (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t, each with each: float64 [n, n] (algorithm 3)."""
    gammas = {average.std: PowerFunction(average.std).gamma for average in averages}
    gamma = np.array([gammas[average.std] for average in averages])[:, None]
    t = np.array([average.images_seen for average in averages], np.float64)[:, None]
    shared = np.minimum(t, t.T)
    within = (shared / t) ** gamma * (shared / t.T) ** gamma.T
    return (gamma + 1) * (gamma.T + 1) / (gamma + gamma.T + 1) * within * shared / (t * t.T)


class EMA:
    """Moving average of a module's parameters, in float32 whatever their dtype.

    It takes the bare module: the caller strips the wrappers of DDP and torch.compile, whose prefixes change the names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Move the average: shadow ← decay · shadow + (1 - decay) · parameter. Nothing waits for the device."""
        parameters = dict(model.named_parameters())
        current = [parameters[name].to(torch.float32) for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        parameters = dict(model.named_parameters())
        torch._foreach_copy_([parameters[name] for name in self.shadow], list(self.shadow.values()))
