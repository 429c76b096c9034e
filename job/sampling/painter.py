"""Drawing: a model, and images from it, on all processes together or on one alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ddpm import figures
from ddpm.generation import Callback, Sampling, Walk, from_noise
from ddpm.model import Model, NotFiniteError
from ddpm.objective import Condition
from ddpm.process import Point, VarianceExploding
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
    """How images come about, of which this is one by one."""

    evaluations: int
    """See `evaluations_of`."""
    walk_of: Callable[[Sequence[int]], Walk] = lambda places: from_noise
    """Of those at these places among the seeds that are drawn."""


class Painter(Model):
    """A model on each of the processes there are."""

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
        """`agreement` has one flag: being stopped, which all processes must be at the same step.

        `decoder` makes pixels of what is drawn, where that are latents. `renewals` are called at each evaluation: see
        `job.runs.readers.reading`.
        """
        super().__init__(**vars(method.model_of(config, ranks.device, precision, decoder)))
        self.config, self.ranks, self.stop, self.agreement, self.renewals = config, ranks, stop, agreement, renewals

    def load(self, run: Store, ref: CheckpointRef, group: str) -> None:
        """Reads weights of a checkpoint, such as `ema` or `model`, once for all processes. Collective.

        Raises:
            BadDataError: it is damaged; the message names the object, and how to find another.
        """
        self._load(self.network, run, ref, group)

    def load_worse(self, run: Store, config: RunConfig, ref: CheckpointRef, group: str) -> None:
        """Likewise, of a second network that is guided away from, and of the run that it is of."""
        if self.worse is None:
            self.worse = method.build_network(config, self.device).eval().requires_grad_(False)
            self._load(self.worse, run, ref, group)

    def _load(self, network: nn.Module, run: Store, ref: CheckpointRef, group: str) -> None:
        def load() -> None:
            tensors = {group: {name: value.detach() for name, value in network.named_parameters()}}
            try:
                with opened(run, ref, (group,)) as restored:
                    restored.copy_into(tensors)
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

    def predict(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's output under its autocast."""
        with self.autocast():
            return self.network(x, t, condition)

    def draw_together(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size_images: int,
        title: str,
        route: Route | None = None,
        kept: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    ) -> np.ndarray:
        """All seeds, shared out over the processes: uint8 [n, H, W, C] on the main one, none on the others. Collective.

        Args:
            seeds: of the images.
            sampling: how they are drawn.
            batch_size_images: at a time and process.
            title: of the bar.
            route: from noise to images; none: straight.
            kept: what is handed on of each batch [n, …] instead of its images.

        Raises:
            StoppedError: on all processes at the same step, when any of them was asked to stop.
        """
        rank, world_size = self.ranks.rank, self.ranks.world_size
        mine, route = range(len(seeds))[rank::world_size], route or Route(self.evaluations_of(sampling))
        made: list[np.ndarray] = []
        # Every process counts the batches of the first one, which has the most.
        starts, done = range(0, len(seeds[::world_size]), batch_size_images), 0

        def after_evaluation(*_: Any) -> None:
            nonlocal done
            self.check_agreed()
            done += 1
            bar.update(len(seeds) * done / (len(starts) * route.evaluations))

        with Progress(title, total=len(seeds)) as bar:
            for start in starts:
                if places := mine[start : start + batch_size_images]:
                    some = [seeds[place] for place in places]
                    made.append(kept(self.draw_alone(some, sampling, after_evaluation, route.walk_of(places))))
                else:
                    for _ in range(route.evaluations):
                        after_evaluation()
            self.agreement.finish()
        # The first process has some whenever there are any; others may have none, of whatever shape.
        part = np.concatenate(made) if made else np.empty(0)
        if world_size == 1:
            return part
        parts: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(part, parts)
        gathered = np.empty((len(seeds) if rank == 0 else 0, *part.shape[1:]), part.dtype)
        for other, of_rank in enumerate(parts or []):
            if len(of_rank):
                gathered[other::world_size] = of_rank
        return gathered

    def denoising_gif(self, seeds: Sequence[int], sampling: Sampling, title: str) -> bytes:
        """The way from noise to image for a few seeds, as a GIF of `GIF_FRAMES` frames, repeated if steps are fewer."""
        # EDM's network is told ln(σ)/4, which says less.
        by_sigma = isinstance(self.process, VarianceExploding)
        evaluations = itertools.count()
        shown = figures.shown_evaluations(self.evaluations_of(sampling), GIF_FRAMES)
        frames: list[tuple[np.ndarray, str]] = []

        def keep(point: Point[float], x_t: torch.Tensor, x_start: torch.Tensor) -> None:
            self.check_stopped()
            if next(evaluations) in shown[:-1]:
                # At the variance of the images, so that noise does not hide all but black and white.
                at = f"sigma = {point.sigma:.3g}" if by_sigma else f"t = {point.t:.0f}"
                frames.append((figures.to_uint8(self.pixels(x_t / max(1.0, point.sigma))), at))

        frames.append((self.draw_alone(seeds, sampling, keep), "the image"))
        shown_frames, labels = zip(*(frames[i * len(frames) // GIF_FRAMES] for i in range(GIF_FRAMES)), strict=True)
        return figures.denoising_gif(shown_frames, labels=labels, title=title)

    def draw_alone(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Callback | None = None,
        walk: Walk = from_noise,
    ) -> np.ndarray:
        """A batch on this process, whatever the others do: uint8 [n, H, W, C].

        Seed k is of class k mod classes, of those that the sampling names or else of all, if there are any.

        Args:
            seeds: of the images.
            sampling: how they are drawn.
            callback: gets every evaluation's point, x_t and predicted x_0; without one a stop is heard.
            walk: from their noise to the images.

        Raises:
            StoppedError: this process was asked to stop.
            NotANumberError: a pixel is none.
        """
        numbers = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        try:
            return figures.to_uint8(self.draw(numbers, sampling, callback or self.check_stopped, walk))
        except NotFiniteError as error:
            raise NotANumberError(str(error)) from None

    def check_stopped(self, *_: Any) -> None:
        """Raises `StoppedError` if this process was asked to stop, whatever the others do."""
        self.stop.check("while sampling")
        for renew in self.renewals:
            renew()

    def check_agreed(self, doing: str = "while sampling") -> None:
        """Raises `StoppedError` on all processes at once if any was asked to stop. Collective."""
        (stopping,) = self.agreement.exchange(self.stop())
        if stopping:
            self.agreement.finish()
            raise StoppedError(f"stopped {doing}; the same command begins again")
        for renew in self.renewals:
            renew()
