"""Pictures: sample grids, nearest neighbours, noised beside original, the β/ᾱ plot, the loss curve, the denoising GIF.

Everything here is pure: tensors and arrays go in, a `PIL.Image.Image` or the bytes of a file come out. Images are
uint8 [B, H, W, C] with C = 1 (grey) or 3 (RGB); every function raises ValueError for an empty batch, and for shapes,
types or counts that do not match. Small images are magnified by nearest neighbour, which keeps the pixels visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from ddpm.captions import INK, WHITE, font, put_text, text_size, titled

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Images = NDArray[np.uint8]
_FAINT, _INK_HEX = (168, 168, 168), "#404040"
_PAGE_PIXELS = 1200
_BETWEEN = (116, 116, 116)
"""The colour at the edges of letters in a palette."""
_XYZ_OF_RGB = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
"""Matrix from linear sRGB (IEC 61966-2-1) to XYZ, relative to the white of D65."""
_CURVES = {
    "loss": ("#22437c", "loss"),
    "val_loss": ("#111111", "held out"),
    "loss_q0": ("#8fd0b5", "1st quarter of the noise"),
    "loss_q1": ("#3fa7c4", "2nd"),
    "loss_q2": ("#e6a04d", "3rd"),
    "loss_q3": ("#d1603d", "4th"),
}


def to_pixels(x: torch.Tensor, bits: int = 8) -> NDArray[Any]:
    """Returns float [B, C, H, W] in [-1, 1] as uint8, or uint16 of 16 bits, [B, H, W, C].

    Values are rounded to nearest and clamped; NaN is mid-grey.
    """
    import torch

    most, dtype = 2**bits - 1, torch.uint16 if bits == 16 else torch.uint8
    levels = x.detach().float().nan_to_num(nan=0.0).add(1).mul(most / 2).round().clamp(0, most)
    return levels.to(dtype).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def shown(images: NDArray[Any], channels: Sequence[int] = ()) -> Images:
    """Returns how pictures show images: uint8 [B, H, W, 1 or 3] of uint8 or uint16 [B, H, W, C].

    Args:
        images: the whole range of uint16 becomes 0 to 255.
        channels: one, or those for red, green and blue, counted from 1; empty: the first three, or the first of two.
    """
    usual = range(1, 4 if images.shape[3] > 2 else 2)
    if channels or images.shape[3] not in (1, 3):
        images = images[..., [channel - 1 for channel in channels or usual]]
    if images.dtype == np.uint16:
        images = np.rint(images / 257).astype(np.uint8)
    return images


def side_by_side(left: Images, right: Images) -> Images:
    """Returns pairs of pictures, uint8 [B, H, W, 1 or 3], as one picture each, [B, H, 2 W, 3]."""
    return np.concatenate([_tiles(left, 1), _tiles(right, 1)], axis=2)


def png(picture: Image.Image) -> bytes:
    """Returns a picture as the bytes of a PNG file."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def image_grid(
    images: Images,
    columns: int,
    padding: int = 2,
    scale: int = 1,
    labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str = "",
) -> Image.Image:
    """Returns images on white, row by row, `columns · (W · scale + padding) + padding` pixels wide, and likewise high.

    Args:
        images: uint8 [B, H, W, C].
        columns: tiles in a row; no more than there are images.
        padding: white pixels around every tile, not scaled.
        scale: nearest-neighbour magnification.
        labels: a caption under each image.
        row_labels: a caption left of each row.
        column_labels: a caption above each column.
        title: above all; see `titled`.
    """
    tiles = _tiles(images, scale)
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = ceil(count / columns)
    for captions, expected in ((labels, count), (row_labels, rows), (column_labels, columns)):
        if captions is not None and len(captions) != expected:
            raise ValueError(f"{len(captions)} captions for {expected} places: {captions}")

    size, line = text_size(width), 2 * text_size(width)
    left = _beside(row_labels, size) if row_labels else 0
    top = line if column_labels else 0
    step_x, step_y = width + padding, height + padding + (line if labels else 0)
    canvas = Image.new("RGB", (left + columns * step_x + padding, top + rows * step_y + padding), WHITE)
    for index, tile in enumerate(tiles):
        x, y = left + padding + index % columns * step_x, top + padding + index // columns * step_y
        canvas.paste(Image.fromarray(tile), (x, y))
        if labels:
            put_text(canvas, (x + width / 2, y + height + line / 2), labels[index], size=size, anchor="mm", limit=width)
        if row_labels and index % columns == 0:
            beside, limit = (left - size / 2, y + height / 2), left - size / 2
            put_text(canvas, beside, row_labels[index // columns], size=size, anchor="rm", limit=limit)
        if column_labels and index < columns:
            put_text(canvas, (x + width / 2, line / 2), column_labels[index], size=size, anchor="mm", limit=width)
    return titled(canvas, title)


def colours_of(images: Images) -> NDArray[np.float64]:
    """Returns the colours of a picture at low resolution, float64 [B, 240], whose distances are about perceptual.

    They are the means of 8×8 and of 4×4 fields in CIE Lab (1976; D65), the coarse ones at twice the weight. By
    distances of raw pixels, a flat picture would be the nearest one to every picture with a pattern, of any colour.
    """
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(_checked_images(images))).permute(0, 3, 1, 2)
    rgb = F.adaptive_avg_pool2d(pixels.float().expand(-1, 3, -1, -1), 8).double() / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,bjhw->bihw", torch.tensor(_XYZ_OF_RGB, dtype=torch.float64), linear)
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29).unbind(1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
    return torch.cat([F.adaptive_avg_pool2d(lab, 4).flatten(1) / 4, lab.flatten(1) / 16], dim=1).numpy()


def nearest_pairs(
    samples: Images, training: Images | Callable[[], Iterable[Images]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the training image nearest to each sample, by `colours_of`.

    Memory is bounded by the samples and a few times 16 MiB, whatever the size of the training set.

    Args:
        samples: uint8 [B, H, W, C].
        training: uint8 [N, H, W, C], such as a memory map, or a function that yields it in chunks along N.

    Returns:
        Indices into the training images, int64 [B], the lowest among equals; distances, float64 [B].
    """
    ours = colours_of(samples)
    best, indices = np.full(len(ours), np.inf), np.zeros(len(ours), dtype=np.int64)
    at_once, seen = max(1, 2**24 // (4 * samples[0].size)), 0
    for chunk in training() if callable(training) else [training]:
        if chunk.shape[1:] != samples.shape[1:]:
            raise ValueError(f"training images are {chunk.shape[1:]}, samples are {samples.shape[1:]}")
        for start in range(0, len(chunk), at_once):
            theirs = colours_of(chunk[start : start + at_once])
            # Differences instead of products: the rounding of products would distinguish a copy from its original.
            squared = np.stack([np.square(theirs - one).sum(axis=1) for one in ours])
            nearest = squared.argmin(axis=1)
            found = squared[np.arange(len(ours)), nearest]
            closer = found < best
            best[closer], indices[closer] = found[closer], nearest[closer] + seen
            seen += len(theirs)
    if not seen:
        raise ValueError("nearest_pairs needs at least one training image")
    return indices, np.sqrt(best)


def pairs_grid(
    samples: Images,
    nearest: Images,
    columns: int = 4,
    labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str = "",
) -> Image.Image:
    """Returns each sample joined by a thin line to its nearest training image, `columns` pairs in a row.

    Args:
        samples: uint8 [B, H, W, C].
        nearest: likewise.
        columns: pairs in a row.
        labels: a caption under each pair.
        column_labels: a caption above each column.
        title: above all.
    """
    if samples.shape != nearest.shape:
        raise ValueError(f"samples {samples.shape} and training images {nearest.shape} do not pair up")
    left, right = (_tiles(images, _scale(images)) for images in (samples, nearest))
    count, height, width, _ = left.shape
    columns = min(columns, count)
    link, gap, size = max(8, width // 8), max(14, width // 4), text_size(width)
    pair, line, header = 2 * width + link, 2 * size if labels else 0, 2 * size if column_labels else 0
    step_x, step_y = pair + gap, height + line + gap // 2
    canvas = Image.new("RGB", (columns * step_x - gap, header + ceil(count / columns) * step_y - gap // 2), WHITE)
    for index in range(count):
        x, y = index % columns * step_x, header + index // columns * step_y
        canvas.paste(_FAINT, (x + width, y + height // 2 - 1, x + width + link, y + height // 2 + 1))
        canvas.paste(Image.fromarray(left[index]), (x, y))
        canvas.paste(Image.fromarray(right[index]), (x + width + link, y))
        if labels:
            put_text(canvas, (x + pair / 2, y + height + line / 2), labels[index], size=size, anchor="mm", limit=pair)
        if column_labels and index < columns:
            put_text(canvas, (x + pair / 2, header / 2), column_labels[index], size=size, anchor="mm", limit=pair)
    return titled(_framed(canvas), f"{title} · each beside the training image that looks nearest" if title else "")


def comparison(grids: Sequence[tuple[str, Images]], column_labels: Sequence[str], title: str = "") -> Image.Image:
    """Returns a row of images for each checkpoint, beside its name ("epoch 30"), with a column for each seed.

    It is as wide as a page: seeds beyond that follow below, again with a row for each checkpoint, and large images are
    reduced to about 128 pixels.

    Args:
        grids: names, and uint8 [B, H, W, C] alike.
        column_labels: a caption above each column.
        title: above all.
    """
    if not grids:
        raise ValueError("there is nothing to compare")
    names, margin = [name for name, _ in grids], 8
    images = np.stack([_reduced(images, round(max(images.shape[1:3]) / 128)) for _, images in grids])
    count, scale = images.shape[1], _scale(images[0])
    step = images.shape[3] * scale + 2
    across = max(1, (_PAGE_PIXELS - 2 * margin - 2 - _beside(names, text_size(step - 2))) // step)
    across = ceil(count / ceil(count / across))
    blank = -count % across
    images = np.pad(images, [(0, 0), (0, blank), (0, 0), (0, 0), (0, 0)], constant_values=255)
    above, blocks = [*column_labels, *[""] * blank], []
    for first in range(0, count, across):
        tiles, heads = np.concatenate(images[:, first : first + across]), above[first : first + across]
        block = image_grid(tiles, across, scale=scale, row_labels=names, column_labels=heads)
        blocks.append(np.asarray(block))
    return titled(_framed(Image.fromarray(np.vstack(blocks)), margin), title)


class NoisingFigure(NamedTuple):
    """Originals and their samples of q(x_t | x_0) (Ho et al. 2020, equation 4)."""

    original: Image.Image
    noised: Image.Image
    combined: Image.Image


def noising_figure(images: Images, noised: torch.Tensor, labels: Sequence[str]) -> NoisingFigure:
    """Returns x_0 (`images`, uint8 [B, H, W, C]) beside x_t (`noised`, float [B, C, H, W], clamped to [-1, 1]).

    These are two bare grids, six to a row (398×134 pixels for twelve 64-pixel images), and a picture of both with
    labels, such as `t = 962`, under the noised ones.
    """
    pixels = to_pixels(noised)
    if pixels.shape != images.shape or len(labels) != len(images):
        raise ValueError(f"images {images.shape}, noised {pixels.shape} and {len(labels)} labels do not match")
    scale = _scale(images)
    plain = image_grid(images, 6, 4, scale, labels=[""] * len(images))
    labelled = image_grid(pixels, 6, 4, scale, labels=labels)
    size = min(max(plain.width // 24, 14), 24)
    step, header = plain.width + round(1.5 * size), 2 * size
    combined = Image.new("RGB", (step + plain.width, header + plain.height), WHITE)
    for x, title, grid in ((0, "original", plain), (step, "noised", labelled)):
        put_text(combined, (x + 2, size * 0.8), title, size=size, anchor="lm", limit=plain.width)
        combined.paste(grid, (x, header))
    return NoisingFigure(image_grid(images, 6), image_grid(pixels, 6), _framed(combined))


def contact_sheet(
    images: Images,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    columns: int = 10,
    title: str = "",
) -> Image.Image:
    """Returns images of a dataset, large ones reduced to about 128 pixels, below a title.

    Args:
        images: uint8 [B, H, W, C].
        labels: the class of each image: those of a class, which may be none, stand beside its name.
        class_names: of all these classes.
        columns: images in a row.
        title: above all; see `titled`.
    """
    images = _reduced(images, round(max(images.shape[1:3]) / 128))
    scale = _scale(images, tile_pixels=72)
    if labels is None:
        return titled(_framed(image_grid(images, columns, 4, scale)), title)
    if len(labels) != len(images):
        raise ValueError(f"{len(labels):,} labels for {len(images):,} images")
    counts = np.bincount(labels, minlength=len(class_names))
    columns = min(columns, int(counts.max()))
    groups, captions = [], []
    for label, count in enumerate(counts):
        rows = max(1, ceil(count / columns))
        blanks = np.full((rows * columns - count, *images.shape[1:]), 255, dtype=np.uint8)
        groups += [images[np.asarray(labels) == label], blanks]
        captions += [class_names[label], *[""] * (rows - 1)]
    return titled(_framed(image_grid(np.concatenate(groups), columns, 4, scale, row_labels=captions)), title)


def shown_evaluations(evaluations: int, frames: int = 20) -> list[int]:
    """Returns the numbers, from 0, of evaluations of a network to show: evenly spaced from the first to the last.

    There are exactly `frames` of them, without repetition, or all if there are fewer.
    """
    count, last = min(frames, evaluations), evaluations - 1
    return [last - index * last // max(1, count - 1) for index in reversed(range(count))]


def denoising_gif(
    frames: Sequence[Images],
    columns: int = 6,
    fps: int = 5,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> bytes:
    """Returns an endless GIF of sampling, with a thin progress bar.

    Args:
        frames: uint8 [B, H, W, C] each, from noise to samples; each becomes exactly one frame.
        columns: tiles in a row.
        fps: frames in a second.
        scale: magnification; None: about 96 pixels a tile.
        labels: the text under each frame, such as `t = 812`.
        title: above all frames; see `titled`.
    """
    if not frames or (labels is not None and len(labels) != len(frames)):
        raise ValueError(f"{len(frames)} frames to animate, with {labels} under them")
    scale = scale or _scale(frames[0])
    pictures = []
    for index, images in enumerate(frames):
        grid = image_grid(images, columns, scale=scale, title=title)
        # The bar also keeps equal frames apart, which the GIF writer would merge into one.
        canvas = Image.new("RGB", (grid.width, grid.height + 6 + (22 if labels else 0)), WHITE)
        canvas.paste(grid)
        if labels:
            put_text(canvas, (4, grid.height + 17), labels[index], size=13, anchor="lm", limit=grid.width)
        end = 2 + (grid.width - 5) * (index + 1) // len(frames)
        ImageDraw.Draw(canvas).rectangle((2, grid.height, end, grid.height + 2), fill=_FAINT)
        # One palette for each frame, since noise and samples share few colours; dithering would look like noise.
        pictures.append(canvas.quantize(palette=_palette(images), dither=Image.Dither.NONE))
    file = BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
    return file.getvalue()


def schedule_figure(curves: Mapping[str, ArrayLike], title: str, log: bool = False) -> bytes:
    """Plots two curves over the timesteps, float [T] each, by their labels, as a 640×480 PNG.

    The first, such as β_t, is red, on the left axis, which may be logarithmic. The second, such as ᾱ_t = ∏ (1 - β_s)
    for s ≤ t (Ho et al. 2020, section 2), is blue, on the right one.
    """
    figure, (axes,) = _figures(6.4, 1)
    sides, colors = (axes, axes.twinx()), ("#c0392b", "#1f5fa8")
    lines = []
    for side, color, (label, values) in zip(sides, colors, curves.items(), strict=True):
        lines += side.plot(np.asarray(values), color=color, linewidth=2, label=label)
        side.set_ylabel(label, color=color, fontsize=14)
        side.tick_params(axis="y", colors=color)
        if log and side is axes:
            side.set_yscale("log")
        else:
            side.set_ylim(bottom=0)
    sides[1].spines[:].set_visible(False)
    axes.set_xlim(0, np.size(lines[0].get_ydata()))
    axes.set_xlabel("timestep t")
    axes.set_title(title, pad=10)
    axes.legend(handles=lines, loc="center right", frameon=False, fontsize=13)
    return _plot_png(figure)


def loss_figure(rows: Sequence[Mapping[str, float]], epoch_images: int | None = None, title: str = "") -> bytes:
    """Plots the training loss over the images seen as a 960×480 PNG: smoothed over raw, timestep quartiles thin.

    Each row has `images_seen`, `loss` and, where known, `loss_q0` … `loss_q3`: the loss over the quarters of the
    timesteps, from least to most noise. A row that a resumed run logged again replaces the earlier one. The y axis is
    logarithmic if the loss spans more than a factor of ten; with `epoch_images` there is a second axis in epochs. The
    title names the run.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    figure, (axes,) = _figures(9.6, 1)
    latest: dict[float, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        latest.setdefault(row["images_seen"], {}).update(row)
    x = np.array(list(latest), dtype=np.float64)
    lowest, highest = inf, -inf
    for key, (color, text) in _CURVES.items():
        y = np.array([row.get(key, np.nan) for row in latest.values()], dtype=np.float64)
        known = np.isfinite(y)
        if known.any():
            lowest, highest = min(lowest, y[known].min()), max(highest, y[known].max())
            width = 2.2 if key == "loss" else 1
            if key == "loss":
                axes.plot(x[known], y[known], color=color, linewidth=0.8, alpha=0.3)
            axes.plot(x[known], smoothed(y[known]), color=color, label=text, linewidth=width, zorder=2 + width)
    if lowest > highest:
        axes.text(0.5, 0.5, "no loss logged yet", transform=axes.transAxes, ha="center", color=_INK_HEX)
    else:
        figure.legend(loc="outside lower center", ncols=len(_CURVES), frameon=False, labelcolor=_INK_HEX)
    if 0 < 10 * lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set(xlabel="images seen", ylabel="loss", xlim=(0, x[-1] if len(x) else 1000))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if epoch_images:
        functions = (lambda images: images / epoch_images, lambda epochs: epochs * epoch_images)
        top = axes.secondary_xaxis("top", functions=functions)
        top.tick_params(colors=_INK_HEX)
        top.set_xlabel("epoch", color=_INK_HEX)
        top.spines[:].set_visible(False)
    figure.suptitle(title, color=_INK_HEX, fontsize=12)
    return _plot_png(figure)


def scores_figure(rows: Sequence[Mapping[str, float]], epoch_images: int, title: str = "") -> bytes:
    """Plots scores over the epochs, a panel for each, as a PNG 480 pixels high.

    Each row has `images_seen`, and scores by their names; the last row of a moment counts. `kid_std` is the ± of `kid`,
    and `real kid`, the score of real images, is a line. The title names the run.
    """
    latest = {row["images_seen"]: row for row in rows}
    beside = ("images_seen", "epoch", "time")
    found = dict.fromkeys(name for row in latest.values() for name in row)
    names = [name for name in found if name not in beside and "_std" not in name and not name.startswith("real ")]
    figure, panels = _figures(4.8 * max(1, len(names)), max(1, len(names)))
    for axes, name in zip(panels, names, strict=False):
        scored = {images / epoch_images: row for images, row in sorted(latest.items()) if name in row}
        y = [row[name] for row in scored.values()]
        metric, dash, extractor = name.partition("-")
        deviations = [row.get(f"{metric}_std{dash}{extractor}", 0.0) for row in scored.values()]
        axes.errorbar(list(scored), y, yerr=deviations, color="#22437c", marker="o", markersize=4, capsize=3)
        if (real := [row.get(f"real {name}") for row in scored.values()][-1]) is not None:
            axes.axhline(real, color="#d1603d", linestyle="--", label="real images")
            axes.legend(frameon=False, labelcolor=_INK_HEX)
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=min(0, *y))
    figure.suptitle(title, color=_INK_HEX, fontsize=12)
    return _plot_png(figure)


def _checked_images(images: Images) -> Images:
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[3] not in (1, 3):
        raise ValueError(f"expected uint8 [B, H, W, 1 or 3] with B ≥ 1, got {images.dtype} {list(images.shape)}")
    return images


def _tiles(images: Images, scale: int) -> Images:
    rgb = np.broadcast_to(_checked_images(images), (*images.shape[:3], 3))
    return np.ascontiguousarray(rgb.repeat(scale, axis=1).repeat(scale, axis=2))


def _reduced(images: Images, factor: int) -> Images:
    tiles = _tiles(images, 1)
    return np.stack([np.asarray(Image.fromarray(tile).reduce(factor)) for tile in tiles]) if factor > 1 else tiles


def _beside(row_labels: Sequence[str], size: int) -> int:
    return min(max(round(font(size).getlength(text)) for text in row_labels), _PAGE_PIXELS // 5) + size


def _scale(images: Images, tile_pixels: int = 96) -> int:
    return max(1, round(tile_pixels / max(_checked_images(images).shape[1:3])))


def _framed(picture: Image.Image, margin: int = 20) -> Image.Image:
    canvas = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), WHITE)
    canvas.paste(picture, (margin, margin))
    return canvas


def _palette(images: Images) -> Image.Image:
    # At most 32 pixels of a side of each image: k-means over more costs seconds and finds the same colours.
    stride = ceil(max(images.shape[1:3]) / 32)
    small = image_grid(images[:, ::stride, ::stride], columns=len(images))
    small = small.quantize(253, Image.Quantize.MEDIANCUT, kmeans=small.width * small.height // 100)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(small.getpalette() or [])[: 3 * 253], *_FAINT, *INK, *_BETWEEN])
    return palette


def _figures(width_inches: float, panels: int) -> tuple[Figure, list[Axes]]:
    # Figure itself, not pyplot: no global state, no display, safe beside other threads.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width_inches, 4.8), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    return figure, [_plain(figure.add_subplot(1, panels, 1 + panel)) for panel in range(panels)]


def _plain(axes: Axes) -> Axes:
    axes.tick_params(colors=_INK_HEX)
    for part in (axes.title, axes.xaxis.label, axes.yaxis.label, axes.spines[:]):
        part.set_color(_INK_HEX)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    return axes


def _plot_png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the moving average over a 25th of the points on either side, and over fewer near the ends."""
    index = np.arange(len(values))
    radius = np.minimum(index, len(values) // 25)
    sums = np.concatenate([[0], np.cumsum(values)])
    first, end = index - radius, np.minimum(index + radius + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)
