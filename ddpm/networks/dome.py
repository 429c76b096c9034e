"""The U-Net of dome272's and ErenGurs' ddpm, for squares of a multiple of 8 pixels.

Parameters have the names of their checkpoints. In shapes, E is 256.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import catalogue
from ddpm.image_size import ImageSize
from ddpm.networks.layers import NOT_TOLD, Block, ToldNetwork, sinusoids
from ddpm.objective import UNCONDITIONAL, Condition

EMBEDDING_WIDTH = 256
HEADS = 4


class DomeUNet(ToldNetwork):
    """Attention at every size but the full one on the way down, and at every size but the smallest on the way up."""

    def __init__(
        self, *, image_size: ImageSize | int, in_channels: int, out_channels: int, num_classes: int = 0
    ) -> None:
        super().__init__()
        catalogue.DomeUNetConfig().check_size(ImageSize.of(image_size))
        self.inc = DoubleConv(in_channels, 64)
        self.down1, self.sa1 = Down(64, 128), SelfAttention(128)
        self.down2, self.sa2 = Down(128, 256), SelfAttention(256)
        self.down3, self.sa3 = Down(256, 256), SelfAttention(256)
        self.bot1, self.bot2, self.bot3 = DoubleConv(256, 512), DoubleConv(512, 512), DoubleConv(512, 256)
        self.up1, self.sa4 = Up(512, 128), SelfAttention(128)
        self.up2, self.sa5 = Up(256, 64), SelfAttention(64)
        self.up3, self.sa6 = Up(128, 64), SelfAttention(64)
        self.outc = nn.Conv2d(64, out_channels, 1)
        self.label_emb = nn.Embedding(num_classes, EMBEDDING_WIDTH) if num_classes else None
        self._take(NOT_TOLD, in_channels, EMBEDDING_WIDTH)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Maps x_t [B, C, H, W] and timesteps [B] to [B, out_channels, H, W]; see `UNet.forward`."""
        of_time = sinusoids(t, EMBEDDING_WIDTH).to(self.outc.weight.dtype)
        # Every level projects the activated embedding: activate it once.
        embedding = F.silu(self._with_condition(of_time, condition, self.label_emb))
        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, embedding))
        x3 = self.sa2(self.down2(x2, embedding))
        h = self.sa3(self.down3(x3, embedding))
        h = self.bot3(self.bot2(self.bot1(h)))
        h = self.sa4(self.up1(h, x3, embedding))
        h = self.sa5(self.up2(h, x2, embedding))
        h = self.sa6(self.up3(h, x1, embedding))
        return self.outc(h)


class DoubleConv(Block):
    """Two 3×3 convolutions, each normalised over the whole image, with a GELU between; `residual`: gelu(x + output)."""

    def __init__(self, width_in: int, width_out: int, width: int | None = None, residual: bool = False) -> None:
        super().__init__()
        self.residual, width = residual, width or width_out
        self.double_conv = nn.Sequential(
            nn.Conv2d(width_in, width, 3, padding=1, bias=False),
            nn.GroupNorm(1, width),
            nn.GELU(),
            nn.Conv2d(width, width_out, 3, padding=1, bias=False),
            nn.GroupNorm(1, width_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H, W]."""
        return F.gelu(x + self.double_conv(x)) if self.residual else self.double_conv(x)


class Down(nn.Module):
    """Halves the size, applies two double convolutions, and adds the embedding."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        blocks = [DoubleConv(width_in, width_in, residual=True), DoubleConv(width_in, width_out)]
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), *blocks)
        self.emb_layer = nn.Sequential(nn.Identity(), nn.Linear(EMBEDDING_WIDTH, width_out))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W] and the activated embedding [B, E] to [B, C', H/2, W/2]."""
        return self.maxpool_conv(x) + self.emb_layer(embedding)[:, :, None, None]


class Up(nn.Module):
    """Doubles the size, puts the skip in front, applies two double convolutions, and adds the embedding."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        blocks = [DoubleConv(width_in, width_in, residual=True), DoubleConv(width_in, width_out, width_in // 2)]
        self.conv = nn.Sequential(*blocks)
        self.emb_layer = nn.Sequential(nn.Identity(), nn.Linear(EMBEDDING_WIDTH, width_out))

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        """Maps [B, C, H, W], the skip of twice the size and the activated embedding [B, E] to [B, C', 2H, 2W]."""
        return self.conv(torch.cat([skip, self.up(x)], dim=1)) + self.emb_layer(embedding)[:, :, None, None]


class SelfAttention(Block):
    """Self-attention between all pixels, then two layers with a GELU, each with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.ln = nn.LayerNorm([width])
        self.ff_self = nn.Sequential(nn.LayerNorm([width]), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H, W]."""
        tokens = x.flatten(2).transpose(1, 2)
        h = self.ln(tokens)
        # With its weights it would allocate a matrix of all pixels by all pixels.
        tokens = tokens + self.mha(h, h, h, need_weights=False)[0]
        return (tokens + self.ff_self(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])
