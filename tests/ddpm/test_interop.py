"""Other people's networks and folders, with diffusers as the judge: the same weights give the same images."""

import json
import re
import resource
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

import ddpm
from ddpm import catalogue, interop
from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.image_size import ImageSize
from ddpm.networks.unet import UNet
from ddpm.objective import Condition
from ddpm.process import make_process
from tests.ddpm.known import assert_equal_gradients, inputs, randomise

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
    assert_equal_gradients(ours, output, theirs, expected)
    # Back again: whoever asks for heads by their number gets their width.
    back = interop.unet_options(config)
    if options["heads"] > 1:
        assert (back["heads"], back["head_channels"]) == (1, 8)
        back |= {"heads": options["heads"], "head_channels": None}
    assert back == options
    # diffusers' own file says the same.
    assert interop.unet_options(theirs.config) == interop.unet_options(config)


def test_defaults_of_diffusers_are_understood():
    config = {"sample_size": 16, "block_out_channels": [32, 64], "in_channels": 3, "out_channels": 3}
    config |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    assert interop.unet_options(config) == interop.unet_options(UNet2DModel.from_config(config).config)


def config_with(changes):
    return unet2d_config(**SMALL | changes)


def options_with(changes):
    return interop.unet_options(unet2d_config(**SMALL) | changes)


def scheduler_with(changes):
    return interop.scheduler_config(Diffusion(**changes), SampleOptions())


WITHOUT_COUNTERPART = [
    *(
        (options_with, changes, said)
        for changes, said in (
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
        )
    ),
    *(
        (interop.process_options, changes, said)
        for changes, said in (
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "num_train_timesteps=500"),
            ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler"),
            ({"variance_type": "learned"}, "learned_range has"),
            ({"thresholding": True}, "thresholding=True"),
            ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
            ({"beta_schedule": "laplace"}, "laplace"),
            ({"beta_end": 0.012}, "0.012"),
            ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        )
    ),
    (config_with, {"heads": 2}, "16 and 24 channels"),
    (scheduler_with, {"schedule": "flow"}, "schedule=flow"),
    (scheduler_with, {"prediction": "edm"}, "prediction=edm"),
]


@pytest.mark.parametrize(("read", "config", "said"), WITHOUT_COUNTERPART)
def test_missing_counterparts_are_named(read, config, said):
    with pytest.raises(interop.NoCounterpartError, match=re.escape(said)):
        read(config)


def test_older_attention_names_are_read():
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
    known = {key: SMALL[key] for key in interop.ho_options(found)}
    assert interop.ho_options(found) == known | {"image_size": ImageSize(32, 32), "attention_sizes": (16,)}
    assert interop.ho_options(found, ImageSize(16, 16)) == known


def test_prefixes_of_wrappers_are_removed():
    weights = {"conv_in.weight": torch.zeros(1)}
    for before in ("", "module.", "_orig_mod.module.", "model.", "module._orig_mod.model."):
        assert interop.without_prefixes({f"{before}{name}": tensor for name, tensor in weights.items()}) == weights
    averaged = {f"ema_model.model.{name}": tensor for name, tensor in weights.items()}
    others = dict.fromkeys(("online_model.model.conv_in.weight", "step", "ema_model.betas"), torch.ones(1))
    assert interop.without_prefixes(averaged | others) == weights


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_processes_are_those_of_diffusers(schedule):
    said = {"schedule": schedule, "timesteps": 200, "prediction": "v", "zero_terminal_snr": schedule == "linear"}
    config = interop.scheduler_config(Diffusion(**said), SampleOptions(clip=True, grid="leading"))
    theirs = DDIMScheduler.from_config(config)
    ours = make_process(Diffusion(**said)).alphas_cumprod
    assert (theirs.alphas_cumprod.double() - ours).abs().max() < 1e-6
    assert interop.process_options(theirs.config) == said | {"variance": "fixed"}


def test_rectified_flow_is_that_of_diffusers():
    flow = Diffusion("flow", prediction="flow")
    theirs, plain = (
        FlowMatchEulerDiscreteScheduler.from_config(interop.scheduler_config(flow, SampleOptions(shift=shift)))
        for shift in (3.0, 1.0)
    )
    assert theirs.config.shift == 3 and interop.sample_options(theirs.config) == {"clip": False, "shift": 3.0}
    points = make_process(flow).numbered(torch.arange(999, -1, -1))
    torch.testing.assert_close(plain.sigmas[:1000].double(), points.sigma, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.timesteps.double(), points.t, rtol=0, atol=1e-3)
    said = {"schedule": "flow", "timesteps": 1000, "prediction": "flow"}
    assert interop.process_options(plain.config) == said | {"zero_terminal_snr": False, "variance": "fixed"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder that diffusers wrote, of four classes."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = UNet2DModel(16, 3, 3, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=4, **blocks)
    randomise(network)
    scheduler = DDIMScheduler(num_train_timesteps=50, timestep_spacing="trailing", prediction_type="v_prediction")
    folder = tmp_path_factory.mktemp("pipeline")
    DDIMPipeline(network.eval(), scheduler).save_pretrained(folder)
    return folder


def test_diffusers_folders_draw_the_same(pipeline):
    model = ddpm.load(pipeline, device="cpu")
    assert (model.classes, model.image_shape) == (("0", "1", "2", "3"), (3, 16, 16))
    seeds = torch.arange(5, 8)
    x = model.noise_of(seeds)(0)
    theirs = DDIMPipeline.from_pretrained(pipeline)
    theirs.scheduler.set_timesteps(10)
    for t in theirs.scheduler.timesteps:
        with torch.no_grad():
            output = theirs.unet(x, t, class_labels=seeds % 4).sample
        x = theirs.scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    ours = model.sample(3, seed=5, steps=10, as_tensor=True)
    torch.testing.assert_close(ours, x.clamp(-1, 1), atol=1e-5, rtol=0)


def test_pictures_follow_seeds_and_classes(pipeline):
    model = ddpm.load(pipeline, device="cpu")
    pictures = model.sample(4, seed=6, steps=5, batch_size=3)
    assert {(picture.size, picture.mode) for picture in pictures} == {((16, 16), "RGB")}
    (alone,) = model.sample(1, seed=8, steps=5)
    difference = torch.frombuffer(bytearray(alone.tobytes()), dtype=torch.uint8).int()
    difference -= torch.frombuffer(bytearray(pictures[2].tobytes()), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1
    # Seed 8 is of class 0.
    chosen = model.sample(1, seed=8, classes=0, steps=5, as_tensor=True)
    assert torch.equal(chosen, model.sample(1, seed=8, classes=["0", np.int64(2)], steps=5, as_tensor=True))
    assert not torch.equal(chosen, model.sample(1, seed=8, classes="2", steps=5, as_tensor=True))
    # Ancestral sampling visits all points unless it is told otherwise.
    all_points = model.sample(1, sampler="ddpm", steps=50, as_tensor=True)
    assert torch.equal(model.sample(1, sampler="ddpm", as_tensor=True), all_points)


def test_a_last_class_without_a_name_guides(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    (folder / "id2label.json").write_text('{"0": "sky", "1": "sea", "2": "sand"}')
    named, numbered = ddpm.load(folder, device="cpu"), ddpm.load(pipeline, device="cpu")
    seen = named.sample(1, classes="sea", steps=5, as_tensor=True)
    assert torch.equal(seen, numbered.sample(1, classes=1, steps=5, as_tensor=True))
    # Without any weight on the class, what is drawn is the last class.
    unguided = named.sample(1, classes="sea", guidance=0, steps=5, as_tensor=True)
    torch.testing.assert_close(unguided, numbered.sample(1, classes=3, steps=5, as_tensor=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": "4"}, "unknown class '4'; there are 4: 0, 1, 2, 3"),
        ({"sampler": "ddin"}, "unknown sampler 'ddin': choose one of ddpm, ddim"),
        ({"steps": 51}, "steps must be between 1 and 50"),
        ({"grid": "even"}, "unknown grid 'even'"),
        ({"images": 0}, "images=0: use 1 or more"),
        ({"batch_size": -1}, "batch_size=-1: use 1 or more"),
        ({"steps": 0}, "steps=0: use 1 or more"),
        ({"seed": -1}, "seeds are from 0"),
        ({"seed": 2**70}, r"seeds are from 0 to 2\^63 - 1"),
        ({"eta": -1}, "eta from 0 to 1"),
        ({"classes": []}, "name one at least"),
        ({"classes": True}, "unknown class True"),
        ({"classes": 1.0}, "unknown class 1.0"),
        ({"guidance": 2}, "guidance needs a network that has also learnt images without class and condition"),
    ],
)
def test_impossible_samples_are_refused(pipeline, options, said):
    with pytest.raises(ValueError, match=said):
        ddpm.load(pipeline, device="cpu").sample(**{"images": 1, **options})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("unet/config.json", None, "is not a diffusers folder: neither unet/config.json nor config.json"),
        ("unet/config.json", "[]", "does not hold a JSON object"),
        ("unet/config.json", "{", "cannot be loaded"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel"}', "it is a UNet2DConditionModel"),
        ("unet/diffusion_pytorch_model.safetensors", None, "only safetensors are read here"),
        ("unet/diffusion_pytorch_model.safetensors", "no tensors", "cannot be loaded"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x"}', "cannot be loaded"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": 1e12}', "cannot be loaded"),
        ("scheduler/scheduler_config.json", '{"_class_name": "EDMEulerScheduler"}', "no counterpart"),
        ("id2label.json", '{"0": "sky", "1": "sea"}', "does not name the 4 classes"),
        ("id2label.json", '{"1": "a", "2": "b", "3": "c", "4": "d"}', "does not name the 4 classes"),
        ("unet/config.json", {"out_channels": 6}, "maps 3 channels to 6"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_level=1000000000 has no counterpart"),
        ("unet/config.json", {"num_class_embeds": 10**10}, "num_classes=10000000000 has no counterpart"),
        # A network within the limits, of 12 GB.
        ("unet/config.json", {"num_class_embeds": 10**8}, "size mismatch for class_embedding.weight"),
        ("", None, "is not a folder"),
    ],
)
def test_damaged_folders_are_refused(pipeline, tmp_path, name: str, content: str | dict[str, Any] | None, said: str):
    """Content is a text, or changes of an object; None: the file is missing. Forged sizes build nothing."""
    path: Path = shutil.copytree(pipeline, tmp_path / "folder") / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        ddpm.load(tmp_path / "folder", device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
