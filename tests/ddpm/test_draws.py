"""Draws by an image's number: Philox against its published answers, noise, augmentation and latents.

The judges are torchvision, matrices of the tests' own and functions that are known everywhere.
"""

import math
import struct
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as torchvision

from ddpm.augment import LABELS, Augmentation, Latents, random_boxes, random_transforms, transform
from ddpm.catalogue import Conditioning
from ddpm.conditions import learnt
from ddpm.image_size import ImageSize
from ddpm.objective import Condition
from ddpm.randomness import (
    Purpose,
    _box_muller,
    augmentation_uniforms,
    condition_noise,
    conditions_on_itself,
    dropout_seed,
    drops_conditions,
    philox,
    sampling_noise,
    training_flips,
    training_noise,
    training_uniforms,
)
from tests.ddpm.known import normal

ONES = 0xFFFFFFFF
PI_KEY = (0xA4093822, 0x299F31D0)
# Known answers of Random123, the authors' library: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
NONE = Augmentation(flip=False, crop_scale=(1.0, 1.0), probability=0.0)
ALL = Augmentation(flip=True, crop_scale=(0.5, 1.0), probability=0.5)
SIZE = ImageSize(24, 24)
SIZES = (SIZE, ImageSize(16, 24), ImageSize(24, 12))
LATENTS = Latents((3.0, -1.0), (2.0, 0.5))


PINNED_NOISE = "5c5e783fe8ac46bed2289e3f3b43f6bfe0e4003ddcfdf33e3e8c25bf3529d03f"


def test_philox_gives_the_known_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        assert philox(counter, key) == expected
    words = torch.randint(0, 2**32, (6, 200), generator=torch.Generator().manual_seed(0))
    words[:, :4] = ONES
    result = torch.stack(philox(tuple(words[:4]), tuple(words[4:])))
    for (c0, c1, c2, c3, k0, k1), found in zip(words.T.tolist(), result.T.tolist(), strict=True):
        assert tuple(found) == philox((c0, c1, c2, c3), (k0, k1))


def box_muller_one_at_a_time(radius_word: int, angle_word: int) -> tuple[float, float]:
    """The module's arithmetic in Python's floats: IEEE 754 doubles, no vectors, no fused operations."""

    def series(x: float, coefficients: list[float]) -> float:
        total = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            total = total * x + coefficient
        return total

    fraction, exponent = math.frexp((radius_word + 0.5) * 2.0**-32)
    z = (2 * fraction - math.sqrt(2)) / (2 * fraction + math.sqrt(2))
    logarithm = series(z * z, [2 / (2 * k + 1) for k in range(9)]) * z + (exponent - 1 + 0.5) * math.log(2)
    squared_radius = logarithm * -2
    (bits,) = struct.unpack("<q", struct.pack("<d", squared_radius))
    (inverse,) = struct.unpack("<d", struct.pack("<q", int(1.5 * (1023 - 0.045) * 2**52) - (bits >> 1)))
    for _ in range(4):
        inverse *= (inverse * inverse) * (squared_radius * -0.5) + 1.5
    radius = inverse * squared_radius

    angle = (angle_word - 2**31) * (math.pi / 2**33)
    cosine = series(angle * angle, [(-1) ** k / math.factorial(2 * k) for k in range(8)])
    sine = series(angle * angle, [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]) * angle
    for _ in range(2):
        cosine, sine = (cosine - sine) * (cosine + sine), cosine * sine * 2
    return cosine * radius, sine * radius


def test_noise_is_plain_ieee_arithmetic() -> None:
    """So it is the same on every processor and card: library functions differ in the last bit, +, -, × and ÷ do not."""
    seed, number, blocks = 0x1234567890ABCDEF, 5_000_000_123, torch.arange(5_000)
    noise = training_noise(seed, torch.tensor([7, number]), (1, 100, 200), "cpu")[1].view(-1, 4)
    counter = (blocks, Purpose.TRAINING_NOISE, number % 2**32, number // 2**32)
    words = torch.stack(philox(counter, (0x90ABCDEF, 0x12345678)), dim=1)
    expected = [box_muller_one_at_a_time(a, b) + box_muller_one_at_a_time(c, d) for a, b, c, d in words.tolist()]
    assert torch.equal(noise, torch.tensor(expected, dtype=torch.float64).float())
    extremes = [*product([0, 1, 2**31 - 1, 2**31, ONES], repeat=2)]
    pairs = torch.stack(_box_muller(*torch.tensor(extremes).unbind(1)), dim=1)
    expected = [box_muller_one_at_a_time(a, b) for a, b in extremes]
    assert torch.equal(pairs, torch.tensor(expected, dtype=torch.float64))
    for (radius_word, angle_word), pair in zip(extremes, pairs.tolist(), strict=True):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        angle = math.pi * (angle_word / 2**31 - 1)
        assert pair == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-9, abs=1e-10)


FEW = torch.arange(8)
FAR = torch.tensor([2**40])


@pytest.mark.parametrize(
    ("found", "pinned"),
    [
        (training_noise(42, torch.tensor([0, 2**40]), (1, 2, 2), "cpu"), PINNED_NOISE),
        (sampling_noise(torch.tensor([42, -1]), 1000, (1, 1, 2), "cpu"), "ec92febf3e3edabe012572bf1eda3c3f"),
        (training_noise(42, FAR, (1, 1, 2), "cpu", 1.0), "0cb49dbf787749bf"),
        (sampling_noise(torch.tensor([-1]), 1000, (1, 1, 2), "cpu", 1.0), "16b83fc09df0a7bf"),
        ((training_uniforms(42, FEW) * 1000).long(), [261, 217, 218, 999, 702, 955, 642, 998]),
        (training_flips(42, FEW).int(), [1, 1, 0, 1, 0, 1, 1, 1]),
        (torch.tensor(dropout_seed(42, 128)), 2038940925434337306),
        (drops_conditions(42, FEW, 0.5, 1)[0].int(), [0, 1, 1, 0, 1, 1, 1, 1]),
        (drops_conditions(42, FEW, 0.2, 3)[1].int(), [0, 0, 0, 1, 1, 1, 1, 0]),
        (condition_noise(Purpose.CONDITION_NOISE, FAR, 42, (1, 1, 2), "cpu"), "7d7e3d3fe464693f"),
        (condition_noise(Purpose.DERIVED_NOISE, FAR, 42, (1, 1, 2), "cpu"), "6c238c3f9941f23e"),
        (condition_noise(Purpose.SAMPLING_CONDITION, 0, FAR, (1, 1, 2), "cpu"), "3656a2bec2d3acbe"),
        ((augmentation_uniforms(Purpose.CONDITION, 42, FAR, 2) * 1000).long(), [[754, 784]]),
        ((augmentation_uniforms(Purpose.CONDITION_LEVEL, 42, FAR, 2) * 1000).long(), [[385, 439]]),
        (torch.tensor([int(conditions_on_itself(42, number)) for number in range(8)]), [0, 1, 1, 1, 0, 1, 0, 1]),
    ],
)
def test_draws_are_pinned(found: Tensor, pinned) -> None:
    """A changed value would change the noise of every run that is resumed: these must never be updated.

    Those of noise are bytes of float32, little-endian.
    """
    is_noise = found.is_floating_point()
    assert (found.numpy().astype("<f4").tobytes().hex() if is_noise else found.tolist()) == pinned


def moments(images: int) -> Tensor:
    mean = normal(0, (images, 2, 4, 4), torch.float32) * torch.tensor([1.6, 0.4])[:, None, None]
    mean += torch.tensor([3.0, -1.0])[:, None, None]
    log_variance = 2 * torch.tensor([1.2, 0.3]).log()[:, None, None].expand(images, 2, 4, 4)
    return torch.cat([mean, log_variance], dim=1).half()


def images_of(count: int, size: ImageSize = SIZE) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augmented(seed: int, numbers: Tensor, part: slice, size: ImageSize) -> Tensor:
    """Images and labels."""
    made = ALL.apply(images_of(61, size)[part], ALL.draw(seed, numbers, size))
    return torch.cat([each.flatten(1) for each in made], dim=1)


def conditions(settings: Conditioning, seed: int, numbers: Tensor, part: slice) -> Tensor:
    """Condition images, some of which are left out, their noise and their classes."""
    x, labels = images_of(61)[part].float() / 127.5 - 1, Condition(torch.zeros(len(numbers), dtype=torch.int64))
    told = learnt(labels, x, seed, numbers, settings, dropout=0.2, null_class=1)
    return torch.cat([each.flatten(1).float() for each in (told.labels[:, None], told.image)], dim=1)


DRAWS = {
    "noise": lambda seed, numbers, _: training_noise(seed, numbers, (3, 5, 7), "cpu"),
    "small noise": lambda seed, numbers, _: training_noise(seed, numbers, (1, 1, 1), "cpu"),
    # Large enough for several threads, whose share of the work begins and ends within vectors.
    "large noise": lambda seed, numbers, _: training_noise(seed, numbers, (3, 33, 31), "cpu"),
    "offset noise": lambda seed, numbers, _: training_noise(seed, numbers, (3, 8, 8), "cpu", 0.3),
    "sampling": lambda seed, numbers, _: sampling_noise(numbers, seed, (1, 7, 5), "cpu", 0.3),
    "points": lambda seed, numbers, _: training_uniforms(seed, numbers),
    "flips": lambda seed, numbers, _: training_flips(seed, numbers),
    "labels": lambda seed, numbers, _: drops_conditions(seed, numbers, 0.2, 3).T,
    "brush": lambda seed, numbers, part: conditions(Conditioning("mask:brush", noise=0.5), seed, numbers, part),
    "noisy": lambda seed, numbers, part: conditions(Conditioning("noise:0.3"), seed, numbers, part),
    "latents": lambda seed, numbers, part: LATENTS.drawn(seed, numbers, moments(61)[part]),
    "augmentation": lambda seed, numbers, part: augmented(seed, numbers, part, SIZES[0]),
    "augmentation of others": lambda seed, numbers, part: augmented(seed, numbers, part, SIZES[1]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_depend_on_seed_and_number(name: str) -> None:
    """On no other image of the batch, and on no number of threads."""
    draw, usual = DRAWS[name], torch.get_num_threads()
    numbers = torch.randperm(61, generator=torch.Generator().manual_seed(0)) + 2**33
    whole = draw(9, numbers, slice(None))
    expected = {"points": torch.float64, "flips": torch.bool, "labels": torch.bool}
    assert whole.dtype == expected.get(name, torch.float32)
    for size in (1, 7, 16):
        parts = [slice(start, start + size) for start in range(0, 61, size)]
        assert torch.equal(torch.cat([draw(9, numbers[part], part) for part in parts]), whole)
    assert not torch.equal(draw(10, numbers, slice(None)), whole)
    assert not torch.equal(draw(9, numbers + 61, slice(None)), whole)
    torch.set_num_threads(1)
    alone = draw(9, numbers, slice(None))
    torch.set_num_threads(usual)
    assert torch.equal(alone, whole)


def test_uniforms_are_uniform() -> None:
    cells, count = 1000, 1_000_000
    uniforms = training_uniforms(11, torch.arange(count))
    counts = (uniforms * cells).long().bincount(minlength=cells)
    chi_squared = ((counts - count / cells) ** 2 / (count / cells)).sum().item()
    # 999 degrees of freedom: five standard deviations from the mean.
    assert abs(chi_squared - 999) < 5 * (2 * 999) ** 0.5
    assert uniforms.min() > 0 and uniforms.max() < 1
    assert (uniforms * 2**33 % 2 == 1).all()


def test_labels_are_dropped_by_probability() -> None:
    numbers = torch.arange(100_000)
    for probability in (0.1, 0.5):
        lost = drops_conditions(11, numbers, probability, 1)[0].double()
        bound = 4 * (probability * (1 - probability) / 100_000) ** 0.5
        assert lost.mean().item() == pytest.approx(probability, abs=bound)
        for other in (training_uniforms(11, numbers), training_flips(11, numbers).double()):
            assert torch.corrcoef(torch.stack([lost, other]))[0, 1].abs() < 4 / 100_000**0.5
    assert not drops_conditions(11, numbers, 0.0, 3).any()
    # All of three conditions at once, and with the same probability each alone.
    patterns = (drops_conditions(11, numbers, 0.1, 3).T.int() @ torch.tensor([1, 2, 4], dtype=torch.int32)).bincount()
    assert (patterns / 100_000).tolist() == pytest.approx([0.6, 0.1, 0.1, 0, 0.1, 0, 0, 0.1], abs=0.005)
    coins = [conditions_on_itself(seed, number) for seed in (0, 2**63 - 1) for number in range(5_000)]
    assert sum(coins) / 10_000 == pytest.approx(0.5, abs=0.02)
    agree = sum(a == b for a, b in zip(coins[:5_000], coins[5_000:], strict=True))
    assert agree / 5_000 == pytest.approx(0.5, abs=0.03)


def test_offset_noise_has_its_covariance() -> None:
    """I + offset² 11ᵀ within a channel, and nothing between channels, images or draws."""
    offset, count = 0.5, 40_000
    seeds = torch.arange(count)
    how = ((2, 1, 2), "cpu", offset)
    for noise in (training_noise(5, seeds, *how), sampling_noise(seeds, 3, *how)):
        block = torch.eye(2) + offset**2
        assert (torch.cov(noise.flatten(1).T) - torch.block_diag(block, block)).abs().max() < 0.05
        assert (noise[1:] * noise[:-1]).mean().abs() < 0.02
    draws = [sampling_noise(seeds, draw, (1, 1, 1), "cpu", 3.0).flatten() for draw in (0, 1)]
    assert torch.corrcoef(torch.stack(draws))[0, 1].abs() < 0.02


def test_dropout_seeds_are_distinct() -> None:
    seeds = [dropout_seed(run_seed, number) for run_seed in (0, 1, -1, 2**63) for number in range(0, 64_000, 64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    torch.manual_seed(max(seeds))


def test_untouched_images_are_exactly_themselves() -> None:
    numbers, images = torch.arange(61), images_of(61)
    scaled = images.float() / 127.5 - 1
    few = replace(NONE, probability=0.1)
    x, labels = few.apply(images, few.draw(7, numbers, SIZE))
    untouched = ~labels.any(dim=1)
    assert 10 < untouched.sum() < 40
    assert torch.equal(x[untouched], scaled[untouched])
    plain = replace(NONE, flip=True)
    x, none = plain.apply(images, plain.draw(7, numbers, SIZE))
    mirrored = (x == scaled.flip(-1)).flatten(1).all(dim=1)
    assert none is None and 20 < mirrored.sum() < 41
    assert torch.equal(x[~mirrored], scaled[~mirrored])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_are_torchvisions(size: ImageSize) -> None:
    """Boxes have the aspect of the images, to which its ratio is not relative."""
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


def _matrix(*rows: list[float]) -> np.ndarray:
    """The first two rows of a matrix of homogeneous coordinates, as one."""
    return np.array([*rows, [0, 0, 1]])


def _scaled(x: float, y: float) -> np.ndarray:
    return _matrix([x, 0, 0], [0, y, 0])


def _rotated(angle: float) -> np.ndarray:
    return _matrix([math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0])


def _source_in_edm(label: list[float], sign: int, size: ImageSize) -> np.ndarray:
    """EDM's `G_inv` in pixels from the middle, y down, written out from its `training/augment.py`, flips included."""
    flip, turn, scale, cosine, sine, along, across, right, down = label
    stretch, axis = sign * math.hypot(along, across), math.atan2(across, along)
    matrix = _scaled(1 - 2 * flip, 1 - 2 * turn) @ _scaled(2 ** (-0.2 * scale), 2 ** (-0.2 * scale))
    matrix = matrix @ _rotated(math.atan2(sine, cosine + 1))
    matrix = matrix @ _rotated(-axis) @ _scaled(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) @ _rotated(axis)
    return matrix @ _matrix([1, 0, -right * size.width / 8], [0, 1, -down * size.height / 8])


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


def test_latents_are_normalised_and_restored():
    """1.6² + 1.2² = 2² and 0.4² + 0.3² = 0.5²: the deviation of what is drawn is of the mean and of the draw."""
    drawn = LATENTS.drawn(0, torch.arange(4000), moments(4000))
    assert drawn.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (drawn.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    mean, log_variance = moments(4000).float().chunk(2, dim=1)
    difference = (LATENTS.restored(drawn) - mean) / (0.5 * log_variance).exp()
    assert difference.mean().abs() < 0.01
    assert abs(difference.std().item() - 1) < 0.01
