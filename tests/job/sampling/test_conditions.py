"""Samples of runs with conditions: whose condition an image has, cascades, and what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import job
from job.data.reading.cache import ImageCache
from job.data.shards import load_index
from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm_here, ran, refuses, settings, succeeded
from tests.job.conftest import MadeOnce
from tests.job.some_images import deep_png, folder_of


@pytest.fixture(scope="module")
def conditioned(tiles: Path, made_once: MadeOnce) -> Path:
    """A bucket with a run `base` without conditions, `sr4` that enlarges, and `hole` that fills in."""
    sets = settings(model__num_classes="0", sample__images="6", train__learning_rate="0.01", train__warmup_images="0")

    def fill(folder: Path) -> None:
        shutil.copytree(tiles, folder)
        for run, derive in (("base", []), ("sr4", ["downscale:4"]), ("hole", ["mask:brush"])):
            more = [word for each in derive for word in ("--set", f"condition.derive={each}")]
            more += ["--set", "model.label_dropout=0.2"] if run == "hole" else []
            words = ("--dataset", "tiles", "--run", run, "--bucket", folder, "--epochs", 1)
            succeeded(ddpm_here("train", *words, *sets, *more))

    return made_once("conditioned", fill)


@pytest.fixture
def bucket(conditioned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(conditioned, tmp_path / "bucket")


def pictures(folder: Path, count: int = 3, side: int = 4) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def saved(bucket: Path, *words: object) -> dict[str, np.ndarray]:
    """Samples a set, and returns its images by name."""
    index = ran("sample", "--bucket", bucket, *words, "--save", "png").split()[0]
    return {path.name: np.asarray(Image.open(path)) for path in Path(index).parent.rglob("piece-*/*.png")}


def tile(grid: Image.Image, row: int, column: int, side: int = 96, above: int = 0) -> np.ndarray:
    """One tile of a grid, at the size of its image."""
    x, y = 2 + column * (side + 2), above + 2 + row * (side + 2)
    return np.asarray(grid.crop((x, y, x + side, y + side)))[3::6, 3::6]


def test_a_grid_shows_condition_sample_and_truth(bucket: Path) -> None:
    """Those of the dataset by seed; a class says nothing here. The tiles are those of the training's last grid, too."""
    store = open_store(str(bucket))
    truth = ImageCache(store, load_index(store, "datasets/tiles-16")).read(np.arange(6))
    for run in ("sr4", "hole"):
        uri = ran("sample", "--run", run, "--seeds", "0-5", "--bucket", bucket).split()[0]
        for data in (Path(uri).read_bytes(), next((bucket / f"runs/{run}/samples").glob("*-4.png")).read_bytes()):
            grid = Image.open(io.BytesIO(data))
            above = grid.height - 2 * 98 - 2
            for seed in range(6):
                condition, _, true = (tile(grid, seed // 3, 3 * (seed % 3) + part, above=above) for part in range(3))
                assert np.array_equal(true, truth[seed])
                if run == "hole":
                    hidden = (condition == 128).all(axis=2)
                    assert 0.05 < hidden.mean() < 0.8 and np.array_equal(condition[~hidden], true[~hidden])
                else:
                    small = Image.fromarray(true).resize((4, 4), Image.Resampling.BICUBIC)
                    large = np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))
                    assert np.abs(condition.astype(int) - large).max() <= 4


def test_pictures_are_conditions_in_turn(bucket: Path, tmp_path: Path) -> None:
    """From the command line and Python alike; in name and set lies what decides the images."""
    small = pictures(tmp_path / "small")
    made = saved(bucket, "--run", "sr4", "--condition", small)
    assert [*sorted(made)] == [f"{seed:09d}.png" for seed in range(3)]
    files = [Image.open(small / f"{number}.png") for number in range(3)]
    model = job.load(f"{bucket}/runs/sr4")
    for given in (files, [small / f"{number}.png" for number in range(3)]):
        found = [np.asarray(each).astype(int) for each in model.sample(3, condition=given)]
        assert all(np.abs(one - made[f"{seed:09d}.png"]).max() <= 1 for seed, one in enumerate(found))
    # Another condition, another image of the same seed.
    (other,) = model.sample(1, condition=files[1])
    assert np.abs(np.asarray(other).astype(int) - made["000000000.png"]).max() > 1
    again = saved(bucket, "--run", "sr4", "--condition", pictures(tmp_path / "more", side=5))
    assert len(again) == 3 and len([*(bucket / "runs/sr4/samples").glob("*/index.json")]) == 2
    ran("runs", "verify", "sr4", "--bucket", bucket)
    for given, said in ((None, "needs condition="), (files[0], "takes no condition")):
        with pytest.raises(ValueError, match=said):
            job.load(f"{bucket}/runs/{'sr4' if given is None else 'base'}").sample(condition=given)


def test_a_cascade_is_two_commands(bucket: Path, tmp_path: Path) -> None:
    """The images of the first run as files are the conditions of the second, by seed: bit by bit."""
    at_once = saved(bucket, "--run", "base", "--then", "sr4", "--count", 5)
    first = saved(bucket, "--run", "base", "--count", 5)
    (tmp_path / "first").mkdir()
    for name, pixels in first.items():
        Image.fromarray(pixels).save(tmp_path / "first" / name)
    second = saved(bucket, "--run", "sr4", "--condition", tmp_path / "first")
    assert at_once.keys() == second.keys() and len(second) == 5
    for name, pixels in second.items():
        # A file is made smaller by Pillow, in whole levels.
        assert np.abs(at_once[name].astype(int) - pixels).max() <= 8
    # Other steps of the first run make other images: in another set, and in a picture of another name.
    fewer = saved(bucket, "--run", "base", "--then", "sr4", "--count", 5, "--steps", 2)
    assert any((fewer[name] != pixels).any() for name, pixels in at_once.items())
    # Without --count the pictures of the first run are the number; its options are in the name.
    assert len(saved(bucket, "--run", "sr4", "--condition", pictures(tmp_path / "two", 2), "--then", "sr4")) == 2
    words = ("sample", "--run", "base", "--then", "sr4@1", "--seeds", "3", "--gif", "--bucket", bucket)
    uris = [line.split()[0] for steps in (3, 4) for line in ran(*words, "--steps", steps).splitlines()]
    assert len({*uris}) == 4 and all("runs/sr4/samples/" in uri and "-of-base-epoch-0001-" in uri for uri in uris)


def test_guidance_moves_away_from_no_condition(bucket: Path, tmp_path: Path) -> None:
    """A mask of a person takes the place of the brush."""
    picture = pictures(tmp_path / "one", 1, side=16)
    sampled = [
        saved(bucket, "--run", "hole", "--condition", picture, "--count", 2, *words)["000000000.png"].astype(int)
        for words in ((), ("--guidance", 3), ("--guidance", 3, "--guidance-by", "condition"), ("--mask", "half"))
    ]
    plain, guided, by_condition, half = sampled
    assert np.abs(plain - guided).max() > 1 and np.abs(plain - half).max() > 1
    assert np.array_equal(guided, by_condition)


def test_sixteen_bits_with_pairs_and_numbers_from_files_to_scores(tmp_path: Path) -> None:
    """A sample has the values of the source, and depends on condition and vector; held-out pairs judge it."""
    low, high, names = 300, 4095, [f"{number:02d}.png" for number in range(40)]
    levels = np.random.default_rng(0).integers(low, high + 1, (40, 16, 16))
    rows = ["file,a,b", *(f"{name},{number},{number % 7}" for number, name in enumerate(names))]
    files = [(name, deep_png(image)) for name, image in zip(names, levels, strict=True)]
    folder_of(tmp_path / "in", [*files, ("table.csv", "\n".join(rows).encode())])
    small = (low + high - levels)[:, ::2, ::2]
    others = folder_of(tmp_path / "other", [(name, deep_png(small[n])) for n, name in enumerate(names)])
    fields = ("--condition", others, "--vector", "table.csv:a,b", "--range", f"{low},{high}", "--hold-out", "20%")
    ran("data", "pack", tmp_path / "in", "x", "--size", 16, *fields, "--bucket", tmp_path)
    about = ("--run", "deep", "--bucket", tmp_path)
    learning = {"train__learning_rate": "0.01", "train__warmup_images": "0", "train__batch_size": "8"}
    ran("train", "--dataset", "x", *about, "--epochs", 4, *settings(model__num_classes="0", **learning))

    # The files of held-out images give what these give without a word.
    store = open_store(str(tmp_path))
    held_out = ImageCache(store, load_index(store, "datasets/x-held-out-16")).numbers(np.arange(4)).astype(int)
    paired = [(f"{place}.png", deep_png(small[number])) for place, (number, _) in enumerate(held_out)]
    folder_of(tmp_path / "same", paired)
    folder_of(tmp_path / "other_one", files[:1])
    np.savetxt(tmp_path / "rows.csv", held_out, "%d", ",", header="a,b", comments="")
    same, vector = ("--condition", tmp_path / "same"), ("--vector", "1,2")
    drawn = []
    for told in (
        (),
        (*same, "--vectors", tmp_path / "rows.csv"),
        (*same, *vector),
        ("--condition", tmp_path / "other_one", *vector),
    ):
        index = Path(ran("sample", *about, *told, "--count", 4, "--save", "png").split()[0])
        opened = [Image.open(path) for path in sorted(index.parent.rglob("piece-*/*.png"))]
        assert [image.mode for image in opened] == ["I;16"] * 4
        drawn.append(np.stack([np.asarray(image) for image in opened]).astype(int))
    assert np.array_equal(drawn[0], drawn[1])
    assert all(np.abs(drawn[2] - other).max() > 4 for other in (drawn[1], drawn[3]))
    every = np.stack(drawn)
    assert low <= every.min() and 255 < every.max() <= high and len(np.unique(every)) > 256
    model = job.load(tmp_path / "runs/deep")
    with pytest.raises(ValueError, match="more than 8 bits"):
        model.sample(condition=tmp_path / "other_one/00.png", vector=(1, 2), as_tensor=True)
    other = Image.fromarray(np.random.default_rng(1).choice([0, 255], (8, 8)).astype(np.uint8))
    alike = (other, other.resize((16, 16), Image.Resampling.LANCZOS))
    drawn = [model.sample(condition=each, vector=(1, 2), seed=3, as_tensor=True) for each in alike]
    assert drawn[0].equal(drawn[1]), "the filter of packing resizes them"

    said = ran("evaluate", *about, "--metrics", "paired", "--count", 12)
    (psnr,) = [line.split()[1:] for line in said.splitlines() if line.startswith("psnr")]
    assert len(psnr) == 2 and all(0 < float(each) < 30 for each in psnr)


def test_conditions_that_cannot_be_are_refused(bucket: Path, tmp_path: Path) -> None:
    small, at = pictures(tmp_path / "small", 1), ("--bucket", str(bucket))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sr4, base, hole = (("sample", "--run", run) for run in ("sr4", "base", "hole"))
    rows = [
        ((*base, "--condition", small), Exit.BAD_REQUEST, "run 'base' has no condition of this kind"),
        ((*sr4, "--vector", "1"), Exit.BAD_REQUEST, "--vector: run 'sr4' has no condition of this kind"),
        ((*sr4, "--vector", "1", "--vectors", "t.csv"), Exit.BAD_REQUEST, "--vectors and --vector exclude each other"),
        ((*sr4, "--condition", tmp_path / "none"), Exit.MISSING_INPUT, "--condition"),
        ((*sr4, "--condition", tmp_path / "empty"), Exit.MISSING_INPUT, "empty folder"),
        ((*sr4, "--condition", tmp_path / "bad.png"), Exit.BAD_DATA, "bad.png is damaged at its beginning"),
        ((*sr4, "--condition", small, "--mask", "half"), Exit.BAD_REQUEST, "has not learnt masks"),
        ((*sr4, "--save", "png"), Exit.BAD_REQUEST, "--save works only with --count"),
        ((*base, "--then", "base"), Exit.BAD_REQUEST, "--then base: it has no condition image of 3 channels"),
        ((*sr4, "--autoguidance", "hole@1", "--guidance", "2"), Exit.BAD_REQUEST, "differs in condition.derive"),
        ((*sr4, "--vector", "1:2:3"), Exit.BAD_REQUEST, "--vector"),
        ((*base, "--mode", "interpolate", "--then", "sr4"), Exit.BAD_REQUEST, "--mode makes no condition images"),
        ((*base, "--vector", "1:2", "--then", "sr4"), Exit.BAD_REQUEST, "--vector of a row makes no condition images"),
        ((*base, "--then", "nobody"), Exit.MISSING_INPUT, "no run 'nobody'"),
        ((*sr4, "--guidance", "2"), Exit.BAD_CONFIG, "sample.guidance=2 needs a run that began with"),
        ((*hole, "--guidance", 2, "--guidance-by", "class"), Exit.BAD_CONFIG, "the network has no class"),
        ((*sr4, "--condition-noise", "0.2"), Exit.BAD_CONFIG, "exceeds condition.noise=0"),
    ]
    refuses([([*map(str, words)], code, said) for words, code, said in rows], *at)
