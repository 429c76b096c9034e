"""From seeds to pictures: one image per seed, whatever the batch, the order or the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ddpm import randomness, samplers
from ddpm.schedule import NoiseSchedule, Prediction


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `eta` is DDIM's (0: deterministic); `variance` is the ancestral sampler's."""

    sampler: Literal["ddpm", "ddim"]
    steps: int
    spacing: Literal["leading", "trailing", "quadratic"]
    eta: float
    variance: Literal["fixed_small", "fixed_large"]

    def timesteps(self, num_timesteps: int) -> list[int]:
        """The descending grid of timesteps."""
        return samplers.timestep_grid(num_timesteps, self.steps, self.spacing)


def generate(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction: Prediction,
    sampling: Sampling,
    seeds: Tensor,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager[None]] | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draws one image per seed.

    Args:
        network: predicts ε or v; on the device of `seeds`, in eval mode.
        schedule: the forward process it was trained with, on the same device.
        prediction: what it predicts.
        sampling: the sampler and its grid.
        seeds: int64 [B]. Image k depends on seeds[k] (and labels[k]) alone.
        shape: (C, H, W).
        labels: int64 [B] for class-conditional networks.
        autocast: context for the network alone, such as bf16 autocast; the sampler's arithmetic is fp32 always.
        callback: called as (t, x_t, x_start) with float32 [B, C, H, W] at every step.

    Returns:
        float32 [B, C, H, W] in [-1, 1].
    """
    device, num_timesteps = seeds.device, schedule.num_timesteps

    def noise_at(draw: int) -> Tensor:
        return randomness.sampling_noise(seeds, draw, shape, device)

    def predict(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        if autocast is None:
            return network(x, timesteps, labels)
        with autocast():
            return network(x, timesteps, labels).float()

    denoise = samplers.make_denoiser(predict, schedule, prediction, labels)
    x_T, timesteps = noise_at(num_timesteps), sampling.timesteps(num_timesteps)
    if device.type == "cuda":
        x_T = x_T.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        if sampling.sampler == "ddim":
            sample = samplers.sample_ddim(denoise, x_T, schedule, timesteps, noise_at, sampling.eta, callback)
        else:
            assert sampling.sampler == "ddpm", sampling.sampler
            sample = samplers.sample_ancestral(denoise, x_T, schedule, timesteps, noise_at, sampling.variance, callback)
    return sample.clamp(-1, 1)
