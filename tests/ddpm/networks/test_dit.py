"""DiT against diffusers with the same weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.image_size import ImageSize
from ddpm.networks.dit import DiT, _rotations
from ddpm.objective import Condition
from tests.ddpm.networks.weights import randomise

NAMES = {
    "to_q": "attn1.to_q",
    "to_k": "attn1.to_k",
    "to_v": "attn1.to_v",
    "to_out": "attn1.to_out.0",
    "linear_1": "ff.net.0.proj",
    "linear_2": "ff.net.2",
    "modulation": "norm1.linear",
    "scale_q": "attn1.norm_q",
    "scale_k": "attn1.norm_k",
}
"""Layers of a block here, and in diffusers."""


def in_diffusers(weights: dict[str, Tensor], depth: int = 2) -> dict[str, Tensor]:
    """Ours by diffusers' names, which give each block an embedding of its own."""
    mapped = {}
    for name, weight in weights.items():
        part, _, leaf = name.rpartition(".")
        if part.startswith("blocks."):
            # A scale is a parameter of the block itself.
            _, number, layer = part.split(".") if leaf in ("weight", "bias") else name.split(".")
            leaf = leaf if leaf in ("weight", "bias") else "weight"
            mapped[f"transformer_blocks.{number}.{NAMES[layer]}.{leaf}"] = weight
        elif part in ("linear_1", "linear_2", "class_embedding"):
            theirs = "class_embedder.embedding_table" if part == "class_embedding" else f"timestep_embedder.{part}"
            mapped |= {f"transformer_blocks.{number}.norm1.emb.{theirs}.{leaf}": weight for number in range(depth)}
        else:
            there = {"patches": "pos_embed.proj", "modulation": "proj_out_1", "output": "proj_out_2"}
            mapped[f"{there[part]}.{leaf}"] = weight
    return mapped


NEW = ("qk_norm", "rms_norm", "rope")


def flux_rotations(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """FLUX's rotary embedding in diffusers, of a patch's row and column: cosines and sines [N, width]."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    return FluxPosEmbed(10_000, [width // 2] * 2)(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))


@pytest.mark.parametrize("options", [(), *((option,) for option in NEW), NEW])
def test_outputs_and_gradients_equal_diffusers(options: tuple[str, ...]) -> None:
    """With diffusers' and PyTorch's norms in their places, and HunyuanDiT's attention, which rotates."""
    import diffusers
    from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

    sizes = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2}
    network = DiT(image_size=24, in_channels=3, out_channels=6, num_classes=6, **sizes, **dict.fromkeys(options, True))
    judge = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=24,
        patch_size=4,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for block in judge.transformer_blocks:
        # diffusers' frequencies end at 1/10000 itself; those of the paper's code, as of ADM's, one step before.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        if "rms_norm" in options:
            block.norm1.norm, block.norm3 = (torch.nn.RMSNorm(16, eps=1e-6, elementwise_affine=False) for _ in range(2))
        if "qk_norm" in options:
            block.attn1.norm_q, block.attn1.norm_k = (diffusers.models.normalization.RMSNorm(8, 1e-6) for _ in range(2))
        if "rope" in options:
            block.attn1.set_processor(HunyuanAttnProcessor2_0())
    if "rms_norm" in options:
        judge.norm_out = torch.nn.RMSNorm(16, eps=1e-6, elementwise_affine=False)
    rotated = {"image_rotary_emb": flux_rotations(6, 6, 8)} if "rope" in options else {}
    randomise(network)
    judge.load_state_dict(in_diffusers(network.state_dict()), strict=True)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 3, 24, 24, generator=generator), torch.tensor([0, 17, 500, 999])
    labels = torch.tensor([0, 4, 2, 5])
    output, expected = network(x, t, Condition(labels)), judge(x, t, labels, rotated).sample
    assert output.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)

    output.square().mean().backward()
    expected.square().mean().backward()
    # diffusers' embeddings are several: their gradients add up to ours.
    theirs = {name: parameter.grad for name, parameter in judge.named_parameters()}
    for name, parameter in network.named_parameters():
        gradient = sum(theirs[there] for there in in_diffusers({name: parameter}))
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * scale + 1e-7, msg=name)


def test_fresh_blocks_are_identities() -> None:
    network = DiT(image_size=16, in_channels=3, out_channels=3, width=32, depth=1, heads=4)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    assert torch.count_nonzero(network(x, t)) == 0
    tokens = torch.randn(2, 64, 32)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 32)), tokens)
    assert network.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_initial_weights_are_the_papers() -> None:
    """q, k and v are one linear layer there, timm's `qkv`; a fresh block has no bias and no gate."""
    block = DiT(image_size=8, in_channels=3, out_channels=3, width=48, depth=1, heads=4).blocks[0]
    fused = torch.nn.Linear(48, 3 * 48)
    torch.nn.init.xavier_uniform_(fused.weight)
    expected, bound = fused.weight.std().item(), fused.weight.abs().max().item()
    for layer in (block.to_q, block.to_k, block.to_v):
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    for layer in (block.to_out, block.linear_1, block.linear_2):
        linear = torch.nn.Linear(layer.in_features, layer.out_features)
        torch.nn.init.xavier_uniform_(linear.weight)
        assert layer.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.05)


def test_images_need_not_be_square() -> None:
    """A fresh network maps each patch alone: by hand, with the positions of the paper's `models.py`."""
    patch_size, rows, columns, width = 4, 2, 3, 16
    network = DiT(image_size=ImageSize(8, 12), in_channels=2, out_channels=2, patch_size=4, width=16, depth=1, heads=2)
    for layer in (network.patches, network.output):
        randomise(layer)
    x = torch.randn(1, 2, 8, 12)
    with torch.no_grad():
        found = network(x, torch.zeros(1))[0].numpy()
    frequencies = 10_000 ** (-np.arange(width // 4) / (width // 4))
    enter, leave = network.patches.weight.detach().flatten(1).numpy(), network.output.weight.detach().numpy()
    for row in range(rows):
        for column in range(columns):
            down, across = (slice(patch_size * at, patch_size * (at + 1)) for at in (row, column))
            angles = [column * frequencies, row * frequencies]
            position = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))])
            token = enter @ x[0, :, down, across].flatten().numpy() + network.patches.bias.detach().numpy() + position
            token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
            pixels = (leave @ token + network.output.bias.detach().numpy()).reshape(patch_size, patch_size, 2)
            assert found[:, down, across] == pytest.approx(pixels.transpose(2, 0, 1), abs=1e-5)


def test_positions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"image_size": ImageSize(16, 24), "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
    network = DiT(in_channels=1, out_channels=1, rope=True, **sizes)
    plain = DiT(in_channels=1, out_channels=1, **sizes)
    assert {*network.state_dict()} == {*plain.state_dict()} == {name for name, _ in network.named_parameters()}
    randomise(network)
    x, t = torch.randn(1, 1, 16, 24), torch.tensor([5.0])
    output = network(x, t)
    for name in ("_positions", "_rotations"):
        monkeypatch.setattr(f"ddpm.networks.dit.{name}", lambda *_: pytest.fail("computed again"))
    assert torch.equal(network(x, t), output)


def test_rows_and_columns_are_told_apart() -> None:
    """Also at another size than it was built for, and the rotations too."""
    cosines, sines = (each[:, ::2] for each in flux_rotations(2, 6, 8))
    torch.testing.assert_close(_rotations(2, 6, 8, torch.device("cpu")), torch.stack([cosines, sines]))
    network = DiT(image_size=16, in_channels=1, out_channels=1, patch_size=4, width=16, depth=1, heads=2)
    randomise(network)
    x, t = torch.randn(1, 1, 8, 24), torch.tensor([5.0])
    output = network(x, t)
    assert output.shape == x.shape
    transposed = network(x.transpose(2, 3).contiguous(), t).transpose(2, 3)
    assert (output - transposed).abs().max() > 0.01
    moved = network(x.roll(8, dims=3), t).roll(-8, dims=3)
    assert (output - moved).abs().max() > 0.01
