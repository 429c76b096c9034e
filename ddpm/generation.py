"""From seeds to images: one image per seed, for any batch, order and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import inf

import torch
from torch import Tensor

from ddpm import randomness
from ddpm.catalogue import SAMPLERS, SampleOptions
from ddpm.grids import make_grid, numbered_points, shifted
from ddpm.networks import laid_out
from ddpm.objective import UNCONDITIONAL, Condition, Network
from ddpm.process import Point, Prediction, Process
from ddpm.samplers import FUNCTIONS, Denoiser, NoiseAt, Points, Sampler

Pair = Callable[[Tensor, Point[float]], tuple[Tensor, Tensor]]
"""(x_t, point) → a denoiser's result, and a worse one."""


@dataclass(frozen=True)
class Guidance:
    """The scale, the range of noise levels and the rescaling of guidance."""

    scale: float = SampleOptions.guidance
    """Factor on the difference of the estimates: 1 + w of Ho & Salimans 2022, w of Karras et al. 2024; 1: off."""
    interval: tuple[float, float] = (0.0, inf)
    """Guidance is on for σ/α above the first and up to the second (Kynkäänniemi et al. 2024, equation 5)."""
    rescale: float = SampleOptions.guidance_rescale
    """φ of Lin et al. 2024, equation 16: 1 gives a guided estimate the contrast of the unguided one."""


UNGUIDED = Guidance()


def guided(denoise: Denoiser, both: Pair, guidance: Guidance) -> Denoiser:
    """Returns a guided denoiser; x_0 is an affine function of the network's output for every prediction.

    The worse estimate is that of the null class (Ho & Salimans 2022, equation 6) or that of a network with less
    training (Karras et al. 2024, equation 4). Within the interval it calls `both`, and else `denoise`. The share of β,
    if there is one, is that of the better estimate.
    """
    low, high = guidance.interval

    def denoise_guided(x_t: Tensor, point: Point[float]) -> Tensor:
        if not low < (point.sigma / point.alpha if point.alpha else inf) <= high:
            return denoise(x_t, point)
        (better, share), (worse, _) = (answer.tensor_split([x_t.shape[1]], dim=1) for answer in both(x_t, point))
        estimate = worse + guidance.scale * (better - worse)
        if guidance.rescale:
            contrast = better.std(dim=(1, 2, 3), keepdim=True) / estimate.std(dim=(1, 2, 3), keepdim=True)
            estimate = estimate * (guidance.rescale * contrast + 1 - guidance.rescale)
        return torch.cat([estimate, share], dim=1)

    return denoise_guided


Callback = Callable[[Point[float], Tensor, Tensor], None]
"""Called at every evaluation of the network with (point, x_t, the estimated x_0)."""


@dataclass(frozen=True)
class Sampling(SampleOptions):
    """How images are drawn: the settings, and a function or points that no setting can name."""

    function: Sampler | None = None
    """Replaces the sampler."""
    numbers: tuple[int, ...] = ()
    """The numbers of the points to visit; they replace the grid."""

    @property
    def guide(self) -> Guidance:
        """The guidance of these settings."""
        return Guidance(self.guidance, self.guidance_interval or (0.0, inf), self.guidance_rescale)

    def points(self, process: Process) -> list[Point[float]]:
        """Returns the points to visit, the clean image included."""
        if self.numbers:
            return numbered_points(process, self.numbers)
        points = make_grid(process, self.steps, self.grid)
        return points if self.shift == 1 else shifted(process, points, self.shift)

    def solver(self, process: Process) -> Sampler:
        """Returns the sampler with its options.

        Raises:
            ValueError: the sampler is unknown.
        """
        if self.function:
            return self.function
        if self.sampler not in FUNCTIONS:
            raise ValueError(f"unknown sampler {self.sampler!r}: choose one of {', '.join(FUNCTIONS)}")
        names = (*SAMPLERS[self.sampler].options, *SAMPLERS[self.sampler].also)
        options = {name: process if name == "process" else getattr(self, name) for name in names}
        return partial(FUNCTIONS[self.sampler], **options)


def make_denoiser(
    network: Network,
    process: Process,
    prediction: Prediction,
    condition: Condition = UNCONDITIONAL,
    *,
    clip: bool = SampleOptions.clip,
    callback: Callback | None = None,
    guidance: Guidance = UNGUIDED,
    null_class: int | None = None,
    worse: Network | None = None,
    with_share: bool = False,
) -> Denoiser:
    """Returns a network as a denoiser.

    Args:
        network: the network, in evaluation mode; all arithmetic around it is fp32.
        process: the process of its training.
        prediction: the meaning of its output.
        condition: its further inputs. An x_0 there is the first estimate of a network with self-conditioning, and each
            evaluation gets the estimate of the one before (Chen et al. 2023, algorithm 2).
        clip: whether the estimated x_0 is clipped to [-1, 1] (as in Ho et al.'s code), after guidance; the network's
            own estimate is clipped likewise.
        callback: see `Callback`.
        guidance: see `Guidance`; without a worse network it moves away from the estimate of the null class, and both
            estimates share a batch.
        null_class: the number of the class for images without a class.
        worse: a network with less training.
        with_share: whether the denoiser also returns the share of β.

    Returns:
        A function (x_t, point) → x_0, float32, without gradients. An estimate conditions only evaluations with less
        noise, so that a second trajectory, and a jump of RePaint, start with the first estimate again.
    """
    first_estimate = condition.x_start
    estimates: list[tuple[float, Tensor]] = []

    def answer_of(network: Network, x_t: Tensor, point: Point[float], condition: Condition) -> Tensor:
        t = torch.full((len(x_t),), point.t, dtype=torch.float32, device=x_t.device)
        answer = network(process.input_scale(point.sigma) * x_t, t, condition).float()
        output, share = answer.tensor_split([x_t.shape[1]], dim=1)
        x_start = prediction.x_start(output, x_t, point)
        return torch.cat([x_start, (share + 1) / 2], dim=1) if with_share else x_start

    def one(x_t: Tensor, point: Point[float]) -> Tensor:
        return answer_of(network, x_t, point, condition)

    def both(x_t: Tensor, point: Point[float]) -> tuple[Tensor, Tensor]:
        if worse is not None:
            return one(x_t, point), answer_of(worse, x_t, point, condition)
        assert condition.labels is not None and null_class is not None
        without = condition._replace(labels=torch.full_like(condition.labels, null_class))
        pairs = zip(condition, without, strict=True)
        # In pairs, so that a group of the batch holds the same images in a batch of any size.
        twice = (None if a is None or b is None else torch.stack([a, b], dim=1).flatten(0, 1) for a, b in pairs)
        answers = answer_of(network, x_t.repeat_interleave(2, dim=0), point, Condition(*twice))
        return answers[::2], answers[1::2]

    answer_at = one if guidance.scale == 1 else guided(one, both, guidance)

    @torch.no_grad()
    def denoise(x_t: Tensor, point: Point[float]) -> Tensor:
        nonlocal condition
        ratio = point.sigma / point.alpha if point.alpha else inf
        if first_estimate is not None:
            while estimates and estimates[-1][0] <= ratio:
                estimates.pop()
            condition = condition._replace(x_start=estimates[-1][1] if estimates else first_estimate)
        x_start, share = answer_at(x_t, point).tensor_split([x_t.shape[1]], dim=1)
        if clip:
            x_start = x_start.clamp(-1, 1)
        if first_estimate is not None:
            # Keeps two: Heun's method evaluates a point twice, and its corrected x follows from the estimate before.
            estimates[:] = [*estimates[-1:], (ratio, x_start)]
        if callback is not None:
            callback(point, x_t, x_start)
        return torch.cat([x_start, share], dim=1) if with_share else x_start

    return denoise


Walk = Callable[[Sampler, Denoiser, Points, NoiseAt], Tensor]
"""(sampler, denoiser, points, noise) → images: `from_noise`, or a function of `editing`."""


def beginning(points: Points, noise_at: NoiseAt) -> Tensor:
    """Returns noise of the first point: of unit variance, or of σ² where a process lets the variance explode."""
    return max(1.0, points[0].sigma) * noise_at(0)


def from_noise(sample: Sampler, denoise: Denoiser, points: Points, noise_at: NoiseAt) -> Tensor:
    """Returns new images."""
    return sample(denoise, beginning(points, noise_at), points, noise_at)


def generate(
    denoise: Denoiser, process: Process, sampling: Sampling, noise_at: NoiseAt, walk: Walk = from_noise
) -> Tensor:
    """Returns x at the clean image, float32 [B, C, H, W]; sample k depends on its noise alone (see `noise_of`).

    It does not clamp x, which may be latents without bounds; `Model.pixels` makes pixels of it.
    """
    with torch.inference_mode():
        return walk(sampling.solver(process), denoise, sampling.points(process), noise_at)


def noise_of(seeds: Tensor, shape: tuple[int, int, int], offset_noise: float = 0.0) -> NoiseAt:
    """Returns the noise (C, H, W) of each seed, int64 [B], on their device, with the offset noise of the training."""

    def noise_at(draw: int) -> Tensor:
        return laid_out(randomness.sampling_noise(seeds, draw, shape, seeds.device, offset_noise))

    return noise_at


def evaluations_of(process: Process, sampling: Sampling, shape: tuple[int, ...], walk: Walk = from_noise) -> int:
    """Counts the evaluations of a denoiser for an image (C, H, W), without guidance, by a walk with zeros."""
    image, asked = torch.zeros(1, *shape), count()

    def denoise(x: Tensor, point: Point[float]) -> Tensor:
        next(asked)
        return x

    generate(denoise, process, replace(sampling, variance="fixed_small"), lambda draw: image, walk)
    return next(asked)
