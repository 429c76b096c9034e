"""Random draws keyed by (seed, image number): the same for any batch, micro-batch, world size and device.

Every draw is a pure function of a key and a counter (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"). So a checkpoint needs no state of a generator, and an image's noise does not depend on its process or
its batch. `torch.randn` cannot do that: its values depend on the batch and, on CUDA, on the card.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ddpm.device import exact_device

Word = Tensor | int
"""A 32-bit word, in an int64 tensor or a Python int. Tensors of words broadcast against each other."""

_WORD_MASK = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

# Bits of x, read as an integer, are about 2⁵²·(log₂ x + 1023 - 0.045); this minus half of them are about those of 1/√x.
_INVERSE_ROOT_GUESS = int(1.5 * (1023 - 0.045) * 2**52)
_ARTANH_SERIES = [2 / (2 * k + 1) for k in range(9)]
_SINE_SERIES = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]
_COSINE_SERIES = [(-1) ** k / math.factorial(2 * k) for k in range(8)]


class Purpose(IntEnum):
    """The purpose of a draw, part of its counter. Other numbers would change the noise of every resumed run."""

    TRAINING_NOISE = 0
    POINT = 1
    FLIP = 2
    DROPOUT = 3
    SAMPLING_NOISE = 4
    AUGMENT = 5
    CROP = 6
    LABEL_DROPOUT = 7
    SELF_CONDITIONING = 8
    TRAINING_OFFSET = 9
    SAMPLING_OFFSET = 10
    LATENTS = 11
    CONDITION = 12
    CONDITION_NOISE = 13
    DERIVED_NOISE = 14
    SAMPLING_CONDITION = 15
    CONDITION_LEVEL = 16


def training_noise(
    seed: int, image_numbers: Tensor, shape: Sequence[int], device: torch.device | str, offset: float = 0.0
) -> Tensor:
    """Returns standard normal noise ε for training images.

    Args:
        seed: the run's seed; its 64 bits count.
        image_numbers: int64 [B], the images' numbers in the run.
        shape: (C, H, W) of one image.
        device: device of the noise.
        offset: standard deviation of the shift of each channel as a whole (offset noise; Guttenberg 2023).

    Returns:
        float32 [B, C, H, W].
    """
    noise = _normals(Purpose.TRAINING_NOISE, image_numbers, seed, shape, device)
    if offset:
        noise += offset * _normals(Purpose.TRAINING_OFFSET, image_numbers, seed, (shape[0], 1, 1), device)
    return noise


def latents_noise(seed: int, image_numbers: Tensor, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Returns the noise of the encoded images of these numbers, int64 [B]: standard normal, float32 [B, C, h, w]."""
    return _normals(Purpose.LATENTS, image_numbers, seed, shape, device)


def condition_noise(
    purpose: Purpose, number: Word, seed: Word, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Returns the noise of condition images of this shape, standard normal, float32 [B, *shape].

    Args:
        purpose: what the noise is for.
        number: the images' numbers, int64 [B], or the draw.
        seed: the run's seed, or the images' seeds, int64 [B].
        shape: (Cc, H, W) of one condition.
        device: device of the noise.
    """
    return _normals(purpose, number, seed, shape, device)


def sampling_noise(
    seeds: Tensor, draw: int, shape: Sequence[int], device: torch.device | str, offset: float = 0.0
) -> Tensor:
    """Returns standard normal noise for sampling, which depends on an image's seed and the draw alone.

    Args:
        seeds: int64 [B], one seed per image.
        draw: number of the image's draw: 0 for the noise at the start, then in the order of the sampler.
        shape: (C, H, W) of one image.
        device: device of the noise.
        offset: the offset noise of the training.

    Returns:
        float32 [B, C, H, W].
    """
    noise = _normals(Purpose.SAMPLING_NOISE, draw, seeds, shape, device)
    if offset:
        noise += offset * _normals(Purpose.SAMPLING_OFFSET, draw, seeds, (shape[0], 1, 1), device)
    return noise


def training_uniforms(seed: int, image_numbers: Tensor) -> Tensor:
    """Returns the uniform number that decides the point of each image.

    Args:
        seed: the run's seed.
        image_numbers: int64 [B], the images' numbers in the run.

    Returns:
        float64 [B], multiples of 2⁻³³ strictly between 0 and 1, on the device of `image_numbers`.
    """
    return (_first_word(Purpose.POINT, image_numbers, seed).double() + 0.5) * 2.0**-32


def training_flips(seed: int, image_numbers: Tensor) -> Tensor:
    """Returns whether each image is mirrored.

    Args:
        seed: the run's seed.
        image_numbers: int64 [B], the images' numbers in the run.

    Returns:
        bool [B] on the device of `image_numbers`, each true with probability 1/2.
    """
    return _first_word(Purpose.FLIP, image_numbers, seed) >= 1 << 31


def augmentation_uniforms(purpose: Purpose, seed: int, image_numbers: Tensor, count: int) -> Tensor:
    """Returns the uniform numbers of `AUGMENT`, `CROP` or `CONDITION`, as `training_uniforms`, float64 [B, count]."""
    blocks = torch.arange(math.ceil(count / 4), device=image_numbers.device)
    words = philox((blocks, int(purpose), *_halves(image_numbers[:, None])), _halves(seed))
    flat = torch.stack([torch.as_tensor(word) for word in words], dim=-1).flatten(1)
    return (flat[:, :count].double() + 0.5) * 2.0**-32


def drops_conditions(seed: int, image_numbers: Tensor, probability: float, count: int) -> Tensor:
    """Returns whether each image is learnt without each of `count` conditions, such as its class.

    With this probability it is learnt without any, and if they are several, with the same one without each alone
    (Brooks et al. 2023, section 3.2.1).

    Returns:
        bool [count, B], on the device of `image_numbers`, int64 [B].
    """
    word, share = _first_word(Purpose.LABEL_DROPOUT, image_numbers, seed), probability * 2**32
    alone = [(word >= (1 + place) * share) & (word < (2 + place) * share) & (count > 1) for place in range(count)]
    return (word < share) | torch.stack(alone)


def conditions_on_itself(seed: int, batch_number: int) -> bool:
    """Returns whether the network gets its own estimate in this batch, with probability 1/2, the same on all ranks."""
    word, *_ = philox((0, int(Purpose.SELF_CONDITIONING), *_halves(batch_number)), _halves(seed))
    return int(word) >= 1 << 31


def dropout_seed(seed: int, first_image_number: int, layer: int = 0) -> int:
    """Returns the seed, 63 bits, of a layer's dropout masks for the images computed at once from this number on."""
    upper, lower, _, _ = philox((layer, int(Purpose.DROPOUT), *_halves(first_image_number)), _halves(seed))
    return int(upper << 32 | lower) >> 1


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Computes Philox4x32-10, a counter-based random function (Salmon et al. 2011, section 3.3).

    Args:
        counter: four words in 0..2³²-1.
        key: two words in 0..2³²-1.

    Returns:
        Four random words in 0..2³²-1, in the shape to which counter and key broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # A product may wrap past 2⁶³, but shift and mask still give its upper word. c1 and c3 keep whole products, and
        # the next mask removes their upper words: that saves two passes over memory.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _WORD_MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _WORD_MASK, product0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD_MASK, (k1 + _KEY_INCREMENTS[1]) & _WORD_MASK
    return c0, c1 & _WORD_MASK, c2, c3 & _WORD_MASK


def _halves(number: Word) -> tuple[Word, Word]:
    """Returns the lower and the upper word of 64-bit integers, negative ones in two's complement."""
    return number & _WORD_MASK, (number >> 32) & _WORD_MASK


def _first_word(purpose: Purpose, numbers: Tensor, seed: int) -> Tensor:
    word, *_ = philox((0, int(purpose), *_halves(numbers)), _halves(seed))
    assert isinstance(word, Tensor)
    return word


def _normals(purpose: Purpose, number: Word, seed: Word, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Returns float32 [B, *shape] for `number` or `seed` [B]: value i of an image is word i mod 4 of block i div 4."""
    compute_device = exact_device(device)
    number, seed = (x[:, None].to(compute_device) if isinstance(x, Tensor) else x for x in (number, seed))
    length = math.prod(shape)
    blocks = torch.arange(math.ceil(length / 4), device=compute_device)
    words = philox((blocks, int(purpose), *_halves(number)), _halves(seed))
    w0, w1, w2, w3 = (torch.as_tensor(word) for word in words)
    normals = torch.empty(*w0.shape, 4, dtype=torch.float32, device=compute_device)
    normals[..., 0], normals[..., 1] = _box_muller(w0, w1)
    normals[..., 2], normals[..., 3] = _box_muller(w2, w3)
    return normals.flatten(1)[:, :length].reshape(-1, *shape).to(device)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two independent standard normals, float64, from two words (Box & Muller 1958).

    It uses +, -, × and ÷ alone, whose rounding IEEE 754 defines. Library logarithms, cosines and even torch's square
    root may differ in the last bit between vector bodies and scalar tails, thread counts, processors and cards;
    rounding to float32 hides that almost always, but not always.
    """
    radius = square_root(_logarithm((radius_word.double() + 0.5) * 2.0**-32).mul_(-2))
    cosine, sine = _cosine_and_sine(angle_word)
    return cosine.mul_(radius), sine.mul_(radius)


def _logarithm(x: Tensor) -> Tensor:
    """Returns ln x of positive float64: ln(f·2ᵉ) = (e + ½) ln 2 + 2 artanh((f-√2)/(f+√2)) for f in [1, 2)."""
    bits = x.view(torch.int64)
    exponent = (bits >> 52) - 1023
    fraction = (bits & ((1 << 52) - 1) | (1023 << 52)).view(torch.float64)
    z = (fraction - math.sqrt(2)).div_(fraction + math.sqrt(2))
    return _series(z * z, _ARTANH_SERIES).mul_(z).add_(exponent.double().add_(0.5).mul_(math.log(2)))


def square_root(x: Tensor) -> Tensor:
    """Returns the square root of positive float64: x·(1/√x), by Newton's method from a guess with half the exponent."""
    inverse_root = (_INVERSE_ROOT_GUESS - (x.view(torch.int64) >> 1)).view(torch.float64)
    minus_half = x * -0.5
    for _ in range(4):
        inverse_root.mul_((inverse_root * inverse_root).mul_(minus_half).add_(1.5))
    return inverse_root.mul_(x)


def _cosine_and_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of a uniform angle: series within ±π/4, then the angle is doubled twice."""
    angle = (word - (1 << 31)).double().mul_(math.pi / 2**33)
    squared = angle * angle
    cosine, sine = _series(squared, _COSINE_SERIES), _series(squared, _SINE_SERIES).mul_(angle)
    for _ in range(2):
        cosine, sine = (cosine - sine).mul_(cosine + sine), (cosine * sine).mul_(2)
    return cosine, sine


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    """Sums a power series by Horner's rule, one operation at a time: a fused multiply-add would round differently."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total.mul_(x).add_(coefficient)
    return total
