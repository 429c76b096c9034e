"""What networks have in common: sinusoids, what they are told beside t, blocks that may be computed twice."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.objective import Condition


class Block(nn.Module):
    """A part of a network that keeps nothing between its ends with `recompute`: the backward pass computes it again.

    The result is the same to the bit, dropout included (Chen et al. 2016, "Training deep nets with sublinear memory").
    """

    recompute = False

    def __call__(self, *args: Any) -> Any:
        """As of any module."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def sinusoids(t: Tensor, width: int, freq_shift: int = 0) -> Tensor:
    """Sines, then cosines, of t at width/2 frequencies from 1 down to almost 1/10000 (Vaswani et al. 2017).

    Args:
        t: [B].
        width: even, at least 4.
        freq_shift: 1 to end at 1/10000 itself, as Ho et al.'s code does.

    Returns:
        float32 [B, width].
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def with_estimate(x: Tensor, condition: Condition, in_channels: int) -> Tensor:
    """x_t [B, C, H, W]; for a network with self-conditioning the estimate of x_0 beside it, [B, 2C, H, W].

    Chen et al. 2023, "Analog bits", section 3.2: where there is no estimate yet, it is zero.

    Raises:
        ValueError: for an estimate that the network does not take.
    """
    if x.shape[1] == in_channels and condition.x_start is None:
        return x
    if x.shape[1] == in_channels:
        raise ValueError("an estimate of x_0 goes with a network that has self_conditioning: set it, or leave this out")
    return torch.cat([x, torch.zeros_like(x) if condition.x_start is None else condition.x_start], dim=1)


def with_labels(
    embedding: Tensor, condition: Condition, classes: nn.Module | None, augmentation: nn.Linear | None
) -> Tensor:
    """The embedding of t [B, E] plus those of the class and of the augmentation (Karras et al. 2022, appendix F.2).

    Raises:
        ValueError: for labels without classes, classes without labels, or augmentation labels that are not taken.
    """
    if (condition.labels is None) != (classes is None):
        raise ValueError("labels go with a network that has classes: set num_classes, or leave the labels out")
    if classes is not None:
        embedding = embedding + classes(condition.labels)
    if augmentation is not None:
        # An image that nothing was done to has zeros; a layer left out would have no gradient, which DDP waits for.
        labels = condition.augmentation
        none = embedding.new_zeros(len(embedding), augmentation.in_features)
        embedding = embedding + augmentation(none if labels is None else labels)
    elif condition.augmentation is not None:
        raise ValueError("this network takes no labels of augmentation: set augmentation_labels, or leave them out")
    return embedding
