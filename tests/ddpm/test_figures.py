from __future__ import annotations

import io
import tracemalloc
import zipfile
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import figures

INK = (64, 64, 64)


@pytest.fixture(scope="module")
def tiles():
    """Twelve real landscapes, uint8 [12, 64, 64, 3]."""
    with zipfile.ZipFile(str(resources.files("job") / "datasets" / "landscape-sample.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::24][:12]
        return np.stack([np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def enlarged(image: np.ndarray) -> np.ndarray:
    return image.repeat(3, axis=0).repeat(3, axis=1)


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.array(picture)


def opened(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.array(image.convert("RGB")).astype(int)


def near(image: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return (np.abs(image - np.array(color)) < tolerance).all(axis=-1)


def test_to_uint8_keeps_every_level():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (figures.to_uint8(levels.float() / 127.5 - 1).ravel() == np.arange(256)).all()
    x = torch.tensor([-3.0, -1.0, 0.9 / 127.5 - 1, 1.1 / 127.5 - 1, float("nan"), 7.0]).reshape(1, 2, 1, 3)
    pixel = figures.to_uint8(x)
    assert pixel.shape == (1, 1, 3, 2) and pixel.flags["C_CONTIGUOUS"]
    assert pixel[0, 0].T.ravel().tolist() == [0, 0, 1, 1, 128, 255]
    assert figures.to_uint8(torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)).item() == 191


def test_grids_have_tiles_in_their_places():
    images = random_images(7, 5, 4, 3)
    picture = figures.image_grid(images, columns=3, padding=2, scale=3)
    grid = pixels(picture)
    assert grid.shape == (3 * (5 * 3 + 2) + 2, 3 * (4 * 3 + 2) + 2, 3)
    remaining = np.ones(grid.shape[:2], dtype=bool)
    for index, image in enumerate(images):
        y, x = 2 + index // 3 * 17, 2 + index % 3 * 14
        assert (grid[y : y + 15, x : x + 12] == enlarged(image)).all()
        remaining[y : y + 15, x : x + 12] = False
    assert (grid[remaining] == 255).all()
    assert (opened(figures.png(picture)) == grid).all()
    # Grey images, and fewer of them than columns.
    images = random_images(2, 4, 4, 1)
    grid = pixels(figures.image_grid(images, columns=6))
    assert grid.shape == (8, 14, 3) and (grid[2:6, 8:12] == images[1]).all()


def test_captions_lie_beside_the_tiles():
    images = np.full((4, 64, 64, 3), 255, dtype=np.uint8)
    bare = figures.image_grid(images, 2)
    labels = ["café", "Σ β", "a name far too long for a tile of this width", ""]
    captioned = figures.image_grid(images, 2, labels=labels, row_labels=["one", "two"], column_labels=["a", "b"])
    left, top = captioned.width - bare.width, 24
    line = (captioned.height - bare.height - top) // 2
    ink = (pixels(captioned) < 200).all(axis=-1)
    for row, y in enumerate((top + 2, top + 68 + line)):
        assert ink[y : y + 64, :left].any() and not ink[y : y + 64, left:].any(), "beside the tiles, not on them"
        under = ink[y + 64 : y + 64 + line, left:]
        assert [under[:, x : x + 64].any() for x in (2, 68)] == [bool(label) for label in labels[2 * row :][:2]]
        assert not under[:, [0, 1, 66, 67]].any(), "long names are cut"
    assert ink[:top, left + 2 : left + 66].any() and ink[:top, left + 68 :].any()
    with pytest.raises(ValueError, match="3 captions for 4 places"):
        figures.image_grid(images, 2, labels=["a", "b", "c"])


def test_letters_beyond_ascii_are_drawn():
    images = np.full((1, 96, 96, 3), 255, dtype=np.uint8)
    drawn = {letter: pixels(figures.image_grid(images, 1, labels=[letter])).tobytes() for letter in "eéβжᾱ\uffff"}
    assert len(set(drawn.values())) == len(drawn), "a missing letter would look like U+FFFF"


def test_colours_are_those_of_lab():
    """Of sRGB's corners, as tables of colours have them."""
    known = {
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
    }
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


def test_pairs_lie_side_by_side():
    samples, nearest = random_images(5, 32, 32, 3), random_images(5, 32, 32, 3, seed=1)
    picture = pixels(figures.pairs_grid(samples, nearest, columns=2))
    link, gap, margin = 12, 24, 20
    for index in range(5):
        x, y = margin + index % 2 * (2 * 96 + link + gap), margin + index // 2 * (96 + 12)
        assert (picture[y : y + 96, x : x + 96] == enlarged(samples[index])).all()
        assert (picture[y : y + 96, x + 96 + link :][:, :96] == enlarged(nearest[index])).all()
        between = picture[y : y + 96, x + 96 : x + 96 + link]
        lined = (between != 255).any(axis=(1, 2))
        assert lined.sum() == 2 and lined[47:49].all() and (between[lined] == 168).all()
    said = {"labels": list("abcde"), "column_labels": ["left", "right"], "title": "a run · epoch 3"}
    named = pixels(figures.pairs_grid(samples, nearest, columns=2, **said))
    assert near(named[:30], INK).any() and named.shape[0] > picture.shape[0] + 4 * 26
    with pytest.raises(ValueError, match="do not pair up"):
        figures.pairs_grid(samples, nearest[:4])


def test_checkpoints_are_compared_row_by_row():
    grids = [(f"epoch {number}", random_images(13, 32, 32, 3, seed=number)) for number in (30, 490)]
    picture = pixels(figures.comparison(grids, [f"seed {seed}" for seed in range(13)]))
    # Two blocks of seven and six seeds, each under its heads.
    block, margin, head = 2 * 98 + 2 + 26, 8, 26
    left = picture.shape[1] - margin - 2 - 7 * 98
    for seed in range(13):
        y, x = margin + seed // 7 * block, left + 2 + seed % 7 * 98
        assert (picture[y : y + head, x : x + 96] < 128).any(), "the seed"
        for row, (_, images) in enumerate(grids):
            top = y + head + 2 + row * 98
            assert (picture[top : top + 96, x : x + 96] == enlarged(images[seed])).all()
            assert (picture[top : top + 96, margin:left] < 128).any(), "the checkpoint"
    assert (picture[margin + block + head + 2 :, left + 2 + 6 * 98 :] == 255).all()
    for size, tile, across in ((28, 84, 11), (64, 128, 8), (512, 128, 8)):
        grid = figures.comparison([("1,000,000 images", random_images(50, size, size, 1))], [""] * 50)
        assert tile * across < grid.width <= 1200
    large = random_images(1, 512, 512, 3)
    reduced = pixels(figures.comparison([("epoch 1", large)], [""]))[-10 - 128 : -10, -10 - 128 : -10]
    assert np.abs(reduced - large[0].reshape(128, 4, 128, 4, 3).mean(axis=(1, 3))).max() <= 0.5
    with pytest.raises(ValueError, match="nothing to compare"):
        figures.comparison([], [])


def test_noising_figure_has_three_pictures(tiles):
    labels = [f"t = {t}" for t in (962, 237, 38, 39, 988, 559, 299, 226, 985, 791, 859, 485)]
    noised = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    figure = figures.noising_figure(tiles, noised, labels)
    assert figure.original.size == figure.noised.size == (398, 134)
    assert (pixels(figure.original)[2:66, 68:132] == tiles[1]).all()
    assert (pixels(figure.noised)[68:132, 332:396] == figures.to_uint8(noised)[11]).all()

    combined = pixels(figure.combined)
    half, y = combined.shape[1] // 2, 20 + 48 + 4 + 128
    under = combined[y : y + 36] < 128
    assert not under[:, :half].any(), "originals have no t"
    assert all(under[:, x : x + 128].any() for x in range(combined.shape[1] - 812, combined.shape[1] - 20, 132))
    with pytest.raises(ValueError, match="11 labels"):
        figures.noising_figure(tiles, noised, labels[:11])


def test_contact_sheet_groups_classes():
    images = np.stack([np.full((36, 36, 3), shade, dtype=np.uint8) for shade in (10, 60, 110, 160, 210)])
    sheet = pixels(figures.contact_sheet(images, [1, 0, 1, 1, 0], ["coast", "hills"], columns=2))
    right = sheet[:, -20 - 2 * 76 - 4 :]
    shades = [[int(right[20 + 4 + 36 + 76 * row, 4 + 36 + 76 * column, 0]) for column in (0, 1)] for row in range(3)]
    assert shades == [[60, 210], [10, 110], [160, 255]]
    names = (sheet[:, : -20 - 2 * 76 - 4] < 128).all(axis=-1)
    rows = [names[20 + 76 * row : 20 + 76 * (row + 1)].any() for row in range(3)]
    assert rows == [True, True, False], "a name stands at the first row of its class"
    with_a_third = figures.contact_sheet(images, [1, 0, 1, 1, 0], ["coast", "hills", "none of it"], columns=2)
    assert with_a_third.height == len(sheet) + 76, "a class without images has a row"
    large = random_images(4, 384, 256, 3)
    assert figures.contact_sheet(large, title="four").size == (40 + 4 * (86 + 4) + 4, 40 + 128 + 2 * 4 + 28)
    assert figures.contact_sheet(random_images(37, 32, 32, 3)).size == (40 + 10 * 68 + 4, 40 + 4 * 68 + 4)
    with pytest.raises(ValueError, match="2 labels for 5 images"):
        figures.contact_sheet(images, [0, 1])


def test_twenty_steps_are_shown():
    for evaluations in (1, 2, 19, 20, 21, 25, 39, 50, 100, 999, 1000):
        shown = figures.shown_evaluations(evaluations)
        strides = [after - before for before, after in pairwise(shown)] or [1]
        assert (len(shown), shown[0] if evaluations > 1 else 0, shown[-1]) == (min(20, evaluations), 0, evaluations - 1)
        assert min(strides) > 0 and max(strides) - min(strides) <= 1
        assert figures.shown_evaluations(evaluations, frames=1) == [evaluations - 1]


def gif_frames(data: bytes) -> list[np.ndarray]:
    gif = Image.open(io.BytesIO(data))
    assert gif.format == "GIF" and gif.info["loop"] == 0
    frames = []
    for index in range(gif.n_frames):  # type: ignore[attr-defined]
        gif.seek(index)
        assert gif.info["duration"] == 200
        frames.append(np.array(gif.convert("RGB")).astype(int))
    return frames


def test_gif_has_every_frame(tiles):
    x = torch.from_numpy(tiles[:, ::2, ::2].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    steps = [figures.to_uint8(x * (i / 19) + noise * (1 - i / 19)) for i in range(20)]
    shown = gif_frames(figures.denoising_gif(steps, labels=[f"t = {i}" for i in range(20)], title="a run"))
    assert len(shown) == 20
    bars = []
    for images, frame in zip(steps, shown, strict=True):
        truth = pixels(figures.image_grid(images, 6, scale=3)).astype(int)
        # Below it are a bar and a label.
        grid, below = np.split(frame, [len(frame) - 28])
        assert near(grid[: -len(truth)], INK).any(), "the title"
        grid = grid[-len(truth) :]
        assert np.abs(grid - truth).mean() < (4 if images is steps[-1] else 12)
        assert (grid[:, [0, 1, 98, 99]] == 255).all(), "gutters stay white"
        bars.append(int((below[1] == 168).all(axis=-1).sum()))
    assert bars == sorted(set(bars)) and bars[-1] == 586
    assert len({frame[-16:, :80].tobytes() for frame in shown}) == 20, "the labels"
    with pytest.raises(ValueError, match="20 frames"):
        figures.denoising_gif(steps, labels=["t = 1"])


def test_equal_frames_stay_frames():
    images = np.full((2, 28, 28, 1), 100, dtype=np.uint8)
    images[1] = np.arange(28, dtype=np.uint8)[:, None] * 9
    shown = gif_frames(figures.denoising_gif([images] * 20, scale=3))
    assert len(shown) == 20
    assert (shown[7][2:86, 2:86] == 100).all(), "no dithering"
    assert np.abs(shown[19][2:86, 88:172] - enlarged(images[1].astype(int))).max() <= 3


def test_schedule_is_drawn_by_its_numbers():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    curves = {r"$\beta_t$": betas, r"$\bar\alpha_t$": alphas_cumprod}
    plot = opened(figures.schedule_figure(curves, "linear"))
    assert plot.shape == (480, 640, 3)
    red, blue = near(plot, (192, 57, 43)), near(plot, (31, 95, 168))
    # The axes end where β ends on the right and ᾱ begins on the left.
    left, right, bottom, top = 94.0, 573.0, np.nonzero(red[:, 100])[0].mean() + 3, np.nonzero(blue[:, 100])[0].mean()
    for x in (150, 300, 430):
        t = int((x - left) / (right - left) * 1000)
        for curve, expected in ((red, betas[t] / 0.02), (blue, alphas_cumprod[t])):
            assert abs((bottom - np.nonzero(curve[:, x])[0].mean()) / (bottom - top) - expected) < 0.02
    renamed = opened(figures.schedule_figure(curves, "cosine"))
    assert set(np.nonzero((renamed != plot).any(axis=(1, 2)))[0]) <= set(range(35)), "the name is in the title alone"


def loss_rows(count: int = 200) -> list[dict[str, float]]:
    losses = 10.0 ** -np.linspace(0, 2, count)
    return [
        {"images_seen": 640 * (i + 1), "loss": loss} | {f"loss_q{q}": loss * 0.6**q for q in range(4)}
        for i, loss in enumerate(losses.tolist())
    ]


def curve_heights(plot: np.ndarray) -> list[float]:
    curve = near(plot, (34, 67, 124))
    return [np.nonzero(curve[:380, x])[0].mean() for x in (200, 500, 800)]


def test_loss_axis_is_logarithmic():
    losses = [{"images_seen": row["images_seen"], "loss": row["loss"]} for row in loss_rows()]
    plot = opened(figures.loss_figure(losses))
    assert plot.shape == (480, 960, 3)
    high, middle, low = curve_heights(plot)
    assert high + 100 < middle < low - 100 and abs(high + low - 2 * middle) < 2, "a logarithmic axis"
    high, middle, low = curve_heights(opened(figures.loss_figure([row | {"loss": 1 + row["loss"]} for row in losses])))
    assert middle - high > 3 * (low - middle), "a linear axis for a range under ten"


def test_quartiles_are_thin_lines():
    levels = {"loss": 0.5, "val_loss": 0.6, "loss_q0": 0.9, "loss_q1": 0.7, "loss_q2": 0.3, "loss_q3": 0.1}
    rows = [{"images_seen": 640 * i} | levels for i in range(1, 50)]
    plot = opened(figures.loss_figure(rows))
    heights = {}
    for name, (color, _) in figures._CURVES.items():
        rgb = (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16))
        line = near(plot[:380, 300:800], rgb, 12)
        assert line.any(axis=0).all() and (line.sum(axis=0) <= (4 if name == "loss" else 2)).all()
        heights[name] = np.nonzero(line)[0].mean()
    assert sorted(heights, key=lambda name: heights[name]) == sorted(levels, key=lambda name: -levels[name])
    with_epochs = opened(figures.loss_figure(rows, epoch_images=3200))
    above = np.s_[:25, 400:600]
    assert near(with_epochs[above], INK).any() and not near(plot[above], INK).any(), "the label of the second axis"


def test_repeated_rows_count_once():
    rows = loss_rows()
    stale = [row | {"loss": 99.0} for row in rows[50:80]]
    broken = {"images_seen": 640 * 50 + 1, "loss": float("nan")}
    assert figures.loss_figure([*rows[:50], *stale, broken, *rows[50:]]) == figures.loss_figure(rows)
    empty = opened(figures.loss_figure([], epoch_images=299))
    assert empty.shape == (480, 960, 3) and near(empty[200:280, 350:650], INK).any(), "it says so"


def test_titles_stand_above_in_lines():
    images = random_images(4, 16, 16, 3)
    bare = pixels(figures.image_grid(images, 4, scale=6))
    parts = " · ".join(["landscape", "epoch 30", "ddim, 100 steps", "seeds 0-39", "class coast"])
    named = pixels(figures.image_grid(images, 4, scale=6, title=parts))
    above = named.shape[0] - bare.shape[0]
    assert (named[above:] == bare).all() and named.shape[1] == bare.shape[1]
    rows = near(named[:above], INK).any(axis=1)
    assert np.count_nonzero(np.diff(rows.astype(int)) == 1) >= 1 and (named[:above, :4] == 255).all()
    narrow = pixels(figures.image_grid(images[:1], 1, title=parts))
    assert narrow.shape[1] == 240 and narrow.shape[0] > 16 + 2 * 20, "several lines, and none is cut"
