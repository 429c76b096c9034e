"""Editing: walks (see `Walk`) that keep parts of given images, with the same denoisers, points and samplers."""

from collections.abc import Sequence
from itertools import count, pairwise
from math import sqrt

import torch
from torch import Tensor

from ddpm.catalogue import Diffusion
from ddpm.process import CLEAN
from ddpm.samplers import Denoiser, NoiseAt, Points, Sampler, Visit, beginning, euler_step, from_noise


def inpaint(
    sample: Sampler,
    denoise: Denoiser,
    points: Points,
    noise_at: NoiseAt,
    *,
    image: Tensor,
    unknown: Tensor,
    path: Sequence[int],
) -> Tensor:
    """Fills the unknown part of an image (RePaint; Lugmayr et al. 2022, algorithm 1, where the sampler is `ancestral`).

    The sampler takes one step at a time along `path`, which holds indices of the points and ends at the clean image
    (see `resampled`). The image [B, C, H, W] does not change where `unknown`, bool, is false.
    """
    noises = map(noise_at, count(1))
    x = beginning(points, noise_at)
    for before, after in pairwise(path):
        point = points[after]
        if after < before:
            alpha = point.alpha / points[before].alpha
            x = alpha * x + sqrt(point.sigma**2 - (alpha * points[before].sigma) ** 2) * next(noises)
        else:
            x = sample(denoise, x, [points[before], point], lambda _: next(noises))
            known = point.alpha * image + point.sigma * next(noises) if point.sigma else image
            x = torch.where(unknown, x, known)
    return x


def resampled(steps: int, jump: int = 10, resamplings: int = 10) -> list[int]:
    """Returns a path through points 0..steps that walks each stretch of `jump` but the first `resamplings` times.

    Without it the new part fits its surroundings in colour, not in meaning (Lugmayr et al. 2022, section 4.2: j, r).
    """
    path = [0]
    for index in range(1, steps + 1):
        path.append(index)
        if index > jump and (steps - index) % jump == 0:
            path += [*range(index - jump, index + 1)] * (resamplings - 1)
    return path


def from_image(
    sample: Sampler,
    denoise: Denoiser,
    points: Points,
    noise_at: NoiseAt,
    *,
    image: Tensor,
    strength: float,
) -> Tensor:
    """Starts from an image with noise, at the first of `last_points` (SDEdit; Meng et al. 2022, algorithm 1)."""
    points = last_points(points, strength)
    return sample(denoise, points[0].alpha * image + points[0].sigma * noise_at(0), points, noise_at)


def inverted(
    sample: Sampler,
    denoise: Denoiser,
    points: Points,
    noise_at: NoiseAt,
    *,
    image: Tensor,
    strength: float,
) -> Tensor:
    """Finds the noise of an image, and makes the image again from there (Song et al. 2021, section 5.4)."""
    points = last_points(points, strength)
    return sample(denoise, noise_in(image, denoise, points), points, noise_at)


def noise_in(image: Tensor, denoise: Denoiser, points: Points) -> Tensor:
    """Returns the x at the first of the points from which DDIM leads to an image [B, C, H, W], to second order.

    DDIM's step from the point with more noise has to end at the x that is known. Its estimate at a guess, by the
    estimate of the step before, gives one step of Newton's method, with the derivative that DDIM's step has for normal
    images of deviation 0.5. It evaluates the denoiser once per point, as does DDIM's step with growing noise, which
    takes the estimate at the wrong end, and is of first order.
    """
    x, x_start, epsilon, before = image, image, torch.zeros_like(image), CLEAN
    for point in points[-2::-1]:
        guess = point.alpha * x_start + point.sigma * epsilon
        # For ancestral steps with a learnt variance the denoiser returns that as well.
        x_start = denoise(guess, point)[:, : image.shape[1]]
        end = euler_step([Visit(point, guess, x_start)], before)
        signal = point.alpha * Diffusion.sigma_data**2
        covariance, variance = (signal * a + point.sigma * s for _, a, s in (before, point))
        x = guess + (x - end) * variance / covariance
        epsilon, before = Visit(point, x, x_start).epsilon, point
    return x


def last_points(points: Points, strength: float) -> Points:
    """Returns the last `strength` of the steps, in (0, 1], one at least; more of them keep less of an image."""
    return points[-1 - max(1, round(strength * (len(points) - 1))) :]


def interpolate(
    sample: Sampler,
    denoise: Denoiser,
    points: Points,
    noise_at: NoiseAt,
    *,
    other: NoiseAt,
    weight: Tensor,
) -> Tensor:
    """Starts from noise between that at `weight` 0 and at 1, [B], in every draw, which keeps noisy samplers smooth."""
    return from_noise(sample, denoise, points, lambda draw: slerp(noise_at(draw), other(draw), weight))


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Interpolates along the great circle (Shoemake 1985; Song et al. 2021, eq. 67), which keeps the norm of noise."""
    # For equal noises any small angle gives their mean.
    angle = torch.cosine_similarity(first.flatten(1), second.flatten(1)).clamp(-1, 1).acos().clamp(min=1e-3)
    ways = ((1 - weight) * angle).sin() / angle.sin(), (weight * angle).sin() / angle.sin()
    return ways[0].view(-1, 1, 1, 1) * first + ways[1].view(-1, 1, 1, 1) * second
