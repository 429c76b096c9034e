"""Augmentation of images before they are noised, as a function of the image's number alone.

The host draws it in float64 and rounds once, the device applies it in fp32, pixel by pixel: the result is bit-identical
for every split of a batch over processes and micro-batches.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm import randomness
from ddpm.device import exact_device
from ddpm.image_size import ImageSize
from ddpm.randomness import Purpose

LABELS = 9
SCALE_STD, STRETCH_STD, SHIFT_STD = 0.2, 0.2, 0.125
"""Standard deviations of log₂ of the factors, and of the shift as a share of the image."""
TURNED_STRETCHES = 0.5
"""Share of the stretches with an axis of random direction; the others follow the image's own axes."""
CROP_TRIES, CROP_RATIO = 10, (3 / 4, 4 / 3)


def in_unit_range(images: Tensor) -> Tensor:
    """Returns uint8 or uint16 as float32 in [-1, 1]: x/127.5 − 1, as Ho et al., or x/32767.5 − 1."""
    return images.float() / (torch.iinfo(images.dtype).max / 2) - 1


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a run's images."""

    flip: bool
    """Whether half of them are mirrored; the network gets no label for it."""
    crop_scale: tuple[float, float]
    """Range of the area of `random_boxes`."""
    probability: float
    """Probability of each transform of `random_transforms`."""

    @property
    def labels(self) -> int:
        """Number of labels that the network gets."""
        return LABELS if self.probability else 0

    def draw(self, seed: int, image_numbers: Tensor, size: ImageSize) -> Tensor:
        """Draws the augmentation of the images with these numbers, int64 [B], and this size.

        Returns:
            float32 [B, columns] on the host, for `apply`: one table, so that one copy to the device suffices.
        """
        parts = [randomness.training_flips(seed, image_numbers)[:, None].double() * self.flip]
        if self.crop_scale != (1.0, 1.0):
            u = randomness.augmentation_uniforms(Purpose.CROP, seed, image_numbers, 4 * CROP_TRIES)
            parts.append(random_boxes(u.view(-1, CROP_TRIES, 4), self.crop_scale, size))
        if self.probability:
            u = randomness.augmentation_uniforms(Purpose.AUGMENT, seed, image_numbers, 14)
            parts += random_transforms(u, self.probability, size)
        return torch.cat(parts, dim=1).float()

    def apply(self, images: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        """Applies the drawn rows to uint8 or uint16 images [b, C, H, W].

        Returns:
            float32 [b, C, H, W] in [-1, 1], and the labels for the network, [b, `LABELS`].
        """
        x = in_unit_range(images)
        if self.crop_scale != (1.0, 1.0):
            x = crop(x, drawn[:, 1:5])
        if self.flip:
            x = torch.where(drawn[:, 0, None, None, None] > 0, x.flip(-1), x)
        if not self.probability:
            return x, None
        labels = drawn[:, -LABELS:]
        return transform(x, drawn[:, -LABELS - 6 : -LABELS].view(-1, 2, 3), labels), labels


def random_boxes(u: Tensor, scale: tuple[float, float], size: ImageSize) -> Tensor:
    """Returns boxes of random area, aspect and place, as in torchvision's `RandomResizedCrop` (Szegedy et al. 2015).

    The aspect is relative to that of the images, whose shape the boxes get.

    Args:
        u: uniform in (0, 1), float64 [B, tries, 4]; the first box that fits is used, else the whole image.
        scale: of the area, as a share of the image's: from, to.
        size: of the images.

    Returns:
        float64 [B, 4]: left, top, width and height in whole pixels.
    """
    area = size.height * size.width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = map(math.log, CROP_RATIO)
    ratio = (low + (high - low) * u[..., 1]).exp() * (size.width / size.height)
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= size.width) & (height <= size.height) & (torch.minimum(width, height) > 0)
    left, top = (u[..., 2] * (size.width - width + 1)).floor(), (u[..., 3] * (size.height - height + 1)).floor()
    boxes = torch.stack([left, top, width, height], dim=-1)
    first = boxes[torch.arange(len(u)), fits.int().argmax(dim=1)]
    whole = torch.tensor([0, 0, size.width, size.height], dtype=u.dtype)
    return torch.where(fits.any(dim=1)[:, None], first, whole)


def crop(x: Tensor, boxes: Tensor) -> Tensor:
    """Enlarges each image's box [B, 4] to the whole image, bilinearly, from pixels inside the box alone."""
    height, width = x.shape[-2:]

    def source(axis: int, size: int) -> Tensor:
        centres = (torch.arange(size, device=x.device) + 0.5) / size
        first, length = boxes[:, axis, None], boxes[:, 2 + axis, None]
        places = torch.minimum((first + length * centres - 0.5).clamp(min=first), first + length - 1)
        return (2 * places + 1) / size - 1

    across, down = source(0, width)[:, None, :], source(1, height)[:, :, None]
    grid = torch.stack([across.expand(-1, height, -1), down.expand(-1, -1, width)], dim=-1)
    return _grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _grid_sample(x: Tensor, grid: Tensor, **how: Any) -> Tensor:
    """Does as PyTorch's `grid_sample`; the host computes it for `mps`, which has neither "border" nor "bicubic"."""
    on = exact_device(x.device)
    return F.grid_sample(x.to(on), grid.to(on), **how).to(x.device)


def random_transforms(u: Tensor, probability: float, size: ImageSize) -> tuple[Tensor, Tensor]:
    """Draws EDM's geometric transforms (Karras et al. 2022, appendix F.2) in the order of its `training/augment.py`.

    Mirrored or not (always drawn), upside down or not, scaled, rotated, stretched along an axis, shifted.

    Args:
        u: uniform in (0, 1), float64 [B, 14].
        probability: of each but the first.
        size: of the images, whose pixels are rotated as squares.

    Returns:
        float64 [B, 6]: rows of the matrix [2, 3] that maps a place in the result to its origin in the mirrored image,
        with 0 in the middle and ±1 at the borders; and float64 [B, 9]: the labels for the network, 0 for a transform
        that is not applied.
    """
    mirrored, upside_down = (u[:, :2] < 0.5).double().unbind(1)
    happens = (u[:, 2:7] < probability).double()
    # Uniform on ±π, and standard normal.
    rotation, axis = ((2 * u[:, 7:9] - 1) * math.pi).unbind(1)
    axis = axis * (u[:, 13] < TURNED_STRETCHES)
    scale, stretch, right, down = torch.special.ndtri(u[:, 9:13]).unbind(1)
    drawn = torch.stack([upside_down, scale, rotation, stretch, right, down], dim=1) * happens[:, [0, 1, 2, 3, 4, 4]]
    upside_down, scale, rotation, stretch, right, down = drawn.unbind(1)
    along = torch.stack([2 ** (-STRETCH_STD * stretch), 2 ** (STRETCH_STD * stretch)], dim=1)
    # Undone in the opposite order: shift, stretch, rotation, scale. A positive rotation is counterclockwise to the eye.
    turned = _rotation(rotation - axis) * along[:, None, :]
    matrix = (turned[..., None] * _rotation(axis)[:, None]).sum(dim=2) * 2 ** (-SCALE_STD * scale)[:, None, None]
    # From pixels to the borders' units, which are not equal across and down.
    aspect = size.height / size.width
    matrix = matrix * torch.tensor([[1, aspect], [1 / aspect, 1]], dtype=u.dtype)
    shift = 2 * SHIFT_STD * torch.stack([right, down], dim=1)
    offset = -(matrix * shift[:, None, :]).sum(dim=2, keepdim=True)
    turn = rotation.cos() - 1, rotation.sin()
    stretched = stretch * axis.cos(), stretch * axis.sin()
    labels = torch.stack([mirrored, upside_down, scale, *turn, *stretched, right, down], dim=1)
    return torch.cat([matrix, offset], dim=2).flatten(1), labels


def _rotation(angle: Tensor) -> Tensor:
    """Returns rotation matrices [B, 2, 2]."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)


def transform(x: Tensor, matrices: Tensor, labels: Tensor) -> Tensor:
    """Moves images [B, C, H, W] as `random_transforms` says, reflected at the centres of their border pixels.

    One bicubic interpolation replaces EDM's symlet filters and bilinear interpolation at twice the size, without their
    low-pass filter before an image shrinks. An image that is not moved keeps its values to the bit.
    """
    x = torch.where(labels[:, 0, None, None, None] > 0, x.flip(-1), x)
    x = torch.where(labels[:, 1, None, None, None] > 0, x.flip(-2), x)
    height, width = x.shape[-2:]
    down, across = ((2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in (height, width))

    def source(axis: int, size: int) -> Tensor:
        # With align_corners, ±1 are the centres of the border pixels, at which EDM's padding reflects.
        m = (matrices[:, axis] * (size / max(size - 1, 1)))[..., None, None]
        # One operation at a time: the rounding of a product of matrices may depend on the size of the batch.
        return m[:, 0] * across + m[:, 1] * down[:, None] + m[:, 2]

    grid = torch.stack([source(0, width), source(1, height)], dim=-1)
    moved = _grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
    return torch.where(labels[:, 2:].any(dim=1)[:, None, None, None], moved, x)


@dataclass(frozen=True)
class Latents:
    """The statistics that normalise a dataset's latents to mean 0 and deviation 1 in each of their C channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def drawn(self, seed: int, image_numbers: Tensor, moments: Tensor) -> Tensor:
        """Returns x_0 of images: z ~ N(mean, exp(log-variance)), normalised, by the seed and the images' numbers.

        Args:
            seed: the run's seed.
            image_numbers: int64 [b].
            moments: mean and log-variance, [b, 2 C, h, w].

        Returns:
            float32 [b, C, h, w].
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        noise = randomness.latents_noise(seed, image_numbers, tuple(mean.shape[1:]), mean.device)
        centre, scale = self._of(mean)
        return (mean + (0.5 * log_variance).exp() * noise - centre) / scale

    def restored(self, x: Tensor) -> Tensor:
        """Returns the latents that the autoencoder decodes, for x_0 [b, C, h, w]."""
        centre, scale = self._of(x)
        return x * scale + centre

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each, device=x.device).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return mean, std
