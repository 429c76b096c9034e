"""What networks have in common: blocks that may be computed twice, sinusoids, what they are told beside t."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.objective import Condition

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
Resize = Literal["down", "up"]


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


def initialised(layer: Layer, zero: bool = False, gain: float = 1.0) -> Layer:
    """Draws Ho et al.'s initial weights, uniform of variance 2 gain²/(fan-in + fan-out), or sets them to zero."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention between tokens, [B, N, C] each, in heads of C/heads channels."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def resized(x: Tensor, resize: Resize) -> Tensor:
    """Half the size, of means of 2×2 pixels, or twice, of pixels doubled."""
    return F.avg_pool2d(x, 2) if resize == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


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
    """x_t [B, C, H, W], and for a network of 2C `in_channels` the estimate of x_0 after it, zero where there is none.

    Raises:
        ValueError: for an estimate that the network does not take.
    """
    if x.shape[1] < in_channels:
        return torch.cat([x, torch.zeros_like(x) if condition.x_start is None else condition.x_start], dim=1)
    if condition.x_start is not None:
        raise ValueError("an estimate of x_0 goes with a network that has self_conditioning: set it, or leave this out")
    return x


def with_labels(
    embedding: Tensor,
    condition: Condition,
    classes: nn.Module | None,
    augmentation: Any = None,
    plus: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """The embedding of t [B, E] `plus` that of the class, and that of the augmentation added.

    Raises:
        ValueError: for labels without classes, classes without labels, or augmentation that is not taken.
    """
    if (condition.labels is None) != (classes is None):
        raise ValueError("labels go with a network that has classes: set num_classes, or leave the labels out")
    if classes is not None:
        embedding = plus(embedding, classes(condition.labels))
    if augmentation is None:
        if condition.augmentation is not None:
            raise ValueError("this network is told of no augmentation: set augmentation_labels, or leave them out")
        return embedding
    # A layer that is left out would have no gradient, which DDP waits for.
    nothing_done = embedding.new_zeros(len(embedding), augmentation.in_features)
    return embedding + augmentation(nothing_done if condition.augmentation is None else condition.augmentation)
