"""Condition images: made from the learnt images by their numbers, noised, and left out for guidance.

Every pixel is computed by one operation at a time, so that a condition has the same bits for every split of a batch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddpm import figures, randomness
from ddpm.catalogue import Conditioning
from ddpm.image_size import ImageSize
from ddpm.objective import Condition
from ddpm.randomness import Purpose

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), as in JPEG and in Pillow's mode L."""
Picture = str | os.PathLike[str] | Image.Image
STROKES = 4
"""Strokes of a brush, from point to point."""
WIDTHS = (1 / 10, 1 / 4)
"""Their widths, as a share of the image's shorter side."""


def derived(derive: str, x: Tensor, seed: int, image_numbers: Tensor) -> Tensor:
    """Makes condition images, as `condition.derive` says; those that a brush or noise changes depend on the numbers.

    Args:
        derive: see `ddpm.catalogue.DERIVATIONS`.
        x: the learnt images, after augmentation, float32 [B, C, H, W] in [-1, 1].
        seed: the run's seed.
        image_numbers: int64 [B], on a device that draws.

    Returns:
        float32 [B, Cc, H, W] in [-1, 1].
    """
    kind, _, value = derive.partition(":")
    if kind == "downscale":
        height, width = Conditioning(derive).small_size(ImageSize(*x.shape[2:])).shape
        return bicubic(bicubic(x, height, width), *x.shape[2:])
    if kind == "grey":
        red, green, blue = (x[:, place : place + 1] * weight for place, weight in enumerate(LUMA))
        return red + green + blue
    if kind == "blur":
        return blurred(x, float(value))
    if kind == "jpeg":
        return _jpeg(x, int(value))
    if kind == "noise":
        noise = randomness.condition_noise(Purpose.DERIVED_NOISE, image_numbers, seed, x.shape[1:], x.device)
        return (x + float(value) * noise).clamp(-1, 1)
    hidden = torch.zeros_like(x[:, :1], dtype=torch.bool)
    if value == "centre":
        down, across = x.shape[2] // 4, x.shape[3] // 4
        hidden[:, :, down : x.shape[2] - down, across : x.shape[3] - across] = True
    else:
        u = randomness.augmentation_uniforms(Purpose.CONDITION, seed, image_numbers, 3 * STROKES + 2)
        hidden = _strokes(u.float().to(x.device), ImageSize(*x.shape[2:]))
    return masked(x, hidden)


def masked(x: Tensor, hidden: Tensor) -> Tensor:
    """Returns images [B, C, H, W] with grey where `hidden`, bool [B, 1, H, W] or [H, W], and a channel of 1 there."""
    shown = torch.where(hidden, 1.0, -1.0).expand_as(x[:, :1])
    return torch.cat([torch.where(hidden, 0.0, x), shown], dim=1)


def of_pictures(derive: str, x: Tensor, size: ImageSize, hidden: Tensor | None = None) -> Tensor:
    """Returns the conditions of given pictures, which are what `derive` makes of an image.

    Args:
        derive: of the run; empty for a dataset of pairs.
        x: float32 [n, C, H, W] in [-1, 1], of `Conditioning.small_size`.
        size: of the learnt images.
        hidden: the part to fill in, bool [H, W], for a run that learns masks; None: as in training, by the place of the
            picture for a brush.

    Returns:
        float32 [n, Cc, H, W].
    """
    kind = derive.partition(":")[0]
    if kind == "downscale":
        return bicubic(x, *size.shape)
    if hidden is not None:
        return masked(x, hidden)
    return derived(derive, x, 0, torch.arange(len(x))) if kind in ("grey", "mask") else x


def blurred(x: Tensor, deviation: float) -> Tensor:
    """Returns images [B, C, H, W] after a Gaussian blur of this deviation in pixels, over 3 deviations at least."""
    return _filtered(_filtered(x, 2, x.shape[2], deviation), 3, x.shape[3], deviation)


def bicubic(x: Tensor, height: int, width: int) -> Tensor:
    """Returns images [B, C, H, W] at another size, clipped to [-1, 1]: bicubic, antialiased as in Pillow."""
    return _filtered(_filtered(x, 2, height), 3, width).clamp(-1, 1)


def _filtered(x: Tensor, dim: int, size: int, blur: float = 0.0) -> Tensor:
    """Resamples one axis to a size, or blurs it."""
    places, weights = (each.to(x.device) for each in _taps(x.shape[dim], size, blur))
    shape = [-1 if dim == axis else 1 for axis in range(4)]
    parts = (x.index_select(dim, place) * weight.view(shape) for place, weight in zip(places, weights, strict=True))
    # A convolution may be rounded otherwise for another number of images.
    return functools.reduce(torch.add, parts)


@functools.cache
def _taps(before: int, after: int, blur: float) -> tuple[Tensor, Tensor]:
    """Returns the pixels that make each new one, int64 [taps, after], and their weights, float32; beyond the border 0.

    The filter is a Gaussian of deviation `blur`, or the cubic of Keys 1981 with a = −1/2, stretched if pixels merge.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    reach = math.ceil(3 * blur) or 2 * stretch
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * scale - 0.5
    places = (centres - reach).ceil() + torch.arange(math.floor(2 * reach) + 1)[:, None]
    distance = (places - centres).abs() / (blur or stretch)
    near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = (-(distance**2) / 2).exp() if blur else cubic
    weights = weights * ((places >= 0) & (places < before))
    return places.clamp(0, before - 1).long(), (weights / weights.sum(dim=0)).float()


def _jpeg(x: Tensor, quality: int) -> Tensor:
    pictures = []
    for pixels in figures.to_pixels(x):
        file = BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
        pictures.append(np.asarray(Image.open(file)).reshape(pixels.shape))
    return torch.from_numpy(np.stack(pictures)).to(x.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _strokes(u: Tensor, size: ImageSize) -> Tensor:
    """Returns strokes from point to point (as Yu et al. 2019, "Free-form image inpainting"), bool [B, 1, H, W].

    Args:
        u: uniform in (0, 1), float32 [B, 3 `STROKES` + 2].
        size: of the images.
    """
    height, width = size.shape
    across, down = torch.arange(width, device=u.device) + 0.5, torch.arange(height, device=u.device)[:, None] + 0.5
    x, y, widths = (part[..., None, None] for part in u.split([STROKES + 1, STROKES + 1, STROKES], dim=1))
    x, y = x * width, y * height
    radii = (WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * widths) * (min(height, width) / 2)
    hidden = torch.zeros(len(u), height, width, dtype=torch.bool, device=u.device)
    for stroke in range(STROKES):
        from_x, from_y = across - x[:, stroke], down - y[:, stroke]
        along_x, along_y = x[:, stroke + 1] - x[:, stroke], y[:, stroke + 1] - y[:, stroke]
        share = (from_x * along_x + from_y * along_y) / (along_x * along_x + along_y * along_y).clamp(min=1e-6)
        off_x, off_y = from_x - share.clamp(0, 1) * along_x, from_y - share.clamp(0, 1) * along_y
        hidden |= off_x * off_x + off_y * off_y < radii[:, stroke] * radii[:, stroke]
    return hidden[:, None]


def noised(condition: Condition, level: Tensor, noise: Tensor) -> Condition:
    """Returns the condition with the image √(1 − s²) c + s ε (Ho et al. 2022, "Cascaded Diffusion Models", section 4).

    Args:
        condition: has an image.
        level: s of each image, below 1, float64 [B], on a device that has it.
        noise: ε, float32 [B, Cc, H, W].
    """
    assert condition.image is not None
    kept, added = (part.float().to(noise.device) for part in (randomness.square_root(1 - level * level), level))
    image = kept.view(-1, 1, 1, 1) * condition.image + added.view(-1, 1, 1, 1) * noise
    return condition._replace(image=image, image_noise=added)


@dataclass(frozen=True)
class VectorStatistics:
    """The names of a dataset's numbers, and their statistics, with which a network gets them."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, rows: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """Returns (value − mean)/deviation of one row of numbers, or of several, float32 [n, k].

        Raises:
            ValueError: a row has another number of numbers, or one is not finite.
        """
        values = np.atleast_2d(np.array(rows, dtype=np.float64))
        if values.shape[1:] != (len(self.names),) or not np.isfinite(values).all():
            raise ValueError(f"a condition vector has {len(self.names)} finite numbers: {', '.join(self.names)}")
        return torch.from_numpy((values - self.mean) / self.std).float()


def read_pictures(
    pictures: Sequence[Picture], channels: int, size: ImageSize, resize_filter: str = "bicubic"
) -> Tensor:
    """Returns pictures, or files or folders of them, at a size, float32 [n, C, H, W] in [-1, 1], for C = 1 or 3.

    Raises:
        ValueError: a picture has more than 8 bits, which Pillow would clip to white.
    """
    opened = list[Image.Image]()
    for one in pictures:
        if isinstance(one, Image.Image):
            opened.append(one)
        else:
            files = sorted(Path(one).iterdir()) if Path(one).is_dir() else [one]
            opened += [Image.open(file) for file in files]
    if deep := [one.mode for one in opened if one.mode[0] in "IF"]:
        raise ValueError(f"condition: a picture has more than 8 bits (mode {deep[0]}): scale it to 0 … 255, mode L")
    mode, shape = "L" if channels == 1 else "RGB", (size.width, size.height)
    pixels = [np.asarray(one.convert(mode).resize(shape, Image.Resampling[resize_filter.upper()])) for one in opened]
    return torch.from_numpy(np.stack(pixels).reshape(-1, *size.shape, channels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def in_turn(image: Tensor | None, vectors: Tensor | None) -> Callable[[Tensor], Condition]:
    """Returns the function of seeds, int64 [B], to conditions of which seed k takes number k mod n.

    Args:
        image: condition images, float32 [n, Cc, H, W].
        vectors: normalised numbers, float32 [n, k].
    """
    flagged = with_flag(vectors)

    def given(seeds: Tensor) -> Condition:
        image_of, vector_of = (None if each is None else each[seeds % len(each)] for each in (image, flagged))
        return Condition(image=image_of, vector=vector_of)

    return given


def with_flag(vectors: Tensor | None) -> Tensor | None:
    """Returns normalised numbers [B, k] as networks get them: [B, k + 1], with 1 at the end."""
    return None if vectors is None else F.pad(vectors, (0, 1), value=1.0)


def without(condition: Condition, dropped: Iterable[tuple[str, Tensor | bool]], null_class: int) -> Condition:
    """Returns the condition with the named fields left out where `dropped`, bool [B], is true."""
    for name, where in dropped:
        if (value := getattr(condition, name)) is not None:
            where = torch.as_tensor(where, device=value.device).view(-1, *[1] * (value.ndim - 1))
            left_out = null_class if name == "labels" else 0
            condition = condition._replace(**{name: torch.where(where, left_out, value)})
    return condition


def learnt(
    condition: Condition,
    x: Tensor,
    seed: int,
    image_numbers: Tensor,
    settings: Conditioning,
    *,
    dropout: float = 0.0,
    null_class: int = 0,
    noise: bool = True,
) -> Condition:
    """Returns what a network is told in training: derives the condition image, adds noise, and leaves some out.

    Args:
        condition: with the class, image and vector of the dataset, if it has them.
        x: the learnt images, float32 [B, C, H, W] in [-1, 1].
        seed: the run's seed.
        image_numbers: int64 [B], on a device that draws.
        settings: those of the run.
        dropout: see `ddpm.randomness.drops_conditions`.
        null_class: the number of the class for images without a class.
        noise: whether noise is added.
    """
    if settings.derive:
        condition = condition._replace(image=derived(settings.derive, x, seed, image_numbers))
    if settings.noise and condition.image is not None:
        u = randomness.augmentation_uniforms(Purpose.CONDITION_LEVEL, seed, image_numbers, 1)[:, 0]
        shape = condition.image.shape[1:]
        added = randomness.condition_noise(Purpose.CONDITION_NOISE, image_numbers, seed, shape, x.device)
        condition = noised(condition, u * settings.noise * noise, added)
    if dropout:
        there = [name for name in ("labels", "image", "vector") if getattr(condition, name) is not None]
        dropped = randomness.drops_conditions(seed, image_numbers, dropout, len(there))
        condition = without(condition, zip(there, dropped.to(x.device), strict=True), null_class)
    return condition
