"""From seeds to pictures: one image per seed, whatever the batch, the order or the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ddpm import randomness, samplers
from ddpm.grids import Grid, make_grid
from ddpm.objective import UNCONDITIONAL, Condition, Network
from ddpm.prediction import Prediction
from ddpm.process import Point, Process
from ddpm.samplers import Denoiser, Variance

Callback = Callable[[Point[float], Tensor, Tensor], None]
"""Called at every evaluation of the network with (point, x_t, the estimated x_0)."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `eta` is DDIM's (0: deterministic); `variance` is the ancestral sampler's."""

    sampler: str
    steps: int
    grid: Grid
    eta: float = 0.0
    variance: Variance = "fixed_large"
    clip: bool = True
    """Whether the estimated x_0 is clipped to [-1, 1] (as Ho et al.'s code does)."""

    def points(self, process: Process) -> list[Point[float]]:
        """The points to visit, the clean image included."""
        return make_grid(process, self.steps, self.grid)

    @property
    def evaluations(self) -> int:
        """How often the network is asked for one image."""
        return self.steps


def make_denoiser(
    network: Network,
    process: Process,
    prediction: Prediction,
    condition: Condition = UNCONDITIONAL,
    clip: bool = True,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    callback: Callback | None = None,
) -> Denoiser:
    """Turn a network into a denoiser.

    Args:
        network: the network, in evaluation mode.
        process: the one it was trained with.
        prediction: what its output means.
        condition: what else it is told.
        clip: see `Sampling`.
        autocast: context for the network alone, such as bf16 autocast; all other arithmetic is fp32.
        callback: see `Callback`.

    Returns:
        A function (x_t, point) → x_0, float32, without gradients.
    """

    @torch.no_grad()
    def denoise(x_t: Tensor, point: Point[float]) -> Tensor:
        t = torch.full((len(x_t),), point.t, dtype=torch.float32, device=x_t.device)
        with autocast():
            output = network(process.input_scale(point.sigma) * x_t, t, condition).float()
        x_start = prediction.x_start(output, x_t, point)
        if clip:
            x_start = x_start.clamp(-1, 1)
        if callback is not None:
            callback(point, x_t, x_start)
        return x_start

    return denoise


def generate(
    network: Network,
    process: Process,
    prediction: Prediction,
    sampling: Sampling,
    seeds: Tensor,
    shape: tuple[int, int, int],
    condition: Condition = UNCONDITIONAL,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    callback: Callback | None = None,
) -> Tensor:
    """Draws one image per seed.

    Args:
        network: on the device of `seeds`, in eval mode.
        process: the one it was trained with.
        prediction: what its output means.
        sampling: the sampler and its grid.
        seeds: int64 [B]. Image k depends on seeds[k] (and what the condition says of it) alone.
        shape: (C, H, W).
        condition: what else the network is told.
        autocast: see `make_denoiser`.
        callback: see `Callback`.

    Returns:
        float32 [B, C, H, W] in [-1, 1].
    """
    device, points = seeds.device, sampling.points(process)

    def noise_at(draw: int) -> Tensor:
        noise = randomness.sampling_noise(seeds, draw, shape, device)
        return noise.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else noise

    denoise = make_denoiser(network, process, prediction, condition, sampling.clip, autocast, callback)
    # A process that keeps the variance ends at unit variance, one that lets it explode at σ.
    x = max(1.0, points[0].sigma) * noise_at(0)
    with torch.inference_mode():
        return _SAMPLERS[sampling.sampler](sampling)(denoise, x, points, noise_at).clamp(-1, 1)


_SAMPLERS: dict[str, Callable[[Sampling], samplers.Sampler]] = {
    "ddpm": lambda chosen: partial(samplers.ancestral, variance=chosen.variance),
    "ddim": lambda chosen: partial(samplers.ddim, eta=chosen.eta),
}
