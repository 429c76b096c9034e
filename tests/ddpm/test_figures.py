"""Pictures as the golden files beside the tests have them, and the numbers behind them.

`DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/ddpm/test_figures.py` writes the files anew.
"""

from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import figures
from ddpm.process import linear_schedule
from tests.ddpm.known import normal

GOLDEN, REWRITE = Path(__file__).with_name("golden"), "DDPM_TEST_REWRITE_GOLDEN"
SAID = "landscape · epoch 30 · ddim, 100 steps · seeds 0-39 · class coast"


def waves(count: int, height: int, width: int, channels: int = 3, phase: float = 0.0) -> np.ndarray:
    """Smooth images, none of which is like another or like itself mirrored."""
    number, y, x, colour = np.ogrid[:count, :height, :width, :channels]
    angle = (y / height + 1) * (x / width + 2) * (1.3 + colour) + 1.7 * number + phase
    return (127.5 + 127.5 * np.sin(angle)).round().astype(np.uint8)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loss_rows(count: int = 200, quartiles: int = 4, floor: float = 0.0) -> list[dict[str, float]]:
    losses = floor + 10.0 ** -np.linspace(0, 2, count) * (1 + 0.1 * np.cos(np.arange(count)))
    return [
        {"images_seen": 640 * (i + 1), "loss": loss, "val_loss": loss * 1.3}
        | {f"loss_q{q}": loss * 0.6**q for q in range(quartiles)}
        for i, loss in enumerate(losses.tolist())
    ]


def frames_of(gif: bytes) -> Image.Image:
    """Its first, middle and last frame, one below the other."""
    shown = Image.open(io.BytesIO(gif))
    assert (shown.format, shown.info["loop"], shown.n_frames) == ("GIF", 0, 20)  # type: ignore[attr-defined]
    frames = []
    for number in (0, 10, 19):
        shown.seek(number)
        assert shown.info["duration"] == 200
        frames.append(np.asarray(shown.convert("RGB")))
    return Image.fromarray(np.vstack(frames))


def denoising(**options: object) -> Image.Image:
    noise = normal(0, (3, 3, 32, 32))
    x = torch.from_numpy(waves(3, 32, 32)).permute(0, 3, 1, 2).float() / 127.5 - 1
    steps = [figures.to_pixels(x * (i / 19) + noise * (1 - i / 19)) for i in range(20)]
    return frames_of(figures.denoising_gif(steps, **options))


SCHEDULE = {r"$\beta_t$": linear_schedule().betas, r"$\bar\alpha_t$": linear_schedule().alphas_cumprod}
NOISED = figures.noising_figure(waves(7, 32, 32), normal(0, (7, 3, 32, 32)), [f"t = {81 * i}" for i in range(7)])
CLASSES = ([1, 0, 1, 1, 0], ["coast", "hills", "none of it"])
CAPTIONS = {"labels": ["café", "Σ β", "a name far too long for a tile of this width", ""]}
CAPTIONS |= {"row_labels": ["one", "two"], "column_labels": ["a", "b"]}
OF_PAIRS = {"labels": list("abc"), "column_labels": ["x", "y"], "title": "run"}
EPOCHS = [(f"epoch {number}", waves(13, 16, 16, phase=number)) for number in (30, 490)]
SCORES = [
    {"images_seen": 3200 * epoch, "fid": 90 / epoch, "kid": 0.2 / epoch, "kid_std": 0.03, "real fid": 4.0}
    for epoch in range(1, 6)
]
PICTURES: dict[str, Callable[[], Image.Image | bytes]] = {
    "grid": lambda: figures.image_grid(waves(7, 5, 4), columns=3, padding=2, scale=3, title=SAID),
    "grid-grey": lambda: figures.image_grid(waves(2, 4, 4, 1), columns=6),
    "grid-captions": lambda: figures.image_grid(waves(4, 64, 64), 2, **CAPTIONS),
    "pairs": lambda: figures.pairs_grid(waves(5, 32, 32), waves(5, 32, 32, phase=0.5), columns=2),
    "pairs-captions": lambda: figures.pairs_grid(waves(3, 32, 32), waves(3, 32, 32), columns=2, **OF_PAIRS),
    "comparison": lambda: figures.comparison(EPOCHS, [f"seed {seed}" for seed in range(13)], title="a run"),
    "comparison-reduced": lambda: figures.comparison([("epoch 1", waves(1, 512, 512))], [""]),
    "noising-original": lambda: NOISED.original,
    "noising-noised": lambda: NOISED.noised,
    "noising-combined": lambda: NOISED.combined,
    "sheet-classes": lambda: figures.contact_sheet(waves(5, 36, 36), *CLASSES, columns=2),
    "sheet-reduced": lambda: figures.contact_sheet(waves(4, 384, 256), title="four"),
    "sheet-many": lambda: figures.contact_sheet(waves(37, 16, 16)),
    "gif": lambda: denoising(columns=2, labels=[f"t = {i}" for i in range(20)], title="a run"),
    # Equal frames stay frames.
    "gif-still": lambda: frames_of(figures.denoising_gif([waves(2, 28, 28, 1)] * 20, scale=3)),
    "schedule": lambda: figures.schedule_figure(SCHEDULE, "linear"),
    "schedule-log": lambda: figures.schedule_figure(SCHEDULE, "linear", log=True),
    "loss": lambda: figures.loss_figure(loss_rows(), epoch_images=3200, title="a run"),
    "loss-linear": lambda: figures.loss_figure(loss_rows(quartiles=0, floor=1)),
    "loss-none": lambda: figures.loss_figure([], epoch_images=299),
    "scores": lambda: figures.scores_figure(SCORES, 3200, title="a run"),
}


def fields(picture: Image.Image) -> np.ndarray:
    """Means of 4×4 pixels: the edges of letters differ among versions of the font's library."""
    return np.asarray(picture.reduce(4)).astype(int)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_the_golden_ones(name: str) -> None:
    made, path = PICTURES[name](), GOLDEN / f"{name}.png"
    picture = Image.open(io.BytesIO(made if isinstance(made, bytes) else figures.png(made))).convert("RGB")
    if os.environ.get(REWRITE):
        picture.save(path, optimize=True)
    kept = Image.open(path)
    said = f"{REWRITE}=1 writes {path} anew, if that is meant"
    assert picture.size == kept.size, said
    assert np.abs(fields(picture) - fields(kept)).max() <= 20, said
    assert {other.stem for other in GOLDEN.iterdir()} == PICTURES.keys()


def test_repeated_rows_count_once() -> None:
    rows = loss_rows(60)
    stale = [row | {"loss": 99.0} for row in rows[20:40]]
    broken = {"images_seen": 640 * 20 + 1, "loss": float("nan")}
    assert figures.loss_figure([*rows[:20], *stale, broken, *rows[20:]]) == figures.loss_figure(rows)


def test_pages_are_as_wide_as_they_may_be() -> None:
    for size, tile, across in ((28, 84, 11), (64, 128, 8), (512, 128, 8)):
        grid = figures.comparison([("1,000,000 images", random_images(50, size, size, 1))], [""] * 50)
        assert tile * across < grid.width <= 1200


IMAGES = random_images(4, 8, 8, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: figures.image_grid(IMAGES, 2, labels=["a", "b", "c"]), "3 captions for 4 places"),
        (lambda: figures.image_grid(IMAGES[..., :2], 2), "expected uint8"),
        (lambda: figures.pairs_grid(IMAGES, IMAGES[:3]), "do not pair up"),
        (lambda: figures.nearest_pairs(IMAGES, IMAGES[:, :4]), "training images are"),
        (lambda: figures.comparison([], []), "nothing to compare"),
        (lambda: figures.noising_figure(IMAGES, torch.zeros(4, 3, 8, 8), ["t"] * 3), "3 labels"),
        (lambda: figures.contact_sheet(IMAGES, [0, 1]), "2 labels for 4 images"),
        (lambda: figures.denoising_gif([IMAGES] * 2, labels=["t = 1"]), "2 frames"),
    ],
)
def test_arguments_that_do_not_match_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_to_pixels_keeps_every_level():
    for bits, most in ((8, 255), (16, 65535)):
        levels = torch.arange(most + 1).reshape(1, 1, 16, -1)
        assert (figures.to_pixels(levels.float() / (most / 2) - 1, bits).ravel() == np.arange(most + 1)).all()
    x = torch.tensor([-3.0, -1.0, 0.9 / 127.5 - 1, 1.1 / 127.5 - 1, float("nan"), 7.0]).reshape(1, 2, 1, 3)
    pixel = figures.to_pixels(x)
    assert pixel.shape == (1, 1, 3, 2) and pixel.flags["C_CONTIGUOUS"]
    assert pixel[0, 0].T.ravel().tolist() == [0, 0, 1, 1, 128, 255]
    assert figures.to_pixels(torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)).item() == 191


def test_colours_are_those_of_lab():
    """At sRGB's corners, as tables of colours have them."""
    known = {(255, 0, 0): (53.24, 80.09, 67.20), (0, 255, 0): (87.73, -86.18, 83.18), (0, 0, 0): (0, 0, 0)}
    known |= {(0, 0, 255): (32.30, 79.19, -107.86), (255, 255, 255): (100, 0, 0)}
    for rgb, lab in known.items():
        fields = figures.colours_of(np.full((1, 16, 16, 3), rgb, dtype=np.uint8))[0]
        coarse, fine = fields[:48].reshape(3, 16) * 4, fields[48:].reshape(3, 64) * 16
        assert np.abs(coarse.T - lab).max() < 0.02 and np.abs(fine.T - lab).max() < 0.02, rgb


def test_nearest_pairs_equal_brute_force():
    training, samples = random_images(50, 6, 5, 3), random_images(9, 6, 5, 3, seed=1)
    squared = ((figures.colours_of(samples)[:, None] - figures.colours_of(training)[None]) ** 2).sum(axis=2)
    in_chunks = [lambda n=n: (training[at : at + n] for at in range(0, 50, n)) for n in (1, 7, 50)]
    for images in (training, *in_chunks):
        indices, distances = figures.nearest_pairs(samples, images)
        assert indices.tolist() == squared.argmin(axis=1).tolist()
        assert distances.tolist() == pytest.approx(np.sqrt(squared.min(axis=1)).tolist(), rel=1e-12)


def test_first_copy_is_the_nearest():
    bright = np.full((1, 64, 64, 3), 254, dtype=np.uint8)
    alike = bright.copy()
    alike[0, 63, 63, 2] = 255
    indices, distances = figures.nearest_pairs(bright, lambda: [alike, np.concatenate([bright, bright]), bright])
    assert (indices.tolist(), distances.tolist()) == ([1], [0.0])
    assert 0 < figures.nearest_pairs(bright, alike)[1][0] < 0.01


def test_search_takes_little_memory(tmp_path):
    training = np.memmap(tmp_path / "train", dtype=np.uint8, mode="w+", shape=(6000, 64, 64, 3))
    training[4321] = 200
    tracemalloc.start()
    indices, _ = figures.nearest_pairs(np.full((2, 64, 64, 3), 199, dtype=np.uint8), training)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20, "in one piece it would be 590 MB"
    tracemalloc.stop()
    assert indices.tolist() == [4321, 4321]


def test_twenty_steps_are_shown():
    for evaluations in (1, 2, 19, 20, 21, 25, 39, 50, 100, 999, 1000):
        shown = figures.shown_evaluations(evaluations)
        strides = [after - before for before, after in pairwise(shown)] or [1]
        assert (len(shown), shown[0] if evaluations > 1 else 0, shown[-1]) == (min(20, evaluations), 0, evaluations - 1)
        assert min(strides) > 0 and max(strides) - min(strides) <= 1
        assert figures.shown_evaluations(evaluations, frames=1) == [evaluations - 1]
