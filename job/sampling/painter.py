"""Sampling with a model, on all processes together or on one alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ddpm import figures
from ddpm.generation import Callback, Sampling, Walk, from_noise
from ddpm.model import Model, NotFiniteError
from ddpm.process import Point, VarianceExploding
from ddpm.threads import group_of
from job.config import RunConfig, method
from job.data.autoencoder import Decoder
from job.exits import BadDataError, NotANumberError, StoppedError
from job.processes.ranks import Agreement, Ranks
from job.progress import Progress
from job.runs.checkpoints import opened
from job.runs.layout import CheckpointRef
from job.stop import Stop
from job.store import Store

GIF_FRAMES = 20


@dataclass(frozen=True)
class Route:
    """The way from noise to images."""

    evaluations: int
    """See `evaluations_of`."""
    walk_of: Callable[[Sequence[int]], Walk] = lambda places: from_noise
    """Returns the walk of the images at these places among the seeds."""


class Painter(Model):
    """A model on each process."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        precision: str,
        stop: Stop,
        agreement: Agreement,
        decoder: Decoder | None = None,
        renewals: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Builds the model of a configuration.

        Args:
            config: that of the run.
            ranks: all processes.
            precision: the number format of the network, `fp32` or `bf16`.
            stop: the stop request of this process.
            agreement: has one flag for stop requests, so that all processes stop at the same step.
            decoder: turns latents into pixels, for a run on latents.
            renewals: called at each evaluation: see `job.runs.retention.kept_while_read`.
        """
        super().__init__(**vars(method.model_of(config, ranks.device, precision, decoder)))
        self.config, self.ranks, self.stop, self.agreement, self.renewals = config, ranks, stop, agreement, renewals

    def load(self, run: Store, ref: CheckpointRef, group: str) -> None:
        """Reads weights of a checkpoint, such as `ema` or `model`, once for all processes. Collective.

        Raises:
            BadDataError: the checkpoint is damaged; the message names the object, and how to find another.
        """
        self._load(self.network, run, ref, group)

    def load_worse(self, run: Store, config: RunConfig, ref: CheckpointRef, group: str) -> None:
        """Reads the weights of the weaker network for autoguidance, with the configuration of its run. Collective."""
        self.worse = method.build_network(config, self.device).eval().requires_grad_(False)
        self.worse_has_classes = bool(config.model.num_classes)
        self._load(self.worse, run, ref, group)

    def _load(self, network: nn.Module, run: Store, ref: CheckpointRef, group: str) -> None:
        def load() -> None:
            tensors = {group: {name: value.detach() for name, value in network.named_parameters()}}
            try:
                with opened(run, ref, into=tensors):
                    pass
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

    def draw_together(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size_images: int,
        title: str,
        route: Route | None = None,
        kept: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    ) -> np.ndarray:
        """Samples seeds on all processes: uint8 [n, H, W, C] on the main one, no images on the others. Collective.

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
        # Every process counts the batches of the first one, which has the most: all must agree equally often.
        of_ranks = self.shared_out(len(seeds), batch_size_images)
        mine, batches, done = of_ranks[self.ranks.rank], len(of_ranks[0]), 0

        def after_evaluation(*_: Any) -> None:
            nonlocal done
            self.check_agreed()
            done += 1
            bar.update(len(seeds) * done / (batches * route.evaluations))

        with Progress(title, total=len(seeds)) as bar:
            for places in mine:
                some = [seeds[place] for place in places]
                made.append(kept(self.draw_alone(some, sampling, after_evaluation, route.walk_of(places))))
            for _ in range(route.evaluations * (batches - len(mine))):
                after_evaluation()
            self.agreement.finish()
        # Only the first process always has images; those without any do not know their shape.
        part = np.concatenate(made) if made else np.empty(0)
        if self.ranks.world_size == 1:
            return part
        parts: list[Any] | None = [None] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(part, parts)
        gathered = np.empty((len(seeds) if self.ranks.is_main else 0, *part.shape[1:]), part.dtype)
        for of_rank, drawn in zip(of_ranks, parts or [], strict=False):
            if of_rank:
                gathered[[place for places in of_rank for place in places]] = drawn
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

    def draw_batches(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size_images: int,
        advance: Callable[[float], None],
        route: Route | None = None,
    ) -> Iterator[np.ndarray]:
        """Samples seeds on this process in batches, uint8 [b, H, W, C]; `advance` gets images, or parts of them.

        Raises:
            StoppedError: a stop was requested.
        """
        route = route or Route(self.evaluations_of(sampling))
        for start in range(0, len(seeds), batch_size_images):
            places = range(len(seeds))[start : start + batch_size_images]

            def after_evaluation(*_: object, part: float = len(places) / route.evaluations) -> None:
                self.check_stopped()
                advance(part)

            some = [seeds[place] for place in places]
            yield self.draw_alone(some, sampling, after_evaluation, route.walk_of(places))

    def denoising_gif(self, seeds: Sequence[int], sampling: Sampling, title: str) -> bytes:
        """Returns a GIF of the denoising of a few seeds: a frame for each of at most `GIF_FRAMES` moments."""
        # The time of EDM's network, ln(σ)/4, means less to people than σ.
        by_sigma = isinstance(self.process, VarianceExploding)
        evaluations = itertools.count()
        shown = figures.shown_evaluations(self.evaluations_of(sampling), GIF_FRAMES - 1)
        frames: list[tuple[np.ndarray, str]] = []

        def keep(point: Point[float], x_t: torch.Tensor, x_start: torch.Tensor) -> None:
            self.check_stopped()
            if next(evaluations) in shown:
                # Scaled to the variance of the images: otherwise most pixels of noise would be black or white.
                at = f"sigma = {point.sigma:.3g}" if by_sigma else f"t = {point.t:.0f}"
                frames.append((figures.to_uint8(self.pixels(x_t / max(1.0, point.sigma))), at))

        frames.append((self.draw_alone(seeds, sampling, keep), "the image"))
        return figures.denoising_gif([images for images, _ in frames], labels=[at for _, at in frames], title=title)

    def draw_alone(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Callback | None = None,
        walk: Walk = from_noise,
    ) -> np.ndarray:
        """Samples a batch on this process, without the others: uint8 [n, H, W, C].

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
            return figures.to_uint8(self.draw(numbers, sampling, callback or self.check_stopped, walk))
        except NotFiniteError as error:
            raise NotANumberError(str(error)) from None

    def check_stopped(self, *_: Any) -> None:
        """Raises `StoppedError` if this process has a stop request, without the others."""
        self.stop.check("while sampling")
        for renew in self.renewals:
            renew()

    def check_agreed(self, doing: str = "while sampling") -> None:
        """Raises `StoppedError` on all processes at once if any of them has a stop request. Collective."""
        (stopping,) = self.agreement.exchange(self.stop())
        if stopping:
            self.agreement.finish()
            raise StoppedError(f"stopped {doing}; the same command begins again")
        for renew in self.renewals:
            renew()
