"""A run's model that samples: on the processes of a command, or for Python by `job.load`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ddpm import figures
from ddpm.device import best_device
from ddpm.grids import find_grid, numbered_points
from ddpm.memory import Fitting
from ddpm.model import Callback, Model, NotFiniteError, Sampling
from ddpm.precision import autocast
from ddpm.process import Point, VarianceExploding
from ddpm.samplers import Walk, beginning, from_noise
from ddpm.threads import group_of, threads_of
from job.config import RunConfig, method
from job.data.latents import Decoder, load_decoder
from job.exits import BadDataError, BadRequestError, NotANumberError, StoppedError
from job.own_code import name_of
from job.processes.ranks import Agreement, Ranks
from job.progress import Progress
from job.requests import SampleRequest
from job.runs.checkpoints import load_weights
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.records import split_run
from job.runs.retention import kept_while_read, reading_chosen
from job.runs.run import FoundGrid, moment_of
from job.sampling.conditions import Conditions, conditions_of, vectors_of
from job.sampling.sampling_plan import SamplePlan, Worse, found_points, plan_sampling
from job.store import ObjectExistsError, Store

GIF_FRAMES = 20
GRID_IMAGES = 16
"""The number of trajectories to measure: those of all images have a similar shape (Chen et al. 2024, section 3)."""
GRID_CANDIDATES = 100


@dataclass(frozen=True)
class Route:
    """The way from noise to images."""

    evaluations: int
    """See `evaluations_of`."""
    walk_of: Callable[[Sequence[int]], Walk] = lambda places: from_noise
    """Returns the walk of the images at these places among the seeds."""


class Painter(Model):
    """A model on each process.

    Attributes:
        conditions: those of the seeds, if the network has some.
    """

    conditions: Conditions | None = None

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        precision: str,
        agreement: Agreement,
        decoder: Decoder | None = None,
        renewals: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Builds the model of a configuration.

        Args:
            config: that of the run.
            ranks: all processes.
            precision: the number format of the network, `fp32`, `bf16` or `fp16`.
            agreement: has one flag for stop requests, so that all processes stop at the same step.
            decoder: turns latents into pixels, for a run on latents.
            renewals: called at each evaluation: see `job.runs.retention.kept_while_read`.
        """
        super().__init__(**vars(model_of(config, ranks.device, precision, decoder)))
        self.config, self.ranks, self.stop = config, ranks, ranks.stop
        self.agreement, self.renewals, self.fitting = agreement, renewals, Fitting()

    def load_worse(self, worse: Worse) -> None:
        """Reads the weights of the weaker network for autoguidance, with the configuration of its run. Collective."""
        config = worse.of_run.config
        self.worse = method.build_network(config, self.device).eval().requires_grad_(False)
        self.worse_has_classes = bool(config.model.num_classes)
        self.load(worse.of_run.run, worse.ref, worse.weights, self.worse)

    def load(self, run: Store, ref: CheckpointRef, group: str, network: nn.Module | None = None) -> None:
        """Reads weights of a checkpoint, such as `ema` or `model`, once for all processes. Collective.

        Raises:
            BadDataError: the checkpoint is damaged; the message names the object, and how to find another.
        """
        network = network or self.network

        def load() -> None:
            try:
                load_weights(run, ref, group, network)
            except BadDataError as error:
                name = run.uri.rsplit("/", 1)[-1]
                raise BadDataError(
                    f"{error}; `ddpm runs show {name}` lists the other checkpoints, for --checkpoints, and "
                    f"`ddpm runs verify {name}` says which are whole"
                ) from None

        self.ranks.on_main(load)
        if dist.is_initialized():
            for parameter in network.parameters():
                dist.broadcast(parameter.detach(), src=0)

    def sample_together(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size_images: int,
        title: str,
        route: Route | None = None,
        kept: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    ) -> np.ndarray:
        """Samples seeds on all processes: [n, H, W, C] on the main one, no images on the others. Collective.

        Args:
            seeds: the seeds of the images.
            sampling: the sampling settings.
            batch_size_images: images per batch on each process.
            title: the title of the progress bar.
            route: the way from noise to images; None: plain sampling.
            kept: turns each batch [n, …] into the values to keep instead of its images.

        Raises:
            StoppedError: one of the processes got a stop request; it raises on all of them at the same step.
        """
        route = route or Route(self.evaluations_of(sampling))
        made: list[np.ndarray] = []
        # All must agree equally often: as the first process, which has the most batches, and whatever a user's sampler
        # does.
        of_ranks = self.shared_out(len(seeds), batch_size_images)
        mine, agreements, done = of_ranks[self.ranks.rank], len(of_ranks[0]) * route.evaluations, 0

        def after_evaluation(*_: Any) -> None:
            nonlocal done
            done += 1
            if done <= agreements or self.ranks.world_size == 1:
                self.check_agreed()
            else:
                # Halves need more; alone, a process that stopped here would leave the others waiting.
                self.show_life()
            bar.update(len(seeds) * min(done, agreements) / agreements)

        def sampled(places: Sequence[int]) -> np.ndarray:
            some = [seeds[place] for place in places]
            return kept(self.sample_alone(some, sampling, after_evaluation, route.walk_of(places)))

        with Progress(title, total=len(seeds)) as bar:
            for places in mine:
                made.extend(self.fitting.in_parts(sampled, places))
            while done < agreements:
                after_evaluation()
            self.agreement.finish()
        # Only the first process always has images; those without any do not know their shape.
        part = np.concatenate(made) if made else np.empty(0)
        if self.ranks.world_size == 1:
            return part
        parts: list[Any] | None = [None] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(part, parts)
        gathered = np.empty((len(seeds) if self.ranks.is_main else 0, *part.shape[1:]), part.dtype)
        for of_rank, theirs in zip(of_ranks, parts or [], strict=False):
            if of_rank:
                gathered[[place for places in of_rank for place in places]] = theirs
        return gathered

    def shared_out(self, images: int, batch_size_images: int) -> list[list[list[int]]]:
        """Returns the places among `images` of each process's batches; the first process has the most.

        Processes take groups in turn, and threads compute one at once: alike on any number of processes and threads.
        """
        self.group_images = min(group_of(images), batch_size_images) if self.threads else 1
        size, world_size = batch_size_images // self.group_images * self.group_images, self.ranks.world_size
        of_ranks: list[list[int]] = [[] for _ in range(world_size)]
        for place in range(images):
            of_ranks[place // self.group_images % world_size].append(place)
        return [[mine[first : first + size] for first in range(0, len(mine), size)] for mine in of_ranks]

    def sample_batches(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size_images: int,
        advance: Callable[[float], None],
        route: Route | None = None,
    ) -> Iterator[np.ndarray]:
        """Samples seeds on this process in batches, [b, H, W, C]; `advance` gets images, or parts of them.

        Raises:
            StoppedError: a stop was requested.
        """
        route = route or Route(self.evaluations_of(sampling))
        for start in range(0, len(seeds), batch_size_images):
            places = range(len(seeds))[start : start + batch_size_images]

            def after_evaluation(*_: object, part: float = len(places) / route.evaluations) -> None:
                self.check_stopped()
                advance(part)

            def sampled(places: Sequence[int], after: Callback = after_evaluation) -> np.ndarray:
                some = [seeds[place] for place in places]
                return self.sample_alone(some, sampling, after, route.walk_of(places))

            yield from self.fitting.in_parts(sampled, places)

    def denoising_gif(self, seeds: Sequence[int], sampling: Sampling, title: str) -> bytes:
        """Returns a GIF of the denoising of a few seeds: a frame for each of at most `GIF_FRAMES` moments."""
        # The time of EDM's network, ln(σ)/4, means less to people than σ.
        by_sigma = isinstance(self.process, VarianceExploding)
        shown = figures.shown_evaluations(self.evaluations_of(sampling), GIF_FRAMES - 1)

        def frames_of(some: Sequence[int]) -> list[tuple[np.ndarray, str]]:
            evaluations, frames = itertools.count(), list[tuple[np.ndarray, str]]()

            def keep(point: Point[float], x_t: torch.Tensor, x_start: torch.Tensor) -> None:
                self.check_stopped()
                if next(evaluations) in shown:
                    # Scaled to the variance of the images: otherwise most pixels of noise would be black or white.
                    at = f"sigma = {point.sigma:.3g}" if by_sigma else f"t = {point.t:.0f}"
                    frames.append((figures.to_pixels(self.pixels(x_t / max(1.0, point.sigma))), at))

            frames.append((self.sample_alone(some, sampling, keep), "the image"))
            return frames

        parts = self.fitting.in_parts(frames_of, seeds)
        images = [np.concatenate([of_part for of_part, _ in frame]) for frame in zip(*parts, strict=True)]
        pictures = [figures.shown(each, self.config.sample.show) for each in images]
        return figures.denoising_gif(pictures, labels=[at for _, at in parts[0]], title=title)

    def sample_alone(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Callback | None = None,
        walk: Walk = from_noise,
    ) -> np.ndarray:
        """Samples a batch on this process, without the others: uint8, or uint16 of 16 bits, [n, H, W, C].

        Seed k has class k mod n of the n classes of the sampling settings, by default of all classes.

        Args:
            seeds: the seeds of the images.
            sampling: the sampling settings.
            callback: gets every evaluation's point, x_t and predicted x_0; the default checks for a stop.
            walk: the way from noise to the images.

        Raises:
            StoppedError: a stop was requested.
            NotANumberError: a pixel is not a number.
        """
        numbers = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        try:
            x = self.sample_seeds(numbers, sampling, callback or self.check_stopped, walk)
            return figures.to_pixels(x, self.bits)
        except NotFiniteError as error:
            raise NotANumberError(str(error)) from None

    def check_stopped(self, *_: Any) -> None:
        """Raises `StoppedError` if this process has a stop request, without the others."""
        self.stop.check("while sampling")
        self.renew()

    def check_agreed(self, doing: str = "while sampling") -> None:
        """Raises `StoppedError` on all processes at once if any of them has a stop request. Collective."""
        (stopping,) = self.agreement.exchange(self.stop())
        if stopping:
            self.agreement.finish()
            raise StoppedError(f"stopped {doing}; the same command begins again")
        self.renew()

    def show_life(self, *_: Any) -> None:
        """Asks for a stop request without obeying it, as a sign of life."""
        self.stop()
        self.renew()

    def renew(self) -> None:
        """Calls the renewals."""
        for renew in self.renewals:
            renew()


def model_of(
    config: RunConfig,
    device: torch.device,
    precision: str = "fp32",
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Model:
    """Returns a run's model with initial weights.

    Args:
        config: the run's configuration.
        device: the network's device.
        precision: number format of the network, `fp32`, `bf16` or `fp16`.
        decode: decodes latents to pixels, if the run learns latents.
        classes: names of the classes; None: their numbers.
    """
    model, count = config.model, config.model.num_classes or 0
    return Model(
        network=method.build_network(config, device).eval().requires_grad_(False),
        process=method.process_of(config),
        prediction=method.prediction_of(config),
        image_shape=config.image_shape,
        sampling=method.sampling_of(config.sample),
        classes=classes or tuple(map(str, range(count))),
        null_class=model.label_dropout > 0,
        diffusion=config.diffusion,
        bits=config.data.bits,
        conditioning=config.condition,
        autocast=partial(autocast, precision, device.type),
        decode=decode,
        threads=threads_of(device, config.train.slot_threads or 1),
    )


@contextmanager
def prepared(plan: SamplePlan, ranks: Ranks) -> Iterator[tuple[SamplePlan, Painter, Sampling]]:
    """Yields the plan, painter and sampling of all processes, and marks the checkpoints as being read. Collective."""
    with ExitStack() as stack:
        # One process chooses for all: training may commit a newer checkpoint between the choices of two.
        checkpoints = ranks.on_main(lambda: stack.enter_context(reading_chosen(plan.run, plan.choose))[0])
        plan = replace(plan, checkpoints=checkpoints)
        # Each process has its own mark: one that commits its last piece may outlive the others.
        renewals = [stack.enter_context(kept_while_read(plan.run, *checkpoints))]
        if (worse := plan.worse) is not None:
            renewals.append(stack.enter_context(kept_while_read(worse.of_run.run, worse.ref)))
        decoder = load_decoder(plan.bucket, plan.index, ranks.device)
        painter = Painter(plan.config, ranks, plan.precision, Agreement(ranks.world_size, flags=1), decoder, renewals)
        if worse is not None:
            painter.load_worse(worse)
        if conditions := conditions_of(plan, stack.enter_context(_first(plan, ranks)), ranks):
            painter.conditions, painter.given = conditions, conditions.given
        sampling = painter.sampling
        if plan.custom_sampler:
            sampling = replace(sampling, function=plan.custom_sampler)
        if plan.config.sample.grid == "found":
            # Another process may have stored the grid since this one planned: all take that of the main process.
            plan = replace(plan, found=ranks.on_main(lambda: plan.found) or find_points(plan, painter))
            sampling = replace(sampling, numbers=plan.found)
        yield plan, painter, sampling


@contextmanager
def _first(plan: SamplePlan, ranks: Ranks) -> Iterator[Callable[[torch.Tensor], np.ndarray] | None]:
    """Yields the function of seeds to the images of the run that gives the conditions for `--then`. Collective."""
    if plan.first is None:
        yield None
        return
    with prepared(plan.first, ranks) as (first, painter, sampling):
        painter.load(first.run, first.checkpoints[0], first.config.sample.weights)
        # One process that stopped here would leave the others waiting.
        # Rounded as in a file: the result is that of two commands.
        yield lambda seeds: painter.sample_alone(seeds.tolist(), sampling, painter.show_life)


def find_points(plan: SamplePlan, painter: Painter) -> tuple[int, ...]:
    """Finds the points on the newest chosen checkpoint, for all sampling with this number of steps. Collective.

    Raises:
        BadRequestError: more steps than candidate points.
        StoppedError: a stop was requested.
    """
    run, sample, steps = plan.run, plan.config.sample, plan.config.sample.steps
    candidates, key = min(GRID_CANDIDATES, painter.process.num_timesteps), ObjectKind.FOUND_GRID.key(steps=sample.steps)
    if steps > candidates:
        raise BadRequestError(f"--grid found: chooses among {candidates} points, so it takes up to {candidates} steps")

    ref = max(plan.checkpoints)
    painter.load(run, ref, sample.weights)

    def find() -> tuple[int, ...]:
        asked = itertools.count(1)

        def advance(*_: object) -> None:
            painter.check_stopped()
            bar.update(next(asked))

        with Progress(f"finding {steps} points", total=candidates, unit="points") as bar:
            seeds = torch.arange(GRID_IMAGES, device=painter.device)
            usual = sample.model_copy(update={"guidance": 1.0, "variance": "fixed_small"})
            denoise = painter.denoiser(seeds, method.sampling_of(usual), advance)
            (first, *_) = numbered_points(painter.process, [painter.process.num_timesteps - 1])
            with torch.inference_mode():
                x = beginning([first], painter.noise_of(seeds))
                numbers = find_grid(denoise, x, painter.process, steps, candidates)
        grid = FoundGrid(numbers=tuple(numbers), checkpoint=ref.key, weights=sample.weights)
        # Another process may have been faster.
        with suppress(ObjectExistsError):
            run.create(key, grid.to_json())
        return found_points(run, steps)

    return painter.ranks.on_main(find)


def load_run(
    run: str,
    *,
    epoch: int | None = None,
    weights: str | None = None,
    device: str | torch.device | None = None,
    network: str | type[nn.Module] = "",
) -> Model:
    """Returns the model of a run, with every byte verified. It samples with the run's settings by default.

    Image k is that of `ddpm sample` for seed k, with the same options.

    Args:
        run: the run's folder, such as `gs://my-bucket/runs/celeba` or `bucket/runs/celeba`.
        epoch: the epoch of the checkpoint; None: the newest.
        weights: `ema`, `ema-STD` or `model`; None: those of the run's `sample.weights`.
        device: None: the first GPU, if there is one, else the CPU.
        network: the run's own network, if it has one: `"mynet.py:MyNet"`, or the class.

    Raises:
        BadRequestError: `run` is not the folder of a run, or a library is missing.
        MissingInputError: no such run, checkpoint or average; the message lists those that exist.
        BadDataError: the checkpoint is damaged.
    """
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
        raise BadRequestError(f"epoch={epoch!r}: use the number of an epoch, such as 80, or None for the newest")
    bucket, name = split_run(str(run))
    chosen = {"weights": weights} if weights else {}
    checkpoints = "latest" if epoch is None else str(epoch)
    named = network if isinstance(network, str) else name_of(network)
    request = SampleRequest(name, bucket=bucket, checkpoints=checkpoints, chosen=chosen, network=named)
    plan = plan_sampling(request.check())
    on = torch.device(device or best_device())
    decode, group = load_decoder(plan.bucket, plan.index, on), plan.config.sample.weights
    # On many processors bf16 is slower than fp32.
    model = model_of(plan.config, on, plan.precision if on.type == "cuda" else "fp32", decode, plan.classes)
    with reading_chosen(plan.run, plan.choose) as ((ref,), _):
        load_weights(plan.run, ref, group, model.network)
    model.vectors = vectors_of(plan.index)
    model.source = f"{plan.run.uri}, {moment_of(plan.label(ref.images_seen))}, weights {group}"
    return model
