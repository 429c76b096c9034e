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
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.exchange.test_encoding import make_autoencoder

SOURCE = resources.files("job") / "datasets" / "landscape-sample.zip"
KEY = "datasets/wide-24x16"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the embedded images at 24×16 pixels, and a run on them with random crops."""
    bucket = tmp_path_factory.mktemp("shapes") / "bucket"
    succeeded(ddpm_here("data", "pack", "landscape-sample", "wide", "--size", "24x16", "--bucket", bucket))
    train = ("train", "--dataset", "wide", "--run", "wide", "--epochs", 1, "--bucket", bucket)
    others = {"data__crop_scale": "0.5,1", "model__num_classes": "0", "sample__nearest": "false"}
    succeeded(ddpm_here(*train, *settings(**others)))
    return bucket


def packed(bucket: Path, *numbers: int) -> np.ndarray:
    store = open_store(str(bucket))
    return ImageCache(store, load_index(store, KEY)).read(np.array(numbers))


def pictures_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("piece-*/*.png"))])


def test_packed_images_are_pillows(bucket: Path) -> None:
    with zipfile.ZipFile(str(SOURCE)) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith((".txt", "/")))
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    # The middle 3:2 of 64×64.
    expected = [image.crop((0, 10, 64, 53)).resize((24, 16), Image.Resampling.LANCZOS) for image in images]
    (shard,) = (bucket / KEY).glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("rgb8"))
    ours = np.stack([sample["png"] for sample in samples])
    assert ours.shape == (299, 16, 24, 3)
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in expected]))
    said = json.loads((bucket / KEY / "index.json").read_text())
    assert said["size"] == "24x16"
    place = ("--size", "24x16", "--bucket", bucket)
    assert "299 colour, 24×16 pixels" in succeeded(ddpm_here("data", "show", "wide", *place))
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "wide", *place))


def test_tars_in_place_give_the_same_images(bucket: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(str(SOURCE)) as archive:
        archive.extractall(tmp_path / "images")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for number, path in enumerate(sorted((tmp_path / "images").rglob("*.jpg"))[:5]):
            tar.write({"__key__": f"{number}", "jpg": path.read_bytes()})
    words = ("data", "index", tmp_path / "a.tar", "wide", "--size", "24x16", "--bucket", tmp_path / "bucket")
    succeeded(ddpm_here(*words))
    assert np.array_equal(packed(tmp_path / "bucket", *range(5)), packed(bucket, *range(5)))


def test_pictures_have_the_shape(bucket: Path) -> None:
    words = ("sample", "--run", "wide", "--bucket", bucket, "--precision", "fp32")
    succeeded(ddpm_here(*words, "--count", 4, "--save", "png"))
    (folder,) = (bucket / "runs/wide/samples").glob("*-0-4-*")
    drawn = pictures_in(folder)
    assert drawn.shape == (4, 16, 24, 3)
    (grid,) = (line.split("  ")[0] for line in succeeded(ddpm_here(*words, "--seeds", "0-3")).splitlines())
    tiles = np.asarray(Image.open(grid))
    # Four times as large, with two pixels between them, below a title.
    assert tiles.shape[1:] == (4 * 98 + 2, 3)
    tiles = np.stack([tiles[-66:-2, 2 + 98 * n :][::4, :96:4] for n in range(4)]).astype(int)
    assert np.abs(tiles - drawn).max() <= 1


def test_a_mask_follows_both_sides(bucket: Path) -> None:
    words = ("sample", "--run", "wide", "--bucket", bucket, "--mode", "inpaint", "--image", 7, "--resamplings", 1)
    (given,) = packed(bucket, 7).astype(int)
    for mask, known in {"half": np.s_[:, :12], "centre": np.s_[:4]}.items():
        succeeded(ddpm_here(*words, "--mask", mask, "--count", 2, "--save", "png"))
        (folder,) = (bucket / "runs/wide/samples").glob(f"*-mask-{mask}-*")
        for picture in pictures_in(folder).astype(int):
            assert np.abs(picture[known] - given[known]).max() <= 1
            assert np.abs(picture - given)[6:10, 13:17].max() > 20


def test_a_mask_lies_on_the_photograph_that_it_was_drawn_on(bucket: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 48, 12))
    mask.save(tmp_path / "mask.png")
    files = ("--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--resamplings", 1)
    words = ("sample", "--run", "wide", "--bucket", bucket, "--mode", "inpaint", *files)
    succeeded(ddpm_here(*words, "--count", 1, "--save", "png"))
    (folder,) = (bucket / "runs/wide/samples").glob("*-0-1-*")
    # Its middle 3:2 begins at row 8, and is halved.
    given = np.asarray(photo.crop((0, 8, 48, 40)).resize((24, 16), Image.Resampling.LANCZOS)).astype(int)
    differs = np.abs(pictures_in(folder)[0] - given).max(axis=(1, 2)) > 1
    assert differs.tolist() == [True] * 2 + [False] * 14


def test_diffusers_draws_the_shape(bucket: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    succeeded(ddpm_here("export", "--run", "wide", "--to", tmp_path / "out", "--bucket", bucket))
    judge = DDIMPipeline.from_pretrained(tmp_path / "out")
    judge.set_progress_bar_config(disable=True)
    assert judge.unet.config.sample_size == [16, 24]
    (theirs,) = judge(1, num_inference_steps=2).images
    (ours,) = ddpm.load(tmp_path / "out").sample(1, steps=2)
    assert theirs.size == ours.size == (24, 16)
    assert "A U-Net of 24×16 pixels" in (tmp_path / "out/README.md").read_text()
    # Back again, and what differs is refused.
    place = ("--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("import", tmp_path / "out", "--run", "back", "--size", "24x16", *place))
    assert existing_config(open_store(str(tmp_path / "bucket")), "back").image_shape == (3, 16, 24)
    line = refused(ddpm_here("import", tmp_path / "out", "--run", "other", "--size", 16, *place), 78)
    assert line == "ddpm: --size 16: the checkpoint states 24x16 pixels"


def test_records_and_pages_name_the_shape(bucket: Path) -> None:
    assert json.loads(succeeded(ddpm_here("runs", "show", "wide", "--bucket", bucket, "--json")))["size"] == "24x16"
    assert verify_run(open_store(str(bucket)), "wide").problems == []
    assert "A diffusion model of wide, 24×16 pixels: unet" in (bucket / "runs/wide/report.html").read_text()
    again = ("train", "--dataset", "wide", "--run", "wide", "--bucket", bucket)
    succeeded(ddpm_here("data", "pack", "landscape-sample", "wide", "--size", "16x24", "--bucket", bucket))
    line = refused(ddpm_here(*again, "--set", "data.size=16x24"), 78)
    assert "learns wide at 24x16 pixels, not 16x24: type --run wide-16x24" in line
    line = refused(ddpm_here("data", "show", "wide", "--bucket", bucket), 64)
    assert "at sizes 24x16, 16x24: choose one with --size N" in line
    job = succeeded(
        ddpm_here("submit", "pack", SOURCE, "w", "--size", "24x16", "--on", "local", "--dry-run", "--bucket", bucket)
    )
    assert "24x16" in job


@pytest.mark.slow
def test_features_are_those_of_the_shape(bucket: Path) -> None:
    few = ("--extractor", "mobilenet", "--count", 12, "--references", 24)
    said = succeeded(ddpm_here("evaluate", "--run", "wide", "--bucket", bucket, *few))
    assert "against 24 of 299 of wide-24x16 (crop center, lanczos)" in said
    assert list((bucket / KEY / "references").iterdir())


@pytest.mark.slow
def test_latents_have_the_shape(bucket: Path, tmp_path: Path) -> None:
    """Half of each side; an autoencoder that cannot halve both is refused."""
    from diffusers import AutoencoderKL

    copy = shutil.copytree(bucket, tmp_path / "bucket")
    encode = ("data", "encode", "wide", "--size", "24x16", "--bucket", copy, "--autoencoder")
    deep = make_autoencoder(tmp_path / "deep", 5, block_out_channels=(8,) * 5)
    assert "halves images 4 times, and 24x16 pixels cannot be" in refused(ddpm_here(*encode, deep), 78)
    vae = make_autoencoder(tmp_path / "vae")
    said = succeeded(ddpm_here(*encode, vae))
    assert "299 as latents of 12×8×4, encoded from wide-24x16" in said
    key = "datasets/wide-latents-12x8"
    moments = ImageCache(open_store(str(copy)), load_index(open_store(str(copy)), key)).read(np.arange(3))
    pixels = torch.from_numpy(packed(copy, 0, 1, 2)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        theirs = AutoencoderKL.from_pretrained(vae).eval().encode(pixels).latent_dist
    theirs = torch.cat([theirs.mean, theirs.logvar], dim=1).permute(0, 2, 3, 1).numpy()
    assert np.abs(moments.view(np.float16) - theirs).max() < 2e-3
    network = (
        "model.kind=dit",
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
        "sample.steps=4",
        "sample.images=4",
    )
    sets = [word for setting in network for word in ("--set", setting)]
    succeeded(ddpm_here("train", "--dataset", "wide-latents", "--run", "l", "--epochs", 1, "--bucket", copy, *sets))
    assert open_run(str(copy), "l").pixel_shape == (3, 16, 24)
    succeeded(ddpm_here("sample", "--run", "l", "--bucket", copy, "--count", 2, "--save", "png"))
    (folder,) = (copy / "runs/l/samples").glob("*-0-2-*")
    assert pictures_in(folder).shape == (2, 16, 24, 3)
    assert "wide-latents, 12×8 pixels of latents" in (copy / "runs/l/report.html").read_text()
    other = make_autoencoder(tmp_path / "other", block_out_channels=(16, 16))
    succeeded(ddpm_here(*encode, other, "--to", "others"))
    child = ddpm_here("train", "--dataset", "others", "--run", "child", "--from", "l", "--bucket", copy, *sets)
    assert "others holds latents of another autoencoder than wide-latents" in refused(child, 78)
