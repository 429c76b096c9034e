"""The network against published sizes and against diffusers with the same weights."""

import pytest
import torch

from ddpm.networks.unet import UNet
from ddpm.objective import UNCONDITIONAL, Condition


def small(**changes: object) -> UNet:
    sizes = {"image_size": 16, "channels": 8, "channel_mults": (1, 2, 3), "attention_sizes": (8,), "norm_groups": 4}
    return UNet(**{**sizes, **changes})


def small_judge(channels: int = 3, num_classes: int | None = None, **changes: object) -> torch.nn.Module:
    """diffusers' network with the settings that make it Ho et al.'s, of the size of `small`."""
    import diffusers

    settings = {
        "sample_size": 16,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "num_class_embeds": num_classes,
        # Of the middle's attention, which has none with scale_shift unless told so.
        "attn_norm_num_groups": 4,
    }
    return diffusers.UNet2DModel(**{**settings, **changes})


RESAMPLING_JUDGE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
SWITCHES = {
    "heads": ({"head_channels": 4}, {"attention_head_dim": 4}),
    "scale_shift": ({"scale_shift": True}, {"resnet_time_scale_shift": "scale_shift"}),
    "resample": ({"resample_in_blocks": True}, RESAMPLING_JUDGE),
    "all": (
        {"heads": 2, "head_channels": 8, "scale_shift": True, "resample_in_blocks": True, "out_channels": 6},
        {"attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift", "out_channels": 6, **RESAMPLING_JUDGE},
    ),
}
"""Dhariwal & Nichol's, and what diffusers calls them."""


def randomise(network: torch.nn.Module, seed: int = 0) -> None:
    """Weights that leave no branch at zero and keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def inputs(channels: int = 3, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, 16, 16, generator=generator), torch.tensor([0, 17, 500, 999])[:batch]


def test_published_sizes() -> None:
    for name, image_size, channel_mults, parameters, tensors in (
        ("cifar10", 32, (1, 2, 2, 2), 35_746_307, 328),
        ("celebahq-256", 256, (1, 1, 2, 2, 4, 4), 113_673_219, 450),
        ("celeba-64", 64, (1, 2, 2, 2, 4), 78_700_803, 390),
    ):
        with torch.device("meta"):
            network = UNet(image_size=image_size, channel_mults=channel_mults)
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters, name
        assert len(network.state_dict()) == tensors, name
        images = torch.empty(2, 3, image_size, image_size, device="meta")
        # On the meta device any look at a value raises, so the forward pass never waits for the device.
        assert network(images, torch.zeros(2, dtype=torch.int64, device="meta")).shape == images.shape, name


def test_sizes_published_for_the_switches() -> None:
    """Nichol & Dhariwal 2021, section 3.4, and Dhariwal & Nichol 2021, table 4, in millions of parameters."""
    improved = {"image_size": 64, "channel_mults": (1, 2, 3, 4), "layers_per_level": 3, "attention_sizes": (16, 8)}
    adm = {"num_classes": 1000, "head_channels": 64, "resample_in_blocks": True, "attention_sizes": (32, 16, 8)}
    for millions, settings in (
        (30, {"channels": 64, **improved}),
        (68, {"channels": 96, **improved}),
        (121, {"channels": 128, **improved}),
        (296, {"channels": 192, **improved, **adm}),
        (422, {"channels": 256, "image_size": 128, "channel_mults": (1, 1, 2, 3, 4), **adm}),
        (554, {"channels": 256, "image_size": 256, "channel_mults": (1, 1, 2, 2, 4, 4), **adm}),
    ):
        with torch.device("meta"):
            network = UNet(out_channels=6, scale_shift=True, **settings)
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions, settings


@pytest.mark.parametrize(("channels", "num_classes"), [(3, 0), (1, 0), (3, 5)], ids=["colour", "grey", "classes"])
def test_forward_and_names_equal_diffusers(channels: int, num_classes: int) -> None:
    network, judge = small(in_channels=channels, num_classes=num_classes), small_judge(channels, num_classes or None)
    randomise(network)
    judge.load_state_dict(network.state_dict(), strict=True)
    labels = torch.tensor([0, 4, 2, 2]) if num_classes else None
    condition = Condition(labels)
    x, timesteps = inputs(channels)
    network.eval()
    judge.eval()
    with torch.no_grad():
        ours, theirs = network(x, timesteps, condition), judge(x, timesteps, labels).sample
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    randomise(judge, seed=2)
    network.load_state_dict(judge.state_dict(), strict=True)
    with torch.no_grad():
        again = network(x, timesteps, condition)
    assert (again - ours).abs().max() > 0.1
    torch.testing.assert_close(again, judge(x, timesteps, labels).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_outputs_and_gradients_equal_diffusers(switch: str | None) -> None:
    ours, theirs = SWITCHES[switch] if switch else ({}, {})
    network, judge = small(**ours), small_judge(**theirs)
    randomise(network)
    judge.load_state_dict(network.state_dict(), strict=True)
    x, timesteps = inputs()
    output, expected_output = network(x, timesteps), judge(x, timesteps).sample
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-5)
    output.square().mean().backward()
    expected_output.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in judge.named_parameters()}
    for name, parameter in network.named_parameters():
        scale = expected[name].abs().max().item()
        # A constant added to all keys moves no attention weight.
        if not name.endswith("to_k.bias"):
            assert scale > 1e-7, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4 * scale + 1e-8, msg=name)


def test_fresh_network_predicts_zero_and_has_ho_initialisation() -> None:
    torch.manual_seed(0)
    network = UNet(image_size=16, channels=32, channel_mults=(1, 2), attention_sizes=(8,))
    x, timesteps = inputs()
    assert torch.count_nonzero(network(x, timesteps)) == 0
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or any(part in name for part in ("conv2.", "to_out.", "conv_out.")):
            assert torch.count_nonzero(parameter) == 0, name
        elif "norm" not in name:
            pixels = parameter[0, 0].numel()
            limit = (6 / (pixels * (parameter.shape[0] + parameter.shape[1]))) ** 0.5
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name


def test_any_size_that_the_levels_divide() -> None:
    """28 pixels are halved twice; the net also takes another size than it was built for."""
    network = small(image_size=28, in_channels=1, attention_sizes=(14,))
    randomise(network)
    assert len(network.down_blocks[1].attentions) == 2
    assert len(network.down_blocks[0].attentions) == 0
    for size in (28, 12):
        output = network(torch.randn(2, 1, size, size), torch.tensor([1, 2]))
        assert output.shape == (2, 1, size, size)
        assert torch.isfinite(output).all()


def test_layers_per_level_count_one_more_on_the_way_up() -> None:
    x, timesteps = inputs()
    for layers in (1, 3):
        network = small(layers_per_level=layers)
        assert [len(block.resnets) for block in network.down_blocks] == [layers] * 3
        assert [len(block.resnets) for block in network.up_blocks] == [layers + 1] * 3
        assert network(x, timesteps).shape == x.shape


def test_channels_last_and_autocast_agree_with_float32() -> None:
    network = small()
    randomise(network)
    x, timesteps = inputs()
    with torch.no_grad():
        expected = network(x, timesteps)
        network.to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last)
        output = network(x_last, timesteps)
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [network(x, timesteps), network(x_last, timesteps)]
        for output in (*rounded, network.bfloat16()(x.bfloat16(), timesteps)):
            assert output.dtype == torch.bfloat16
            assert (output.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    network = small(num_classes=3, channel_mults=(1, 2), layers_per_level=1)
    randomise(network)
    x, timesteps = inputs()
    condition = Condition(torch.tensor([0, 1, 2, 0]))
    expected = network(x, timesteps, condition)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, timesteps, condition), expected, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    network = small(dropout=0.5)
    randomise(network)
    x, timesteps = inputs()
    with torch.no_grad():
        torch.manual_seed(0)
        first = network(x, timesteps)
        assert (network(x, timesteps) - first).abs().max() > 0.01
        torch.manual_seed(0)
        assert torch.equal(network(x, timesteps), first)
        network.eval()
        assert torch.equal(network(x, timesteps), network(x, timesteps))


def test_labels_must_match_the_network() -> None:
    x, timesteps = inputs()
    with pytest.raises(ValueError, match="num_classes"):
        small(num_classes=5)(x, timesteps, UNCONDITIONAL)
    with pytest.raises(ValueError, match="num_classes"):
        small()(x, timesteps, Condition(torch.tensor([0, 0, 0, 0])))


def test_impossible_networks_are_refused() -> None:
    for changes, message in (
        ({"image_size": 30}, r"data.size=30 cannot be halved 2 times.*multiple of 4"),
        ({"image_size": 0}, r"data.size=0"),
        ({"norm_groups": 5}, r"channels=8 cannot be split into model.norm_groups=5 groups"),
        ({"channels": 3, "norm_groups": 3}, r"channels=3 must be even and at least 4"),
        ({"channel_mults": ()}, r"at least one level"),
        ({"heads": 3}, r"16 channels cannot be split into heads"),
        ({"head_channels": 12}, r"16 channels cannot be split into heads"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
