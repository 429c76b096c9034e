"""What becomes of images, against torchvision, matrices of its own and functions that are known everywhere."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as torchvision

from ddpm.augment import LABELS, Augmentation, random_boxes, random_transforms, transform
from ddpm.image_size import ImageSize

NONE = Augmentation(flip=False, crop_scale=(1.0, 1.0), probability=0.0)
ALL = Augmentation(flip=True, crop_scale=(0.5, 1.0), probability=0.5)
SIZE = ImageSize(24, 24)
SIZES = (SIZE, ImageSize(16, 24), ImageSize(24, 12))


def images_of(count: int, size: ImageSize = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size.shape), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("image_size", SIZES[:2], ids=str)
def test_every_split_gives_the_same(image_size: ImageSize) -> None:
    """Also what nothing is done to, which is exactly the image, and its labels zeros."""
    numbers, images = torch.arange(2**33, 2**33 + 61), images_of(61, image_size)
    drawn = ALL.draw(7, numbers, image_size)
    whole, labels = ALL.apply(images, drawn)
    for size in (1, 7):
        for start in range(0, 61, size):
            part = slice(start, start + size)
            assert torch.equal(ALL.draw(7, numbers[part], image_size), drawn[part])
            x, told = ALL.apply(images[part], drawn[part])
            assert torch.equal(x, whole[part]) and torch.equal(told, labels[part])
    few = replace(NONE, probability=0.1)
    x, labels = few.apply(images, few.draw(7, numbers, image_size))
    untouched = ~labels.any(dim=1)
    assert 10 < untouched.sum() < 40
    assert torch.equal(x[untouched], images[untouched].float() / 127.5 - 1)
    plain = replace(NONE, flip=True)
    x, none = plain.apply(images, plain.draw(7, numbers, image_size))
    mirrored = (x == (images.float() / 127.5 - 1).flip(-1)).flatten(1).all(dim=1)
    assert none is None and 20 < mirrored.sum() < 41


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_are_torchvisions(size: ImageSize) -> None:
    """Of the aspect of the images, which its ratio is not relative to."""
    numbers, images = torch.arange(5000), images_of(40, size)
    crops = replace(NONE, crop_scale=(0.3, 0.9))
    drawn = crops.draw(3, numbers, size)
    x, _ = crops.apply(images, drawn[:40])
    boxes = drawn[:, 1:].int().numpy()
    for image, found, (left, top, width, height) in zip(images, x, boxes.tolist(), strict=False):
        expected = torchvision.resized_crop(image.float() / 127.5 - 1, top, left, height, width, [*size.shape])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.manual_seed(0)
    ratio = [bound * size.width / size.height for bound in (3 / 4, 4 / 3)]
    theirs = np.array([RandomResizedCrop.get_params(images[0], (0.3, 0.9), ratio) for _ in numbers])
    # Theirs are top, left, height, width.
    for ours, other in zip(boxes.T, theirs[:, [1, 0, 3, 2]].T, strict=True):
        assert ours.mean() == pytest.approx(other.mean(), abs=5 * other.std() / 50)
        assert ours.std() == pytest.approx(other.std(), rel=0.06)
        quantiles = (0.01, 0.25, 0.5, 0.75, 0.99)
        assert abs(np.quantile(ours, quantiles) - np.quantile(other, quantiles)).max() <= 1


def test_the_first_box_that_fits_counts() -> None:
    """A wide box of all of the area does not fit."""
    unfit, fit = [0.999, 0.999, 0.5, 0.5], [0.001, 0.5, 0.999, 0.001]
    u = torch.tensor([[unfit, unfit], [unfit, fit], [fit, unfit]], dtype=torch.float64)
    assert random_boxes(u, (0.25, 1.0), SIZE).tolist() == [[0, 0, 24, 24], [12, 0, 12, 12], [12, 0, 12, 12]]


def _scaled(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def _rotated(angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


def _shifted(right: float, down: float) -> np.ndarray:
    return np.array([[1, 0, right], [0, 1, down], [0, 0, 1.0]])


def _source_in_edm(label: list[float], sign: int, size: ImageSize) -> np.ndarray:
    """EDM's `G_inv` in pixels from the middle, y down, written out from its `training/augment.py`, flips included."""
    flip, turn, scale, cosine, sine, along, across, right, down = label
    stretch, axis = sign * math.hypot(along, across), math.atan2(across, along)
    matrix = _scaled(1 - 2 * flip, 1 - 2 * turn) @ _scaled(2 ** (-0.2 * scale), 2 ** (-0.2 * scale))
    matrix = matrix @ _rotated(math.atan2(sine, cosine + 1))
    matrix = matrix @ _rotated(-axis) @ _scaled(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) @ _rotated(axis)
    return matrix @ _shifted(-right * size.width / 8, -down * size.height / 8)


@pytest.mark.parametrize("size", [ImageSize(64, 64), ImageSize(48, 80)], ids=str)
def test_transforms_are_edms(size: ImageSize) -> None:
    """A smooth function in the place of an image is known beyond its pixels: the result is the function elsewhere.

    EDM's label (w cos r, w sin r) is that of a stretch along r, or else of as strong a squeeze: both are drawn.
    """

    def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sin(1.3 * x + 0.4) * np.cos(0.9 * y - 0.2) + 0.3 * x

    count, middle = 200, np.array(size.shape) / 2
    u = torch.rand(count, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices, labels = random_transforms(u, 0.5, size)
    x, y = np.meshgrid(*(np.arange(side) - (side - 1) / 2 for side in (size.width, size.height)))
    images = torch.from_numpy(smooth(x / 32, y / 32)).float().expand(count, 1, -1, -1)
    found = transform(images, matrices.view(-1, 2, 3).float(), labels.float())[:, 0].numpy()
    compared, squeezes = 0, []
    for number, label in enumerate(labels.tolist()):
        fits = {}
        for sign in (1, -1):
            at = _source_in_edm(label, sign, size) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
            source_x, source_y, _ = at.reshape(3, *x.shape)
            inside = (abs(source_x) < middle[1] - 2) & (abs(source_y) < middle[0] - 2)
            compared += inside.sum() / 2
            fits[sign] = abs(found[number] - smooth(source_x / 32, source_y / 32))[inside].max(initial=0) < 4e-3
        assert any(fits.values()), number
        if any(label[5:7]) and not all(fits.values()):
            squeezes.append(fits[-1])
    assert compared > count * x.size / 3
    assert len(squeezes) > 80 and 0.3 < np.mean(squeezes) < 0.7


def test_rotations_are_counterclockwise() -> None:
    """By hand: a quarter turn has EDM's label sin w = 1, and its padding repeats no border pixel."""
    image = images_of(1).float()[0]
    # Nothing happens but a rotation by π/2, of the range ±π.
    u = torch.full((1, 14), 0.999, dtype=torch.float64)
    u[0, 4], u[0, 7] = 0, 0.75
    matrices, labels = random_transforms(u, 0.5, SIZE)
    assert labels[0].tolist() == pytest.approx([0, 0, 0, -1, 1, 0, 0, 0, 0])
    turned = transform(image[None], matrices.view(-1, 2, 3).float(), labels.float())[0].numpy()
    assert turned == pytest.approx(np.rot90(image.numpy(), axes=(1, 2)), abs=0.02)
    # Five pixels to the right and three up.
    shift = torch.tensor([[[1.0, 0.0, -10 / 24], [0.0, 1.0, 6 / 24]]])
    moved = transform(image[None], shift, torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 5, -3]]))[0].numpy()
    padded = np.pad(image.numpy(), ((0, 0), (0, 3), (5, 0)), mode="reflect")
    assert moved == pytest.approx(padded[:, 3:, :24], abs=0.02)


def test_draws_have_edms_distributions() -> None:
    labels = replace(NONE, probability=0.12).draw(1, torch.arange(50_000), SIZE)[:, -LABELS:].double()
    shares = (labels != 0).double().mean(dim=0)
    # Half of the stretches follow the image's axes: r = 0, and no w sin r.
    assert shares.tolist() == pytest.approx([0.5, 0.06, *[0.12] * 4, 0.06, *[0.12] * 2], abs=0.008)
    # Standard normal where they happen.
    turned = labels[labels[:, 6] != 0]
    axis = torch.atan2(turned[:, 6], turned[:, 5])
    assert (axis.mean().item(), axis.std().item()) == pytest.approx((0, 2 * math.pi / math.sqrt(12)), abs=0.1)
    labels[:, 6] = torch.where(labels[:, 6] == 0, labels[:, 5], 0)
    for column in (2, 6, 7, 8):
        drawn = labels[:, column][labels[:, column] != 0]
        assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((0, 1), abs=0.05), column
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 4] != 0]
    assert (angle.mean().item(), angle.std().item()) == pytest.approx((0, 2 * math.pi / math.sqrt(12)), abs=0.08)
    # Each happens whatever the others do, but for the two parts of one.
    happened = (labels[:, [0, 1, 2, 4, 5, 7]] != 0).double().T
    assert (torch.corrcoef(happened) - torch.eye(6)).abs().max() < 0.02
