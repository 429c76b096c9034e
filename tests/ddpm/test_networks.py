"""Each kind of network: published sizes and initial weights, its inputs, and the same result in other circumstances.

The judges of forward passes with the same weights are diffusers for DiT, and the papers' formulas for others;
`test_interop.py` compares Ho et al.'s network with diffusers.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ddpm import networks
from ddpm.catalogue import NETWORKS, OF_CLASSES, OF_IMAGES, OF_NUMBERS
from ddpm.image_size import ImageSize
from ddpm.networks.dit import _rotations
from ddpm.networks.edm2 import MPConv
from ddpm.objective import Condition
from tests.ddpm.known import SMALL, TOLD, assert_equal_gradients, build, inputs, normal, of_classes

DROPOUT: dict[str, dict[str, Any]] = {kind: {"dropout": 0.3} for kind in TOLD} | {"dome": {}}
OPTIONS = DROPOUT | {"dit": DROPOUT["dit"] | {"qk_norm": True, "rms_norm": True, "rope": True}}
TELLS: dict[str, dict[str, Any]] = {
    kind: {"self_conditioning": True, "augmentation_labels": 5} if kind in TOLD else {} for kind in SMALL
}

CONDITIONED = {"condition_channels": 2, "vector_size": 3, "condition_noise": True}
GIVEN = Condition(
    image=normal(7, (4, 2, 16, 16), torch.float32),
    image_noise=torch.tensor([0.1, 0.2, 0.3, 0.4]),
    vector=torch.cat([normal(8, (4, 3), torch.float32), torch.ones(4, 1)], dim=1),
)
"""The conditions of four images."""
IMPROVED = {"channel_mults": (1, 2, 3, 4), "layers_per_level": 3, "attention_sizes": (16, 8), "scale_shift": True}
ADM = {"head_channels": 64, "resample_in_blocks": True, "attention_sizes": (32, 16, 8), "scale_shift": True}
PUBLISHED = {
    # Nichol & Dhariwal 2021, section 3.4, and Dhariwal & Nichol 2021, table 4.
    ("unet", 64, 6, 0): [(30, IMPROVED | {"channels": 64}), (121, IMPROVED)],
    ("unet", 64, 6, 1000): [(296, IMPROVED | ADM | {"channels": 192})],
    ("unet", 128, 6, 1000): [(422, ADM | {"channels": 256, "channel_mults": (1, 1, 2, 3, 4)})],
    ("unet", 256, 6, 1000): [(554, ADM | {"channels": 256, "channel_mults": (1, 1, 2, 2, 4, 4)})],
    # Peebles & Xie 2023, table 4, on latents.
    ("dit", 32, 8, 1001): [
        (33, {"width": 384, "depth": 12, "heads": 6}),
        (131, {"width": 768, "depth": 12, "heads": 12, "patch_size": 8}),
        (675, {"width": 1152, "depth": 28, "heads": 16}),
    ],
    # Karras et al. 2024, table 2, on latents.
    ("edm2", 64, 4, 1000): [(124.7, {"channels": 128}), (1523.2, {"channels": 448})],
    # dome272's checkpoints.
    ("dome", 64, 3, 0): [(23.332739, {})],
}
"""Millions of parameters, by kind, size of the images, channels out and classes."""


@pytest.mark.parametrize("about", PUBLISHED)
def test_published_sizes(about: tuple[str, int, int, int]) -> None:
    kind, image_size, out_channels, num_classes = about
    shape = {"image_size": image_size, "out_channels": out_channels, "num_classes": num_classes}
    for millions, options in PUBLISHED[about]:
        with torch.device("meta"):
            network = networks.build(kind, in_channels=3 if kind in ("unet", "dome") else 4, **shape, **options)
        found = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) / 1e6
        assert round(found, len(str(millions).partition(".")[2])) == millions, options


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unet", {"image_size": 27}, r"data.size=27 cannot be halved 1 times.*multiple of 2"),
        ("unet", {"image_size": 0}, r"data.size=0"),
        ("unet", {"norm_groups": 5}, r"channels=8 cannot be split into model.norm_groups=5 groups"),
        ("unet", {"channels": 3, "norm_groups": 3}, r"channels=3 must be even and at least 4"),
        ("unet", {"channel_mults": ()}, r"at least one level"),
        ("unet", {"heads": 3}, r"16 channels cannot be split into heads"),
        ("unet", {"head_channels": 12}, r"16 channels cannot be split into heads"),
        ("unet", {"null_class": True}, r"null_class stands for none of the classes"),
        ("edm2", {"image_size": 15}, r"data.size=15 cannot be halved 1 times"),
        ("edm2", {"channel_mults": ()}, r"at least one level"),
        ("edm2", {"head_channels": 5}, r"16 channels cannot be split into heads by model.head_channels=5"),
        ("dit", {"image_size": 15}, r"data.size=15 is not a multiple of model.patch_size=2"),
        ("dit", {"heads": 3}, r"width=16 cannot be split into model.heads=3"),
        ("dit", {"width": 6}, r"width=6 must be a multiple of 4"),
        ("dit", {"heads": 8, "rope": True}, r"rope: model.width=16 / model.heads=8 must be a multiple of 4"),
        ("dome", {"image_size": 0}, r"data.size=0 cannot be halved 3 times"),
        ("dome", {"image_size": 28}, r"data.size=28 cannot be halved 3 times"),
        ("unet", {"image_size": ImageSize(16, 27)}, r"data.size=27x16 cannot be halved"),
        ("edm2", {"image_size": ImageSize(27, 16)}, r"data.size=16x27 cannot be halved"),
        ("dit", {"image_size": ImageSize(15, 16)}, r"data.size=16x15 is not a multiple"),
        ("dome", {"image_size": ImageSize(16, 24)}, r"takes squares alone, not data.size=24x16"),
        ("dome", {"self_conditioning": True}, "t and the class alone"),
        *(("dome", {key: 2}, "t and the class alone") for key in ("augmentation_labels", "condition_channels")),
        ("vit", {}, f"unknown network 'vit': choose one of {', '.join(NETWORKS)}"),
    ],
)
def test_impossible_networks_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)


ZERO = {"unet": ("conv2.", "to_out.", "conv_out."), "dit": ("modulation.", "output.")}
"""Layers that begin at zero, so that a residual block begins as the identity and the output as zero."""


@pytest.mark.parametrize("kind", ZERO)
def test_initial_weights_are_the_papers(kind: str) -> None:
    """Uniform by fans, Ho et al.'s and DiT's, where q, k and v are one matrix; DiT's embeddings are normal."""
    torch.manual_seed(0)
    sizes = {"unet": {"channels": 32, "norm_groups": 32}, "dit": {"width": 64, "qk_norm": True, "num_classes": 5}}
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": 0}
    network = networks.build(kind, **shape | SMALL[kind] | sizes[kind])
    for name, parameter in network.named_parameters():
        if "norm" in name or "scale_" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("bias") or any(part in name for part in ZERO[kind]):
            assert torch.count_nonzero(parameter) == 0, name
        elif kind == "dit" and name.startswith(("linear_", "class_embedding.")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            fan_in, fan_out = parameter[0].numel(), parameter[:, 0].numel()
            if name.startswith("patches."):
                fan_out = len(parameter)
            if kind == "dit" and ".to_" in name and ".to_out" not in name:
                fan_out *= 3
            limit = math.sqrt(6 / (fan_in + fan_out))
            assert 0.98 * limit < parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name


@pytest.mark.parametrize("kind", SMALL)
def test_wrong_inputs_are_refused(kind: str) -> None:
    """Images of another size than it was built for are right."""
    (x, t), network, with_classes = inputs(), build(kind), build(kind, num_classes=5)
    output = network(x[..., ::2, :], t)
    assert output.shape == (4, 3, 8, 16) and output.isfinite().all()
    refused = [
        (network, of_classes(0, 0, 0, 0), "num_classes"),
        (with_classes, Condition(), "num_classes"),
        (network, Condition(augmentation=torch.zeros(4, 2)), "augmentation_labels"),
        # dome's has no such input.
        *([(network, Condition(x_start=x), "self_conditioning")] if kind in TOLD else []),
    ]
    for asked, condition, message in refused:
        with pytest.raises(ValueError, match=message):
            asked(x, t, condition)


@pytest.mark.parametrize("kind", TOLD)
def test_networks_are_told_estimate_and_augmentation(kind: str) -> None:
    """Without estimate and augmentation it is told zeros; dropout acts in training alone."""
    network = build(kind, out_channels=6, **TELLS[kind], **OPTIONS[kind])
    x, t = inputs()
    none, ones = Condition(), torch.ones(4, 5)
    zero = Condition(x_start=torch.zeros_like(x), augmentation=torch.zeros(4, 5))
    with torch.no_grad():
        assert (network(x, t) - network(x, t)).abs().max() > 0.01
        output = network.eval()(x, t, none)
        assert output.shape == (4, 6, 16, 16)
        assert torch.equal(network(x, t, zero), output)
        for other in (zero._replace(x_start=x), zero._replace(augmentation=ones)):
            assert (network(x, t, other) - output).abs().max() > 0.01
        # Each image is told its own.
        mixed = network(x, t, zero._replace(augmentation=ones * torch.tensor([[0.0], [1.0], [0.0], [1.0]])))
    assert_close(mixed[[0, 2]], output[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TOLD)
def test_networks_are_told_their_conditions(kind: str) -> None:
    """What is left out is zeros, also where a number is zero, which is another one."""
    network, (x, t) = build(kind, **CONDITIONED).eval(), inputs()
    with torch.no_grad():
        output, zeros = network(x, t, GIVEN), torch.zeros(4, 4)
        zeroed = [zeros[:, :3], torch.ones(4, 1)]
        others = {"image": GIVEN.image.flip(1), "image_noise": zeros[:, 0], "vector": zeros}
        answers = [network(x, t, GIVEN._replace(**{name: other})) for name, other in others.items()]
        answers.append(network(x, t, GIVEN._replace(vector=torch.cat(zeroed, dim=1))))
        for number, answer in enumerate(answers):
            assert all((answer - other).abs().max() > 0.01 for other in (output, *answers[:number]))
        # Each image is told its own.
        alone = Condition(*(None if each is None else each[:1] for each in GIVEN))
        assert_close(network(x[:1], t[:1], alone), output[:1], rtol=0, atol=1e-5)
    plain = build(kind)
    for name, message in (("image", "2 channels"), ("image_noise", "image_noise goes with"), ("vector", "vector goes")):
        with pytest.raises(ValueError, match=message):
            network(x, t, GIVEN._replace(**{name: None}))
        with pytest.raises(ValueError, match=message.replace("2 c", "0 c")):
            plain(x, t, Condition(**{name: getattr(GIVEN, name)}))


@pytest.mark.parametrize("kind", TOLD)
def test_conditions_that_come_later_change_nothing_at_first(kind: str) -> None:
    """The weights of a network without conditions, followed by zeros, and new layers as they begin."""
    parent, (x, t) = build(kind), inputs()
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": 0}
    child = networks.build(kind, **shape, **SMALL[kind], **CONDITIONED)
    learnt, grown = dict(parent.named_parameters()), []
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            if name.startswith(OF_NUMBERS):
                continue
            value = learnt[name]
            if parameter.shape != value.shape:
                grown.append(name)
                parameter.zero_()
            parameter[:, : value.shape[1]].copy_(value) if parameter.ndim > 1 else parameter.copy_(value)
        for each in (parent, child):
            if kind == "edm2":
                each.normalise()
        output, expected = child.eval()(x, t, GIVEN), parent.eval()(x, t)
    assert len(grown) == 1 and grown[0] in OF_IMAGES
    assert_close(output, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    child(x, t, GIVEN).square().mean().backward()
    assert all(dict(child.named_parameters())[f"{part}.linear_2.weight"].grad.any() for part in OF_NUMBERS)


def super_resolved(weights: dict[str, Tensor], x: Tensor, t: Tensor, low: Tensor) -> Tensor:
    """guided-diffusion's `SuperResModel`: its `UNetModel` of ADM's options on x_t, then the enlarged image.

    Written from unet.py and nn.py of github.com/openai/guided-diffusion, with our names of the weights, for two levels
    of one block, attention in the second one, heads of 8 channels, `use_scale_shift_norm` and `resblock_updown`.
    """

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(name: str, h: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(h, weight, weights[f"{name}.bias"], padding=weight.shape[2] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 4, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    def res_block(name: str, h: Tensor, change: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
        out = conv(f"{name}.conv1", change(F.silu(norm(f"{name}.norm1", h))))
        h = change(h)
        scale, shift = linear(f"{name}.time_emb_proj", F.silu(emb))[..., None, None].chunk(2, dim=1)
        out = norm(f"{name}.norm2", out) * (1 + scale) + shift
        skip = conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in weights else h
        return skip + conv(f"{name}.conv2", F.silu(out))

    def attention_block(name: str, h: Tensor) -> Tensor:
        b, c, *spatial = h.shape
        flat = norm(f"{name}.group_norm", h.reshape(b, c, -1))
        q, k, v = (
            F.conv1d(flat, weights[f"{name}.to_{part}.weight"][..., None], weights[f"{name}.to_{part}.bias"]).reshape(
                b * (c // 8), 8, -1
            )
            for part in "qkv"
        )
        scale = 1 / math.sqrt(math.sqrt(8))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        out = F.conv1d(a, weights[f"{name}.to_out.0.weight"][..., None], weights[f"{name}.to_out.0.bias"])
        return h + out.reshape(b, c, *spatial)

    upsampled = F.interpolate(low, x.shape[2:], mode="bilinear")
    freqs = torch.exp(-math.log(10000) * torch.arange(4, dtype=torch.float32) / 4)
    args = t[:, None].float() * freqs[None]
    emb = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    emb = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", emb)))
    down, up = "down_blocks", "up_blocks"
    hs = [conv("conv_in", torch.cat([x, upsampled], dim=1))]
    hs.append(res_block(f"{down}.0.resnets.0", hs[-1]))
    hs.append(res_block(f"{down}.0.downsamplers.0", hs[-1], lambda h: F.avg_pool2d(h, 2)))
    hs.append(attention_block(f"{down}.1.attentions.0", res_block(f"{down}.1.resnets.0", hs[-1])))
    h = attention_block("mid_block.attentions.0", res_block("mid_block.resnets.0", hs[-1]))
    h = res_block("mid_block.resnets.1", h)
    for number in range(2):
        h = res_block(f"{up}.0.resnets.{number}", torch.cat([h, hs.pop()], dim=1))
        h = attention_block(f"{up}.0.attentions.{number}", h)
    h = res_block(f"{up}.0.upsamplers.0", h, lambda h: F.interpolate(h, scale_factor=2, mode="nearest"))
    for number in range(2):
        h = res_block(f"{up}.1.resnets.{number}", torch.cat([h, hs.pop()], dim=1))
    return conv("conv_out", F.silu(norm("conv_norm_out", h)))


def test_a_conditioned_unet_is_the_upsampler_of_guided_diffusion() -> None:
    adm = {"head_channels": 8, "scale_shift": True, "resample_in_blocks": True, "conventions": "diffusers"}
    network, (x, t) = build("unet", out_channels=6, condition_channels=3, **adm).eval(), inputs()
    low = normal(9, (4, 3, 4, 4), torch.float32)
    expected = super_resolved(network.state_dict(), x, t, low)
    output = network(x, t, Condition(image=F.interpolate(low, (16, 16), mode="bilinear")))
    assert expected.std() > 0.1
    assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_every_weight_has_a_part_and_a_gradient(kind: str) -> None:
    """Also when it gets neither an estimate nor augmentation: DDP waits for one that has none."""
    told, given = (CONDITIONED, GIVEN) if kind in TOLD else ({}, Condition())
    network = build(kind, num_classes=3, **TELLS[kind], **told, **({"uncertainty": True} if kind == "edm2" else {}))
    x, t = inputs()
    network(x, t, given._replace(labels=torch.tensor([0, 1, 0, 2]))).square().mean().backward()
    learnt = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in learnt.values())
    assert {name.partition(".")[0] for name in learnt} == {*NETWORKS[kind].parts.split()}


@pytest.mark.parametrize("kind", SMALL)
def test_the_null_class_is_one_more(kind: str) -> None:
    plain, network = build(kind, num_classes=3).eval(), build(kind, num_classes=3, null_class=True).eval()
    x, t = inputs()
    three, four = (dict(each.named_parameters()) for each in (plain, network))
    wider = [name for name in three if three[name].shape != four[name].shape]
    assert wider == [name for name in three if name.startswith(OF_CLASSES)] != []
    assert [sorted(four[name].shape)[0] for name in wider] == [4]
    outputs = torch.stack([network(x, t, of_classes(*[label] * 4)) for label in range(4)])
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def held_bytes(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A result, and how much beside the weights lies in memory until the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, sum(held.values())


@pytest.mark.parametrize("kind", SMALL)
def test_recomputing_keeps_every_bit(kind: str) -> None:
    results = []
    for again in (False, True):
        network = build(kind, gradient_checkpointing=again, num_classes=2, **OPTIONS[kind])
        x, t = inputs()
        torch.manual_seed(5)
        output, held = held_bytes(network, lambda: network(x, t, of_classes(0, 1, 0, 1)))  # noqa: B023
        output.square().mean().backward()
        results.append(([output, *(parameter.grad for parameter in network.parameters())], held))
    (tensors, held), (tensors_again, held_again) = results
    for one, other in zip(tensors, tensors_again, strict=True):
        assert (one is other is None) or torch.equal(one, other)
    assert held_again < 0.5 * held


@pytest.mark.parametrize("kind", SMALL)
def test_half_precision_agrees_with_float32(kind: str) -> None:
    network = build(kind, num_classes=3, **TELLS[kind], **OPTIONS[kind]).eval()
    (x, t), condition = inputs(), of_classes(0, 1, 2, 0)
    with torch.no_grad():
        expected = network(x, t, condition)
        network.to(memory_format=torch.channels_last)
        output = network(x.contiguous(memory_format=torch.channels_last), t, condition)
        assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [network(x, t, condition)]
        if kind != "edm2":
            rounded += [network.bfloat16()(x.bfloat16(), t, condition)]
    for output in rounded:
        assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("kind", SMALL)
def test_no_pass_waits_for_the_device(kind: str) -> None:
    """On the meta device any look at a value raises."""
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 6, "num_classes": 3}
    with torch.device("meta"):
        network = networks.build(kind, **shape, **SMALL[kind], **OPTIONS[kind])
        x, t, labels = torch.empty(2, 3, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.int64)
    output = network(x, t, Condition(labels))
    output.sum().backward()
    assert output.shape == (2, 6, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_compiles_as_one_graph(kind: str, again: bool) -> None:
    options = OPTIONS[kind] | ({"dropout": 0.0} if kind in TOLD else {})
    network = build(kind, num_classes=3, gradient_checkpointing=again, **options)
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    outputs = [each(*inputs(), of_classes(0, 1, 2, 0)) for each in (network, compiled)]
    for output in outputs:
        output.square().mean().backward()
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        # Also the weights that EDM2 brings back in place.
        assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
        if ours.requires_grad:
            scale = ours.grad.abs().max().item()
            assert_close(theirs.grad, ours.grad, rtol=0, atol=1e-3 * scale + 1e-6)


NAMES = {"to_q": "attn1.to_q", "to_k": "attn1.to_k", "to_v": "attn1.to_v", "to_out": "attn1.to_out.0"}
NAMES |= {"linear_1": "ff.net.0.proj", "linear_2": "ff.net.2", "modulation": "norm1.linear"}
NAMES |= {"scale_q": "attn1.norm_q", "scale_k": "attn1.norm_k"}
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
    theirs = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2}
    theirs |= {"sample_size": 24, "patch_size": 4, "num_embeds_ada_norm": 5, "norm_eps": 1e-6}
    judge = diffusers.DiTTransformer2DModel(**theirs).eval()
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
    assert_close(output, expected, rtol=0, atol=2e-5)
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
            assert_close(network(corner, t), whole(x, t)[:, :, :height, :width], rtol=0, atol=1e-5)
        cosines, sines = (each[:, ::2] for each in flux_rotations(height // 4, width // 4, 8))
        found = _rotations(height // 4, width // 4, 8, torch.device("cpu"))
        assert_close(found, torch.stack([cosines, sines]))


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
    assert_close(output, expected, rtol=0, atol=2e-5)


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
        assert_close(network(x, t, condition).double(), expected, rtol=0, atol=2e-5)


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
    assert_close(output, expected, rtol=0, atol=5e-3)
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
