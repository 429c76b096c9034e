"""Forward passes of networks against judges with the same weights: diffusers for DiT, the papers' formulas for others.

`test_interop.py` compares Ho et al.'s network with diffusers.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.image_size import ImageSize
from ddpm.networks.dit import _rotations
from ddpm.networks.edm2 import MPConv
from ddpm.objective import Condition
from tests.ddpm.known import assert_equal_gradients, build, inputs, normal, of_classes

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
"""Layers of a block of DiT here, and in diffusers."""


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
def test_dit_equals_diffusers(options: tuple[str, ...]) -> None:
    """With diffusers' and PyTorch's norms in their places, and HunyuanDiT's attention, which rotates."""
    import diffusers
    from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

    sizes = {"image_size": 24, "out_channels": 6, "num_classes": 6, "patch_size": 4}
    network = build("dit", **sizes, **dict.fromkeys(options, True))
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
            block.norm1.norm = block.norm3 = judge.norm_out = nn.RMSNorm(16, eps=1e-6, elementwise_affine=False)
        if "qk_norm" in options:
            block.attn1.norm_q, block.attn1.norm_k = (diffusers.models.normalization.RMSNorm(8, 1e-6) for _ in range(2))
        if "rope" in options:
            block.attn1.set_processor(HunyuanAttnProcessor2_0())
    judge.load_state_dict(in_diffusers(network.state_dict()), strict=True)
    x, t, labels = normal(1, (4, 3, 24, 24), torch.float32), torch.tensor([0, 17, 500, 999]), of_classes(0, 4, 2, 5)
    rotated = {"image_rotary_emb": flux_rotations(6, 6, 8)} if "rope" in options else {}
    output, expected = network(x, t, labels), judge(x, t, labels.labels, rotated).sample
    assert output.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    # diffusers' embeddings are several: their gradients add up to ours.
    assert_equal_gradients(network, output, judge, expected, lambda name: [*in_diffusers({name: torch.empty(0)})])


def test_each_patch_has_its_place() -> None:
    """Fresh blocks are identities: then a smaller image, of any shape, is a corner of a square one."""
    whole = build("dit", image_size=24, patch_size=4, depth=1)
    for block in whole.blocks:
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
    x, t = normal(1, (1, 3, 24, 24), torch.float32), torch.tensor([5.0])
    for height, width in ((8, 24), (16, 8)):
        corner = x[:, :, :height, :width]
        own = build("dit", image_size=ImageSize(height, width), patch_size=4, depth=1)
        own.load_state_dict(whole.state_dict())
        for network in (own, whole):
            torch.testing.assert_close(network(corner, t), whole(x, t)[:, :, :height, :width], rtol=0, atol=1e-5)
        cosines, sines = (each[:, ::2] for each in flux_rotations(height // 4, width // 4, 8))
        found = _rotations(height // 4, width // 4, 8, torch.device("cpu"))
        torch.testing.assert_close(found, torch.stack([cosines, sines]))


def test_positions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in no checkpoint."""
    network = build("dit", image_size=ImageSize(16, 24), rope=True)
    assert {*network.state_dict()} == {name for name, _ in network.named_parameters()}
    x, t = inputs(size=(16, 24))
    output = network(x, t)
    for name in ("_positions", "_rotations"):
        monkeypatch.setattr(f"ddpm.networks.dit.{name}", lambda *_: pytest.fail("computed again"))
    assert torch.equal(network(x, t), output)


def dome(weights: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The published forward pass, from its weights alone: attention as a matrix, frequencies as they are there."""

    def double_conv(name: str, x: Tensor, residual: bool = False) -> Tensor:
        h = F.conv2d(x, weights[f"{name}.double_conv.0.weight"], padding=1)
        h = F.gelu(F.group_norm(h, 1, weights[f"{name}.double_conv.1.weight"], weights[f"{name}.double_conv.1.bias"]))
        h = F.conv2d(h, weights[f"{name}.double_conv.3.weight"], padding=1)
        h = F.group_norm(h, 1, weights[f"{name}.double_conv.4.weight"], weights[f"{name}.double_conv.4.bias"])
        return F.gelu(x + h) if residual else h

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(name: str, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.view(B, C, H * W).swapaxes(1, 2)
        qkv = norm(f"{name}.ln", tokens) @ weights[f"{name}.mha.in_proj_weight"].T + weights[f"{name}.mha.in_proj_bias"]
        q, k, v = qkv.view(B, H * W, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        heads = (q @ k.transpose(2, 3) / math.sqrt(C // 4)).softmax(-1) @ v
        tokens = tokens + linear(f"{name}.mha.out_proj", heads.transpose(1, 2).reshape(B, H * W, C))
        h = F.gelu(linear(f"{name}.ff_self.1", norm(f"{name}.ff_self.0", tokens)))
        return (linear(f"{name}.ff_self.3", h) + tokens).swapaxes(2, 1).view(B, C, H, W)

    def embedded(name: str, x: Tensor) -> Tensor:
        return x + linear(f"{name}.emb_layer.1", F.silu(embedding))[:, :, None, None]

    def down(number: int, x: Tensor) -> Tensor:
        name = f"down{number}.maxpool_conv"
        x = double_conv(f"{name}.2", double_conv(f"{name}.1", F.max_pool2d(x, 2), residual=True))
        return attention(f"sa{number}", embedded(f"down{number}", x))

    def up(number: int, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([skip, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)], dim=1)
        x = double_conv(f"up{number}.conv.1", double_conv(f"up{number}.conv.0", x, residual=True))
        return attention(f"sa{number + 3}", embedded(f"up{number}", x))

    frequencies = 1.0 / 10000 ** (torch.arange(0, 256, 2).float() / 256)
    embedding = torch.cat([torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)], dim=-1)
    embedding = embedding + weights["label_emb.weight"][labels]
    x1 = double_conv("inc", x)
    x2 = down(1, x1)
    x3 = down(2, x2)
    h = down(3, x3)
    for number in (1, 2, 3):
        h = double_conv(f"bot{number}", h)
    h = up(3, up(2, up(1, h, x3), x2), x1)
    return F.conv2d(h, weights["outc.weight"], weights["outc.bias"])


@pytest.mark.parametrize("image_size", [16, 24])
def test_dome_is_what_its_weights_say(image_size: int) -> None:
    """By the names of the published checkpoints, which are 183 with classes."""
    network, condition = build("dome", image_size=image_size, num_classes=10), of_classes(0, 9)
    assert len(network.state_dict()) == 183
    x, t = normal(1, (2, 3, image_size, image_size), torch.float32), torch.tensor([1.0, 999.0])
    with torch.no_grad():
        output = network(x, t, condition)
        expected = dome(network.state_dict(), x, t, condition.labels)
    assert output.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


def edm2(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Figure 21 from the weights alone, in float64, of `SMALL` with classes and augmentation."""
    weights = {name: parameter.double() for name, parameter in network.named_parameters()}

    def unit(v: Tensor, dim: int) -> Tensor:
        return v / (v.square().mean(dim, keepdim=True).sqrt() + 1e-4)

    def layer(name: str, v: Tensor) -> Tensor:
        w = weights[f"{name}.weight"]
        w = (unit(w.flatten(1), 1) / w[0].numel() ** 0.5).view_as(w)
        return v @ w.T if w.ndim == 2 else F.conv2d(v, w, padding=w.shape[-1] // 2)

    def silu(v: Tensor) -> Tensor:
        return v * torch.sigmoid(v) / 0.596

    def block(name: str, v: Tensor, encoder: bool = False) -> Tensor:
        shortcut = f"{name}.conv_shortcut.weight" in weights
        if encoder:
            v = unit(layer(f"{name}.conv_shortcut", v) if shortcut else v, 1)
        h = layer(f"{name}.conv_1", silu(v))
        h = h * (1 + weights[f"{name}.gain"] * layer(f"{name}.dense", embedding))[:, :, None, None]
        h = layer(f"{name}.conv_2", silu(h))
        if not encoder and shortcut:
            v = layer(f"{name}.conv_shortcut", v)
        v = (0.7 * v + 0.3 * h) / 0.58**0.5
        if f"{name}.to_qkv.weight" in weights:
            B, C, H, W = v.shape
            qkv = layer(f"{name}.to_qkv", v).view(B, 3, C // 8, 8, H * W)
            q, k, value = unit(qkv, 3).unbind(1)
            attended = value @ (q.transpose(2, 3) @ k / 8**0.5).softmax(3).transpose(2, 3)
            v = (0.7 * v + 0.3 * layer(f"{name}.to_out", attended.reshape(B, C, H, W))) / 0.58**0.5
        return v

    def cat(a: Tensor, b: Tensor) -> Tensor:
        total = a.shape[1] + b.shape[1]
        parts = [part * (total / 2 / part.shape[1]) ** 0.5 for part in (a, b)]
        return torch.cat(parts, dim=1)

    x, t = x.double(), t.double()
    fourier = 2**0.5 * torch.cos(2 * math.pi * (t[:, None] * weights["frequencies"] + weights["phases"]))
    one_hot = F.one_hot(condition.labels, 5).double() * 5**0.5
    embedding = (layer("time_embedding", fourier) + layer("class_embedding", one_hot)) / 2**0.5
    embedding = silu(embedding + layer("augmentation_embedding", condition.augmentation.double()))
    skips = [layer("conv_in", F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))]
    skips.append(block("encoder.0", skips[-1], encoder=True))
    skips.append(block("encoder.1", F.avg_pool2d(skips[-1], 2), encoder=True))
    skips.append(block("encoder.2", skips[-1], encoder=True))
    h = block("middle.1", block("middle.0", skips[-1]))
    h = block("decoder.0", cat(h, skips.pop()))
    h = block("decoder.1", cat(h, skips.pop()))
    h = block("decoder.2", h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    h = block("decoder.3", cat(h, skips.pop()))
    h = block("decoder.4", cat(h, skips.pop()))
    return layer("conv_out", h) * weights["gain_out"]


def told() -> tuple[Tensor, Tensor, Condition]:
    x, _ = inputs()
    condition = of_classes(0, 4, 2, 2)._replace(augmentation=normal(2, (4, 2), torch.float32))
    return x, torch.tensor([-1.55, -0.3, 0.2, 1.1]), condition


def test_edm2_is_what_the_paper_says() -> None:
    network, (x, t, condition) = build("edm2", num_classes=5, augmentation_labels=2).eval(), told()
    with torch.no_grad():
        expected = edm2(network, x, t, condition)
        assert expected.std() > 0.3
        torch.testing.assert_close(network(x, t, condition).double(), expected, rtol=0, atol=2e-5)


def test_training_brings_the_weights_back_once() -> None:
    """A second time, in a step that is repeated, changes no bit; sampling changes none."""
    network, (x, t, condition) = build("edm2", num_classes=5, augmentation_labels=2), told()
    weights = {name: module.weight for name, module in network.named_modules() if isinstance(module, MPConv)}
    assert len(weights) == 48
    with torch.no_grad():
        for i, weight in enumerate(weights.values()):
            weight.mul_(weight[0].numel() ** 0.5 * 2.0 ** (i % 5 - 2))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    expected = network.eval()(x, t, condition)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())

    network.train().normalise()
    output = network(x, t, condition)
    for name, weight in weights.items():
        assert (weight.square().flatten(1).mean(dim=1).sqrt() - 1).abs().max() < 1e-5, name
    # Only the direction of stored weights plays a part in the output.
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-3)
    after = {name: parameter.clone() for name, parameter in network.named_parameters()}
    assert all(torch.equal(after[name], before[name]) for name in after if name.removesuffix(".weight") not in weights)
    network.normalise()
    again = network(x, t, condition)
    assert torch.equal(again, output)
    assert all(torch.equal(parameter, after[name]) for name, parameter in network.named_parameters())

    # No gradient points along the weights, whose length says nothing (equation 51).
    again.square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {"frequencies", "phases"}
    for name, weight in weights.items():
        along = (weight.grad * weight).flatten(1).sum(dim=1).norm()
        assert along < 1e-3 * weight.grad.norm() * weight[0].norm(), name
