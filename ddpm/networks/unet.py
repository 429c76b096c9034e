"""The U-Net of Ho et al. 2020 for any image size, optionally with classes.

Parameters are named as in diffusers' `UNet2DModel`, so that exporting a checkpoint is a copy. In shapes, E is the width
of the timestep embedding: four times that of the first level.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.layers import Block, sinusoids, with_estimate, with_labels
from ddpm.objective import UNCONDITIONAL, Condition

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class UNet(nn.Module):
    """Takes noisy images and their timesteps, gives a prediction of the images' shape (Ho et al. 2020, appendix B)."""

    def __init__(
        self,
        *,
        image_size: int,  # height and width in pixels
        in_channels: int = 3,  # of the images; twice that with self-conditioning
        out_channels: int | None = None,  # as in_channels
        channels: int = 128,  # width of the first level, before its multiplier
        channel_mults: Sequence[int] = (1, 2, 2, 2),  # one per level; every level halves the size
        attention_sizes: Sequence[int] = (16,),  # pixels; levels of these sizes get attention, the middle always
        layers_per_level: int = 2,  # residual blocks per level on the way down; on the way up there is one more
        norm_groups: int = 32,  # of the group normalisations
        dropout: float = 0.0,  # probability, within the residual blocks
        num_classes: int = 0,  # 0: no class conditioning
        augmentation_labels: int = 0,  # 0: none
    ) -> None:
        super().__init__()
        _check_architecture(image_size, channels, channel_mults, norm_groups)
        widths = [channels * multiplier for multiplier in channel_mults]
        last_level = len(widths) - 1
        attention = [image_size // 2**level in attention_sizes for level in range(len(widths))]
        embedding_width = 4 * widths[0]

        def resnet(width_in: int, width_out: int) -> ResnetBlock:
            return ResnetBlock(width_in, width_out, embedding_width, norm_groups, dropout)

        self.conv_in = _initialised(nn.Conv2d(in_channels, widths[0], 3, padding=1))
        self.time_embedding = TimestepEmbedding(widths[0], embedding_width)
        self.class_embedding = nn.Embedding(num_classes, embedding_width) if num_classes else None
        labels = augmentation_labels
        self.augmentation_embedding = _initialised(nn.Linear(labels, embedding_width, bias=False)) if labels else None

        width = widths[0]
        skip_widths = [width]
        self.down_blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            resnets = [resnet(level_width if i else width, level_width) for i in range(layers_per_level)]
            width = level_width
            downsample = level < last_level
            skip_widths += [width] * (layers_per_level + downsample)
            self.down_blocks.append(DownBlock(resnets, width, norm_groups, attention[level], downsample))

        self.mid_block = MidBlock([resnet(width, width), resnet(width, width)], width, norm_groups)

        self.up_blocks = nn.ModuleList()
        for level in range(last_level, -1, -1):
            resnets = []
            for _ in range(layers_per_level + 1):
                resnets.append(resnet(width + skip_widths.pop(), widths[level]))
                width = widths[level]
            self.up_blocks.append(UpBlock(resnets, width, norm_groups, attention[level], upsample=level > 0))

        self.conv_norm_out = _group_norm(norm_groups, width)
        self.conv_out = _initialised(nn.Conv2d(width, out_channels or in_channels, 3, padding=1), zero=True)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Predict.

        Args:
            x: x_t, [B, C, H, W], of any size that the levels divide.
            t: timesteps, whole or between, [B].
            condition: has labels exactly when the network has classes.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: for a condition that the network does not take, or classes without labels.
        """
        told = with_labels(self.time_embedding(t), condition, self.class_embedding, self.augmentation_embedding)
        # Every residual block projects the activated embedding: activate it once.
        embedding = F.silu(told)

        skips = [self.conv_in(with_estimate(x, condition, self.conv_in.in_channels))]
        for down_block in self.down_blocks:
            skips += down_block(skips[-1], embedding)
        h = self.mid_block(skips[-1], embedding)
        for up_block in self.up_blocks:
            h = up_block(h, skips, embedding)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each with attention if wanted, then half the size."""

    def __init__(
        self, resnets: list["ResnetBlock"], width: int, norm_groups: int, attention: bool, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(AttentionBlock(width, norm_groups) for _ in resnets if attention)
        self.downsamplers = nn.ModuleList([Downsample(width)] if downsample else [])

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """All intermediate results, for the way up; the last one goes on to the next level."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            if self.attentions:
                h = self.attentions[i](h)
            outputs.append(h)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(h))
        return outputs


class MidBlock(nn.Module):
    """The middle, at the smallest size: residual block, attention, residual block."""

    def __init__(self, resnets: list["ResnetBlock"], width: int, norm_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([AttentionBlock(width, norm_groups)])

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] and [B, E] to [B, C, H, W]."""
        first, second = self.resnets
        return second(self.attentions[0](first(h, embedding)), embedding)


class UpBlock(nn.Module):
    """One level on the way up: residual blocks that take the skips of the way down, then twice the size."""

    def __init__(
        self, resnets: list["ResnetBlock"], width: int, norm_groups: int, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(AttentionBlock(width, norm_groups) for _ in resnets if attention)
        self.upsamplers = nn.ModuleList([Upsample(width)] if upsample else [])

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]; takes its skips off the end of the list, which frees them when sampling."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), embedding)
            if self.attentions:
                h = self.attentions[i](h)
        for upsampler in self.upsamplers:
            h = upsampler(h)
        return h


class ResnetBlock(Block):
    """h + conv(dropout(silu(norm(conv(silu(norm(h))) + dense(embedding))))), a 1×1 convolution where widths differ."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _group_norm(norm_groups, width_in)
        self.conv1 = _initialised(nn.Conv2d(width_in, width_out, 3, padding=1))
        self.time_emb_proj = _initialised(nn.Linear(embedding_width, width_out))
        self.norm2 = _group_norm(norm_groups, width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _initialised(nn.Conv2d(width_out, width_out, 3, padding=1), zero=True)
        self.conv_shortcut = _initialised(nn.Conv2d(width_in, width_out, 1)) if width_in != width_out else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] and the activated embedding [B, E] to [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(Block):
    """Self-attention between all pixels, one head over all channels, with a residual connection."""

    def __init__(self, width: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = _group_norm(norm_groups, width)
        self.to_q = _initialised(nn.Linear(width, width))
        self.to_k = _initialised(nn.Linear(width, width))
        self.to_v = _initialised(nn.Linear(width, width))
        self.to_out = nn.ModuleList([_initialised(nn.Linear(width, width), zero=True)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        # One copy (none in channels_last), where each of the three projections would make its own.
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """3×3 convolution with stride 2, padded on the right and bottom alone as TensorFlow's SAME does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _initialised(nn.Conv2d(width, width, 3, stride=2))

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2]."""
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel doubled, then a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _initialised(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Two dense layers on the sinusoids of the timestep."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear_1 = _initialised(nn.Linear(width, embedding_width))
        self.linear_2 = _initialised(nn.Linear(embedding_width, embedding_width))

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, E]."""
        features = sinusoids(t, self.linear_1.in_features, freq_shift=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


def _group_norm(groups: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def _initialised(layer: Layer, zero: bool = False) -> Layer:
    """Ho et al.'s initial weights: uniform, with variance 2/(fan-in + fan-out); zero where a residual branch ends."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _check_architecture(image_size: int, channels: int, channel_mults: Sequence[int], norm_groups: int) -> None:
    """Refuse what would fail in the middle of a forward pass."""
    halvings = len(channel_mults) - 1
    if halvings < 0:
        raise ValueError("channel_mults needs at least one level")
    if image_size < 1 or image_size % 2**halvings:
        raise ValueError(
            f"image_size {image_size} cannot be halved {halvings} times, as the {halvings + 1} levels of channel_mults "
            f"{tuple(channel_mults)} need: use a multiple of {2**halvings}, or fewer levels"
        )
    if channels % norm_groups:
        raise ValueError(f"channels {channels} is not a multiple of norm_groups {norm_groups}: change one of them")
    if channels < 4 or channels % 2:
        raise ValueError(f"channels {channels} must be even and at least 4, for the sinusoids of the timestep")
