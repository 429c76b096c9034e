"""Guidance, chosen classes and editing through the command: which pictures come out, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from benchmarks.solvers import rms
from ddpm.editing import inverted
from ddpm.grids import make_grid
from ddpm.model import noise_of
from ddpm.process import points_of
from ddpm.samplers import Visit, ddim
from job import load
from job.data.reading.cache import ImageCache
from job.data.shards import load_index
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded
from tests.job.sampling.conftest import ddim_50, estimate_of

SEEDS = [0, 1, 2, 3, 4, 10**17, 77]


@pytest.fixture
def bucket(learned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(learned, tmp_path / "bucket")


@pytest.fixture
def sampled(bucket: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Runs `ddpm sample` of the run `all` and returns the pictures it named, int16."""

    def sampled(*words: object) -> dict[str, np.ndarray]:
        out = succeeded(ddpm_here("sample", "--run", "all", "--bucket", bucket, "--precision", "fp32", *words))
        paths = [Path(line.split()[0]) for line in out.splitlines()]
        return {path.name: np.asarray(Image.open(path), np.int16) for path in paths if path.suffix == ".png"}

    return sampled


def images_of(bucket: Path, *numbers: int) -> np.ndarray:
    store = open_store(str(bucket))
    index = load_index(store, "datasets/tiles-16")
    return ImageCache(store, index).read(np.array(numbers)).astype(np.int16)


def tiles_of(picture: np.ndarray, columns: int, left: int = 0, padding: int = 8) -> np.ndarray:
    """The images of a grid whose tiles are six times as large and have `padding` around each, [n, 16, 16, 3]."""
    step = 96 + padding
    rows, above = divmod(picture.shape[0] - padding, step)
    picture = picture[above + padding :, left + padding :]
    return np.stack([picture[step * y :, step * x :][:96:6, :96:6] for y in range(rows) for x in range(columns)])


@pytest.mark.slow
def test_guided_images_depend_on_seeds_alone(draw):
    """With all that a network can learn: half a batch without classes, the estimate before, a variance of its own."""
    plain = draw(SEEDS, 64, run="all")
    for chosen in (
        {"guidance": 3.0, "guidance_interval": (0.5, 5.0), "guidance_rescale": 0.7},
        {"guidance": 2.0, "autoguidance": 1},
        {"sampler": "ddpm", "steps": 8, "variance": "learned_range", "guidance": 2.0},
        {"labels": (3,)},
    ):
        images = draw(SEEDS, 64, run="all", **chosen)
        assert np.abs(images - plain).mean() > 1, chosen
        assert np.abs(draw(SEEDS, 2, run="all", **chosen) - images).max() <= 1, chosen
    kinds = ("learned_range", "fixed_large")
    learnt, large = (draw(SEEDS, 64, run="all", sampler="ddpm", steps=8, variance=kind) for kind in kinds)
    assert np.abs(learnt - large).mean() > 1
    # Seeds 3 and 77 mod 5 are of this class anyway.
    one_class = np.abs(draw(SEEDS, 64, run="all", labels=(3,)) - plain).mean(axis=(1, 2, 3))
    assert (one_class < 0.1).tolist() == [seed % 5 == 3 for seed in SEEDS]


def test_names_state_guidance_and_classes(sampled):
    limited = "ddim-4-guidance-3-guidance_interval-0.5_5-guidance_rescale-0.7"
    for name, words in (
        ("ddim-4-guidance-3", "--guidance 3"),
        (limited, "--guidance 3 --guidance-interval 0.5,5 --guidance-rescale 0.7"),
        ("ddim-4-guidance-1.5-autoguidance-1", "--guidance 1.5 --autoguidance 1"),
        ("ddpm-4-variance-learned_range", "--sampler ddpm --steps 4 --variance learned_range"),
        ("ddim-4-classes-2_0", "--classes hills,0"),
    ):
        assert list(sampled(*words.split(), "--seeds", "0-3")) == [f"epoch-0002-{name}-seeds-0-3.png"]


def test_saved_images_have_the_chosen_classes(bucket, sampled, draw):
    sampled("--classes", "skyline,coast", "--count", 18, "--guidance", 2, "--autoguidance", 1)
    (folder,) = (bucket / "runs/all/samples").glob("epoch-0002-ddim-4-guidance-2-autoguidance-1-classes-4_0-0-18-*")
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["cls"] for sample in samples] == [4, 0] * 9
    drawn = draw(range(18), 16, run="all", guidance=2.0, autoguidance=1, labels=(4, 0))
    assert np.abs(np.stack([sample["png"] for sample in samples]) - drawn).max() <= 1
    assert verify_run(open_store(str(bucket)), "all").problems == []


CLASSLESS = {"model__num_classes": "0", "ema__stds": "0.10"}


@pytest.mark.slow
@pytest.mark.parametrize(("learnt", "weights"), [({}, ""), ({}, "model"), (CLASSLESS, "ema-0.1")])
def test_autoguidance_takes_another_runs_network(bucket, learnt, weights):
    """As EDM2's best results are: away from a smaller network that has learnt less, averaged otherwise or classless."""
    smaller = ("--dataset", "tiles", "--run", "small", "--bucket", bucket, "--epochs", 1)
    succeeded(ddpm_here("train", *smaller, *settings(model__channels="4", **learnt)))
    words = ("--precision", "fp32", "--steps", 50, "--guidance", 2, "--autoguidance", "small@1", "--count", 4)
    # As a person may write it.
    words += ("--autoguidance-weights", weights.replace("0.1", "0.10")) if weights else ()
    name = f"-autoguidance_weights-{weights}" if weights else ""
    succeeded(ddpm_here("sample", "--run", "walk", "--bucket", bucket, *words, "--save", "png"))
    (folder,) = (bucket / "runs/walk/samples").glob(f"*-guidance-2-autoguidance-1-autoguidance_run-small{name}-0-4-*")
    saved = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("piece-*/*.png"))])
    seeds = torch.arange(4)
    better = estimate_of(bucket, "walk", seeds)
    worse = estimate_of(bucket, "small", None if learnt else seeds, weights=weights or "ema")
    x = ddim_50(lambda *at: (worse(*at) + 2 * (better(*at) - worse(*at))).clamp(-1, 1), noise_of(seeds, (3, 16, 16))(0))
    expected = ((x.permute(0, 2, 3, 1) + 1) * 127.5).clip(0, 255).numpy()
    assert np.abs(saved - expected).max() < 0.51
    assert verify_run(open_store(str(bucket)), "walk").problems == []


@pytest.mark.slow
def test_inpainting_keeps_the_known_part(bucket, sampled, tmp_path):
    given, inpaint = images_of(bucket, 3, 17), ("--mode", "inpaint", "--resamplings", 2, "--steps", 12)
    ((name, picture),) = sampled(*inpaint, "--image", "3,17", "--seeds", "0-5").items()
    # Each has its own class.
    assert name == "epoch-0002-ddim-12-classes-0_0-inpaint-image-3_17-mask-half-resamplings-2-seeds-0-5.png"
    tiles = tiles_of(picture, 5).reshape(2, 5, 16, 16, 3)
    for own, image in zip(tiles, given, strict=True):
        assert np.array_equal(own[0], image)
        assert np.array_equal(own[1, :, :8], image[:, :8]) and (own[1, :, 8:] == 128).all()
        assert np.array_equal(own[2:, :, :8], image[None, :, :8].repeat(3, axis=0))
        different = [np.abs(own[a, :, 8:] - own[b, :, 8:]).mean() for a, b in ((2, 3), (2, 4), (3, 4))]
        assert min(different) > 2
    heads = picture[-8 - 2 * 104 - 26 : -8 - 2 * 104]
    assert all((heads[:, 8 + 104 * column :][:, :96] < 128).any() for column in range(5)), "a head above each column"
    ((_, alone),) = sampled(*inpaint, "--image", "3,17", "--seeds", "4,5", "--batch-size", 1).items()
    again = tiles_of(alone, 3).reshape(2, 3, 16, 16, 3)
    assert np.abs(again[:, 2] - tiles[:, 4]).max() <= 1

    # The same image and mask as files.
    Image.fromarray(given[0].astype(np.uint8)).save(tmp_path / "image.png")
    hidden = np.zeros((32, 32), np.uint8)
    hidden[:, 16:] = 255
    Image.fromarray(hidden).save(tmp_path / "mask.png")
    files = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--classes", "coast")
    ((name, of_files),) = sampled(*inpaint, *files, "--seeds", "0,2,4").items()
    assert name.startswith("epoch-0002-ddim-12-classes-0-inpaint-image-") and len(name) < 130
    assert np.abs(tiles_of(of_files, 5)[2:] - tiles[0, 2:]).max() <= 1

    # Saved in pieces, image by image the same; of another image in a folder of its own.
    for slice_ in ("0/2", "1/2"):
        sampled(*inpaint, "--save", "png", "--count", 18, "--image", "3,17", "--slice", slice_)
    (folder,) = (bucket / "runs/all/samples").glob("*-0-18-*")
    saved = [np.asarray(Image.open(path), np.int16) for path in sorted(folder.glob("piece-*/*.png"))]
    assert len(saved) == 18
    for seed in range(6):
        assert np.abs(saved[seed] - tiles[seed % 2, 2 + seed // 2]).max() <= 1


def test_each_step_of_edits_shows(bucket, monkeypatch):
    """Processes without a batch of their own count the same steps, or the others would wait for them for ever."""
    monkeypatch.setattr("job.progress.LINE_SECONDS", 0.0)
    for steps, words in (
        # Of 12 steps the last ten are walked twice.
        (22, ("--mode", "inpaint", "--image", 0, "--resamplings", 2, "--steps", 12)),
        (6, ("--mode", "img2img", "--image", 0, "--strength", 0.3, "--steps", 20)),
    ):
        done = ddpm_here("sample", "--run", "all", "--bucket", bucket, "--seeds", "0-2", "--batch-size", 2, *words)
        shown = [int(percent) for percent in re.findall(r"(?m)^epoch-\d+: (\d+) % · ", done.stderr)]
        assert succeeded(done) and shown == [100 * step // (2 * steps) for step in range(1, 2 * steps + 1)], words


def test_img2img_keeps_more_at_low_strength(bucket, sampled):
    given, distances = images_of(bucket, 40), []
    for strength in (0.05, 0.3, 0.9):
        words = ("--mode", "img2img", "--image", 40, "--strength", strength, "--steps", 20, "--seeds", "0-2")
        ((name, picture),) = sampled(*words).items()
        assert f"-img2img-image-40-strength-{strength:g}-seeds-0-2.png" in name
        tiles = tiles_of(picture, 4)
        assert np.array_equal(tiles[0], given[0])
        distances.append(np.abs(tiles[1:] - given).mean())
    assert distances[0] < 12 < distances[1] < distances[2]


def test_invert_draws_an_image_again(bucket, sampled):
    words = ("--mode", "invert", "--image", "40,41", "--steps", 40)
    ((name, picture),) = sampled(*words).items()
    assert name == "epoch-0002-ddim-40-classes-0_0-invert-image-40_41-strength-1.0.png"
    tiles = tiles_of(picture, 2)
    given = images_of(bucket, 40, 41)
    assert np.array_equal(tiles[::2], given)
    again, other = np.abs(tiles[1::2] - given).mean(), np.abs(tiles[1::2] - given[::-1]).mean()
    assert 1 < again < 12 and 2 * again < other


def test_a_trained_network_inverts_closer_than_with_diffusers(learned):
    import diffusers

    model, image = load(str(learned / "runs/walk")), torch.from_numpy(images_of(learned, 3, 17, 40, 41))
    image, table = image.permute(0, 3, 1, 2) / 127.5 - 1, model.process.betas.numpy()
    denoise = model.denoiser(torch.arange(4), replace(model.sampling, clip=False))
    config = {"num_train_timesteps": 50, "trained_betas": table, "clip_sample": False, "timestep_spacing": "trailing"}
    for steps, most in ((10, 0.25), (50, 0.1)):
        points, x = make_grid(model.process, steps, "trailing"), image
        for kind in (diffusers.DDIMInverseScheduler, diffusers.DDIMScheduler):
            judge = kind(**config)
            judge.set_timesteps(steps)
            for t in judge.timesteps:
                (point,) = points_of(model.process.numbered(t.view(1)))
                x = judge.step(Visit(point, x, denoise(x, point)).epsilon, t, x).prev_sample
        ours = inverted(ddim, denoise, points, model.noise_of(torch.arange(4)), image=image, strength=1.0)
        assert rms(ours - image) < most * rms(x - image), steps


def test_interpolation_ends_with_both_seeds(sampled, draw):
    ((name, picture),) = sampled("--mode", "interpolate", "--seeds", "3,8,5,10").items()
    assert name == "epoch-0002-ddim-4-interpolate-seeds-3_8_5_10.png"
    rows = tiles_of(picture, 8, picture.shape[1] - 98 * 8 - 2, padding=2).reshape(2, 8, 16, 16, 3)
    ends = draw([3, 8, 5, 10], 4, run="all")
    # Both seeds of a pair are of one class here, or they would not end with the second one's own image.
    assert np.abs(rows[:, 0] - ends[::2]).max() <= 1
    assert np.abs(rows[:, -1] - ends[1::2]).max() <= 1
    steps = np.abs(np.diff(rows, axis=1)).mean(axis=(2, 3, 4))
    whole = np.abs(rows[:, 0] - rows[:, -1]).mean(axis=(1, 2, 3))
    assert (steps < 0.5 * whole[:, None]).all() and (steps > 0).all()


def test_impossible_samplings_are_refused(bucket, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    inpaint, img2img = ("--mode", "inpaint", "--image", "3"), ("--mode", "img2img", "--image")
    for run, code, said, words in (
        ("walk", 78, "began with model.label_dropout=0.1", ("--guidance", 2)),
        ("walk", 78, "diffusion.variance", ("--sampler", "ddpm", "--variance", "learned_range")),
        ("walk", 78, "is of order 3, above sample.steps=2", ("--sampler", "unipc", "--steps", 2)),
        ("walk", 64, "--order is an option of unipc, ipndm, deis", ("--sampler", "dpmpp_2m", "--order", 2)),
        ("walk", 78, "t=0 of 50", ("--grid", "leading", "--steps", 1)),
        ("walk", 78, "sample.steps=51 exceeds", ("--grid", "found", "--steps", 51)),
        ("all", 64, "--guidance-rescale needs --guidance", ("--guidance-rescale", 0.7)),
        ("walk", 78, "sample.shift=3 needs diffusion.schedule=flow", ("--shift", 3)),
        ("all", 78, "guidance other than 1", ("--autoguidance", 1)),
        ("all", 64, "--autoguidance-weights needs --autoguidance", ("--autoguidance-weights", "model")),
        ("all", 64, "--autoguidance-weights 'best': input should be 'ema'", ("--autoguidance-weights", "best")),
        ("all", 64, "smaller number first", ("--guidance-interval", "5,0.5")),
        ("all", 64, "--guidance-interval '5': give two numbers", ("--guidance-interval", "5")),
        ("all", 64, "--guidance-rescale", ("--guidance-rescale", 2)),
        ("all", 66, "no checkpoint of epoch 3", ("--guidance", 2, "--autoguidance", 3)),
        ("all", 66, "there is no run 'none'", ("--guidance", 2, "--autoguidance", "none@3")),
        ("all", 64, "--autoguidance 'x'", ("--guidance", 2, "--autoguidance", "walk@x")),
        ("all", 64, "diffusion.self_conditioning: True and False", ("--guidance", 2, "--autoguidance", "walk@1")),
        ("all", 64, "did you mean 'mountain'?", ("--classes", "coast,mountan")),
        ("all", 64, "there is no class '7'; there are 5: coast", ("--classes", "7")),
        ("all", 64, "inpaint, img2img, invert, interpolate; did you mean 'inpaint'?", ("--mode", "inpant")),
        ("all", 64, "needs --image", ("--mode", "img2img")),
        ("all", 64, "--strength is an option of --mode img2img and invert", (*inpaint, "--strength", 0.5)),
        ("all", 64, "--mask is an option of --mode inpaint", ("--mask", "half")),
        ("all", 2, "'--strength': Input should be greater than or equal to 0.001", (*img2img, 3, "--strength", 0)),
        ("all", 2, "'--resamplings': Input should be greater than or equal to 1", (*inpaint, "--resamplings", 0)),
        ("all", 64, "--gif works only for new images", (*inpaint, "--gif")),
        ("all", 64, "leave --count out", ("--mode", "interpolate", "--count", 4)),
        ("all", 64, "--seeds 0-2 has an odd number", ("--mode", "interpolate", "--seeds", "0-2")),
        ("all", 64, "has the images 0 to 298", (*img2img, "0-299")),
        ("all", 66, "no.png: No such file", (*img2img, tmp_path / "no.png")),
        ("all", 65, "is damaged at its beginning", (*img2img, tmp_path / "broken.png")),
        ("all", 64, "inpaint replaces the white part", (*inpaint, "--mask", tmp_path / "white.png")),
    ):
        line = refused(ddpm_here("sample", "--run", run, "--bucket", bucket, *words), code)
        assert said in line, (words, line)
    learned = "diffusion.variance=learned_range"
    for said, *changes in (
        ("needs a network with classes", "model.label_dropout=0.1", "model.num_classes=0"),
        ("change diffusion.draws", learned, "diffusion.draws=log_normal"),
        ("change diffusion.schedule", learned, "diffusion.schedule=flow", "diffusion.prediction=v"),
        ("change diffusion.offset_noise", learned, "diffusion.offset_noise=0.1"),
        ("is set by ddpm sample --autoguidance [RUN@]EPOCH", "sample.autoguidance=3"),
        ("class 9 does not exist, the network has 5", "sample.labels=1,9"),
        ("are for `ddpm sample`", "sample.sampler=own"),
        ("are for `ddpm sample`", "sample.grid=found"),
    ):
        sets = [*settings(), *(word for change in changes for word in ("--set", change))]
        line = refused(ddpm_here("train", "--dataset", "tiles", "--run", "new", "--bucket", bucket, *sets), 78)
        assert said in line, (changes, line)
    assert not (bucket / "runs/new").exists()


@pytest.mark.slow
def test_processes_share_an_edit(bucket, sampled):
    inpaint = ("--mode", "inpaint", "--image", "3,17", "--resamplings", 2, "--steps", 12, "--seeds", "0-6")
    words = (*inpaint, "--guidance", 2, "--autoguidance", 1)
    ((name, alone),) = sampled(*words).items()
    how = ("--run", "all", "--bucket", bucket, "--precision", "fp32", "--processes", 2)
    (line,) = succeeded(ddpm("sample", *how, *words)).splitlines()
    path = Path(line.split()[0])
    assert path.name == name
    assert np.abs(np.asarray(Image.open(path), np.int16) - alone).max() <= 1
