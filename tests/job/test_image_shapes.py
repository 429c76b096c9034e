"""Images that are not square, from packing to the page; Pillow, webdataset and diffusers say what shape is right."""

import io
import json
import shutil
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import ddpm
from job.data.reading.cache import ImageCache
from job.data.shards import load_index
from job.runs.records import existing_config
from job.runs.run import open_run
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, ran, refused, refuses, settings
from tests.job.exchange.test_encoding import make_autoencoder

SOURCE = resources.files("job") / "datasets" / "landscape-sample.zip"
LANCZOS = Image.Resampling.LANCZOS


def said(bucket: Path, *words: object) -> str:
    return ran(*words, "--bucket", bucket)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the embedded images at 24×16 pixels, and a run on them with random crops."""
    bucket = tmp_path_factory.mktemp("shapes") / "bucket"
    said(bucket, "data", "pack", "landscape-sample", "wide", "--size", "24x16")
    others = settings(data__crop_scale="0.5,1", model__num_classes="0", sample__nearest="false")
    said(bucket, "train", "--dataset", "wide", "--run", "wide", "--epochs", 1, *others)
    return bucket


def packed(bucket: Path, *numbers: int, key: str = "datasets/wide-24x16") -> np.ndarray:
    store = open_store(str(bucket))
    return ImageCache(store, load_index(store, key)).read(np.array(numbers))


def drawn(bucket: Path, count: int, *words: object, run: str = "wide") -> np.ndarray:
    """The pictures that a command draws, as integers."""
    samples = bucket / "runs" / run / "samples"
    before = set(samples.iterdir())
    said(bucket, "sample", "--run", run, "--count", count, "--save", "png", *words)
    (folder,) = set(samples.iterdir()) - before
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("piece-*/*.png"))]).astype(int)


def test_packed_images_are_pillows(bucket, tmp_path):
    with zipfile.ZipFile(str(SOURCE)) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith((".txt", "/")))
        files = [archive.read(name) for name in names]
    # The middle 3:2 of 64×64.
    images = [Image.open(io.BytesIO(file)).convert("RGB").crop((0, 10, 64, 53)) for file in files]
    (shard,) = (bucket / "datasets/wide-24x16").glob("*.tar")
    samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("rgb8")
    ours = np.stack([sample["png"] for sample in samples])
    assert ours.shape == (299, 16, 24, 3)
    assert np.array_equal(ours, np.stack([np.asarray(image.resize((24, 16), LANCZOS)) for image in images]))
    assert json.loads((bucket / "datasets/wide-24x16/index.json").read_text())["size"] == "24x16"
    assert "299 colour, 24×16 pixels" in said(bucket, "data", "show", "wide", "--size", "24x16")
    assert "as it was packed" in said(bucket, "data", "verify", "wide", "--size", "24x16")

    # Tars in place give the same images.
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for number in range(5):
            tar.write({"__key__": f"{number}", "jpg": files[number]})
    said(tmp_path / "bucket", "data", "index", tmp_path / "a.tar", "wide", "--size", "24x16")
    assert np.array_equal(packed(tmp_path / "bucket", *range(5)), packed(bucket, *range(5)))


def test_pictures_have_the_shape(bucket):
    pictures = drawn(bucket, 4, "--precision", "fp32")
    assert pictures.shape == (4, 16, 24, 3)
    words = ("sample", "--run", "wide", "--precision", "fp32", "--seeds", "0-3")
    (grid,) = (line.split("  ")[0] for line in said(bucket, *words).splitlines())
    tiles = np.asarray(Image.open(grid))
    # Four times as large, with two pixels between them, below a title.
    assert tiles.shape[1:] == (4 * 98 + 2, 3)
    tiles = np.stack([tiles[-66:-2, 2 + 98 * n :][::4, :96:4] for n in range(4)]).astype(int)
    assert np.abs(tiles - pictures).max() <= 1


def test_a_mask_follows_both_sides(bucket, tmp_path):
    words = ("--mode", "inpaint", "--resamplings", 1)
    (given,) = packed(bucket, 7).astype(int)
    for mask, known in {"half": np.s_[:, :12], "centre": np.s_[:4]}.items():
        for picture in drawn(bucket, 2, *words, "--image", 7, "--mask", mask):
            assert np.abs(picture[known] - given[known]).max() <= 1
            assert np.abs(picture - given)[6:10, 13:17].max() > 20

    # And lies on the photograph that it was drawn on, whose middle 3:2 begins at row 8, and is halved.
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 48, 12))
    mask.save(tmp_path / "mask.png")
    (picture,) = drawn(bucket, 1, *words, "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png")
    given = np.asarray(photo.crop((0, 8, 48, 40)).resize((24, 16), LANCZOS)).astype(int)
    assert (np.abs(picture - given).max(axis=(1, 2)) > 1).tolist() == [True] * 2 + [False] * 14


def test_diffusers_draws_the_shape(bucket, tmp_path):
    from diffusers import DDIMPipeline

    said(bucket, "export", "--run", "wide", "--to", tmp_path / "out")
    judge = DDIMPipeline.from_pretrained(tmp_path / "out")
    judge.set_progress_bar_config(disable=True)
    assert judge.unet.config.sample_size == [16, 24]
    (theirs,) = judge(1, num_inference_steps=2).images
    (ours,) = ddpm.load(tmp_path / "out").sample(1, steps=2)
    assert theirs.size == ours.size == (24, 16)
    assert "A U-Net of 24×16 pixels" in (tmp_path / "out/README.md").read_text()
    # Back again, and what differs is refused.
    words = ("import", tmp_path / "out", "--bucket", tmp_path / "bucket", "--run")
    ran(*words, "back", "--size", "24x16")
    assert existing_config(open_store(str(tmp_path / "bucket")), "back").image_shape == (3, 16, 24)
    line = refused(ddpm_here(*words, "other", "--size", 16), 78)
    assert line == "ddpm: --size 16: the checkpoint states 24x16 pixels"


def test_records_and_pages_name_the_shape(bucket):
    assert json.loads(said(bucket, "runs", "show", "wide", "--json"))["size"] == "24x16"
    assert verify_run(open_store(str(bucket)), "wide").problems == []
    assert "A diffusion model of wide, 24×16 pixels: unet" in (bucket / "runs/wide/report.html").read_text()
    job = ("submit", "pack", SOURCE, "w", "--size", "24x16", "--on", "local", "--dry-run")
    assert "24x16" in said(bucket, *job)
    said(bucket, "data", "pack", "landscape-sample", "wide", "--size", "16x24")
    again = "train --dataset wide --run wide --set data.size=16x24"
    several = ("data show wide", 64, "at sizes 24x16, 16x24: choose one with --size N")
    changed = (again, 78, "learns wide at 24x16 pixels, not 16x24: type --run wide-16x24")
    refuses([changed, several], "--bucket", bucket)


@pytest.mark.slow
def test_features_are_those_of_the_shape(bucket):
    few = ("--extractor", "mobilenet", "--count", 12, "--references", 24)
    assert "against 24 of 299 of wide-24x16 (crop center, lanczos)" in said(bucket, "evaluate", "--run", "wide", *few)
    assert list((bucket / "datasets/wide-24x16/references").iterdir())


@pytest.mark.slow
def test_latents_have_the_shape(bucket, tmp_path):
    """Half of each side; an autoencoder that cannot halve both is refused."""
    from diffusers import AutoencoderKL

    copy = shutil.copytree(bucket, tmp_path / "bucket")
    encode = ("data", "encode", "wide", "--size", "24x16", "--autoencoder")
    deep = make_autoencoder(tmp_path / "deep", 5, block_out_channels=(8,) * 5)
    refuses([((*encode, deep), 78, "halves images 4 times, and 24x16 pixels cannot be")], "--bucket", copy)
    vae = make_autoencoder(tmp_path / "vae")
    assert "299 as latents of 12×8×4, encoded from wide-24x16" in said(copy, *encode, vae)
    moments = packed(copy, 0, 1, 2, key="datasets/wide-latents-12x8")
    pixels = torch.from_numpy(packed(copy, 0, 1, 2)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        theirs = AutoencoderKL.from_pretrained(vae).eval().encode(pixels).latent_dist
    theirs = torch.cat([theirs.mean, theirs.logvar], dim=1).permute(0, 2, 3, 1).numpy()
    assert np.abs(moments - theirs).max() < 2e-3
    network = "model.kind=dit model.width=16 model.depth=1 model.heads=2 sample.steps=4 sample.images=4"
    train = [word for setting in network.split() for word in ("--set", setting)]
    train = ("train", *train, "--epochs", 1, "--dataset")
    said(copy, *train, "wide-latents", "--run", "l")
    assert open_run(str(copy), "l").pixel_shape == (3, 16, 24)
    assert drawn(copy, 2, run="l").shape == (2, 16, 24, 3)
    assert "wide-latents, 12×8 pixels of latents" in (copy / "runs/l/report.html").read_text()
    said(copy, *encode, make_autoencoder(tmp_path / "other", block_out_channels=(16, 16)), "--to", "others")
    child = ddpm_here(*train, "others", "--run", "child", "--from", "l", "--bucket", copy)
    assert "others holds latents of another autoencoder than wide-latents" in refused(child, 78)
