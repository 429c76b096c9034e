"""`ddpm sample`, and the pictures that training makes: grids, comparisons and GIFs into the run's folder.

RUN/samples/epoch-0080-ddim-100.png              one image per seed, from the averaged weights
            epoch-0080-ddpm-1000-seeds-0-63.png  other samplers, steps, weights or seeds are in the name
            comparison-30-80-490-ddim-100.png    the same seeds under several checkpoints
            denoising-epoch-0080.gif             20 frames from noise to image
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ddpm import figures
from ddpm.generation import Sampling, generate
from ddpm.schedule import make_schedule
from ddpm.unet import UNet
from job.config import RunConfig
from job.data.cache import ImageCache, default_cache_dir, open_cache
from job.data.shards import DatasetIndex, dataset_key
from job.exits import BadDataError, StoppedError
from job.processes import compute
from job.processes.ranks import Agreement, Ranks, meet
from job.progress import Progress
from job.requests import GIF_SEEDS, SampleRequest, parse_numbers
from job.runs import records
from job.runs.checkpoints import CheckpointRef, opened
from job.runs.provenance import put_picture
from job.runs.retention import reading
from job.sampling.names import SAMPLES, file_words, how_drawn, label_of
from job.sampling.plan import SamplePlan, plan_sampling
from job.stop import NEVER, Stop, beat
from job.store import Store

GIF_FRAMES = 20

Images = np.ndarray


class Painter:
    """A network in eval mode and all that is needed to draw from it on the processes there are."""

    def __init__(self, config: RunConfig, ranks: Ranks, precision: str, stop: Stop, agreement: Agreement) -> None:
        """`agreement` has one flag: being stopped, which all processes must be at the same step."""
        self.config, self.ranks, self.stop, self._agreement = config, ranks, stop, agreement
        self.device = ranks.accelerator.device
        self.network: UNet = compute.build_network(config, self.device).eval().requires_grad_(False)
        self.schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(self.device)
        self.autocast = compute.autocast_for(precision, self.device)

    def generate(
        self, seeds: Sequence[int], sampling: Sampling, callback: Callable[[int, Any, Any], None] | None = None
    ) -> torch.Tensor:
        """One batch on this process: float32 [B, C, H, W] in [-1, 1]; seed k is of class k mod classes, if any.

        `callback` gets every step's timestep, x_t and predicted x_0.
        """
        config, classes = self.config, self.config.model.num_classes
        assert config.data.size is not None and config.data.channels is not None
        numbers = torch.tensor(seeds, dtype=torch.int64, device=self.device)

        return generate(
            self.network,
            self.schedule,
            config.diffusion.prediction,
            sampling,
            numbers,
            (config.data.channels, config.data.size, config.data.size),
            numbers % classes if classes else None,
            self.autocast,
            callback,
        )

    def draw(self, seeds: Sequence[int], sampling: Sampling, batch_size_images: int, title: str) -> Images:
        """All seeds, shared out over the processes: uint8 [n, H, W, C] on the main one, empty on the others.

        Raises:
            StoppedError: on all processes at the same step, when any of them was asked to stop.
        """
        rank, world_size = self.ranks.rank, self.ranks.world_size
        mine = list(seeds[rank::world_size])
        steps = len(sampling.timesteps(self.schedule.num_timesteps))
        made: list[Images] = []
        with Progress(title, total=len(seeds), unit="images", disable=rank != 0) as bar:
            # Every process counts the batches of the first one, which has the most.
            for start in range(0, len(seeds[::world_size]), batch_size_images):
                if batch := mine[start : start + batch_size_images]:
                    made.append(figures.to_uint8(self.generate(batch, sampling, self._check_agreed)))
                else:
                    for _ in range(steps):
                        self._check_agreed()
                bar.update(min(len(seeds), (start + len(batch)) * world_size))
            self._agreement.finish()
        part = np.concatenate(made) if made else np.empty((0, 0, 0, 0), np.uint8)
        if world_size == 1:
            return part
        parts: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(part, parts)
        if parts is None:
            return np.empty((0, 0, 0, 0), np.uint8)
        images = np.empty((len(seeds), *parts[0].shape[1:]), np.uint8)
        for other, piece in enumerate(parts):
            if len(piece):
                images[other::world_size] = piece
        return images

    def _check_agreed(self, *_: Any) -> None:
        (stopping,) = self._agreement.exchange(self.stop())
        if stopping:
            self._agreement.finish()
            raise StoppedError("stopped while sampling; the same command begins again")

    def denoising_gif(self, seeds: Sequence[int], sampling: Sampling) -> bytes:
        """The way from noise to image for a few seeds, as a GIF of `GIF_FRAMES` frames, repeated if steps are fewer."""
        shown = figures.denoising_timesteps(sampling.timesteps(self.schedule.num_timesteps), GIF_FRAMES)
        frames: list[Images] = []

        def keep(t: int, x_t: torch.Tensor, x_start: torch.Tensor) -> None:
            if self.stop():
                raise StoppedError("stopped while sampling; the same command begins again")
            if t in shown[:-1]:
                frames.append(figures.to_uint8(x_t))

        frames.append(figures.to_uint8(self.generate(seeds, sampling, keep)))
        return figures.denoising_gif([frames[i * len(frames) // GIF_FRAMES] for i in range(GIF_FRAMES)])


@dataclass(frozen=True)
class Look:
    """How a grid is laid out: captions for classes, pairs for nearest training images."""

    classes: tuple[str, ...]
    training: Callable[[], Any] | None = None
    """Yields all training images in chunks, uint8 [N, H, W, C], to find the nearest ones in."""
    lookup: Callable[[np.ndarray], Images] | None = None

    def grid(self, images: Images, seeds: Sequence[int]) -> bytes:
        """A PNG of the images."""
        if self.training is not None and self.lookup is not None:
            indices, _ = figures.nearest_pairs(images, self.training)
            return figures.png(figures.pairs_grid(images, self.lookup(indices), columns=5))
        count = len(self.classes)
        columns = 10 if count == 5 or count == 10 else 8 if len(images) > 4 else len(images)
        named = count and columns % count == 0 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
        labels = [self.classes[seed % count] for seed in seeds[:columns]] if named else None
        scale = max(1, 96 // images.shape[1])
        return figures.png(figures.image_grid(images, columns, scale=scale, column_labels=labels))


def look_for(config: RunConfig, index: DatasetIndex, cache: ImageCache | None, stop: Stop = NEVER) -> Look:
    """The layout for a run; with a cache, nearest training images are shown, unless `stop` says so meanwhile.

    Its `grid` then raises `StoppedError`.
    """
    classes = index.classes if config.model.num_classes else ()
    if cache is None:
        return Look(classes)

    def chunks() -> Iterator[Images]:
        for first in range(0, index.images, 1024):
            beat()
            stop.check("while the nearest training images were looked for")
            yield cache.read(np.arange(first, min(first + 1024, index.images)))

    return Look(classes, chunks, cache.read)


def default_sampling(config: RunConfig) -> Sampling:
    """The sampler of a run's configuration."""
    sample = config.sample
    return Sampling(sample.sampler, sample.steps, sample.spacing, sample.eta, sample.variance)


def sampling_of(plan: SamplePlan) -> Sampling:
    """The sampler of a run's configuration, but for what the request chose."""
    return replace(default_sampling(plan.config), sampler=plan.sampler, steps=plan.steps)  # type: ignore[arg-type]


def run_grid_key(config: RunConfig, dataset_images: int, images_seen: int) -> str:
    """Where a run's standard grid of a moment lies."""
    label = label_of(images_seen, dataset_images, config.train.batch_size)
    return f"{SAMPLES}/{label}-{config.sample.sampler}-{config.sample.steps}.png"


def draw_run_grid(
    put: Callable[[str, bytes], None], painter: Painter, index: DatasetIndex, images_seen: int, cache: ImageCache | None
) -> None:
    """Draws the run's standard grid and has it `put` into its folder; collective."""
    config = painter.config
    seeds, sampling = range(config.sample.images), default_sampling(config)
    images = painter.draw(seeds, sampling, config.sample.batch_size, "sampling")

    def publish() -> None:
        look = look_for(config, index, cache if config.sample.nearest else None, painter.stop)
        put(run_grid_key(config, index.images, images_seen), look.grid(images, seeds))

    painter.ranks.on_main(publish)


def run_sampling(request: SampleRequest, stop: Stop = NEVER) -> None:
    """Draws from the chosen checkpoints of a run and prints where each picture lies.

    Args:
        request: what to draw.
        stop: asked all the while.

    Raises:
        MissingInputError: no such run or checkpoint; the message names those there are.
        BadDataError: a checkpoint is damaged; the message names the object.
        BucketAwayError: the bucket stayed away beyond the limit.
    """
    plan = plan_sampling(request, stop)
    run, config, index = plan.run, plan.config, plan.index
    sampling, usual = sampling_of(plan), default_sampling(config)
    seeds: Sequence[int] = range(config.sample.images)
    gif_seeds: Sequence[int] = range(GIF_SEEDS)
    if request.seeds:
        seeds = parse_numbers(request.seeds, "--seeds")
        gif_seeds = seeds[:GIF_SEEDS]
    ranks = meet(stop)
    painter = Painter(
        config, ranks, request.precision or config.train.precision, stop, Agreement(ranks.world_size, flags=1)
    )
    cache = _training_cache(plan, request, stop) if ranks.is_main else None
    look = look_for(config, index, cache, stop)
    chosen = partial(how_drawn, plan.sampler, plan.steps, raw=request.raw, precision=plan.other_precision(request))
    how = gif_how = chosen(seeds=request.seeds)
    if request.seeds and len(gif_seeds) < len(seeds):
        gif_how = chosen(seeds=",".join(map(str, gif_seeds)))
    is_standard = how == how_drawn(usual.sampler, usual.steps)
    is_layout_chosen = request.nearest is not None and request.nearest != config.sample.nearest
    layout = ("-nearest" if request.nearest else "-alone") if is_layout_chosen else ""
    grids: list[tuple[str, Images]] = []
    for ref in plan.checkpoints:
        load_weights(run, ref, "model" if request.raw else "ema", painter.network, ranks)
        label = label_of(ref.images_seen, index.images, config.train.batch_size)
        if request.grid:
            started = time.monotonic()
            images = painter.draw(seeds, sampling, request.batch_size or config.sample.batch_size, label)
            if ranks.is_main:
                rate = len(seeds) / (time.monotonic() - started)
                unit, number = label.split("-")
                grids.append((f"{unit} {int(number):,}", images))
                _publish(run, ref, f"{label}-{how}{layout}.png", look.grid(images, seeds), f"{rate:.2f} images/s")
        if request.gif and ranks.is_main:
            name = f"denoising-{label}.gif" if is_standard else f"denoising-{label}-{gif_how}.gif"
            _publish(run, ref, name, painter.denoising_gif(gif_seeds, sampling))
    if len(grids) > 1:
        words = file_words(request.checkpoints, "-")
        _publish(run, max(plan.checkpoints), f"comparison-{words}-{how}.png", figures.png(figures.comparison(grids)))


def _training_cache(plan: SamplePlan, request: SampleRequest, stop: Stop) -> ImageCache | None:
    config, index = plan.config, plan.index
    wanted = config.sample.nearest if request.nearest is None else request.nearest
    if not (wanted and request.grid):
        return None
    return open_cache(
        plan.bucket,
        dataset_key(config.data.dataset, index.size),
        index,
        cache_dir=default_cache_dir(),
        budget_bytes=int(config.data.cache_gigabytes * 1e9),
        stop=stop,
    )


def load_weights(run: Store, ref: CheckpointRef, group: str, network: UNet, ranks: Ranks) -> None:
    """Reads the weights of a checkpoint, once for all processes, and keeps it from being retired meanwhile. Collective.

    Raises:
        BadDataError: it is damaged; the message names the object.
    """

    def load() -> None:
        tensors = {group: {name: value.detach() for name, value in network.named_parameters()}}
        try:
            with reading(run, ref), opened(run, ref, (group,)) as restored:
                records.check_written_here(run, restored.manifest)
                restored.copy_into(tensors)
        except BadDataError as error:
            name = run.uri.rsplit("/", 1)[-1]
            raise BadDataError(
                f"{error}; `ddpm runs show {name}` lists the other checkpoints, for --checkpoints, and "
                f"`ddpm runs verify {name}` says which are whole"
            ) from None

    ranks.on_main(load)
    if dist.is_initialized():
        for parameter in network.parameters():
            dist.broadcast(parameter.detach(), src=0)


def _publish(run: Store, ref: CheckpointRef, name: str, picture: bytes, note: str = "") -> None:
    key = f"{SAMPLES}/{name}"
    put_picture(run, key, picture, fence=ref.fence, images_seen=ref.images_seen)
    print(f"{run.uri_of(key)}{f'  ({note})' if note else ''}")
