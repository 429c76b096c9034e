"""DiT, a transformer on patches of the image (Peebles & Xie 2023), for any size that the patches divide.

In shapes, N is the number of patches and E the width of all tokens and of the embedding of t.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.layers import Block, attend, initialised, sinusoids, with_estimate, with_labels
from ddpm.objective import UNCONDITIONAL, Condition

FREQUENCIES = 256
"""Width of the sinusoids of t."""


class DiT(nn.Module):
    """Transformer blocks that are told t and the class by their normalisations (section 3.2, adaLN-Zero)."""

    def __init__(
        self,
        *,
        image_size: int,  # height and width in pixels
        in_channels: int,  # of the images; twice that with self-conditioning
        out_channels: int,
        patch_size: int = 2,  # pixels
        width: int = 384,  # of every token
        depth: int = 12,  # blocks
        heads: int = 6,  # of every attention
        dropout: float = 0.0,  # probability, at the ends of both branches of a block
        num_classes: int = 0,  # 0: no class conditioning
        augmentation_labels: int = 0,  # 0: none
    ) -> None:
        super().__init__()
        if image_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: change one")
        if width % heads or width % 4:
            raise ValueError(f"width {width} is not a multiple of 4 and of heads {heads}: change one of them")
        self.in_channels, self.patch_size = in_channels, patch_size
        self.patches = initialised(nn.Conv2d(in_channels, width, patch_size, stride=patch_size))
        self.linear_1, self.linear_2 = initialised(nn.Linear(FREQUENCIES, width)), initialised(nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None
        labels = augmentation_labels
        self.augmentation_embedding = initialised(nn.Linear(labels, width, bias=False)) if labels else None
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(depth))
        self.modulation = initialised(nn.Linear(width, 2 * width), zero=True)
        self.output = initialised(nn.Linear(width, patch_size**2 * out_channels), zero=True)
        # A patch is one vector of pixels.
        nn.init.xavier_uniform_(self.patches.weight.flatten(1))
        for embedding in (self.linear_1, self.linear_2, self.class_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """x_t [B, C, H, W] and timesteps [B] to [B, out_channels, H, W]; see `UNet.forward`."""
        # Cosines come first, as in the published weights.
        features = sinusoids(t, FREQUENCIES).roll(FREQUENCIES // 2, dims=1).to(self.output.weight.dtype)
        told = self.linear_2(F.silu(self.linear_1(features)))
        # Every block projects the activated embedding: activate it once.
        embedding = F.silu(with_labels(told, condition, self.class_embedding, self.augmentation_embedding))

        patches = self.patches(with_estimate(x, condition, self.in_channels))
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = tokens + _positions(rows, columns, tokens.shape[2], x.device).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        pixels = self.output(_modulated(tokens, shift, scale))
        pixels = pixels.view(len(x), rows, columns, self.patch_size, self.patch_size, -1)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])


class TransformerBlock(Block):
    """Attention, then two layers with a GELU; the embedding shifts and scales what enters, and gates what is added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (initialised(nn.Linear(width, width)) for _ in range(4))
        self.linear_1, self.linear_2 = (
            initialised(nn.Linear(width, 4 * width)),
            initialised(nn.Linear(4 * width, width)),
        )
        # The block begins as the identity.
        self.modulation = initialised(nn.Linear(width, 6 * width), zero=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, N, E] and the activated embedding [B, E] to [B, N, E]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        h = _modulated(x, shift_1, scale_1)
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads))
        x = x + gate_1 * self.dropout(h)
        h = F.gelu(self.linear_1(_modulated(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2 * self.dropout(self.linear_2(h))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of a patch's column, then of its row, float32 [N, E]."""
    across = torch.arange(columns, device=device).repeat(rows)
    down = torch.arange(rows, device=device).repeat_interleave(columns)
    return torch.cat([sinusoids(across, width // 2), sinusoids(down, width // 2)], dim=1)
