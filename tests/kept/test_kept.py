"""What earlier versions wrote is read: a format is a promise from its first test here on."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DModel
from PIL import Image

from job.data.checks import verify_dataset
from job.data.shards import load_index
from job.runs.records import existing_config
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, ran, succeeded

ARCHIVES = sorted(Path(__file__).parent.glob("format-*.tar.gz"))
assert ARCHIVES, "there is one"


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def kept(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="data")
    return folder / "bucket"


def test_datasets_and_runs_are_whole(kept):
    store = open_store(str(kept))
    for name in sorted(path.name for path in (kept / "datasets").iterdir()):
        assert verify_dataset(store, f"datasets/{name}") == []
    for run in ("pixels", "latents"):
        assert verify_run(store, run).problems == []
    assert load_index(store, "datasets/kept-8").held_out == "kept-held-out"
    assert load_index(store, "datasets/kept-latents-4").encoding.source == "kept"
    assert existing_config(store, "pixels").ema.names == ("ema-0.1",)
    (folder, *_) = sorted((kept / "runs/pixels/checkpoints").iterdir(), reverse=True)
    assert UNet2DModel.from_pretrained(folder, subfolder="unet").config.num_class_embeds == 2


@pytest.mark.parametrize(("run", "dataset"), [("pixels", "kept"), ("latents", "kept-latents")])
def test_runs_draw_the_same_pictures_and_go_on(kept, tmp_path, run, dataset):
    bucket = shutil.copytree(kept, tmp_path / "bucket")
    (before,) = (kept / "runs" / run / "samples").glob("epoch-0002-*-seeds-0-3-no-nearest.png")
    path = bucket / before.relative_to(kept)
    path.unlink()
    ran("sample", "--run", run, "--seeds", "0-3", "--no-nearest", "--bucket", bucket)
    now, then = (np.asarray(Image.open(picture)).astype(int) for picture in (path, before))
    # One row of tiles, with what is said above it by this version. Another processor rounds otherwise.
    assert np.abs(now[-98:] - then[-98:]).max() <= 3
    done = ddpm_here("train", "--dataset", dataset, "--run", run, "--epochs", 3, "--bucket", bucket)
    succeeded(done)
    assert "resuming at epoch 2" in done.stderr
    assert verify_run(open_store(str(bucket)), run).problems == []
    status = json.loads((bucket / "runs" / run / "status.json").read_text())
    assert (status["state"], status["fence"]) == ("finished", 2)


def test_what_was_made_is_found_again(kept, tmp_path):
    bucket = shutil.copytree(kept, tmp_path / "bucket")
    said = ran("sample", "--run", "pixels", "--count", 20, "--bucket", bucket)
    assert "complete already" in said
    ran("sample", "--run", "pixels", "--weights", "ema-0.2", "--seeds", 0, "--bucket", bucket)
    words = ("--run", "pixels", "--count", 12, "--extractor", "mobilenet", "--bucket", bucket)
    assert "fd-mobilenet" in ran("evaluate", *words)
