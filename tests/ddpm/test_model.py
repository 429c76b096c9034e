"""A model in three lines, against diffusers."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import ddpm
from tests.ddpm.networks.weights import randomise


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


def test_a_last_class_without_a_name_guides(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    (folder / "id2label.json").write_text('{"0": "sky", "1": "sea", "2": "sand"}')
    named, numbered = ddpm.load(folder, device="cpu"), ddpm.load(pipeline, device="cpu")
    seen = named.sample(1, classes="sea", steps=5, as_tensor=True)
    assert torch.equal(seen, numbered.sample(1, classes=1, steps=5, as_tensor=True))
    # Without any weight on the class, what is drawn is the last class.
    unguided = named.sample(1, classes="sea", guidance=0, steps=5, as_tensor=True)
    torch.testing.assert_close(unguided, numbered.sample(1, classes=3, steps=5, as_tensor=True), atol=1e-5, rtol=0)


def test_ancestral_sampling_visits_all_points(pipeline):
    model = ddpm.load(pipeline, device="cpu")
    all_points = model.sample(1, sampler="ddpm", steps=50, as_tensor=True)
    assert torch.equal(model.sample(1, sampler="ddpm", as_tensor=True), all_points)


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
        ({"guidance": 2}, "guidance needs a network that has also learnt images without their class"),
    ],
)
def test_what_cannot_be_drawn_is_said(pipeline, options, said):
    with pytest.raises(ValueError, match=said):
        ddpm.load(pipeline, device="cpu").sample(**{"images": 1, **options})


def broken(folder: Path, name: str, text: str | None) -> None:
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
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
    ],
)
def test_damaged_folders_are_refused(pipeline, tmp_path, name, text, said):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    broken(folder, name, text)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        ddpm.load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_per_block": 10**9}, "layers_per_level=1000000000 has no counterpart: input should be less"),
        ({"num_class_embeds": 10**10}, "num_classes=10000000000 has no counterpart"),
        # A network within the limits, of 12 GB.
        ({"num_class_embeds": 10**8}, "size mismatch for class_embedding.weight"),
    ],
)
def test_forged_sizes_build_nothing(pipeline, tmp_path, changes, said):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    config = json.loads((folder / "unet/config.json").read_text()) | changes
    (folder / "unet/config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=said):
        ddpm.load(folder, device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_networks_of_other_channels_are_refused(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    config = json.loads((folder / "unet/config.json").read_text()) | {"out_channels": 6}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="maps 3 channels to 6"):
        ddpm.load(folder)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ddpm.load(tmp_path / "nowhere")


def test_top_level_names_import_late():
    assert all(getattr(ddpm, name).__name__ for name in ddpm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ddpm.nothing
    code = "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & sys.modules.keys(); ddpm.load; job.load"
    subprocess.run([sys.executable, "-c", f"import sys, ddpm.catalogue, job; {code}"], check=True)
