"""The random function against its published answers, and the draws against what the training loop relies on."""

import math
import struct
from itertools import product

import pytest
import torch

from ddpm.randomness import (
    Purpose,
    _box_muller,
    conditions_on_itself,
    dropout_seed,
    drops_label,
    philox,
    sampling_noise,
    training_flips,
    training_noise,
    training_uniforms,
)

ONES = 0xFFFFFFFF
SHAPES = [(3, 8, 8), (1, 7, 5), (1, 1, 1), (3, 5, 7)]
# Known answers of Random123, the authors' library: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

OFFSET_DRAWS = ((training_noise, (42, torch.tensor([2**40]))), (sampling_noise, (torch.tensor([-1]), 1000)))
# Bytes of float32, little-endian.
PINNED_TRAINING = "5c5e783fe8ac46bed2289e3f3b43f6bfe0e4003ddcfdf33e3e8c25bf3529d03f"
PINNED_SAMPLING = "ec92febf3e3edabe012572bf1eda3c3f"
PINNED_TIMESTEPS = [261, 217, 218, 999, 702, 955, 642, 998]
PINNED_FLIPS = [1, 1, 0, 1, 0, 1, 1, 1]
PINNED_DROPOUT = 2038940925434337306
PINNED_OFFSETS = "0cb49dbf787749bf16b83fc09df0a7bf"
PINNED_LOST_LABELS = [0, 1, 1, 0, 1, 1, 1, 1]
PINNED_COINS = [0, 1, 1, 1, 0, 1, 0, 1]


def test_philox_gives_the_known_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        assert philox(counter, key) == expected
    words = torch.randint(0, 2**32, (6, 200), generator=torch.Generator().manual_seed(0))
    words[:, :4] = ONES
    result = torch.stack(philox(tuple(words[:4]), tuple(words[4:])))
    for (c0, c1, c2, c3, k0, k1), found in zip(words.T.tolist(), result.T.tolist(), strict=True):
        assert tuple(found) == philox((c0, c1, c2, c3), (k0, k1))


def test_normals_are_box_muller() -> None:
    """Every value from first principles: counter layout, uniforms, and the library's log, cosine and sine."""
    seed, number, shape = 0x1234567890ABCDEF, 5_000_000_123, (3, 5, 7)
    noise = training_noise(seed, torch.tensor([7, number]), shape, "cpu")[1].flatten()
    key = (0x90ABCDEF, 0x12345678)
    expected = []
    for block in range(math.ceil(105 / 4)):
        words = philox((block, Purpose.TRAINING_NOISE, number % 2**32, number // 2**32), key)
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            angle = math.pi * (second / 2**31 - 1)
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(noise, torch.tensor(expected[:105]), rtol=1e-6, atol=1e-7)


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
    blocks = torch.arange(5_000)
    noise = training_noise(8, torch.tensor([1]), (1, 100, 200), "cpu").view(-1, 4)
    words = torch.stack(philox((blocks, 0, 1, 0), (8, 0)), dim=1)
    expected = [box_muller_one_at_a_time(a, b) + box_muller_one_at_a_time(c, d) for a, b, c, d in words.tolist()]
    assert torch.equal(noise, torch.tensor(expected, dtype=torch.float64).float())
    extremes = [0, 1, 2**31 - 1, 2**31, ONES]
    radius_words, angle_words = torch.tensor(list(product(extremes, extremes))).unbind(1)
    pairs = torch.stack(_box_muller(radius_words, angle_words), dim=1)
    expected = [box_muller_one_at_a_time(a, b) for a, b in product(extremes, extremes)]
    assert torch.equal(pairs, torch.tensor(expected, dtype=torch.float64))
    assert pairs.norm(dim=1).max().item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-12)
    assert pairs.norm(dim=1).min().item() == pytest.approx(2**-16, rel=1e-5)


def test_noise_is_pinned() -> None:
    """A changed value would change the noise of every run that is resumed: these must never be updated."""
    noise = training_noise(42, torch.tensor([0, 2**40]), (1, 2, 2), "cpu")
    assert noise.numpy().astype("<f4").tobytes().hex() == PINNED_TRAINING
    noise = sampling_noise(torch.tensor([42, -1]), 1000, (1, 1, 2), "cpu")
    assert noise.numpy().astype("<f4").tobytes().hex() == PINNED_SAMPLING
    assert (training_uniforms(42, torch.arange(8)) * 1000).long().tolist() == PINNED_TIMESTEPS
    assert training_flips(42, torch.arange(8)).int().tolist() == PINNED_FLIPS
    assert dropout_seed(42, 128) == PINNED_DROPOUT
    shifted = [draw(*of, (1, 1, 2), "cpu", 1.0) for draw, of in OFFSET_DRAWS]
    assert torch.cat(shifted).numpy().astype("<f4").tobytes().hex() == PINNED_OFFSETS
    assert drops_label(42, torch.arange(8), 0.5).int().tolist() == PINNED_LOST_LABELS
    assert [int(conditions_on_itself(42, number)) for number in range(8)] == PINNED_COINS


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_are_independent_of_the_batch(shape: tuple[int, ...]) -> None:
    numbers = torch.randperm(37, generator=torch.Generator().manual_seed(0)) + 2**33
    noise = training_noise(9, numbers, shape, "cpu")
    assert (noise.shape, noise.dtype) == ((37, *shape), torch.float32)
    uniforms, flips = training_uniforms(9, numbers), training_flips(9, numbers)
    assert (uniforms.dtype, flips.dtype) == (torch.float64, torch.bool)
    for micro_batch in (1, 2, 3, 5, 16):
        parts = numbers.split(micro_batch)
        assert torch.equal(torch.cat([training_noise(9, part, shape, "cpu") for part in parts]), noise)
        assert torch.equal(torch.cat([training_uniforms(9, part) for part in parts]), uniforms)
        assert torch.equal(torch.cat([training_flips(9, part) for part in parts]), flips)
        assert torch.equal(torch.cat([drops_label(9, part, 0.4) for part in parts]), drops_label(9, numbers, 0.4))
        shifted = torch.cat([training_noise(9, part, shape, "cpu", 0.3) for part in parts])
        assert torch.equal(shifted, training_noise(9, numbers, shape, "cpu", 0.3))
    seeds = torch.tensor([3, 2**62, 0, -5, 3])
    noise = sampling_noise(seeds, 999, shape, "cpu")
    assert torch.equal(noise[0], noise[4])
    assert torch.equal(torch.cat([sampling_noise(seed, 999, shape, "cpu") for seed in seeds.split(1)]), noise)
    assert not torch.equal(sampling_noise(seeds, 1000, shape, "cpu"), noise)


def test_noise_does_not_depend_on_threads() -> None:
    """Large enough for several threads, whose share of the work begins and ends within vectors."""
    numbers = torch.arange(67)
    noise = training_noise(1, numbers, (3, 33, 31), "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(training_noise(1, numbers, (3, 33, 31), "cpu"), noise)
    finally:
        torch.set_num_threads(threads)
    parts = [training_noise(1, part, (3, 33, 31), "cpu") for part in numbers.split(13)]
    assert torch.equal(torch.cat(parts), noise)


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
        lost = drops_label(11, numbers, probability).double()
        bound = 4 * (probability * (1 - probability) / 100_000) ** 0.5
        assert lost.mean().item() == pytest.approx(probability, abs=bound)
        for other in (training_uniforms(11, numbers), training_flips(11, numbers).double()):
            assert torch.corrcoef(torch.stack([lost, other]))[0, 1].abs() < 4 / 100_000**0.5
    assert not drops_label(11, numbers, 0.0).any()
    coins = [conditions_on_itself(seed, number) for seed in (0, 2**63 - 1) for number in range(5_000)]
    assert sum(coins) / 10_000 == pytest.approx(0.5, abs=0.02)
    assert sum(a == b for a, b in zip(coins[:5_000], coins[5_000:], strict=True)) / 5_000 == pytest.approx(
        0.5, abs=0.03
    )


def test_offset_noise_has_its_covariance() -> None:
    """I + offset² 11ᵀ within a channel, and nothing between channels, images or draws."""
    offset, count = 0.5, 40_000
    seeds = torch.arange(count)
    for noise in (
        training_noise(5, seeds, (2, 1, 2), "cpu", offset),
        sampling_noise(seeds, 3, (2, 1, 2), "cpu", offset),
    ):
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
