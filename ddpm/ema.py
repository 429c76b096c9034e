"""Averaged weights: the ones to sample from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AverageSettings:
    """How fast the average forgets."""

    decay: float
    """Of the old average in one update, as it is reached in the end."""
    warmup: bool
    """Whether to begin with min(decay, (1 + n)/(10 + n)) after n batches, as latent-diffusion does, so that the random
    initial weights are forgotten early."""

    def decay_at(self, images_seen: int, batch_size_images: int) -> float:
        """The factor on the old average, for the update after `images_seen` images, the present batch included."""
        if not self.warmup:
            return self.decay
        n = images_seen / batch_size_images
        return min(self.decay, (1 + n) / (10 + n))


class EMA:
    """Exponential moving average of a module's parameters, in float32 whatever their dtype.

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
