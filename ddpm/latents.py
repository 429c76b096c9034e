"""Encoded images: each is a normal distribution, of which every image number draws (Rombach et al. 2022, 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm import randomness


@dataclass(frozen=True)
class Latents:
    """The statistics that normalise a dataset's latents to mean 0 and deviation 1 in each of their C channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def drawn(self, seed: int, image_numbers: Tensor, moments: Tensor) -> Tensor:
        """Returns x_0 of images: z ~ N(mean, exp(log-variance)), normalised, by the seed and the images' numbers.

        Args:
            seed: the run's seed.
            image_numbers: int64 [b].
            moments: mean and log-variance, [b, 2 C, h, w].

        Returns:
            float32 [b, C, h, w].
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        noise = randomness.latents_noise(seed, image_numbers, tuple(mean.shape[1:]), mean.device)
        centre, scale = self._of(mean)
        return (mean + (0.5 * log_variance).exp() * noise - centre) / scale

    def restored(self, x: Tensor) -> Tensor:
        """Returns the latents that the autoencoder decodes, for x_0 [b, C, h, w]."""
        centre, scale = self._of(x)
        return x * scale + centre

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each, device=x.device).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return mean, std
