"""DiT, a transformer on patches of the image (Peebles & Xie 2023), for any size that is a multiple of the patch size.

In shapes, N is the number of patches and E the width of the tokens and of the embedding of t.
"""

import math
from typing import Any

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
    initialised,
    sinusoids,
)
from ddpm.objective import UNCONDITIONAL, Condition

FREQUENCIES = 256
"""Width of the sinusoids of t."""


class DiT(ToldNetwork):
    """Transformer blocks whose normalisations depend on t and the class (section 3.2, adaLN-Zero)."""

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
        chosen = catalogue.DiTConfig(**options)
        size = ImageSize.of(image_size)
        chosen.check_size(size)
        width, patch_size = chosen.width, chosen.patch_size
        self.patch_size, self.rms_norm = patch_size, chosen.rms_norm
        self.head_width = width // chosen.heads if chosen.rope else 0
        self.patches = initialised(nn.Conv2d(in_channels, width, patch_size, stride=patch_size))
        self.linear_1, self.linear_2 = initialised(nn.Linear(FREQUENCIES, width)), initialised(nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None
        self._take(told, in_channels, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, chosen.heads, chosen.dropout, qk_norm=chosen.qk_norm, rms_norm=chosen.rms_norm)
            for _ in range(chosen.depth)
        )
        self.modulation = initialised(nn.Linear(width, 2 * width), zero=True)
        self.output = initialised(nn.Linear(width, patch_size**2 * out_channels), zero=True)
        # Each patch is one input vector.
        nn.init.xavier_uniform_(self.patches.weight.flatten(1))
        for embedding in (self.linear_1, self.linear_2, self.class_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        # Constants, which checkpoints leave out.
        self.grid = size.height // patch_size, size.width // patch_size
        positions, rotations = self._places(*self.grid, self.output.weight.device)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("rotations", rotations, persistent=False)

    def _places(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Returns the sinusoids for the tokens and, with `rope`, the rotations for the attention."""
        rotations = _rotations(rows, columns, self.head_width, device) if self.head_width else None
        return _positions(rows, columns, self.output.in_features, device), rotations

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Maps x_t [B, C, H, W] and timesteps [B] to [B, out_channels, H, W]; see `UNet.forward`."""
        # Cosines come first, as in the published weights.
        features = sinusoids(t, FREQUENCIES).roll(FREQUENCIES // 2, dims=1).to(self.output.weight.dtype)
        of_time = self.linear_2(F.silu(self.linear_1(features)))
        # Every block projects the activated embedding: activate it once.
        embedding = F.silu(self._with_condition(of_time, condition, self.class_embedding))

        patches = self.patches(self._with_images(x, condition))
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        is_usual = (rows, columns) == self.grid
        positions, rotations = (self.positions, self.rotations) if is_usual else self._places(rows, columns, x.device)
        tokens = tokens + positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, embedding, rotations)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        pixels = self.output(_modulated(tokens, shift, scale, self.rms_norm))
        pixels = pixels.view(len(x), rows, columns, self.patch_size, self.patch_size, -1)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])


class TransformerBlock(Block):
    """Attention, then two layers with a GELU; the embedding shifts and scales their inputs, and gates their outputs."""

    def __init__(
        self, width: int, heads: int, dropout: float, *, qk_norm: bool = False, rms_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.rms_norm = heads, rms_norm
        # They are parts of one matrix [3 E, E], whose variance 2/(E + 3 E) is half of that of a matrix [E, E].
        fused = math.sqrt(0.5)
        self.to_q, self.to_k, self.to_v = (initialised(nn.Linear(width, width), gain=fused) for _ in range(3))
        self.to_out = initialised(nn.Linear(width, width))
        self.scale_q, self.scale_k = (nn.Parameter(torch.ones(width // heads)) if qk_norm else None for _ in range(2))
        self.linear_1, self.linear_2 = (
            initialised(nn.Linear(width, 4 * width)),
            initialised(nn.Linear(4 * width, width)),
        )
        # The initial block is the identity.
        self.modulation = initialised(nn.Linear(width, 6 * width), zero=True)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Maps [B, N, E], the activated embedding [B, E] and optional `_rotations` to [B, N, E]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        h = _modulated(x, shift_1, scale_1, self.rms_norm)
        q, k = self._placed(self.to_q(h), self.scale_q, rotations), self._placed(self.to_k(h), self.scale_k, rotations)
        h = self.to_out(attend(q, k, self.to_v(h), self.heads))
        x = x + gate_1 * self.dropout(h)
        h = F.gelu(self.linear_1(_modulated(x, shift_2, scale_2, self.rms_norm)), approximate="tanh")
        return x + gate_2 * self.dropout(self.linear_2(h))

    def _placed(self, x: Tensor, scale: Tensor | None, rotations: Tensor | None) -> Tensor:
        """Normalises and rotates queries or keys [B, N, E] of each head, if the options ask for it."""
        heads = x.unflatten(2, (self.heads, -1))
        if scale is not None:
            heads = F.rms_norm(heads.float(), scale.shape, eps=1e-6) * scale
        if rotations is not None:
            cosine, sine = rotations[:, :, None]
            first, second = heads.unflatten(3, (-1, 2)).unbind(4)
            turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=4)
            heads = turned.flatten(3)
        return heads.flatten(2).to(x.dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, rms_norm: bool) -> Tensor:
    norm = F.rms_norm if rms_norm else F.layer_norm
    # The norm needs no learnt scale, since `scale` has a bias.
    return norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Returns sinusoids of each patch's column, then of its row, float32 [N, width]."""
    across = torch.arange(columns, device=device).repeat(rows)
    down = torch.arange(rows, device=device).repeat_interleave(columns)
    return torch.cat([sinusoids(across, width // 2), sinusoids(down, width // 2)], dim=1)


def _rotations(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Returns the two-dimensional rotary embedding (RoPE) of EVA-02 (Fang et al. 2023), as in LightningDiT and JiT.

    A patch's row rotates the pairs of neighbouring channels in the first half of a head of this width, its column those
    in the second half: pair i by 10000^(-4 i/width) radians per patch.

    Returns:
        float32 [2, N, width/2]: cosines, then sines.
    """
    sines_across, cosines_across, sines_down, cosines_down = _positions(rows, columns, width, device).chunk(4, dim=1)
    return torch.stack([torch.cat([cosines_down, cosines_across], 1), torch.cat([sines_down, sines_across], 1)])
