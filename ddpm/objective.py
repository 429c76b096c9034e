"""The training loss: what the network predicts, and how much each timestep counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ddpm.schedule import NoiseSchedule, Prediction

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, C, H, W], timesteps int64 [B], labels int64 [B] or None) → prediction [B, C, H, W]."""


@dataclass(frozen=True, eq=False)
class Objective:
    """Denoising loss of Ho et al. 2020 (equation 14) for ε- or v-prediction, optionally with the min-SNR weight.

    All of it is float32; autocast, if any, belongs around the network alone.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    min_snr_gamma: float | None = None
    """γ of Hang et al. 2023; None weighs all timesteps alike."""

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"unknown prediction {self.prediction!r}: choose epsilon or v")

    def losses(
        self, model: Network, x_start: Tensor, timesteps: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Noise the images, run the network, compare.

        Args:
            model: the network.
            x_start: images [B, C, H, W] in [-1, 1].
            timesteps: int64 [B].
            noise: standard normal ε, float32 [B, C, H, W].
            labels: class indices, int64 [B], for a network with classes.

        Returns:
            float32 [B]: each image's squared error, averaged over its pixels and weighted.
        """
        x_t = self.schedule.add_noise(x_start, noise, timesteps)
        target = noise if self.prediction == "epsilon" else self.schedule.velocity(x_start, noise, timesteps)
        output = model(x_t, timesteps, labels).float()
        return self.weights(timesteps) * (output - target).square().mean(dim=(1, 2, 3))

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each timestep's squared error at the network's output (Hang et al. 2023, section 3.4).

        min(SNR, γ) on the error of x_0, which is 1/SNR of the error of ε and 1/(SNR+1) of the error of v.

        Args:
            timesteps: int64 [B].

        Returns:
            float32 [B].
        """
        snr = self.schedule.snr[timesteps]
        if self.min_snr_gamma is None:
            return torch.ones_like(snr)
        if self.prediction == "epsilon":
            # Not min(SNR, γ) / SNR: an SNR that underflows to 0 would make it 0/0.
            return (self.min_snr_gamma / snr).clamp(max=1)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1)
