"""The optimiser: Adam, and the learning rate as a function of images seen."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adam import adam

from ddpm.catalogue import Train


def learning_rate_at(train: Train, images_seen: int) -> float:
    """Returns the learning rate of the step after `images_seen` images.

    It decays as 1/√images from `decay_images` on (`inverse_root`; Karras et al. 2024), or along half a cosine from the
    end of the warm-up to zero at `decay_images`.
    """
    rate = train.learning_rate
    if train.warmup_images:
        rate *= min(1.0, (images_seen + train.batch_size) / train.warmup_images)
    if train.learning_rate_decay == "inverse_root":
        rate /= math.sqrt(max(images_seen / train.decay_images, 1.0))
    elif train.learning_rate_decay == "cosine":
        done = (images_seen - train.warmup_images) / (train.decay_images - train.warmup_images)
        rate *= (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    return rate


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), by PyTorch's fused kernel, for the parameters that have a gradient.

    With weight decay it is AdamW (Loshchilov & Hutter 2019, algorithm 2) as in PyTorch, which subtracts lr · decay.
    `torch.optim.Adam` computes the same, but imports the compiler, which takes more than a second.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        self._parameters, self._train = dict(named_parameters), train
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
            beta1=self._train.adam_betas[0],
            beta2=self._train.adam_betas[1],
            lr=learning_rate,
            weight_decay=self._train.weight_decay,
            eps=self._train.adam_eps,
            maximize=False,
        )
        for parameter in self._parameters.values():
            parameter.grad = None
