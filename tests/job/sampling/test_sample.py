"""Sampling from checkpoints: which images come out by each sampler, and that nothing but their seeds decides it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm import figures
from job.config.schema import SampleConfig
from job.data.shards import Shards, load_index
from job.evaluation.evaluate import run_evaluation
from job.evaluation.evaluation_plan import plan_evaluation
from job.exits import NotANumberError, StoppedError
from job.requests import EvaluateRequest, SampleRequest
from job.runs.checkpoints import choose, list_checkpoints
from job.runs.layout import CheckpointRef
from job.runs.retention import reading_chosen
from job.runs.run import FoundGrid
from job.sampling.painter import Painter
from job.sampling.pictures import grid_png, run_sampling
from job.sampling.sampling_plan import plan_sampling
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.launching import stop_after

SEEDS = [0, 1, 2, 3, 4, 10**17, 77]
BF16_LEVELS = 1.0
"""Mean difference, in levels of 255, that bf16 may make; measured on a CPU: 0.0 between batch sizes, 0.2 from fp32."""


@pytest.fixture
def sample(bucket: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Image.Image]]:
    """Samples in this process and returns the pictures it named."""
    run = open_store(str(bucket)).sub("runs/walk")

    def sample(**options) -> dict[str, Image.Image]:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        chosen = {key: options.pop(key) for key in SampleConfig.model_fields.keys() & options.keys()}
        run_sampling(plan_sampling(SampleRequest("walk", bucket=str(bucket), chosen=chosen, **options).check()))
        named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        keys = [uri.removeprefix(f"{run.uri}/samples/") for uri in named]
        return {key: Image.open(io.BytesIO(run.read(f"samples/{key}").data)) for key in keys}

    return sample


@pytest.mark.slow
def test_images_depend_on_seeds_alone(draw):
    for sampling in (
        {},
        {"sampler": "ddim", "steps": 5, "eta": 1.0},
        {"sampler": "ddpm", "steps": 8},
        {"sampler": "dpmpp_sde_2m", "steps": 5},
        {"sampler": "heun", "steps": 4, "churn": 2.0},
    ):
        images = draw(SEEDS, 64, **sampling)
        assert images.shape == (7, 16, 16, 3)
        for batch_size in (1, 3):
            assert np.abs(draw(SEEDS, batch_size, **sampling) - images).max() <= 1, sampling
        # Classes go round: a seed keeps its class in any company.
        chosen = [6, 5, 1]
        assert np.abs(draw([SEEDS[i] for i in chosen], 2, **sampling) - images[chosen]).max() <= 1, sampling
        different = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
        assert different[~np.eye(7, dtype=bool)].min() > 10, sampling


def test_a_batch_without_memory_is_drawn_in_halves(draw, monkeypatch):
    expected, sample_alone, sizes = draw(SEEDS, 64), Painter.sample_alone, []

    def with_little_memory(painter, seeds, *arguments):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError
        return sample_alone(painter, seeds, *arguments)

    monkeypatch.setattr(Painter, "sample_alone", with_little_memory)
    assert np.abs(draw(SEEDS, 64) - expected).max() <= 1
    assert sizes == [7, 4, 2, 2, 2, 1]


ORDERS = {"unipc": 2, "ipndm": 2, "deis": 3}


@pytest.mark.slow
def test_samplers_without_noise_agree(draw):
    """That of each seed where the probability flow ends, and the better ones find it in fewer steps."""
    exact, seeds = draw(range(4), 4, sampler="dpmpp_3m", steps=50, clip=False), range(4)
    errors = {}
    for sampler, order in {**dict.fromkeys(("ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m")), **ORDERS}.items():
        options = {"order": order} if order else {}
        errors[sampler] = np.abs(draw(seeds, 4, sampler=sampler, steps=12, clip=False, **options) - exact).mean()
    first_order = errors.pop("ddim")
    assert errors.pop("euler") == first_order < 12
    assert max(errors.values()) < first_order, errors
    for noisy in ({"sampler": "euler_ancestral"}, {"sampler": "dpmpp_sde_2m"}, {"sampler": "heun", "churn": 20.0}):
        assert np.abs(draw(seeds, 4, steps=12, **noisy) - exact).mean() > 20, noisy


@pytest.mark.parametrize(("precision", "levels"), [("bf16", BF16_LEVELS), ("fp16", BF16_LEVELS / 4)])
def test_half_precision_differs_a_little(draw, precision, levels):
    fp32 = draw(SEEDS, 64)
    half = {batch_size: draw(SEEDS, batch_size, precision=precision) for batch_size in (1, 3, 64)}
    for images in half.values():
        assert np.abs(images - half[64]).mean() < levels
        assert 0 < np.abs(images - fp32).mean() < levels


def test_a_grid_is_found_once(bucket, sample):
    run, name = bucket / "runs/walk", "epoch-0003-ddim-4-grid-found-seeds-0-3.png"
    how = {"grid": "found", "steps": 4, "seeds": "0-3"}
    first = sample(**how, checkpoints="3")
    assert list(first) == [name]
    found = {path: path.read_bytes() for path in (run / "grids").iterdir()}
    (path,) = found
    numbers = json.loads(found[path])["numbers"]
    assert path.name == "found-4.json"
    assert numbers[0] == 49 and numbers == sorted({*numbers}, reverse=True) and len(numbers) == 4
    assert sample(**how, checkpoints="1,3")[name].tobytes() == first[name].tobytes()
    assert {path: path.read_bytes() for path in (run / "grids").iterdir()} == found
    more = ("sample", "--run", "walk", "--bucket", bucket, "--grid", "found", "--steps", 4, "--sampler", "unipc")
    succeeded(ddpm_here(*more, "--count", 4))
    assert "complete already" in succeeded(ddpm_here(*more, "--count", 4))
    assert verify_run(open_store(str(bucket)), "walk").problems == []
    # Images of one set all visit the same points.
    other = FoundGrid.from_json(found[path], "").model_copy(update={"numbers": (49, 30, 20, 10)})
    path.write_bytes(other.to_json())
    assert "4 made at" in succeeded(ddpm_here(*more, "--count", 4))


def test_each_step_shows_on_the_bar(bucket, draw, monkeypatch, capsys):
    monkeypatch.setattr("job.progress.LINE_SECONDS", 0.0)
    draw(range(7), 4, steps=5)
    run_sampling(plan_sampling(SampleRequest("walk", bucket=str(bucket), chosen={"steps": 5}, count=7).check()))
    shown = re.findall(r"(?m)^(\w+)[^:]*: (\d+) % · (\d)", capsys.readouterr().err)
    whole = [("test", str(10 * step), str(round(0.7 * step))) for step in range(1, 10)] + [("test", "100", "7")]
    assert [line for line in shown if line[0] == "test"] == whole
    assert [int(line[1]) for line in shown if line[0] == "sampling"] == [20, 40, 60, 80, 100]


def test_infinite_pixels_are_refused(draw, monkeypatch):
    load = Painter.load

    def load_damaged(painter, *what):
        load(painter, *what)
        painter.network.conv_out.bias[0] = float("nan")

    monkeypatch.setattr(Painter, "load", load_damaged)
    with pytest.raises(NotANumberError, match="sample from an earlier checkpoint"):
        draw(SEEDS, 4)


@pytest.mark.slow
def test_names_state_what_pictures_show(sample):
    """What differs does not overwrite each other; what is the run's own way anyway changes no name."""
    names = {
        "epoch-0003-ddim-4.png": {},
        "epoch-0003-ddim-4-weights-model.png": {"weights": "model"},
        "epoch-0003-ddim-4-eta-0.5.png": {"eta": 0.5},
        "epoch-0003-ddim-4-grid-linspace-clip-false.png": {"grid": "linspace", "clip": False},
        "epoch-0003-ddpm-4-variance-fixed_small.png": {"sampler": "ddpm", "steps": 4, "variance": "fixed_small"},
        "epoch-0003-ddim-5.png": {"steps": 5},
        "epoch-0003-ddim-4-seeds-0_3.png": {"seeds": "0, 3"},
        "epoch-0003-ddim-4-seeds-0-3.png": {"seeds": "0-3"},
        "epoch-0003-ddpm-4.png": {"sampler": "ddpm", "steps": 4},
        # The run's steps are meant for its own sampler.
        "epoch-0003-ddpm-50-seeds-0.png": {"sampler": "ddpm", "seeds": "0"},
        "epoch-0003-ddim-4-precision-bf16.png": {"precision": "bf16"},
        "epoch-0003-ddim-4-nearest.png": {"nearest": True},
        "denoising-epoch-0003-ddim-4.gif": {"gif": True},
        "denoising-epoch-0003-ddim-4-seeds-0-3.gif": {"gif": True, "seeds": "0-3"},
    }
    made = {name: list(sample(**options)) for name, options in names.items()}
    assert {name: pictures[-1:] for name, pictures in made.items()} == {name: [name] for name in names}
    assert {name: len(pictures) for name, pictures in made.items()} == {name: 1 + ("gif" in name) for name in names}
    usual = {"precision": "fp32", "nearest": False, "sampler": "ddim", "steps": 4, "checkpoints": "3"}
    assert list(sample(**usual)) == ["epoch-0003-ddim-4.png"]
    assert max(map(len, sample(seeds=",".join(map(str, range(1000, 1100)))))) < 60
    averaged, raw = (np.asarray(next(iter(sample(weights=weights).values())), np.int16) for weights in ("ema", "model"))
    assert np.abs(averaged - raw).mean() > 2


def test_several_checkpoints_give_a_comparison(bucket, sample):
    pictures = sample(checkpoints="1, 3", seeds="0-3")
    assert list(pictures) == [
        "epoch-0001-ddim-4-seeds-0-3.png",
        "epoch-0003-ddim-4-seeds-0-3.png",
        "comparison-1-3-ddim-4-seeds-0-3.png",
    ]
    assert list(sample(checkpoints="all", seeds="0-3"))[-1] == "comparison-all-ddim-4-seeds-0-3.png"
    compared, *alone = (np.asarray(pictures[name], np.int16) for name in sorted(pictures))
    rows = compared[-8 - 2 * 98 - 2 :, -8 - 4 * 98 :]
    for number, grid in enumerate(alone):
        assert np.array_equal(rows[2 + 98 * number :][:96, : 4 * 98 - 2], grid[-98:-2, 2 : 4 * 98])
    assert verify_run(open_store(str(bucket)), "walk").problems == []


@pytest.mark.parametrize("steps", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_gif_goes_from_noise_to_sample(sample, draw, steps):
    _, gif = sample(gif=True, steps=steps).values()
    assert (gif.n_frames, gif.info["loop"]) == (min(steps, 19) + 1, 0)
    frames = []
    for number in range(gif.n_frames):
        gif.seek(number)
        assert gif.info["duration"] == 200
        frames.append(np.asarray(gif.convert("RGB"), np.int16))
    # Twelve tiles of 96 pixels in two rows, between the title and where it is. A palette is all that stands between.
    first = draw(range(12), 12, steps=steps)[0].repeat(6, axis=0).repeat(6, axis=1)
    top = gif.height - 28 - 2 * 98
    tiles = [frame[top : top + 96, 2:98] for frame in frames]
    assert np.abs(tiles[-1] - first).mean() < 8 < 40 < np.abs(tiles[0] - first).mean()
    assert all((before != after).any() for before, after in pairwise(tiles)), "no step is shown twice"


def test_search_for_nearest_images_can_stop(bucket):
    class Cache:
        """Has more images than are compared at a time."""

        index = load_index(open_store(str(bucket)), "datasets/tiles-16")
        large = index.shards[0].model_copy(update={"images": 5000, "bytes": 1 << 30})
        index = index.model_copy(update={"shards": Shards.of([large])})

        def read(self, indices):
            return np.zeros((len(indices), 16, 16, 3), np.uint8)

    with pytest.raises(StoppedError, match="nearest"):
        grid_png(np.zeros((4, 16, 16, 3), np.uint8), range(4), training=Cache(), stop=stop_after(1))


KINDS = ["coast", "desert", "hills", "mountain", "skyline"]


OF_COAST = {"seeds": "3-8", "classes": "hills,coast", "eta": 0.5}


@pytest.mark.parametrize(
    ("words", "title", "above", "below"),
    [
        ({"seeds": "0-9"}, " · seeds 0-9", KINDS * 2, None),
        ({"seeds": "7,1,2"}, " · seeds 7, 1-2", None, ["hills", "desert", "hills"]),
        (OF_COAST, ", eta 0.5 · seeds 3-8", ["coast", "hills"] * 3, None),
        ({"seeds": "0", "classes": "coast"}, " · seed 0 · class coast", None, None),
    ],
)
def test_a_grid_says_what_it_shows(sample, monkeypatch, words, title, above, below):
    said, drawn = {}, figures.image_grid
    monkeypatch.setattr(figures, "image_grid", lambda *grid, **more: said.update(more) or drawn(*grid, **more))
    sample(**words)
    found = (said["title"], said["column_labels"], said["labels"])
    assert found == (f"walk · epoch 3 · ddim, 4 steps{title}", above, below)


@pytest.mark.slow
def test_retired_checkpoints_are_chosen_again(bucket, capsys, monkeypatch):
    """And those stay that a process reads: each epoch retires all but the newest checkpoint and that of the first."""
    monkeypatch.setenv("DDPM_LAUNCHED", "1")
    run = open_store(str(bucket)).sub("runs/walk")

    def train_on(epochs: int) -> list[int]:
        words = ("train", "--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs", epochs)
        succeeded(ddpm_here(*words))
        return [ref.images_seen for ref in list_checkpoints(run)]

    requests = ({"chosen": {"nearest": False}}, {"count": 3}, {"checkpoints": "3"})
    grid, images, gone = (plan_sampling(SampleRequest("walk", bucket=str(bucket), **options)) for options in requests)
    few = {"count": 12, "extractor": "mobilenet", "references": 24}
    scores = plan_evaluation(EvaluateRequest("walk", bucket=str(bucket), **few))
    assert grid.checkpoints == images.checkpoints == [CheckpointRef(1, 912)]
    with reading_chosen(run, lambda: choose(run, "latest", 299, 24)) as (kept, _):
        assert [*kept] == [CheckpointRef(1, 912)]
        assert train_on(4) == [312, 912, 1200]
        told = ddpm_here("runs", "delete", "walk", "--yes", "--bucket", bucket)
        assert "a process samples from" in refused(told, 76)
    assert train_on(5) == [312, 1512]
    for plan in (grid, images):
        run_sampling(plan)
        assert "epoch-0005-" in capsys.readouterr().out
    run_evaluation(scores)
    assert "walk, epoch-0005: 12 images" in capsys.readouterr().out
    with pytest.raises(Exception, match=r"no checkpoint of epoch 3: not kept or not reached \(there are: 1, 5\)"):
        run_sampling(gone)
    assert not list((bucket / "runs/walk").glob("reading/*"))
