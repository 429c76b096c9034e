"""Checkpoints for other people, with diffusers as the judge of what they get."""

import json
import shutil

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard

from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded


@pytest.fixture(scope="module")
def bucket(tiles, tmp_path_factory):
    """With a run of images, and one of classes."""
    bucket = shutil.copytree(tiles, tmp_path_factory.mktemp("exporting") / "bucket")
    for run, changes in (("images", {"model__num_classes": "0", "ema__stds": "0.1"}), ("classes", {})):
        train = ("train", "--dataset", "tiles", "--run", run, "--epochs", 1, "--bucket", bucket)
        succeeded(ddpm_here(*train, *settings(**changes)))
    return bucket


def export(bucket, run, to, *more):
    return ddpm_here("export", "--run", run, "--to", to, "--bucket", bucket, *more)


def test_exports_are_pipelines_with_cards(bucket, tmp_path):
    from diffusers import DDIMPipeline

    said = succeeded(export(bucket, "images", tmp_path / "out"))
    assert f"{tmp_path}/out  (epoch-0001, weights ema, " in said
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    beside = {"README.md", "grid.png", "run_config.yaml", "scheduler/scheduler_config.json"}
    assert names == {"model_index.json", *unet, *beside}
    card = (tmp_path / "out/README.md").read_text()
    assert "Licence of the images: not stated." in card
    assert "299 images of tiles" in card
    # As the hub reads it, and what its client would send.
    assert ModelCard(card).data.to_dict() == {
        "library_name": "diffusers",
        "tags": ["unconditional-image-generation", "ddpm"],
    }
    sent = [CommitOperationAdd(name, tmp_path / "out" / name) for name in names]
    assert all(operation.upload_info.size for operation in sent)
    # What the card says is what one types.
    (code,) = (part.removeprefix("python\n") for part in card.split("```")[1::2])
    seen: dict = {}
    exec(
        code.replace("this folder", str(tmp_path / "out")).replace("num_inference_steps=4", "num_inference_steps=5"),
        seen,
    )
    assert isinstance(seen["pipeline"], DDIMPipeline)
    assert len(seen["images"]) == 4


def test_card_of_a_rectified_flow_has_its_pipeline(bucket, tmp_path):
    flow = {"diffusion__schedule": "flow", "diffusion__prediction": "flow", "diffusion__weighting": "plain"}
    words = ("--dataset", "tiles", "--run", "flow", "--epochs", 1, "--bucket", bucket)
    succeeded(ddpm_here("train", *words, *settings(model__num_classes="0", **flow)))
    succeeded(export(bucket, "flow", tmp_path / "out"))
    (code,) = (part.removeprefix("python\n") for part in (tmp_path / "out/README.md").read_text().split("```")[1::2])
    seen: dict = {}
    exec(code.replace("this folder", str(tmp_path / "out")), seen)
    assert type(seen["pipeline"].scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert len(seen["images"]) == 4


def test_killed_exports_resume(bucket, tmp_path):
    succeeded(export(bucket, "images", tmp_path / "out"))
    (tmp_path / "out/model_index.json").unlink()
    (tmp_path / "out/README.md").unlink()
    succeeded(export(bucket, "images", tmp_path / "out"))
    assert (tmp_path / "out/model_index.json").exists()
    # Other weights under the same name are somebody else's; only these have a grid.
    (tmp_path / "out/grid.png").unlink()
    weights = (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes()
    line = refused(export(bucket, "images", tmp_path / "out", "--weights", "model"), Exit.BAD_REQUEST)
    assert line == f"ddpm: --to {tmp_path}/out: another export is there already; name another folder, or an empty one"
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_exports_have_the_chosen_average(bucket, tmp_path):
    from safetensors.torch import load_file

    succeeded(export(bucket, "images", tmp_path / "ema"))
    succeeded(export(bucket, "images", tmp_path / "other", "--weights", "ema-0.10", "--checkpoint", "1"))
    (stored,) = (bucket / "runs/images/checkpoints").glob("*/ema-0.1-00.safetensors")
    name = "unet/diffusion_pytorch_model.safetensors"
    exported, average = load_file(tmp_path / "other" / name), load_file(stored)
    assert all(torch.equal(tensor, average[key]) for key, tensor in exported.items())
    assert (tmp_path / "other" / name).read_bytes() != (tmp_path / "ema" / name).read_bytes()
    missing = export(bucket, "images", tmp_path / "none", "--weights", "ema-0.2")
    assert "ddpm ema --run images --std 0.2" in refused(missing, Exit.MISSING_INPUT)
    assert not (tmp_path / "none").exists()


def test_card_of_classes_has_a_loop(bucket, tmp_path):
    done = export(bucket, "classes", tmp_path / "out")
    succeeded(done)
    assert "DDIMPipeline does not take a class" in done.stderr
    card = (tmp_path / "out/README.md").read_text()
    seen: dict = {}
    exec(card.split("```")[1].removeprefix("python\n").replace("this folder", str(tmp_path / "out")), seen)
    assert seen["x"].shape == (4, 3, 16, 16)
    assert "the names of the classes: coast, desert, hills, mountain, skyline." in card
    assert not (tmp_path / "out/model_index.json").exists()


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


def test_impossible_exports_leave_nothing(bucket, tmp_path):
    small = [word for word in settings() if word.startswith(("train.", "sample."))]
    tiny = ("model.kind=dit", "model.width=16", "model.depth=1", "model.heads=2", *small)
    words = [word for setting in tiny for word in ("--set", setting)]
    succeeded(ddpm_here("train", "--dataset", "tiles", "--run", "dit", "--epochs", 1, "--bucket", bucket, *words))
    said = refused(export(bucket, "dit", tmp_path / "dit"), Exit.BAD_REQUEST)
    assert "model.kind=dit is not a network" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "notes.txt is there already" in refused(export(bucket, "images", tmp_path / "full"), Exit.BAD_REQUEST)
    assert "use an epoch" in refused(export(bucket, "images", tmp_path / "x", "--checkpoint", "1,2"), Exit.BAD_REQUEST)
    assert "no run 'nope'" in refused(export(bucket, "nope", tmp_path / "x"), Exit.MISSING_INPUT)
    assert not (tmp_path / "x").exists()


def test_full_disks_get_no_export(bucket, small_disk):
    (small_disk / "filler").write_bytes(bytes(1_900_000))
    refused(export(bucket, "images", small_disk / "out"), Exit.DISK_FULL)
    assert not [path for path in (small_disk / "out").rglob("*") if path.is_file()]
    assert open_store(str(bucket)).exists("runs/images/LATEST")
