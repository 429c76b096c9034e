"""The magnitude-preserving U-Net of Karras et al. 2024 (EDM2, configuration G), written from the paper.

Every layer keeps the variance of independent inputs, so there are neither group normalisations nor biases. Activations
are not clipped at ±256, which only float16 needs. In shapes, E is the width of the embedding.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import catalogue
from ddpm.image_size import ImageSize
from ddpm.networks.layers import (
    NOT_TOLD,
    Block,
    Dropout,
    Told,
    ToldNetwork,
    attend,
    resized,
)
from ddpm.objective import UNCONDITIONAL, Condition

EPSILON = 1e-4
RESIDUAL_BALANCE = 0.3
"""Weight of a residual branch in its sum."""
SILU_MAGNITUDE = 0.596
"""√E[silu(x)²] for standard normal x."""

Kind = Literal["encoder", "down", "decoder", "up"]


class EDM2(ToldNetwork):
    """Takes noisy images at unit variance and c_noise = ln(σ)/4 (figure 21)."""

    def __init__(
        self,
        *,
        image_size: ImageSize | int,  # an int: of squares, in pixels
        in_channels: int,  # of all images that it takes
        out_channels: int,
        num_classes: int = 0,  # 0: no class conditioning
        told: Told = NOT_TOLD,
        **options: Any,  # see the catalogue
    ) -> None:
        super().__init__()
        chosen = catalogue.EDM2Config(**options)
        size = ImageSize.of(image_size)
        chosen.check_size(size)
        widths = [chosen.channels * multiplier for multiplier in chosen.channel_mults]
        last_level, embedding_width = len(widths) - 1, max(widths)
        has_attention = catalogue.levels_with_attention(chosen, size)
        block = partial(
            ResidualBlock,
            embedding_width=embedding_width,
            head_channels=chosen.head_channels,
            dropout=chosen.dropout,
        )

        # A further channel of ones replaces all biases.
        self.conv_in = MPConv(in_channels + 1, widths[0], 3)
        # Drawn once, without gradient. As parameters they are part of a checkpoint.
        self.frequencies = nn.Parameter(torch.randn(widths[0]), requires_grad=False)
        self.phases = nn.Parameter(torch.rand(widths[0]), requires_grad=False)
        self.time_embedding = MPConv(widths[0], embedding_width, 0)
        self.class_embedding = MPEmbedding(num_classes, embedding_width, 0) if num_classes else None
        self._take(told, in_channels, embedding_width, partial(MPConv, kernel_size=0))

        width = widths[0]
        skip_widths = [width]
        self.encoder = nn.ModuleList()
        for level, level_width in enumerate(widths):
            if level > 0:
                self.encoder.append(block("down", width, width))
                skip_widths.append(width)
            for _ in range(chosen.layers_per_level):
                self.encoder.append(block("encoder", width, level_width, has_attention[level]))
                width = level_width
                skip_widths.append(width)

        self.middle = nn.ModuleList([block("decoder", width, width, attention) for attention in (True, False)])

        self.decoder = nn.ModuleList()
        for level in range(last_level, -1, -1):
            for _ in range(chosen.layers_per_level + 1):
                width_in = width + skip_widths.pop()
                self.decoder.append(block("decoder", width_in, widths[level], has_attention[level]))
                width = widths[level]
            if level > 0:
                self.decoder.append(block("up", width, width))
        self.conv_out = MPConv(width, out_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros([]))
        self.uncertainty = Uncertainty() if chosen.uncertainty else None

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Maps c_in x_t [B, C, H, W] and c_noise [B] to [B, out_channels, H, W]; see `UNet.forward`."""
        of_time = self.time_embedding(fourier(t, self.frequencies, self.phases).to(self.gain_out.dtype))
        embedding = mp_silu(self._with_condition(of_time, condition, self.class_embedding, mp_sum))

        skips = [self.conv_in(self._with_images(x, condition, torch.ones_like(x[:, :1])))]
        for block in self.encoder:
            skips.append(block(skips[-1], embedding))
        h = skips[-1]
        for block in self.middle:
            h = block(h, embedding)
        for block in self.decoder:
            h = block(h if block.kind == "up" else mp_cat(h, skips.pop()), embedding)
        output = self.conv_out(h) * self.gain_out
        if self.uncertainty is None or not self.training:
            return output
        # DDP waits for a gradient of every weight, even if only the output is differentiated.
        return output + 0 * self.uncertainty(t)[:, None, None, None].to(output.dtype)

    @torch.no_grad()
    def normalise(self) -> None:
        """Forces the weights to unit magnitude: algorithm 1, once after a step instead of in each layer.

        Weights of unit magnitude do not change by a bit, so that a second micro-batch or a resumed attempt rounds
        nothing again. Frozen weights stay as they are: each layer normalises its own anyway.
        """
        layers = [module for module in self.modules() if isinstance(module, MPConv)]
        for weight in [layer.weight for layer in layers if layer.weight.requires_grad]:
            now = magnitude(weight)
            weight.copy_(torch.where((now - 1).abs() < EPSILON, weight, weight / now.clamp(min=EPSILON)))


class Uncertainty(nn.Module):
    """Learns u(σ), the logarithm of the expected error at a noise level, by the loss error/exp(u) + u (equation 21)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(width), requires_grad=False)
        self.phases = nn.Parameter(torch.rand(width), requires_grad=False)
        self.linear = MPConv(width, 1, 0)

    def forward(self, t: Tensor) -> Tensor:
        """Maps c_noise [B] to u, float32 [B]."""
        return self.linear(fourier(t, self.frequencies, self.phases))[:, 0]


class ResidualBlock(Block):
    """conv(dropout(silu(g · conv(silu(h))))) with g = 1 + gain · dense(embedding), then attention if wanted.

    In the encoder every pixel of the input is normalised, after the 1×1 convolution for a change of width.
    """

    def __init__(
        self,
        kind: Kind,
        width_in: int,
        width_out: int,
        attention: bool = False,
        *,
        embedding_width: int,
        head_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads = heads = width_out // head_channels if attention else 0
        self.kind, self.is_decoder = kind, kind in ("decoder", "up")
        self.conv_1 = MPConv(width_in if self.is_decoder else width_out, width_out, 3)
        self.dense = MPConv(embedding_width, width_out, 0)
        self.gain = nn.Parameter(torch.zeros([]))
        self.dropout = Dropout(dropout)
        self.conv_2 = MPConv(width_out, width_out, 3)
        self.conv_shortcut = MPConv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.to_qkv = MPConv(width_out, 3 * width_out, 1) if heads else None
        self.to_out = MPConv(width_out, width_out, 1) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] and the activated embedding [B, E] to [B, C', H', W']."""
        if self.kind == "down" or self.kind == "up":
            x = resized(x, self.kind)
        if not self.is_decoder:
            x = normalised(self.conv_shortcut(x), [1])
        scale = 1 + self.gain * self.dense(embedding)
        h = self.conv_1(mp_silu(x)) * scale[:, :, None, None].to(x.dtype)
        h = self.conv_2(self.dropout(mp_silu(h)))
        x = mp_sum(self.conv_shortcut(x) if self.is_decoder else x, h, RESIDUAL_BALANCE)
        if self.to_qkv is None or self.to_out is None:
            return x
        # Cosine attention: queries, keys and values of unit magnitude in each head.
        qkv = self.to_qkv(x).flatten(2).transpose(1, 2).unflatten(2, (3 * self.heads, -1))
        q, k, v = normalised(qkv, [3]).flatten(2).chunk(3, dim=2)
        attended = attend(q, k, v, self.heads)
        return mp_sum(x, self.to_out(attended.transpose(1, 2).unflatten(2, x.shape[2:])), RESIDUAL_BALANCE)


class MPConv(nn.Module):
    """A convolution, or for size 0 a dense layer, whose weights of each output have unit norm (equation 47)."""

    def __init__(self, width_in: int, width_out: int, kernel_size: int) -> None:
        super().__init__()
        self.in_features = width_in
        self.weight = nn.Parameter(torch.randn(width_out, width_in, *[kernel_size] * 2 * (kernel_size > 0)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H, W], or [B, C] to [B, C']."""
        weight = normalised(self.weight) / math.sqrt(self.weight[0].numel())
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[2] // 2)


class MPEmbedding(MPConv):
    """A dense layer of classes, one-hot at unit magnitude."""

    def forward(self, labels: Tensor) -> Tensor:
        """Maps int64 [B] to [B, E]."""
        one_hot = labels[:, None] == torch.arange(self.in_features, device=labels.device)
        return super().forward(one_hot.to(self.weight.dtype) * math.sqrt(self.in_features))


def fourier(t: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
    """Returns √2 cos(2π(f t + φ)) for t [B], float32 [B, C] (equation 75)."""
    return math.sqrt(2) * (2 * math.pi * (t[:, None].float() * frequencies + phases)).cos()


def magnitude(x: Tensor, dims: list[int] | None = None) -> Tensor:
    """Returns the root of the mean square over `dims`, or all but the first, kept with size 1; in float32 at least."""
    dims, dtype = dims or list(range(1, x.ndim)), torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return norm * math.sqrt(norm.numel() / x.numel())


def normalised(x: Tensor, dims: list[int] | None = None) -> Tensor:
    """Returns x at unit magnitude over `dims`, or all but the first."""
    return (x / (magnitude(x, dims) + EPSILON)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Returns silu(x) at the magnitude of x (equation 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, balance: float = 0.5) -> Tensor:
    """Returns (1 - balance) a + balance b at their magnitude (equation 88)."""
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Returns the channels of both at their magnitude, with equal weight for any number of channels (equation 103)."""
    half = (a.shape[1] + b.shape[1]) / 2
    return torch.cat([a * math.sqrt(half / a.shape[1]), b * math.sqrt(half / b.shape[1])], dim=1)
