"""Each kind of network: published sizes, the inputs that it takes, and the same result in other circumstances."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import networks
from ddpm.catalogue import NETWORKS
from ddpm.image_size import ImageSize
from ddpm.objective import Condition
from tests.ddpm.networks.weights import inputs, randomise

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": 8, "channel_mults": (1, 2), "attention_sizes": (8,), "norm_groups": 4, "dropout": 0.3},
    "edm2": {"channels": 8, "channel_mults": (1, 2), "attention_sizes": (8,), "head_channels": 8, "dropout": 0.3},
    "dit": {"width": 16, "depth": 2, "heads": 2, "dropout": 0.3, "qk_norm": True, "rms_norm": True, "rope": True},
    "dome": {},
}
TELLABLE = [kind for kind, network in NETWORKS.items() if network.takes_estimates]
"""Of estimates and augmentation."""


def build(kind: str, **changes: Any) -> nn.Module:
    sizes = {"image_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": 0}
    network = networks.build(kind, **{**sizes, **SMALL.get(kind, {}), **changes})
    randomise(network)
    return network


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
}
"""Millions of parameters, by kind, size of the images, channels out and classes."""


@pytest.mark.parametrize("about", PUBLISHED)
def test_published_sizes(about: tuple[str, int, int, int]) -> None:
    kind, image_size, out_channels, num_classes = about
    shape = {"image_size": image_size, "out_channels": out_channels, "num_classes": num_classes}
    for millions, options in PUBLISHED[about]:
        with torch.device("meta"):
            network = networks.build(kind, in_channels=3 if kind == "unet" else 4, **shape, **options)
        found = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) / 1e6
        assert round(found, 1 if kind == "edm2" else None) == millions, options


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
        ("dit", {"heads": 8}, r"rope: model.width=16 / model.heads=8 must be a multiple of 4"),
        ("dome", {"image_size": 0}, r"data.size=0 cannot be halved 3 times"),
        ("dome", {"image_size": 28}, r"data.size=28 cannot be halved 3 times"),
        ("unet", {"image_size": ImageSize(16, 27)}, r"data.size=27x16 cannot be halved"),
        ("edm2", {"image_size": ImageSize(27, 16)}, r"data.size=16x27 cannot be halved"),
        ("dit", {"image_size": ImageSize(15, 16)}, r"data.size=16x15 is not a multiple"),
        ("dome", {"image_size": ImageSize(16, 24)}, r"takes squares alone, not data.size=24x16"),
        ("dome", {"self_conditioning": True}, "t and the class alone"),
        ("dome", {"augmentation_labels": 2}, "t and the class alone"),
        ("vit", {}, f"unknown network 'vit': choose one of {', '.join(NETWORKS)}"),
    ],
)
def test_impossible_networks_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)


@pytest.mark.parametrize("kind", SMALL)
def test_other_sizes_than_built_for(kind: str) -> None:
    x = torch.randn(2, 3, 8, 24)
    output = build(kind)(x, torch.tensor([1.0, 2.0]))
    assert output.shape == x.shape
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", TELLABLE)
def test_dropout_acts_in_training_alone(kind: str) -> None:
    network, (x, t) = build(kind), inputs()
    with torch.no_grad():
        assert (network(x, t) - network(x, t)).abs().max() > 0.01
        network.eval()
        assert torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize("kind", TELLABLE)
def test_lacking_estimate_and_augmentation_are_zero(kind: str) -> None:
    network = build(kind, out_channels=6, self_conditioning=True, augmentation_labels=5).eval()
    x, t = inputs()
    none, ones = Condition(), torch.ones(4, 5)
    zero = Condition(x_start=torch.zeros_like(x), augmentation=torch.zeros(4, 5))
    output = network(x, t, none)
    assert output.shape == (4, 6, 16, 16)
    assert torch.equal(network(x, t, zero), output)
    for other in (zero._replace(x_start=x), zero._replace(augmentation=ones)):
        assert (network(x, t, other) - output).abs().max() > 0.01
    # Each image is told its own.
    mixed = network(x, t, zero._replace(augmentation=ones * torch.tensor([[0.0], [1.0], [0.0], [1.0]])))
    torch.testing.assert_close(mixed[[0, 2]], output[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_the_null_class_is_one_more(kind: str) -> None:
    plain, network = build(kind, num_classes=3).eval(), build(kind, num_classes=3, null_class=True).eval()
    x, t = inputs()
    wide = [
        one for one, other in zip(network.parameters(), plain.parameters(), strict=True) if one.shape != other.shape
    ]
    assert [sorted(parameter.shape)[0] for parameter in wide] == [4]
    outputs = torch.stack([network(x, t, Condition(torch.full((4,), label))) for label in range(4)])
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


@pytest.mark.parametrize("kind", SMALL)
def test_every_weight_has_a_gradient(kind: str) -> None:
    """Also when it gets neither an estimate nor augmentation: DDP waits for one that has none."""
    told = {"self_conditioning": True, "augmentation_labels": 2} if kind in TELLABLE else {}
    network = build(kind, num_classes=2, **told, **({"uncertainty": True} if kind == "edm2" else {}))
    x, t = inputs()
    network(x, t, Condition(torch.tensor([0, 1, 0, 1]))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", SMALL)
def test_wrong_inputs_are_refused(kind: str) -> None:
    x, t = inputs()
    network = build(kind)
    for condition, message in (
        (Condition(torch.tensor([0, 0, 0, 0])), "num_classes"),
        (Condition(x_start=x), "self_conditioning"),
        (Condition(augmentation=torch.zeros(4, 2)), "augmentation_labels"),
    ):
        if kind == "dome" and condition.x_start is not None:
            # It has no such input.
            continue
        with pytest.raises(ValueError, match=message):
            network(x, t, condition)
    with pytest.raises(ValueError, match="num_classes"):
        build(kind, num_classes=5)(x, t, Condition())


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
        network = build(kind, gradient_checkpointing=again, num_classes=2)
        x, t = inputs()
        condition = Condition(torch.tensor([0, 1, 0, 1]))
        torch.manual_seed(5)
        output, held = held_bytes(network, lambda: network(x, t, condition))  # noqa: B023
        output.square().mean().backward()
        results.append((output, {name: parameter.grad for name, parameter in network.named_parameters()}, held))
    (output, gradients, held), (output_again, gradients_again, held_again) = results
    assert torch.equal(output_again, output)
    for name, gradient in gradients.items():
        other = gradients_again[name]
        assert (other is gradient is None) or torch.equal(other, gradient), name
    assert held_again < 0.5 * held


@pytest.mark.parametrize("kind", SMALL)
def test_half_precision_agrees_with_float32(kind: str) -> None:
    told = {"self_conditioning": True, "augmentation_labels": 2} if kind in TELLABLE else {}
    network = build(kind, num_classes=3, **told).eval()
    x, t = inputs()
    condition = Condition(torch.tensor([0, 1, 2, 0]))
    with torch.no_grad():
        expected = network(x, t, condition)
        network.to(memory_format=torch.channels_last)
        output = network(x.contiguous(memory_format=torch.channels_last), t, condition)
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [network(x, t, condition)]
        if kind != "edm2":
            rounded += [network.bfloat16()(x.bfloat16(), t, condition)]
    for output in rounded:
        assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("kind", SMALL)
def test_no_pass_waits_for_the_device(kind: str) -> None:
    """On the meta device any look at a value raises."""
    with torch.device("meta"):
        network = networks.build(kind, image_size=16, in_channels=3, out_channels=6, num_classes=3, **SMALL[kind])
        x, t, labels = torch.empty(2, 3, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.int64)
    output = network(x, t, Condition(labels))
    output.sum().backward()
    assert output.shape == (2, 6, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_compiles_as_one_graph(kind: str, again: bool) -> None:
    network = build(kind, num_classes=3, gradient_checkpointing=again, **({} if kind == "dome" else {"dropout": 0.0}))
    twin = copy.deepcopy(network)
    x, t = inputs()
    condition = Condition(torch.tensor([0, 1, 2, 0]))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for each in (network, compiled):
        output = each(x, t, condition)
        output.square().mean().backward()
        results.append(output)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        # Also the weights that EDM2 brings back in place.
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
        if ours.requires_grad:
            scale = ours.grad.abs().max().item()
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=0, atol=1e-3 * scale + 1e-6)
