"""Averages of the weights, for sampling: updated while training, or combined from stored averages afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.catalogue import ExponentialAverage


@dataclass(frozen=True)
class Exponential(ExponentialAverage):
    """An exponential average, whose factor is smaller while it warms up, so that it forgets the random initial weights.

    After n batches the factor is at most (1 + n)/(10 + n) with `ratio`, as in latent-diffusion; 1 - (1 +
    (n-1)/inv_gamma)^-power with `power`, as in diffusers; with `edm` the half-life is at most a twentieth of the
    batches so far (Karras et al. 2022).
    """

    def decay_at(self, images_seen: int, batch_size_images: int) -> float:
        """Returns the factor on the old average for the update after `images_seen` images, this batch included."""
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
    """An average in which weights at time τ count as τ^γ (Karras et al. 2024, section 3.1).

    Its width is proportional to the length of training. The first update copies the weights.
    """

    std: float
    """σ_rel: standard deviation of the profile, as a share of the time since training began; below 1/√12."""

    @cached_property
    def gamma(self) -> float:
        """γ, the largest root of σ_rel² (γ+2)² (γ+3) = γ+1 (algorithm 2)."""
        inverse = self.std**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def decay_at(self, images_seen: int, batch_size_images: int) -> float:
        """Returns β = (1 - Δt/t)^(γ+1); the arguments are those of `Exponential.decay_at`."""
        return float((1 - batch_size_images / images_seen) ** (self.gamma + 1))


Profile = Exponential | PowerFunction


class Stored(NamedTuple):
    """A power-function average at some moment of training."""

    std: float
    images_seen: int


def reconstruct(stored: Sequence[Stored], wanted: Stored) -> tuple[np.ndarray, float]:
    """Returns the sum of stored averages whose profile is nearest to another one (Karras et al. 2024, section 3.2).

    The factors add up to one, which the paper does not require: the average of constant weights is these weights.

    Args:
        stored: averages of different moments, none later than the wanted one.
        wanted: any average, stored or not.

    Returns:
        The factors, float64, and the norm of the difference between the two profiles, relative to the wanted one.
    """
    products = _inner_products([*stored, wanted])
    products /= products[-1, -1]
    # The last row and column belong to the Lagrange multiplier that makes the factors add up to one.
    system, right = np.ones_like(products), np.append(products[:-1, -1], 1.0)
    system[:-1, :-1], system[-1, -1] = products[:-1, :-1], 0.0
    factors = np.linalg.lstsq(system, right)[0][:-1]
    difference = np.append(factors, -1.0)
    return factors, float(max(difference @ products @ difference, 0.0) ** 0.5)


def _inner_products(averages: Sequence[Stored]) -> np.ndarray:
    """Returns the inner products of all profiles (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t, float64 [n, n] (algorithm 3)."""
    gammas = {average.std: PowerFunction(average.std).gamma for average in averages}
    gamma = np.array([gammas[average.std] for average in averages])[:, None]
    t = np.array([average.images_seen for average in averages], np.float64)[:, None]
    shared = np.minimum(t, t.T)
    within = (shared / t) ** gamma * (shared / t.T) ** gamma.T
    return (gamma + 1) * (gamma.T + 1) / (gamma + gamma.T + 1) * within * shared / (t * t.T)


def _chosen(model: nn.Module, names: Collection[str] | None) -> list[tuple[str, nn.Parameter]]:
    return [(name, each) for name, each in model.named_parameters() if names is None or name in names]


class EMA:
    """Moving average of a module's parameters, in float32 for any dtype.

    It takes the bare module: the caller strips the wrappers of DDP and torch.compile, whose prefixes change the names.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Begins with the parameters of these names, or with all."""
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in _chosen(model, names)
        }

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Updates the average: shadow ← decay · shadow + (1 - decay) · parameter, without waiting for the device."""
        parameters = dict(model.named_parameters())
        current = [parameters[name].to(torch.float32) for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    def before_change(self) -> None:
        """Returns when the parameters may change."""

    def finish(self) -> None:
        """Returns when `shadow` holds all updates."""

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the parameters that are averaged."""
        self.finish()
        parameters = dict(model.named_parameters())
        torch._foreach_copy_([parameters[name] for name in self.shadow], list(self.shadow.values()))


class HostEMA(EMA):
    """An average in host memory: a thread updates it beside the next step.

    From a GPU the parameters are copied to page-locked memory first. On a CPU the thread reads them where they are, and
    its bits are those of `EMA`; on a GPU the kernel of `EMA` may round otherwise.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        parameters = {name: parameter.detach() for name, parameter in _chosen(model, names)}
        device = next(iter(parameters.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.shadow = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in parameters.items()}
        if self._stream is not None:
            parameters = {name: torch.empty_like(t, device="cpu", pin_memory=True) for name, t in parameters.items()}
        self._read = parameters
        self._pool, self._update = ThreadPoolExecutor(1, "average"), Future[None]()
        self._update.set_result(None)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Begins the update of `EMA`; the parameters must not change before `before_change`."""
        self.finish()
        copied = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                parameters = dict(model.named_parameters())
                for name, read in self._read.items():
                    read.copy_(parameters[name], non_blocking=True)
                copied = self._stream.record_event()
        self._update = self._pool.submit(self._add, 1 - decay, torch.get_num_threads(), copied)

    @torch.no_grad()
    def _add(self, weight: float, threads: int, copied: torch.cuda.Event | None) -> None:
        # The setting is that of this thread.
        torch.set_num_threads(threads)
        if copied is not None:
            copied.synchronize()
        current = [self._read[name].to("cpu", torch.float32) for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), current, weight)

    def before_change(self) -> None:
        """Returns when the parameters may change: on a GPU the next kernels wait for the copy, and not this thread."""
        if self._stream is None:
            self.finish()
        else:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def finish(self) -> None:
        """Returns when `shadow` holds all updates; raises the error of the last one."""
        self._update.result()
