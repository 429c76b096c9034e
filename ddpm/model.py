"""A trained network with all that sampling needs: `ddpm.load(folder).sample(16, seed=0)`.

Each seed has one image, for any batch, order and number of processes.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf
from operator import index
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ddpm import figures, randomness
from ddpm.catalogue import GUIDED, SAMPLERS, Conditioning, Diffusion, SampleOptions
from ddpm.conditions import Picture, VectorStatistics, in_turn, noised, of_pictures, read_pictures, without
from ddpm.grids import make_grid, numbered_points, shifted
from ddpm.image_size import ImageSize
from ddpm.networks import laid_out
from ddpm.objective import UNCONDITIONAL, Condition, Network
from ddpm.process import Point, Prediction, Process
from ddpm.randomness import Purpose
from ddpm.samplers import FUNCTIONS, Denoiser, NoiseAt, Sampler, Walk, from_noise
from ddpm.threads import Threads, group_of

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

    The worse estimate is that without class and condition (Ho & Salimans 2022, equation 6) or that of a network with
    less training (Karras et al. 2024, equation 4). Within the interval it calls `both`, and else `denoise`. The share
    of β, if there is one, is that of the better estimate.
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
    """How images are sampled: the settings, and a function or points that no setting can name."""

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
    guided_by: str = "all",
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
        guidance: see `Guidance`; without a worse network it moves away from the estimate without class and condition,
            and both estimates share a batch.
        null_class: the number of the class for images without a class.
        guided_by: the conditions that the worse estimate lacks without a worse network, see `ddpm.catalogue.GUIDED`.
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
        left_out = [GUIDED[guided_by]] if guided_by != "all" else [*GUIDED.values()]
        less = without(condition, [(name, True) for name in left_out if name], null_class or 0)
        pairs = zip(condition, less, strict=True)
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


class NotFiniteError(ValueError):
    """A network gives images with values that are not finite."""


@dataclass
class Model:
    """A network in evaluation mode with its process. An image depends on its seed alone.

    Attributes:
        network: its output has the images' shape, or twice their channels if it predicts variances as well.
        process: the process of its training.
        prediction: the meaning of its output.
        image_shape: (C, H, W) of the images or latents.
        sampling: the default settings of sampling.
        classes: names of the network's classes, by number.
        null_class: whether the network has also learnt images without class and condition, as guidance needs; of a
            network with classes a further class stands for these.
        diffusion: the settings of its training.
        conditioning: those of its condition image and vector.
        vectors: the statistics of the numbers in the vector.
        given: returns the condition images and vectors of seeds, int64 [B].
        autocast: context for the network alone, such as bf16 autocast.
        decode: decodes latents to pixels [B, c, h, w]; `pixels` clamps these to [-1, 1].
        worse: a network with less training, for guidance away from it.
        worse_has_classes: whether it takes the classes too; without them it stands for images of any class.
        bits: of a value of the images, 8 or 16.
        threads: share the images of a batch on a CPU.
        group_images: images that a thread computes at once; None: by the size of the batch.
        source: the place that it was loaded from, for people.
    """

    network: nn.Module
    process: Process
    prediction: Prediction
    image_shape: tuple[int, int, int]
    sampling: Sampling
    classes: tuple[str, ...] = ()
    null_class: bool = False
    diffusion: Diffusion = field(default_factory=Diffusion)
    conditioning: Conditioning = field(default_factory=Conditioning)
    vectors: VectorStatistics | None = None
    given: Callable[[Tensor], Condition] = lambda seeds: UNCONDITIONAL
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    decode: Callable[[Tensor], Tensor] | None = None
    worse: nn.Module | None = None
    worse_has_classes: bool = True
    bits: int = 8
    threads: Threads | None = None
    group_images: int | None = None
    source: str = ""

    def __repr__(self) -> str:
        """Returns one line; the generated one would have every layer of the network."""
        parts = [
            type(self.network).__name__,
            f"{sum(parameter.numel() for parameter in self.network.parameters()):,} parameters",
            f"{'latents' if self.decode else 'images'} {'×'.join(map(str, self.image_shape))}",
            f"prediction {self.diffusion.prediction}",
            f"schedule {self.diffusion.schedule}",
        ]
        parts += [f"{len(self.classes):,} classes"] if self.classes else []
        parts += [f"from {self.source}"] if self.source else []
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        """Returns the network's device."""
        return next(self.network.parameters()).device

    def sample(
        self,
        images: int = 1,
        *,
        seed: int = 0,
        classes: str | int | Sequence[str | int] | None = None,
        condition: Picture | Sequence[Picture] | None = None,
        vector: Sequence[float] | Sequence[Sequence[float]] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        as_tensor: bool = False,
        **options: Any,
    ) -> list[Image.Image] | Tensor:
        """Samples images: number k is that of seed `seed` + k, for any number of images.

        Args:
            images: number of images.
            seed: seed of the first image.
            classes: names or numbers of the classes that the seeds take in turn; None: all.
            condition: pictures or files that the seeds take in turn, for a network with condition images: what
                `condition.derive` makes of an image, or before `downscale` enlarges it. Each is resized if need be.
            vector: the numbers of a condition vector, or several such rows, which the seeds take in turn.
            sampler: such as `ddim`, `unipc` or `ddpm`.
            steps: number of sampling steps.
            guidance: scale of the guidance away from images without a class; 1: off.
            batch_size: images at a time.
            as_tensor: whether to return float32 [B, C, H, W] in [-1, 1] on the network's device instead of pictures.
            options: further fields of `Sampling`, such as `eta` or `grid`.

        Raises:
            ValueError: a number is out of range, a class, sampler or grid is unknown, there are more steps than
                timesteps, a condition is missing or superfluous, the network has not learnt what guidance needs, or
                pictures cannot hold its images.
            NotFiniteError: the images have values that are not finite.
            TypeError: an option is unknown.
        """
        numbers = {"images": images, "batch_size": batch_size, "steps": 1 if steps is None else steps}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}={number}: use 1 or more")
        if not 0 <= seed <= 2**63 - images or not 0 <= options.get("eta", 0) <= 1:
            raise ValueError(f"seed={seed}, eta={options.get('eta', 0)}: seeds are from 0 to 2^63 - 1, eta from 0 to 1")
        channels = 3 if self.decode else self.image_shape[0]
        if not as_tensor and (self.bits != 8 or channels not in (1, 3)):
            raise ValueError(f"pictures do not hold {self.bits} bits in {channels} channels: use as_tensor=True")
        if "labels" in options:
            raise TypeError("labels: name classes, as in classes=['forest', 3]")
        if classes is not None:
            options["labels"] = self._labels(classes)
        if guidance is not None:
            options["guidance"] = float(guidance)
        sampling, model = self._sampling(sampler, steps, options), replace(self, given=self._given(condition, vector))
        with _bar(total=images * self.evaluations_of(sampling)) as advance:
            parts = []
            for first in range(0, images, batch_size):
                seeds = torch.arange(first, min(first + batch_size, images), device=self.device) + seed
                parts.append(model.sample_seeds(seeds, sampling, lambda _, x_t, __: advance(len(x_t))))
        x = torch.cat(parts)
        if as_tensor:
            return x
        pixels = figures.to_pixels(x)
        return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in pixels]

    def _sampling(self, sampler: str | None, steps: int | None, options: dict[str, Any]) -> Sampling:
        """Returns this model's settings with these options."""
        own, all_steps = self.sampling.sampler, self.process.num_timesteps
        if steps is None and sampler not in (None, own) and "ddpm" in (sampler, own):
            # Ancestral sampling gives noise in few steps, and the other samplers need only few.
            steps = all_steps if sampler == "ddpm" else min(SampleOptions.steps, all_steps)
        chosen = {"steps": steps, "sampler": sampler, **options}
        sampling = replace(self.sampling, **{key: value for key, value in chosen.items() if value is not None})
        if sampling.guidance != 1 and not self.null_class and self.worse is None:
            raise ValueError("guidance needs a network that has also learnt images without class and condition")
        return sampling

    def sample_seeds(
        self, seeds: Tensor, sampling: Sampling, callback: Callback | None = None, walk: Walk = from_noise
    ) -> Tensor:
        """Returns the images of these seeds, int64 [B] on the device, as pixels [B, C, H, W] in [-1, 1].

        Args:
            seeds: seeds of one batch.
            sampling: the settings.
            callback: see `Callback`.
            walk: from the noise to the images.

        Raises:
            NotFiniteError: a pixel is not finite.
        """
        x = generate(self.denoiser(seeds, sampling, callback), self.process, sampling, self.noise_of(seeds), walk)
        # As a picture it would be grey, like a valid one.
        if not x.isfinite().all():
            raise NotFiniteError("the samples have values that are not finite: sample from an earlier checkpoint")
        return self.pixels(x)

    def pixels(self, x: Tensor) -> Tensor:
        """Returns the pixels of x [B, C, H, W], latents or images: float32 in [-1, 1]."""
        return (self.decode(x) if self.decode else x).clamp(-1, 1)

    def denoiser(self, seeds: Tensor, sampling: Sampling, callback: Callback | None = None) -> Denoiser:
        """Returns the denoiser for these seeds, int64 [B] on the device; seed k has class k mod n of n chosen ones."""
        taken = torch.tensor(sampling.labels or range(len(self.classes)), device=self.device)
        estimate = None
        if self.diffusion.self_conditioning:
            estimate = torch.zeros(len(seeds), *self.image_shape, device=self.device)
        labels = taken[seeds % len(taken)] if self.classes else None
        condition = self.given(seeds)._replace(labels=labels, x_start=estimate)
        if self.conditioning.noise and condition.image is not None:
            shape, device = condition.image.shape[1:], condition.image.device
            noise = randomness.condition_noise(Purpose.SAMPLING_CONDITION, 0, seeds, shape, device)
            level = torch.full((len(seeds),), sampling.condition_noise, dtype=torch.float64)
            condition = noised(condition, level, noise)
        return make_denoiser(
            self.predict,
            self.process,
            self.prediction,
            condition,
            clip=sampling.clip,
            callback=callback,
            guidance=sampling.guide,
            null_class=len(self.classes),
            guided_by=sampling.guidance_by,
            worse=self.worse and partial(self._answer, self.worse),
            with_share=(sampling.sampler, sampling.variance) == ("ddpm", "learned_range"),
        )

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the network's output [B, …] under its autocast, without gradients."""
        return self._answer(self.network, x, t, condition)

    def _answer(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if network is self.worse and not self.worse_has_classes:
            condition = condition._replace(labels=None)
        if self.threads:
            return self.threads.sharing(network, self.autocast, self.group_images or group_of(len(x)))(x, t, condition)
        with torch.no_grad(), self.autocast():
            answer: Tensor = network(x, t, condition)
            return answer

    def noise_of(self, seeds: Tensor) -> NoiseAt:
        """Returns the noise of seeds, int64 [B] on the device."""
        return noise_of(seeds, self.image_shape, self.diffusion.offset_noise)

    def evaluations_of(self, sampling: Sampling, walk: Walk = from_noise) -> int:
        """Returns the number of evaluations of the network for an image."""
        return evaluations_of(self.process, sampling, self.image_shape, walk)

    def _given(
        self, condition: Picture | Sequence[Picture] | None, vector: Sequence[float] | Sequence[Sequence[float]] | None
    ) -> Callable[[Tensor], Condition]:
        """Returns the conditions of seeds, which take those of `sample` in turn.

        Raises:
            ValueError: a condition is missing, superfluous or of another form.
        """
        channels, numbers, image = self.conditioning.channels, self.conditioning.vector, None
        for name, wants, found in (("condition", channels, condition), ("vector", numbers, vector)):
            if bool(wants) != (found is not None):
                what = f"needs {name}=" if wants else f"takes no {name}"
                raise ValueError(f"the network {what}: see the settings condition.* of its run")
        if condition is not None:
            settings, size = self.conditioning, ImageSize(*self.image_shape[1:])
            those = [condition] if isinstance(condition, str | os.PathLike | Image.Image) else [*condition]
            channels = self.image_shape[0] if settings.derive else channels
            x = read_pictures(those, channels, settings.small_size(size), settings.resize_filter).to(self.device)
            image = of_pictures(settings.derive, x, size)
        rows = None if vector is None or self.vectors is None else self.vectors.normalised(vector).to(self.device)
        return in_turn(image, rows)

    def _labels(self, classes: str | int | Sequence[str | int]) -> tuple[int, ...]:
        if not self.classes:
            raise ValueError(f"classes={classes!r}: the network has no classes, so leave them out")
        several: Iterable[Any] = [classes]
        if isinstance(classes, Iterable) and not isinstance(classes, str):
            several = classes
        labels = tuple(map(self._label, several))
        if not labels:
            raise ValueError("classes: name one at least, or leave them out for all")
        return labels

    def _label(self, one: str | int) -> int:
        if one in self.classes:
            return self.classes.index(str(one))
        # Accepts NumPy's integers, but neither True nor 1.0.
        if hasattr(one, "__index__") and not isinstance(one, bool) and 0 <= index(one) < len(self.classes):
            return index(one)
        near = difflib.get_close_matches(str(one), self.classes, 1)
        there = f"did you mean {near[0]!r}?" if near else f"there are {len(self.classes):,}: {', '.join(self.classes)}"
        raise ValueError(f"unknown class {one!r}; {there:.300}")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("sampling", total=total)
        yield lambda done: bars.advance(task, done)
