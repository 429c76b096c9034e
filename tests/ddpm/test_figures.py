from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
import zipfile
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import figures

WHITE = (255, 255, 255)
INK = (64, 64, 64)


@pytest.fixture(scope="module")
def tiles():
    """Twelve real landscapes, uint8 [12, 64, 64, 3]."""
    with zipfile.ZipFile(str(resources.files("job") / "datasets" / "landscape-sample.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::24][:12]
        return np.stack([np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.array(picture)


def opened(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.array(image.convert("RGB")).astype(int)


def near(image: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return (np.abs(image - np.array(color)) < tolerance).all(axis=-1)


def test_every_pixel_survives_the_way_to_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (figures.to_uint8(levels.float() / 127.5 - 1).ravel() == np.arange(256)).all()


def test_to_uint8_rounds_to_nearest_clamps_and_moves_channels_last():
    x = torch.tensor([-3.0, -1.0, 0.9 / 127.5 - 1, 1.1 / 127.5 - 1, float("nan"), 7.0]).reshape(1, 2, 1, 3)
    pixel = figures.to_uint8(x)
    assert pixel.shape == (1, 1, 3, 2) and pixel.flags["C_CONTIGUOUS"]
    assert pixel[0, 0].T.ravel().tolist() == [0, 0, 1, 1, 128, 255]
    assert figures.to_uint8(torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)).item() == 191


def test_a_grid_has_every_tile_in_its_place_on_white():
    images = random_images(7, 5, 4, 3)
    grid = pixels(figures.image_grid(images, columns=3, padding=2, scale=3))
    assert grid.shape == (3 * (5 * 3 + 2) + 2, 3 * (4 * 3 + 2) + 2, 3)
    remaining = np.ones(grid.shape[:2], dtype=bool)
    for index, image in enumerate(images):
        y, x = 2 + index // 3 * 17, 2 + index % 3 * 14
        assert (grid[y : y + 15, x : x + 12] == image.repeat(3, axis=0).repeat(3, axis=1)).all()
        remaining[y : y + 15, x : x + 12] = False
    assert (grid[remaining] == 255).all()


def test_grey_images_and_fewer_images_than_columns():
    images = random_images(2, 4, 4, 1)
    grid = pixels(figures.image_grid(images, columns=6))
    assert grid.shape == (8, 14, 3)
    assert (grid[2:6, 8:12] == images[1]).all()


def test_captions_lie_beside_the_tiles_and_within_them():
    images = np.full((4, 64, 64, 3), 255, dtype=np.uint8)
    bare = figures.image_grid(images, 2)
    labels = ["café", "Σ β", "a name far too long for a tile of this width", ""]
    captioned = figures.image_grid(images, 2, labels=labels, row_labels=["one", "two"], column_labels=["a", "b"])
    left, top = captioned.width - bare.width, 24
    line = (captioned.height - bare.height - top) // 2
    ink = (pixels(captioned) < 200).all(axis=-1)
    for row in range(2):
        y = top + 2 + row * (66 + line)
        assert ink[y : y + 64, :left].any(), "row label"
        assert not ink[y : y + 64, left:].any(), "nothing on the tiles"
        for column in range(2):
            x = left + 2 + column * 66
            under = ink[y + 64 : y + 64 + line]
            assert under[:, x : x + 64].any() == bool(labels[2 * row + column])
        assert not ink[y + 64 : y + 64 + line, [left, left + 1, left + 66, left + 67]].any(), "long names are cut"
    assert ink[:top, left + 2 : left + 66].any() and ink[:top, left + 68 :].any()
    with pytest.raises(ValueError, match="3 captions for 4 places"):
        figures.image_grid(images, 2, labels=["a", "b", "c"])


def test_letters_beyond_ascii_are_letters_and_not_boxes():
    images = np.full((1, 96, 96, 3), 255, dtype=np.uint8)
    drawn = {letter: pixels(figures.image_grid(images, 1, labels=[letter])).tobytes() for letter in "eéβжᾱ\uffff"}
    assert len(set(drawn.values())) == len(drawn), "a missing letter would look like U+FFFF"


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3)),
        np.zeros((1, 4, 4, 2), np.uint8),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images):
    for draw in (
        lambda: figures.image_grid(images, 2),
        lambda: figures.comparison([("epoch 1", images)]),
        lambda: figures.contact_sheet(images),
        lambda: figures.denoising_gif([images]),
        lambda: figures.pairs_grid(images, images),
    ):
        with pytest.raises(ValueError, match="expected uint8"):
            draw()


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_nearest_pairs_equal_a_search_by_hand(chunk):
    training, samples = random_images(50, 6, 5, 3), random_images(9, 6, 5, 3, seed=1)
    squared = ((samples[:, None].astype(np.int64) - training[None]) ** 2).sum(axis=(2, 3, 4))
    indices, distances = figures.nearest_pairs(
        samples, lambda: (training[start : start + chunk] for start in range(0, 50, chunk))
    )
    assert indices.tolist() == squared.argmin(axis=1).tolist()
    assert distances.tolist() == np.sqrt(squared.min(axis=1)).tolist()
    assert all(
        (a == b).all() for a, b in zip(figures.nearest_pairs(samples, training), (indices, distances), strict=True)
    )


def test_a_copy_is_told_from_a_look_alike_and_from_a_later_copy():
    bright = np.full((1, 64, 64, 3), 254, dtype=np.uint8)
    alike = bright.copy()
    alike[0, 63, 63, 2] = 255
    indices, distances = figures.nearest_pairs(bright, lambda: [alike, np.concatenate([bright, bright]), bright])
    assert (indices.tolist(), distances.tolist()) == ([1], [0.0])
    assert figures.nearest_pairs(bright, alike)[1].tolist() == [1.0]


def test_the_search_takes_little_memory_for_a_large_training_set(tmp_path):
    training = np.memmap(tmp_path / "train", dtype=np.uint8, mode="w+", shape=(6000, 64, 64, 3))
    training[4321] = 200
    tracemalloc.start()
    indices, _ = figures.nearest_pairs(np.full((2, 64, 64, 3), 199, dtype=np.uint8), training)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert indices.tolist() == [4321, 4321]
    assert peak < 64 * 2**20, "in one piece it would be 590 MB"


def test_the_search_refuses_other_shapes_and_no_images():
    samples = random_images(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"training images are \(8, 8, 3\)"):
        figures.nearest_pairs(samples, random_images(2, 8, 8, 3))
    with pytest.raises(ValueError, match="no training images"):
        figures.nearest_pairs(samples, lambda: [])


def test_pairs_lie_side_by_side_with_a_link_between():
    samples, nearest = random_images(5, 32, 32, 3), random_images(5, 32, 32, 3, seed=1)
    picture = pixels(figures.pairs_grid(samples, nearest, columns=2))
    link, gap, header, margin = 12, 24, 26, 20
    assert picture.shape == (2 * margin + header + 3 * 96 + 2 * 12, 2 * margin + 2 * (2 * 96 + link) + gap, 3)
    for index in range(5):
        x, y = margin + index % 2 * (2 * 96 + link + gap), margin + header + index // 2 * (96 + 12)
        for image, left in ((samples[index], x), (nearest[index], x + 96 + link)):
            assert (picture[y : y + 96, left : left + 96] == image.repeat(3, axis=0).repeat(3, axis=1)).all()
        between = picture[y : y + 96, x + 96 : x + 96 + link]
        lined = (between != 255).any(axis=(1, 2))
        assert lined.sum() == 2 and lined[47:49].all() and (between[lined] == 168).all()
    assert (picture[margin : margin + header, margin:] < 128).any(), "header"
    with pytest.raises(ValueError, match="do not pair up"):
        figures.pairs_grid(samples, nearest[:4])


def test_checkpoints_are_compared_side_by_side_and_tile_by_tile():
    first, second = random_images(4, 32, 32, 3), random_images(4, 32, 32, 3, seed=1)
    picture = pixels(figures.comparison([("epoch 30", first), ("epoch 490", second)]))
    block, title = 2 * 98 + 2, 14
    gap, header, margin = 21, 2 * title, 20
    assert picture.shape == (2 * margin + header + block, 2 * margin + 2 * block + gap, 3)
    for number, images in enumerate((first, second)):
        x, y = margin + number * (block + gap), margin + header
        assert (picture[y : y + block, x : x + block] == pixels(figures.image_grid(images, 2, scale=3))).all()
        assert (picture[margin:y, x : x + block] < 128).any(), "title"
    with pytest.raises(ValueError, match="nothing to compare"):
        figures.comparison([])


def test_many_checkpoints_stay_on_the_screen():
    grids = [(f"epoch {number}", random_images(64, 64, 64, 3, seed=number)) for number in range(5)]
    picture = figures.comparison(grids)
    assert picture.width < 2000 and picture.height < 1400


def test_the_noising_figure_is_two_grids_of_398_by_134_and_a_labelled_picture(tiles):
    timesteps = [962, 237, 38, 39, 988, 559, 299, 226, 985, 791, 859, 485]
    noised = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    figure = figures.noising_figure(tiles, noised, timesteps)
    assert figure.original.size == figure.noised.size == (398, 134)
    assert (pixels(figure.original)[2:66, 68:132] == tiles[1]).all()
    assert (pixels(figure.noised)[68:132, 332:396] == figures.to_uint8(noised)[11]).all()

    combined = pixels(figure.combined)
    half = combined.shape[1] // 2
    block = 6 * (128 + 4) + 4
    under = combined[20 + 48 + 4 + 128 : 20 + 48 + 4 + 128 + 36]
    assert (under[:, :half] == 255).all(), "originals have no t"
    starts = [combined.shape[1] - 20 - block + 4 + 132 * column for column in range(6)]
    assert all((under[:, x : x + 128] < 128).any() for x in starts)
    with pytest.raises(ValueError, match="11 timesteps"):
        figures.noising_figure(tiles, noised, timesteps[:11])


def test_a_contact_sheet_groups_classes_beside_their_names():
    images = np.stack([np.full((36, 36, 3), shade, dtype=np.uint8) for shade in (10, 60, 110, 160, 210)])
    sheet = pixels(figures.contact_sheet(images, [1, 0, 1, 1, 0], ["coast", "hills"], columns=2))
    right = sheet[:, -20 - 2 * 76 - 4 :]
    shades = [[int(right[20 + 4 + 36 + 76 * row, 4 + 36 + 76 * column, 0]) for column in (0, 1)] for row in range(3)]
    assert shades == [[60, 210], [10, 110], [160, 255]]
    names = (sheet[:, : -20 - 2 * 76 - 4] < 128).all(axis=-1)
    rows = [names[20 + 76 * row : 20 + 76 * (row + 1)].any() for row in range(3)]
    assert rows == [True, True, False], "a name stands at the first row of its class"
    assert figures.contact_sheet(random_images(37, 32, 32, 3)).size == (40 + 10 * 68 + 4, 40 + 4 * 68 + 4)
    with pytest.raises(ValueError, match="2 labels for 5 images"):
        figures.contact_sheet(images, [0, 1])


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 25, 39, 50, 100, 999, 1000])
def test_twenty_different_steps_are_shown_or_all_there_are(steps):
    grid = list(range(steps - 1, -1, -1))
    shown = figures.denoising_timesteps(grid)
    assert len(shown) == len(set(shown)) == min(20, steps)
    assert shown[-1] == 0 and (steps == 1 or shown[0] == steps - 1)
    strides = {a - b for a, b in pairwise(shown)}
    assert shown == sorted(shown, reverse=True) and (not strides or max(strides) - min(strides) <= 1)
    assert figures.denoising_timesteps(grid, frames=1) == [0]


def test_an_empty_grid_of_steps_is_refused():
    with pytest.raises(ValueError, match="no steps"):
        figures.denoising_timesteps([])


def gif_frames(data: bytes) -> list[np.ndarray]:
    gif = Image.open(io.BytesIO(data))
    assert gif.format == "GIF" and gif.info["loop"] == 0
    frames = []
    for index in range(gif.n_frames):  # type: ignore[attr-defined]
        gif.seek(index)
        assert gif.info["duration"] == 200
        frames.append(np.array(gif.convert("RGB")).astype(int))
    return frames


def test_the_gif_has_every_frame_for_a_fifth_of_a_second_and_colours_that_hold(tiles):
    x = torch.from_numpy(tiles[:, ::2, ::2].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    steps = [figures.to_uint8(x * (i / 19) + noise * (1 - i / 19)) for i in range(20)]
    shown = gif_frames(figures.denoising_gif(steps))
    assert len(shown) == 20
    bars = []
    for images, frame in zip(steps, shown, strict=True):
        truth = pixels(figures.image_grid(images, 6, scale=3)).astype(int)
        grid = frame[: truth.shape[0]]
        assert frame.shape == (truth.shape[0] + 6, 590, 3)
        assert np.abs(grid - truth).mean() < (4 if images is steps[-1] else 12)
        assert (grid[:, [0, 1, 98, 99]] == 255).all(), "gutters stay white"
        bars.append(int((frame[truth.shape[0] + 1] == 168).all(axis=-1).sum()))
    assert bars == sorted(set(bars)) and bars[-1] == 586


def test_equal_frames_stay_frames_and_flat_colours_stay_flat():
    images = np.full((2, 28, 28, 1), 100, dtype=np.uint8)
    images[1] = np.arange(28, dtype=np.uint8)[:, None] * 9
    shown = gif_frames(figures.denoising_gif([images] * 20, scale=3))
    assert len(shown) == 20
    assert np.unique(shown[7][2:86, 2:86].reshape(-1, 3), axis=0).tolist() == [[100, 100, 100]], "no dithering"
    greys = images[1, :, :, 0].repeat(3, axis=0).repeat(3, axis=1).astype(int)
    assert np.abs(shown[19][2:86, 88:172] - greys[..., None]).max() <= 3


def test_the_schedule_is_drawn_where_its_numbers_say():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    data = figures.schedule_figure(betas, alphas_cumprod, "linear")
    plot = opened(data)
    assert plot.shape == (480, 640, 3)
    inside = plot.copy()
    inside[:, :97] = inside[:, 571:] = 255
    inside[:, 480:560, :][200:260] = 255  # the legend
    red, blue = near(inside, (192, 57, 43)), near(inside, (31, 95, 168))
    left, right = 94.0, 573.0
    bottom = np.nonzero(red[:, 100])[0].mean() + 3
    top = np.nonzero(blue[:, 100])[0].mean()
    for x in (150, 300, 430):
        t = int((x - left) / (right - left) * 1000)
        height = (bottom - np.array([np.nonzero(curve[:, x])[0].mean() for curve in (red, blue)])) / (bottom - top)
        assert abs(height[0] - float(betas[t]) / 0.02) < 0.02
        assert abs(height[1] - float(alphas_cumprod[t])) < 0.02
    assert figures.schedule_figure(betas.numpy(), alphas_cumprod.numpy(), "linear") == data
    renamed = opened(figures.schedule_figure(betas, alphas_cumprod, "cosine"))
    assert set(np.nonzero((renamed != plot).any(axis=(1, 2)))[0]) <= set(range(35)), "the name is in the title alone"


def loss_rows(count: int = 200) -> list[dict[str, float]]:
    losses = 10.0 ** -np.linspace(0, 2, count)
    return [
        {"images_seen": 640 * (i + 1), "loss": loss} | {f"loss_q{q}": loss * 0.6**q for q in range(4)}
        for i, loss in enumerate(losses.tolist())
    ]


def test_the_loss_curve_is_straight_where_the_loss_decays_exponentially():
    only_loss = [{key: row[key] for key in ("images_seen", "loss")} for row in loss_rows()]
    plot = opened(figures.loss_figure(only_loss))
    assert plot.shape == (480, 960, 3)
    curve = near(plot, (34, 67, 124))
    heights = [np.nonzero(curve[:380, x])[0].mean() for x in (200, 500, 800)]
    assert heights[0] + 100 < heights[1] < heights[2] - 100
    assert abs(heights[0] + heights[2] - 2 * heights[1]) < 2, "a logarithmic axis"

    level = opened(figures.loss_figure([row | {"loss": 1 + row["loss"]} for row in only_loss]))
    curve = near(level, (34, 67, 124))
    heights = [np.nonzero(curve[:380, x])[0].mean() for x in (200, 500, 800)]
    assert heights[1] - heights[0] > 3 * (heights[2] - heights[1]), "a linear axis for a range under ten"


def test_quartiles_are_thin_lines_of_their_own_and_epochs_a_second_axis():
    levels = {"loss": 0.5, "loss_q0": 0.9, "loss_q1": 0.7, "loss_q2": 0.3, "loss_q3": 0.1}
    rows = [{"images_seen": 640 * i} | levels for i in range(1, 50)]
    plot = opened(figures.loss_figure(rows))
    heights = {}
    for name, (color, _) in figures._CURVES.items():
        rgb = (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16))
        line = near(plot[:380, 300:800], rgb, 12)
        assert line.any(axis=0).all() and (line.sum(axis=0) <= (4 if name == "loss" else 2)).all()
        heights[name] = np.nonzero(line)[0].mean()
    assert sorted(heights, key=lambda name: heights[name]) == ["loss_q0", "loss_q1", "loss", "loss_q2", "loss_q3"]
    with_epochs = opened(figures.loss_figure(rows, epoch_images=3200))
    above = np.s_[:25, 400:600]
    assert near(with_epochs[above], INK).any() and not near(plot[above], INK).any(), "the label of the second axis"


def test_what_a_resumed_run_logged_again_counts_once_and_nan_is_left_out():
    rows = loss_rows()
    stale = [row | {"loss": 99.0} for row in rows[50:80]]
    broken = {"images_seen": 640 * 50 + 1, "loss": float("nan")}
    assert figures.loss_figure([*rows[:50], *stale, broken, *rows[50:]]) == figures.loss_figure(rows)


def test_a_run_without_losses_has_a_picture_too():
    plot = opened(figures.loss_figure([], epoch_images=299))
    assert plot.shape == (480, 960, 3)
    assert near(plot[200:280, 350:650], INK).any(), "it says so"


def test_png_keeps_every_pixel():
    grid = figures.image_grid(random_images(3, 8, 8, 3), 2)
    assert (opened(figures.png(grid)) == pixels(grid)).all()


def test_neither_torch_nor_matplotlib_nor_a_display_is_loaded_before_it_is_needed():
    script = (
        "import sys, ddpm.figures as f\n"
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])\n"
        "f.schedule_figure([.1, .2], [.9, .7], 'short')\n"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n[]\n"
