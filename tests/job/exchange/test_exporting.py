"""Checkpoints for other people, with diffusers as the judge of what they get."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard
from PIL import Image

import ddpm
from ddpm.model import generate, make_denoiser
from ddpm.objective import Condition
from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.launching import StopWhen

FLOW = {"diffusion__schedule": "flow", "diffusion__prediction": "flow", "diffusion__weighting": "plain"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bucket(tiles, tmp_path_factory):
    """With a run of images, which has damaged scores, and one of classes."""
    bucket = shutil.copytree(tiles, tmp_path_factory.mktemp("exporting") / "bucket")
    for run, changes in (("images", {"model__num_classes": "0", "ema__stds": "0.1"}), ("classes", {})):
        train(bucket, run, settings(**changes))
    (bucket / "runs/images/evaluations/damaged").mkdir(parents=True)
    (bucket / "runs/images/evaluations/damaged/scores.json").write_text("{}")
    return bucket


def train(bucket, run, sets):
    succeeded(ddpm_here("train", "--dataset", "tiles", "--run", run, "--epochs", 1, "--bucket", bucket, *sets))


def export(bucket, run, to, *more):
    return ddpm_here("export", "--run", run, "--to", to, "--bucket", bucket, *more)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def told(out, seen=None, **changes):
    """What one has after typing the code of an export's card, with some words changed."""
    card, seen = (out / "README.md").read_text(), seen or {}
    (code,) = (part.removeprefix("python\n") for part in card.split("```")[1::2])
    for before, after in ({"this folder": str(out)} | changes).items():
        assert before in code
        code = code.replace(before, after)
    exec(code, seen)
    assert len(seen["images"]) == 4
    return card, seen


def test_exports_are_pipelines_with_cards(bucket, tmp_path, monkeypatch):
    from diffusers import DDIMPipeline

    monkeypatch.setattr("job.progress.LINE_SECONDS", 0.0)
    done = export(bucket, "images", tmp_path / "out")
    assert f"{tmp_path}/out  (epoch-0001, weights ema, " in succeeded(done)
    names = files_in(tmp_path / "out")
    beside = {"README.md", "grid.png", "run_config.yaml", "scheduler/scheduler_config.json"}
    assert names == {"model_index.json", "unet/config.json", WEIGHTS, *beside}
    card, seen = told(tmp_path / "out", **{"num_inference_steps=4": "num_inference_steps=5"})
    assert isinstance(seen["pipeline"], DDIMPipeline)
    assert "Licence of the images: not stated." in card and "299 images of tiles" in card
    # As the hub reads it, and what its client would send.
    tags = ["unconditional-image-generation", "ddpm"]
    assert ModelCard(card).data.to_dict() == {"library_name": "diffusers", "tags": tags}
    sent = [CommitOperationAdd(name, tmp_path / "out" / name) for name in names]
    assert all(operation.upload_info.size for operation in sent)
    # Each object shows when it is written, of which none has a megabyte.
    assert done.stderr.count("exporting images: 0 MB") == len(names)


def test_card_of_a_rectified_flow_has_its_pipeline(bucket, tmp_path):
    train(bucket, "flow", settings(model__num_classes="0", **FLOW))
    succeeded(export(bucket, "flow", tmp_path / "out"))
    _, seen = told(tmp_path / "out")
    assert type(seen["pipeline"].scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_a_condition_image_is_exported_with_its_loop(bucket, tmp_path):
    """diffusers draws from the card's loop, with noise of ours, what `ddpm.load` draws from a picture."""
    conditioned = {"condition__derive": "downscale:4", "sample__clip": "false", "sample__steps": "5"}
    train(bucket, "sr4", settings(model__num_classes="0", **conditioned))
    succeeded(export(bucket, "sr4", tmp_path / "out"))
    assert "model_index.json" not in files_in(tmp_path / "out")
    x = torch.linspace(-1, 1, 3 * 16).view(1, 3, 4, 4).add(1).mul(127.5).round() / 127.5 - 1
    picture = Image.fromarray(((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    picture.save(tmp_path / "small.png")
    model = ddpm.load(tmp_path / "out")
    ours = model.sample(4, condition=tmp_path / "small.png", steps=5, as_tensor=True)
    noise = model.noise_of(torch.arange(4))(0)
    condition = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    seen = {"noise": noise, "condition_": condition.expand(4, -1, -1, -1)}
    _, seen = told(
        tmp_path / "out",
        seen=seen,
        **{"torch.randn(4, 3, 16, 16)": "noise", "torch.zeros(4, 3, 16, 16)": "condition_"},
    )
    torch.testing.assert_close(ours, seen["images"].clamp(-1, 1), rtol=0, atol=0.02)
    for run, sets in (("noisy", "condition__noise"),):
        train(bucket, run, settings(**{sets: "0.3", "condition__derive": "downscale:4"}))
        line = refused(export(bucket, run, tmp_path / run), Exit.BAD_REQUEST)
        assert "UNet2DModel has no input for condition.noise" in line


def test_killed_exports_resume(bucket, tmp_path):
    succeeded(export(bucket, "images", tmp_path / "out"))
    (tmp_path / "out/model_index.json").unlink()
    (tmp_path / "out/README.md").unlink()
    succeeded(export(bucket, "images", tmp_path / "out"))
    assert (tmp_path / "out/model_index.json").exists()
    # Other weights under the same name are somebody else's; only these have a grid.
    (tmp_path / "out/grid.png").unlink()
    weights = (tmp_path / "out" / WEIGHTS).read_bytes()
    line = refused(export(bucket, "images", tmp_path / "out", "--weights", "model"), Exit.BAD_REQUEST)
    assert line == f"ddpm: --to {tmp_path}/out: another export is there already; name another folder, or an empty one"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == weights
    # The chosen average, of a chosen checkpoint.
    from safetensors.torch import load_file

    succeeded(export(bucket, "images", tmp_path / "other", "--weights", "ema-0.10", "--checkpoint", "1"))
    (stored,) = (bucket / "runs/images/checkpoints").glob("*/ema-0.1-00.safetensors")
    exported, average = load_file(tmp_path / "other" / WEIGHTS), load_file(stored)
    assert all(torch.equal(tensor, average[key]) for key, tensor in exported.items())
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != weights


def test_stopped_exports_leave_nothing(bucket, tmp_path, monkeypatch):
    is_begun = StopWhen((tmp_path / "out/run_config.yaml").exists)
    # In the place of one that listens to signals.
    is_begun.install = lambda: is_begun
    monkeypatch.setattr("job.exchange.exporting.Stop", lambda: is_begun)
    said = refused(export(bucket, "images", tmp_path / "out"), Exit.STOPPED)
    assert "while exporting; its files are deleted, and the same command begins again" in said
    assert files_in(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("run", "changes", "steps", "how"),
    [
        ("classes", {}, 5, {"steps": 5}),
        # The four points of diffusers' flow.
        ("flowing", {**FLOW, "sample__clip": "false"}, 4, {"sampler": "euler", "numbers": (999, 666, 333, 0)}),
        ("jumps", {"diffusion__objective": "consistency"}, 1, {"sampler": "consistency", "numbers": (49,)}),
        ("flows", {**FLOW, "diffusion__objective": "consistency"}, 1, {"sampler": "consistency", "numbers": (999,)}),
        # Its steps draw noise of their own.
        ("varied", {"diffusion__variance": "learned_range"}, 5, None),
    ],
)
def test_exports_with_classes_bring_their_pipeline(bucket, tmp_path, monkeypatch, run, changes, steps, how):
    """It is loaded as the card says, or by its folder, and draws what our own sampler draws."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    out, labels = str(tmp_path / "out"), [4, 0, 2]
    train(bucket, run, settings(**changes))
    done = export(bucket, run, out)
    succeeded(done)
    assert "without model_index.json" not in done.stderr
    card, seen = told(tmp_path / "out")
    assert "the names of the classes: coast, desert, hills, mountain, skyline." in card
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(out)
    assert [image.size for image in seen["images"]] == [(16, 16)] * 4
    pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=out, trust_remote_code=True)
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    theirs = pipeline(labels, steps, torch.Generator().manual_seed(7), output_type="pt").images
    assert theirs.shape == noise.shape
    if how is not None:
        model, condition = ddpm.load(out), Condition(torch.tensor(labels))
        denoise = make_denoiser(
            model.network, model.process, model.prediction, condition, clip=run in ("classes", "jumps")
        )
        ours = generate(denoise, model.process, replace(model.sampling, **how), lambda step: noise) / 2 + 0.5
        assert (theirs - ours.clamp(0, 1)).abs().max() < 2e-6


def test_classes_are_named_as_on_the_hub(bucket, tmp_path, capfd):
    """As in the hub's label files, and so that diffusers warns of nothing: that of an export, and of a checkpoint."""
    from diffusers import DDIMScheduler, UNet2DModel

    succeeded(export(bucket, "classes", tmp_path / "out"))
    (checkpoint,) = (path for path in (bucket / "runs/classes/checkpoints").iterdir() if path.is_dir())
    names = dict(enumerate(("coast", "desert", "hills", "mountain", "skyline")))
    for folder in (tmp_path / "out", checkpoint):
        assert {int(k): v for k, v in json.loads((folder / "id2label.json").read_text()).items()} == names
        capfd.readouterr()
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        assert capfd.readouterr() == ("", "")
        assert unet.config.num_class_embeds == len(names)


def test_impossible_exports_leave_nothing(bucket, tmp_path, small_disk):
    small = [word for word in settings() if word.startswith(("train.", "sample."))]
    tiny = ("model.kind=dit", "model.width=16", "model.depth=1", "model.heads=2", *small)
    train(bucket, "dit", [word for setting in tiny for word in ("--set", setting)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (small_disk / "filler").write_bytes(bytes(1_900_000))
    for run, to, code, said, *more in [
        ("dit", "dit", Exit.BAD_REQUEST, "model.kind=dit is not a network"),
        ("images", "full", Exit.BAD_REQUEST, "notes.txt is there already"),
        ("images", "x", Exit.BAD_REQUEST, "such as 80, or latest", "--checkpoint", "1,2"),
        ("images", "x", Exit.MISSING_INPUT, "ddpm ema --run images --std 0.2", "--weights", "ema-0.2"),
        ("nope", "x", Exit.MISSING_INPUT, "no run 'nope'"),
        ("images", small_disk / "x", Exit.DISK_FULL, ""),
    ]:
        assert said in refused(export(bucket, run, tmp_path / to, *more), code)
        assert files_in(tmp_path / to) <= {"notes.txt"}
    assert not (tmp_path / "x").exists()
    assert open_store(str(bucket)).exists("runs/images/LATEST")
