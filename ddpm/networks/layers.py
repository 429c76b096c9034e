"""Layers that networks share: checkpointed blocks, attention, resizing, sinusoids, and the inputs beside t."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm import randomness
from ddpm.objective import Condition

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
Resize = Literal["down", "up"]
Plus = Callable[[Tensor, Tensor], Tensor]


class _Images(threading.local):
    """The images that this thread computes at once: the seed of their run, and the number of the first one."""

    key: tuple[int, int] | None = None


_images = _Images()


class Block(nn.Module):
    """A part of a network that keeps no activations with `recompute`: the backward pass computes them again.

    The result is bit-identical, with dropout as well (Chen et al. 2016, "Training deep nets with sublinear memory").
    """

    recompute = False

    def __call__(self, *args: Any) -> Any:
        """Calls the module, under a checkpoint if it recomputes."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class Dropout(nn.Module):
    """Dropout whose masks a CPU draws from (seed, first image number, layer), in any thread and order.

    PyTorch's own takes them from one generator that all threads share. A GPU uses it, seeded by the same images: there
    a generator per layer would cut the compiled graph.
    """

    number = 0
    """The place of the layer among the modules of its network."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Maps x to x/(1 - p), or 0 with probability p; in evaluation to itself."""
        if x.device.type != "cpu" or not (self.training and self.probability) or _images.key is None:
            return F.dropout(x, self.probability, self.training)
        generator, kept = torch.Generator(), 1 - self.probability
        generator.manual_seed(randomness.dropout_seed(*_images.key, layer=self.number))
        return x * torch.empty_like(x).bernoulli_(kept, generator=generator).div_(kept)


@contextmanager
def dropout_of(seed: int, first_image_number: int) -> Iterator[None]:
    """Draws the dropout masks of this thread by the seed of the run and the first number of the images."""
    # Before that PyTorch would keep each call, with its stack, for ever.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(randomness.dropout_seed(seed, first_image_number))
    _images.key = seed, first_image_number
    try:
        yield
    finally:
        _images.key = None


def repeat_dropout() -> None:
    """Lets a second pass within `dropout_of` draw the masks of the first; on a CPU each pass does so by itself."""
    if torch.cuda.is_initialized() and (key := getattr(_images, "key", None)):
        torch.cuda.manual_seed(randomness.dropout_seed(*key))


def initialised(layer: Layer, zero: bool = False, gain: float = 1.0) -> Layer:
    """Initialises weights as Ho et al., uniform of variance 2 gain²/(fan-in + fan-out), or with zeros."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Returns softmax attention between tokens, [B, N, C] each, in heads of C/heads channels."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def resized(x: Tensor, resize: Resize) -> Tensor:
    """Returns x at half the size, with means of 2×2 pixels, or at twice the size, with doubled pixels."""
    return F.avg_pool2d(x, 2) if resize == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


NUMBER_FREQUENCIES = 16
"""Sines and cosines of each number of a condition vector."""


def sinusoids(t: Tensor, width: int, freq_shift: int = 0) -> Tensor:
    """Returns sines, then cosines, of t at width/2 frequencies from 1 down to almost 1/10000 (Vaswani et al. 2017).

    Args:
        t: [B].
        width: even, at least 4.
        freq_shift: 1: end at exactly 1/10000, as Ho et al.'s code.

    Returns:
        float32 [B, width].
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NumbersEmbedding(nn.Module):
    """Two dense layers on Fourier features of numbers; the second begins at zero, so that a network can get it later.

    Numbers that are left out have features of zero, which no number has.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.linear_1 = initialised(nn.Linear(2 * NUMBER_FREQUENCIES * count, width))
        self.linear_2 = initialised(nn.Linear(width, width), zero=True)

    def forward(self, numbers: Tensor) -> Tensor:
        """Maps normalised numbers and 1, or zeros, [B, k + 1] to [B, E]."""
        # From half a period over ±4 deviations to one over a tenth of a deviation.
        octaves = torch.arange(NUMBER_FREQUENCIES, device=numbers.device) / 2
        angles = numbers[:, :-1, None].float() * (math.pi / 8 * 2**octaves)
        features = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1) * numbers[:, -1:]
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class Told(NamedTuple):
    """The inputs that a network has beside x_t, its estimate, t and the class; see `ddpm.networks.build`."""

    augmentation_labels: int = 0
    condition_channels: int = 0
    vector_size: int = 0
    condition_noise: bool = False


NOT_TOLD = Told()


def _dense(width_in: int, width_out: int) -> nn.Module:
    return initialised(nn.Linear(width_in, width_out, bias=False))


class ToldNetwork(nn.Module):
    """A network with such inputs."""

    def _take(self, told: Told, in_channels: int, width: int, dense: Callable[[int, int], nn.Module] = _dense) -> None:
        """Adds the embeddings of the inputs, of this width; `in_channels` are those of all images."""
        self.told, self.in_channels, labels = told, in_channels, told.augmentation_labels
        self.augmentation_embedding = dense(labels, width) if labels else None
        self.vector_embedding = NumbersEmbedding(told.vector_size, width) if told.vector_size else None
        self.noise_embedding = NumbersEmbedding(1, width) if told.condition_noise else None

    def _with_images(self, x: Tensor, condition: Condition, *others: Tensor) -> Tensor:
        """Returns x_t, the estimate of x_0, or zeros, if it is taken, others, and the condition image, in this order.

        Raises:
            ValueError: the network does not take an estimate, or its condition image is missing or superfluous.
        """
        parts, channels = [x], self.told.condition_channels
        if x.shape[1] < self.in_channels - channels:
            parts.append(torch.zeros_like(x) if condition.x_start is None else condition.x_start)
        elif condition.x_start is not None:
            raise ValueError(
                "an estimate of x_0 goes with a network that has self_conditioning: set it, or leave this out"
            )
        given = 0 if condition.image is None else condition.image.shape[1]
        if given != channels:
            raise ValueError(f"the network takes {channels} channels of a condition image, not {given}")
        # Last: the weights of a network that gets a condition later are its own, followed by zeros.
        parts += [*others, *([] if condition.image is None else [condition.image.to(x.dtype)])]
        return torch.cat(parts, dim=1) if len(parts) > 1 else x

    def _with_condition(
        self, embedding: Tensor, condition: Condition, classes: nn.Module | None, plus: Plus = torch.add
    ) -> Tensor:
        """Returns the embedding of t [B, E] `plus` that of the class, with those of the other inputs added.

        Raises:
            ValueError: an input is missing or superfluous.
        """
        if (condition.labels is None) != (classes is None):
            raise ValueError("labels go with a network that has classes: set num_classes, or leave the labels out")
        if classes is not None:
            embedding = plus(embedding, classes(condition.labels))
        if (augmentation := condition.augmentation) is None and self.augmentation_embedding is not None:
            # DDP waits for the gradient of this layer, even if no image is augmented.
            augmentation = embedding.new_zeros(len(embedding), self.told.augmentation_labels)
        level = None if condition.image_noise is None else F.pad(condition.image_noise[:, None], (0, 1), value=1.0)
        for name, given, layer in (
            ("augmentation_labels", augmentation, self.augmentation_embedding),
            ("vector", condition.vector, self.vector_embedding),
            ("image_noise", level, self.noise_embedding),
        ):
            if (given is None) != (layer is None):
                raise ValueError(f"{name} goes with a network that was built for it: build it so, or leave it out")
            embedding = embedding if layer is None else embedding + layer(given)
        return embedding
