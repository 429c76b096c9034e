"""`job.load`: what it draws is what `ddpm sample` does."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpm
import job
from job.exits import BadRequestError, MissingInputError
from tests.job.command_line import ddpm_here, settings, succeeded

NOBODY = 65534


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.mark.parametrize("words", [(), ("--sampler", "ddpm"), ("--classes", "hills,coast", "--steps", "7")])
def test_images_equal_those_of_the_command(bucket, tmp_path, words):
    succeeded(
        ddpm_here(
            "sample", "--run", "walk", "--bucket", bucket, "--count", 6, "--save", "png", "--first-seed", 3, *words
        )
    )
    (folder,) = (bucket / "runs/walk/samples").glob("epoch-0003-*-3-6-*")
    theirs = pixels([Image.open(path) for path in sorted(folder.glob("piece-*/*.png"))])
    options = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    if "steps" in options:
        options = {"classes": ["hills", 0], "steps": 7}
    model = job.load(f"{bucket}/runs/walk", device="cpu")
    assert abs(pixels(model.sample(6, seed=3, **options)) - theirs).max() <= 1


def test_epochs_and_weights_are_chosen(bucket):
    uri = f"{bucket}/runs/walk/"
    last, first = (job.load(uri, epoch=epoch, device="cpu").sample(2, steps=4, as_tensor=True) for epoch in (3, 1))
    raw = job.load(uri, weights="model", device="cpu").sample(2, steps=4, as_tensor=True)
    assert (last != first).any()
    assert (last != raw).any()
    assert job.load(uri, weights="ema-0.1", device="cpu").classes == ("coast", "desert", "hills", "mountain", "skyline")


def test_an_export_of_an_augmented_run_loads(tiles, tmp_path):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    augmented = settings(data__augment="0.1", sample__every_epochs="0")
    train = ("train", "--dataset", "tiles", "--run", "augmented", "--epochs", 1, *augmented, "--bucket", bucket)
    succeeded(ddpm_here(*train))
    succeeded(ddpm_here("export", "--run", "augmented", "--bucket", bucket, "--to", tmp_path / "folder"))
    there, here = ddpm.load(tmp_path / "folder", device="cpu"), job.load(f"{bucket}/runs/augmented", device="cpu")
    assert (pixels(there.sample(1, steps=2)) == pixels(here.sample(1, steps=2))).all()


def test_an_export_is_the_same_model(bucket, tmp_path):
    succeeded(ddpm_here("export", "--run", "walk", "--bucket", bucket, "--to", tmp_path / "folder"))
    there, here = ddpm.load(tmp_path / "folder", device="cpu"), job.load(f"{bucket}/runs/walk", device="cpu")
    assert (pixels(there.sample(3, steps=4)) == pixels(here.sample(3, steps=4))).all()
    what = "Model(UNet, 64,643 parameters, images 3×16×16, prediction v, schedule cosine, 5 classes, from "
    assert repr(here) == f"{what}{bucket}/runs/walk, epoch 3, weights ema)"
    assert repr(there) == f"{what}{tmp_path / 'folder'})"
    hills = [model.sample(1, classes="hills", steps=4) for model in (there, here)]
    assert (pixels(hills[0]) == pixels(hills[1])).all()


def test_what_is_not_there_is_said(bucket):
    with pytest.raises(BadRequestError, match="is not the folder of a run: use one such as gs://my-bucket/runs/celeba"):
        job.load(f"{bucket}/walk")
    with pytest.raises(MissingInputError, match="there is no run 'walking'"):
        job.load(f"{bucket}/runs/walking")
    with pytest.raises(MissingInputError, match=r"has no checkpoint of epoch 2: .* \(there are: 1, 3\)"):
        job.load(f"{bucket}/runs/walk", epoch=2)


@pytest.fixture
def read_only(walked):
    """A bucket of which this process can change nothing, also where it is root's."""
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(walked, Path(folder, "bucket"))
        for path in (Path(folder), copied, *copied.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        # Root may write anywhere.
        user = os.geteuid()
        os.seteuid(user or NOBODY)
        try:
            yield copied
        finally:
            os.seteuid(user)
            for path in (Path(folder), copied, *copied.rglob("*")):
                path.chmod(0o755)


def test_who_may_only_read_may_load(read_only):
    assert len(job.load(f"{read_only}/runs/walk", device="cpu").sample(1, steps=2)) == 1
    assert not list((read_only / "runs/walk").glob("reading/*"))
