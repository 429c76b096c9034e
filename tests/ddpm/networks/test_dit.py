"""DiT against published sizes and against diffusers with the same weights."""

import pytest
import torch
from torch import Tensor

from ddpm.networks.dit import DiT
from ddpm.objective import Condition
from tests.ddpm.networks.test_unet import randomise

NAMES = {
    "to_q": "attn1.to_q",
    "to_k": "attn1.to_k",
    "to_v": "attn1.to_v",
    "to_out": "attn1.to_out.0",
    "linear_1": "ff.net.0.proj",
    "linear_2": "ff.net.2",
    "modulation": "norm1.linear",
}
"""Layers of a block here, and in diffusers."""


def in_diffusers(weights: dict[str, Tensor], depth: int = 2) -> dict[str, Tensor]:
    """Ours by diffusers' names, which give each block an embedding of its own."""
    mapped = {}
    for name, weight in weights.items():
        part, _, leaf = name.rpartition(".")
        if part.startswith("blocks."):
            _, number, layer = part.split(".")
            mapped[f"transformer_blocks.{number}.{NAMES[layer]}.{leaf}"] = weight
        elif part in ("linear_1", "linear_2", "class_embedding"):
            theirs = "class_embedder.embedding_table" if part == "class_embedding" else f"timestep_embedder.{part}"
            mapped |= {f"transformer_blocks.{number}.norm1.emb.{theirs}.{leaf}": weight for number in range(depth)}
        else:
            there = {"patches": "pos_embed.proj", "modulation": "proj_out_1", "output": "proj_out_2"}
            mapped[f"{there[part]}.{leaf}"] = weight
    return mapped


def test_published_sizes() -> None:
    """Peebles & Xie 2023, table 4, in millions of parameters: of ImageNet's classes on latents of 32×32×4."""
    for millions, patch_size, width, depth, heads in (
        (33, 2, 384, 12, 6),
        (130, 2, 768, 12, 12),
        (131, 8, 768, 12, 12),
        (458, 2, 1024, 24, 16),
        (459, 8, 1024, 24, 16),
        (675, 2, 1152, 28, 16),
        (676, 8, 1152, 28, 16),
    ):
        sizes = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
        with torch.device("meta"):
            network = DiT(image_size=32, in_channels=4, out_channels=8, num_classes=1001, **sizes)
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions, sizes


def test_outputs_and_gradients_equal_diffusers() -> None:
    import diffusers

    network = DiT(image_size=24, in_channels=3, out_channels=6, patch_size=4, width=16, depth=2, heads=2, num_classes=6)
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
    randomise(network)
    judge.load_state_dict(in_diffusers(network.state_dict()), strict=True)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 3, 24, 24, generator=generator), torch.tensor([0, 17, 500, 999])
    labels = torch.tensor([0, 4, 2, 5])
    output, expected = network(x, t, Condition(labels)), judge(x, t, labels).sample
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


def test_fresh_network_predicts_zero_and_its_blocks_are_identities() -> None:
    network = DiT(image_size=16, in_channels=3, out_channels=3, width=32, depth=1, heads=4)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    assert torch.count_nonzero(network(x, t)) == 0
    tokens = torch.randn(2, 64, 32)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 32)), tokens)
    assert network.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_rows_and_columns_are_told_apart() -> None:
    """Also at another size than it was built for."""
    network = DiT(image_size=16, in_channels=1, out_channels=1, patch_size=4, width=16, depth=1, heads=2)
    randomise(network)
    x, t = torch.randn(1, 1, 8, 24), torch.tensor([5.0])
    output = network(x, t)
    assert output.shape == x.shape
    transposed = network(x.transpose(2, 3).contiguous(), t).transpose(2, 3)
    assert (output - transposed).abs().max() > 0.01
    moved = network(x.roll(8, dims=3), t).roll(-8, dims=3)
    assert (output - moved).abs().max() > 0.01


def test_impossible_networks_are_refused() -> None:
    for changes, message in (
        ({"image_size": 30}, r"image_size 30 is not a multiple of patch_size 4"),
        ({"heads": 3}, r"width 16 is not a multiple of 4 and of heads 3"),
        ({"width": 6, "heads": 3}, r"width 6 is not a multiple of 4"),
    ):
        sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
        with pytest.raises(ValueError, match=message):
            DiT(in_channels=3, out_channels=3, **{**sizes, **changes})
