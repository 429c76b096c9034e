"""The U-Net of Ho et al. 2020 for any image size, optionally with classes.

Parameters have the names of diffusers' `UNet2DModel`, so that exporting a checkpoint is a copy. In shapes, E is the
width of the timestep embedding: four times that of the first level.
"""

from collections.abc import Callable
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
    Resize,
    Told,
    ToldNetwork,
    attend,
    initialised,
    resized,
    sinusoids,
)
from ddpm.objective import UNCONDITIONAL, Condition

Conventions = Literal["ho", "diffusers"]
"""The code whose details to follow, which the shapes do not show: Ho et al.'s, or the defaults of diffusers."""


class UNet(ToldNetwork):
    """Maps noisy images and their timesteps to a prediction of the images' shape (Ho et al. 2020, appendix B).

    With `heads`, `scale_shift` and `resample_in_blocks` it is the network of Dhariwal & Nichol 2021, section 3.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize | int,  # an int: of squares, in pixels
        in_channels: int = 3,  # of all images that it takes
        out_channels: int | None = None,  # as in_channels
        num_classes: int = 0,  # 0: no class conditioning
        told: Told = NOT_TOLD,
        **options: Any,  # see the catalogue
    ) -> None:
        super().__init__()
        chosen = catalogue.UNetConfig(**options)
        size = ImageSize.of(image_size)
        chosen.check_size(size)
        widths = [chosen.channels * multiplier for multiplier in chosen.channel_mults]
        embedding_width = 4 * widths[0]
        self.conv_in = initialised(nn.Conv2d(in_channels, widths[0], 3, padding=1))
        self.time_embedding = TimestepEmbedding(widths[0], embedding_width, chosen.conventions)
        self.class_embedding = nn.Embedding(num_classes, embedding_width) if num_classes else None
        self._take(told, in_channels, embedding_width)

        groups = chosen.norm_groups
        resnet = partial(
            ResnetBlock,
            embedding_width=embedding_width,
            norm_groups=groups,
            dropout=chosen.dropout,
            scale_shift=chosen.scale_shift,
        )
        heads, head_channels = chosen.heads, chosen.head_channels
        attention = partial(AttentionBlock, norm_groups=groups, heads=heads, head_channels=head_channels)

        def resample(width: int, resize: Resize) -> nn.Module:
            if chosen.resample_in_blocks:
                return resnet(width, width, resize)
            return Resample(width, resize, chosen.conventions)

        self._add_levels(
            widths,
            catalogue.levels_with_attention(chosen, size),
            chosen.layers_per_level,
            resnet=resnet,
            attention=attention,
            resample=resample,
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = initialised(nn.Conv2d(widths[0], out_channels or in_channels, 3, padding=1), zero=True)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1e-6 if chosen.conventions == "ho" else 1e-5

    def _add_levels(
        self,
        widths: list[int],
        has_attention: list[bool],
        layers: int,
        *,
        resnet: Callable[..., "ResnetBlock"],
        attention: Callable[[int], "AttentionBlock"],
        resample: Callable[[int, Resize], nn.Module],
    ) -> None:
        """Adds the blocks of the way down, the middle and the way up."""
        width = widths[0]
        skip_widths = [width]
        self.down_blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            resnets = [resnet(level_width if i else width, level_width) for i in range(layers)]
            width = level_width
            attentions = [attention(width) for _ in resnets if has_attention[level]]
            resizers = [resample(width, "down")] if level < len(widths) - 1 else []
            skip_widths += [width] * (layers + len(resizers))
            self.down_blocks.append(DownBlock(resnets, attentions, resizers))

        self.mid_block = MidBlock([resnet(width, width), resnet(width, width)], attention(width))

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            resnets = []
            for _ in range(layers + 1):
                resnets.append(resnet(width + skip_widths.pop(), widths[level]))
                width = widths[level]
            attentions = [attention(width) for _ in resnets if has_attention[level]]
            resizers = [resample(width, "up")] if level > 0 else []
            self.up_blocks.append(UpBlock(resnets, attentions, resizers))

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Returns the prediction.

        Args:
            x: x_t, [B, C, H, W], of any size that the levels can halve.
            t: timesteps, also between whole ones, [B].
            condition: with labels exactly if the network has classes, and likewise with its image, noise and vector.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: the network does not take the condition, or needs labels.
        """
        of_time = self.time_embedding(t)
        # Every residual block projects the activated embedding: activate it once.
        embedding = F.silu(self._with_condition(of_time, condition, self.class_embedding))

        skips = [self.conv_in(self._with_images(x, condition))]
        for down_block in self.down_blocks:
            skips += down_block(skips[-1], embedding)
        h = self.mid_block(skips[-1], embedding)
        for up_block in self.up_blocks:
            h = up_block(h, skips, embedding)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, optionally with attention, then half the size."""

    def __init__(
        self, resnets: list["ResnetBlock"], attentions: list["AttentionBlock"], downsamplers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """Returns all intermediate results for the way up; the last one is the input of the next level."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            if self.attentions:
                h = self.attentions[i](h)
            outputs.append(h)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(h, embedding))
        return outputs


class MidBlock(nn.Module):
    """The middle level, at the smallest size: residual block, attention, residual block."""

    def __init__(self, resnets: list["ResnetBlock"], attention: "AttentionBlock") -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] and [B, E] to [B, C, H, W]."""
        first, second = self.resnets
        return second(self.attentions[0](first(h, embedding)), embedding)


class UpBlock(nn.Module):
    """One level on the way up: residual blocks that take the skips from the way down, then twice the size."""

    def __init__(
        self, resnets: list["ResnetBlock"], attentions: list["AttentionBlock"], upsamplers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, 2H, 2W]; it pops its skips off the list, which frees them in sampling."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), embedding)
            if self.attentions:
                h = self.attentions[i](h)
        for upsampler in self.upsamplers:
            h = upsampler(h, embedding)
        return h


class ResnetBlock(Block):
    """h + conv(dropout(silu(norm(conv(silu(norm(h))) + dense(embedding))))), a 1×1 convolution where widths differ.

    With `scale_shift` the embedding gives (s, b) of (1 + s) norm(…) + b; with `resize` the first convolution and the
    sum are at the new size.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        resize: Resize | None = None,
        *,
        embedding_width: int,
        norm_groups: int,
        dropout: float,
        scale_shift: bool,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.norm1 = nn.GroupNorm(norm_groups, width_in)
        self.conv1 = initialised(nn.Conv2d(width_in, width_out, 3, padding=1))
        self.time_emb_proj = initialised(nn.Linear(embedding_width, width_out * (1 + scale_shift)))
        self.norm2 = nn.GroupNorm(norm_groups, width_out)
        self.dropout = Dropout(dropout)
        self.conv2 = initialised(nn.Conv2d(width_out, width_out, 3, padding=1), zero=True)
        self.conv_shortcut = initialised(nn.Conv2d(width_in, width_out, 1)) if width_in != width_out else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] and the activated embedding [B, E] to [B, C', H', W']."""
        h = F.silu(self.norm1(x))
        if self.resize is not None:
            h, x = (resized(each, self.resize) for each in (h, x))
        h = self.conv1(h)
        projected = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + projected)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(Block):
    """Self-attention between all pixels, with a residual connection."""

    def __init__(self, width: int, *, norm_groups: int, heads: int, head_channels: int | None) -> None:
        super().__init__()
        self.heads = width // head_channels if head_channels else heads
        self.group_norm = nn.GroupNorm(norm_groups, width)
        self.to_q = initialised(nn.Linear(width, width))
        self.to_k = initialised(nn.Linear(width, width))
        self.to_v = initialised(nn.Linear(width, width))
        self.to_out = nn.ModuleList([initialised(nn.Linear(width, width), zero=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H, W]."""
        # One copy (none in channels_last) instead of one for each of the three projections.
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()
        attended = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), self.heads)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    """A 3×3 convolution on doubled pixels, or of stride 2, which Ho et al. pad only on the right and below."""

    def __init__(self, width: int, resize: Resize, conventions: Conventions) -> None:
        super().__init__()
        self.resize, self.beyond = resize, conventions == "ho" and resize == "down"
        stride, padding = 2 if resize == "down" else 1, 0 if self.beyond else 1
        self.conv = initialised(nn.Conv2d(width, width, 3, stride, padding))

    def forward(self, h: Tensor, _: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H', W'], without the embedding."""
        if self.resize == "up":
            h = resized(h, "up")
        return self.conv(F.pad(h, (0, 1, 0, 1)) if self.beyond else h)


class TimestepEmbedding(nn.Module):
    """Two dense layers on the sinusoids of the timestep."""

    def __init__(self, width: int, embedding_width: int, conventions: Conventions) -> None:
        super().__init__()
        self.conventions = conventions
        self.linear_1 = initialised(nn.Linear(width, embedding_width))
        self.linear_2 = initialised(nn.Linear(embedding_width, embedding_width))

    def forward(self, t: Tensor) -> Tensor:
        """Maps [B] to [B, E]."""
        width, is_ho = self.linear_1.in_features, self.conventions == "ho"
        features = sinusoids(t, width, freq_shift=1 if is_ho else 0)
        if not is_ho:
            features = features.roll(width // 2, dims=1)
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))
