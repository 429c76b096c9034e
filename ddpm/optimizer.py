"""The optimiser: Adam, and the learning rate as a function of images seen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.adam import adam


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of the optimiser and its learning rate."""

    learning_rate: float
    warmup_images: int = 0
    """Images over which the learning rate grows linearly; 0: no warm-up."""
    learning_rate_decay: Literal["constant", "inverse_root", "cosine"] = "constant"
    """The decay: as 1/√images from `decay_images` on (Karras et al. 2024), or along half a cosine from the end of the
    warm-up to zero at `decay_images`."""
    decay_images: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Share of each weight that a step at a learning rate of 1 would remove."""
    clip_norm: float = 1.0
    """Limit of the gradient's global L2 norm."""

    def learning_rate_at(self, images_seen: int, batch_size_images: int) -> float:
        """Returns the learning rate of the step after `images_seen` images."""
        rate = self.learning_rate
        if self.warmup_images:
            rate *= min(1.0, (images_seen + batch_size_images) / self.warmup_images)
        if self.learning_rate_decay == "inverse_root":
            rate /= math.sqrt(max(images_seen / self.decay_images, 1.0))
        elif self.learning_rate_decay == "cosine":
            done = (images_seen - self.warmup_images) / (self.decay_images - self.warmup_images)
            rate *= (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        return rate


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), by PyTorch's fused kernel, for the parameters that have a gradient.

    With weight decay it is AdamW (Loshchilov & Hutter 2019, algorithm 2) as in PyTorch, which subtracts lr · decay.
    `torch.optim.Adam` computes the same, but imports the compiler, which takes more than a second.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> None:
        self._parameters, self._settings = dict(named_parameters), settings
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.steps = {name: torch.zeros((), device=p.device) for name, p in self._parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates the parameters from their gradients, and frees the gradients."""
        names = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        adam(
            params=[self._parameters[name] for name in names],
            grads=[grad for name in names if (grad := self._parameters[name].grad) is not None],
            exp_avgs=[self.exp_avg[name] for name in names],
            exp_avg_sqs=[self.exp_avg_sq[name] for name in names],
            max_exp_avg_sqs=[],
            state_steps=[self.steps[name] for name in names],
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self._settings.betas[0],
            beta2=self._settings.betas[1],
            lr=learning_rate,
            weight_decay=self._settings.weight_decay,
            eps=self._settings.eps,
            maximize=False,
        )
        for parameter in self._parameters.values():
            parameter.grad = None
