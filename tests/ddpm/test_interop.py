"""Other people's networks, with diffusers as the judge: the same weights give the same outputs in both directions."""

import re
from itertools import product

import pytest
import torch

from ddpm import catalogue, interop
from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.image_size import ImageSize
from ddpm.networks.unet import UNet
from ddpm.objective import Condition
from tests.ddpm.networks.weights import inputs, randomise

IMAGES = {"image_size": ImageSize(16, 16), "in_channels": 3, "out_channels": 3, "num_classes": 0}
WIDTHS = {"channels": 8, "channel_mults": (1, 2, 3), "attention_sizes": (8,), "layers_per_level": 1, "norm_groups": 4}
SWITCHES = {"heads": 1, "head_channels": None, "scale_shift": False, "resample_in_blocks": False, "conventions": "ho"}
SMALL = IMAGES | WIDTHS | SWITCHES | {"dropout": 0.0}


HO = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
"""diffusers' names of what Ho et al.'s code does otherwise."""


def unet2d_config(**options):
    """The configuration of a `UNet` with these arguments."""
    about_images = {key: options.pop(key) for key in IMAGES}
    return interop.unet2d_config(catalogue.UNetConfig(**options), **about_images)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conventions": "diffusers", "head_channels": 8, "num_classes": 5},
        {"heads": 2, "channel_mults": (1, 2, 2), "layers_per_level": 3},
        {"scale_shift": True, "resample_in_blocks": True, "head_channels": 4, "in_channels": 1, "out_channels": 2},
        {"attention_sizes": (16, 4), "resample_in_blocks": True, "conventions": "diffusers", "layers_per_level": 2},
        {"image_size": ImageSize(64, 96), "attention_sizes": (32,), "conventions": "diffusers", "head_channels": 8},
        {"image_size": ImageSize(32, 16), "attention_sizes": (8,)},
    ],
)
def test_networks_equal_diffusers(changes):
    from diffusers import UNet2DModel

    options = SMALL | changes
    config = unet2d_config(**options)
    assert config | HO == config or options["conventions"] == "diffusers"
    ours, theirs = UNet(**options).eval(), UNet2DModel.from_config(config).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x, t = inputs(options["in_channels"], options["image_size"].shape)
    labels = torch.arange(4) if options["num_classes"] else None
    output, expected = ours(x, t, Condition(labels)), theirs(x, t, labels).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.square().mean().backward()
    expected.square().mean().backward()
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = of_theirs[name].grad.abs().max().item()
        # A constant added to all keys moves no attention weight.
        assert scale > 1e-8 or name.endswith("to_k.bias"), name
        torch.testing.assert_close(parameter.grad, of_theirs[name].grad, rtol=0, atol=1e-4 * scale + 1e-8, msg=name)
    # Back again: whoever asks for heads by their number gets their width.
    back = interop.unet_options(config)
    if options["heads"] > 1:
        assert (back["heads"], back["head_channels"]) == (1, 8)
        back |= {"heads": options["heads"], "head_channels": None}
    assert back == options
    # What diffusers writes itself says the same.
    assert interop.unet_options(theirs.config) == interop.unet_options(config)


def test_defaults_of_diffusers_are_understood():
    from diffusers import UNet2DModel

    config = {"sample_size": 16, "block_out_channels": [32, 64], "norm_num_groups": 8}
    config |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    theirs = UNet2DModel.from_config(config).eval()
    ours = UNet(**interop.unet_options(config | {"in_channels": 3, "out_channels": 3})).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x, t = inputs()
    with torch.no_grad():
        assert (ours(x, t) - theirs(x, t).sample).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"freq_shift": 0}, "freq_shift=0"),
        ({"sample_size": None}, "ValueError: write 64 for a square"),
        ({"sample_size": [16, 32, 32]}, "TypeError"),
        ({"block_out_channels": []}, "down_block_types"),
        ({"block_out_channels": [0, 0, 0]}, "ZeroDivisionError"),
        ({"block_out_channels": [8, 12, 16]}, "block_out_channels=[8, 12, 16]"),
        ({"block_out_channels": [8, 16]}, "down_block_types"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"layers_per_block": 10**9}, "layers_per_level=1000000000 has no counterpart: input should be less than"),
        ({"num_class_embeds": 10**10}, "num_classes=10000000000 has no counterpart"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups=8"),
        ({"attn_norm_num_groups": None, "resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
    ],
)
def test_networks_without_counterpart_are_named(changes, named):
    with pytest.raises(interop.NoCounterpartError, match=re.escape(named)):
        interop.unet_options(unet2d_config(**SMALL) | changes)


def test_impossible_heads_are_named():
    with pytest.raises(interop.NoCounterpartError, match="16 and 24 channels"):
        unet2d_config(**SMALL | {"heads": 2})


def test_older_attention_names_are_read():
    from diffusers import UNet2DModel

    theirs = UNet2DModel.from_config(unet2d_config(**SMALL))
    today = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    named = theirs.state_dict()
    old = {re.sub("to_(?:q|k|v|out.0)", lambda match: today[match[0]], name): named[name] for name in named}
    assert sum("query" in name for name in old) == 2 * 4
    assert interop.with_names_of_today(old).keys() == named.keys()


def ho_named(ours):
    """The tensors of a network of three levels, by the names in the table of pesser/pytorch_diffusion."""
    block = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names = {"time_embedding.linear_1": "temb.dense.0", "time_embedding.linear_2": "temb.dense.1"}
    names |= {"conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
    names |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    for level, i in product(range(3), range(2)):
        for here, way, index in ((level, "down", level), (2 - level, "up", level)):
            names[f"{way}_blocks.{here}.resnets.{i}"] = f"{way}.{index}.block.{i}"
            names[f"{way}_blocks.{here}.attentions.{i}"] = f"{way}.{index}.attn.{i}"
            names[f"{way}_blocks.{here}.{way}samplers.0"] = f"{way}.{index}.{way}sample"
    theirs = {}
    for name, tensor in ours.state_dict().items():
        start = next((old for old in names if name.startswith(f"{old}.")), "")
        rest = name.removeprefix(start)
        inner = attention if "attentions" in start else block
        for new, old in inner.items():
            rest = rest.replace(f".{new}.", f".{old}.")
        is_projection = "attentions" in start and tensor.ndim == 2
        theirs[names.get(start, "") + rest] = tensor[:, :, None, None] if is_projection else tensor
    return theirs


def test_the_networks_of_ho_are_read():
    ours = UNet(**SMALL)
    randomise(ours)
    theirs = ho_named(ours)
    assert {"up.1.attn.0.q.weight", "up.2.upsample.conv.bias", "down.1.block.0.nin_shortcut.weight"} <= theirs.keys()
    found = interop.from_ho(theirs)
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in ours.state_dict().items())
    shown = {key: SMALL[key] for key in interop.ho_options(found)} | {
        "image_size": ImageSize(32, 32),
        "attention_sizes": (16,),
    }
    assert interop.ho_options(found) == shown
    assert interop.ho_options(found, ImageSize(16, 16)) == {key: SMALL[key] for key in shown}


def test_prefixes_of_wrappers_are_removed():
    weights = {"conv_in.weight": torch.zeros(1)}
    for before in ("", "module.", "_orig_mod.module.", "model.", "module._orig_mod.model."):
        assert interop.without_prefixes({f"{before}{name}": tensor for name, tensor in weights.items()}) == weights
    averaged = {f"ema_model.model.{name}": tensor for name, tensor in weights.items()}
    others = {
        "online_model.model.conv_in.weight": torch.ones(1),
        "step": torch.ones(()),
        "ema_model.betas": torch.ones(3),
    }
    assert interop.without_prefixes(averaged | others) == weights


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_processes_are_those_of_diffusers(schedule):
    from diffusers import DDIMScheduler

    from ddpm.process import make_process

    said = {"schedule": schedule, "timesteps": 200, "prediction": "v", "zero_terminal_snr": schedule == "linear"}
    config = interop.scheduler_config(Diffusion(**said), SampleOptions(clip=True, grid="leading"))
    theirs = DDIMScheduler.from_config(config)
    ours = make_process(Diffusion(**said)).alphas_cumprod
    assert (theirs.alphas_cumprod.double() - ours).abs().max() < 1e-6
    assert interop.process_options(theirs.config) == said | {"variance": "fixed"}


def test_rectified_flow_is_that_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ddpm.process import make_process

    flow = Diffusion("flow", prediction="flow")
    theirs = FlowMatchEulerDiscreteScheduler.from_config(interop.scheduler_config(flow, SampleOptions(shift=3.0)))
    assert theirs.config.shift == 3 and interop.sample_options(theirs.config) == {"clip": False, "shift": 3.0}
    plain = FlowMatchEulerDiscreteScheduler.from_config(interop.scheduler_config(flow, SampleOptions()))
    points = make_process(flow).numbered(torch.arange(999, -1, -1))
    torch.testing.assert_close(plain.sigmas[:1000].double(), points.sigma, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.timesteps.double(), points.t, rtol=0, atol=1e-3)
    said = {"schedule": "flow", "timesteps": 1000, "prediction": "flow"}
    assert interop.process_options(plain.config) == said | {"zero_terminal_snr": False, "variance": "fixed"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler"),
        ({"variance_type": "learned"}, "learned_range has"),
        ({"thresholding": True}, "thresholding=True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "laplace"}, "laplace"),
        ({"beta_end": 0.012}, "0.012"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_processes_without_counterpart_are_named(config, named):
    with pytest.raises(interop.NoCounterpartError, match=named):
        interop.process_options(config)


def test_unknown_processes_are_named():
    for schedule, prediction, named in (("flow", "v", "schedule=flow"), ("linear", "edm", "prediction=edm")):
        with pytest.raises(interop.NoCounterpartError, match=named):
            interop.scheduler_config(Diffusion(schedule, 100, prediction=prediction), SampleOptions())
