"""`ddpm sample`, and the pictures that training makes: grids, comparisons and GIFs into the run's folder.

RUN/samples/epoch-0080-ddim-100.png              one image per seed, from the averaged weights
            epoch-0080-ddpm-1000-seeds-0-63.png  other samplers, steps, weights or seeds are in the name
            comparison-30-80-490-ddim-100.png    the same seeds under several checkpoints
            denoising-epoch-0080.gif             20 frames from noise to image
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ddpm import figures
from ddpm.epochs import epochs_completed_by
from ddpm.generation import Sampling, generate
from ddpm.schedule import make_schedule
from ddpm.unet import UNet
from job import compute
from job.checkpoints import CheckpointRef, opened
from job.config import RunConfig
from job.data.cache import ImageCache, default_cache_dir, open_cache
from job.data.shards import DatasetIndex, dataset_key
from job.exits import StoppedError
from job.plan import SamplePlan, plan_sampling
from job.progress import Progress
from job.requests import SampleRequest, parse_numbers
from job.stopping import StopFlag
from job.store import Store

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLES = "samples"
GIF_SEEDS = 12
GIF_FRAMES = 20
NEAREST_PAIRS = 40

Images = np.ndarray


class Painter:
    """A network in eval mode and all that is needed to draw from it on the processes there are."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, precision: str, stop: Callable[[], bool]) -> None:
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.device = accelerator.device
        self.network: UNet = compute.build_network(config, self.device).eval().requires_grad_(False)
        self.schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(self.device)
        self.autocast = compute.autocast_for(precision, self.device)

    def generate(
        self, seeds: Sequence[int], sampling: Sampling, callback: Callable[[int, Any, Any], None] | None = None
    ) -> torch.Tensor:
        """One batch on this process: float32 [B, C, H, W] in [-1, 1]; seed k is of class k mod classes, if any."""
        config, classes = self.config, self.config.model.num_classes
        assert config.data.size is not None and config.data.channels is not None
        numbers = torch.tensor(seeds, dtype=torch.int64, device=self.device)

        def checked(t: int, x_t: Any, x_start: Any) -> None:
            if self.stop():
                raise StoppedError("stopped while sampling; the same command begins again")
            if callback is not None:
                callback(t, x_t, x_start)

        return generate(
            self.network,
            self.schedule,
            config.diffusion.prediction,
            sampling,
            numbers,
            (config.data.channels, config.data.size, config.data.size),
            numbers % classes if classes else None,
            self.autocast,
            checked,
        )

    def draw(self, seeds: Sequence[int], sampling: Sampling, batch_size_images: int, title: str) -> Images:
        """All seeds, shared out over the processes: uint8 [n, H, W, C] on the main one, empty on the others."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(seeds[rank::world_size])
        made: list[Images] = []
        with Progress(title, total=len(seeds), unit="images", disable=rank != 0) as bar:
            for start in range(0, len(mine), batch_size_images):
                batch = self.generate(mine[start : start + batch_size_images], sampling)
                made.append(figures.to_uint8(batch))
                bar.update(min(len(seeds), (start + len(batch)) * world_size))
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

    def denoising_gif(self, seeds: Sequence[int], sampling: Sampling) -> bytes:
        """The way from noise to image for a few seeds, as a GIF of `GIF_FRAMES` frames, repeated if steps are fewer."""
        shown = figures.denoising_timesteps(sampling.timesteps(self.schedule.num_timesteps), GIF_FRAMES)
        frames: list[Images] = []

        def keep(t: int, x_t: torch.Tensor, x_start: torch.Tensor) -> None:
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
            shown = images[:NEAREST_PAIRS]
            indices, _ = figures.nearest_pairs(shown, self.training)
            return figures.png(figures.pairs_grid(shown, self.lookup(indices), columns=5))
        count = len(self.classes)
        columns = 10 if count == 5 or count == 10 else 8 if len(images) > 4 else len(images)
        named = count and columns % count == 0 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
        labels = [self.classes[seed % count] for seed in seeds[:columns]] if named else None
        scale = max(1, 96 // images.shape[1])
        return figures.png(figures.image_grid(images, columns, scale=scale, column_labels=labels))


def look_for(config: RunConfig, index: DatasetIndex, cache: ImageCache | None) -> Look:
    """The layout for a run; with a cache, nearest training images are shown."""
    classes = index.classes if config.model.num_classes else ()
    if cache is None:
        return Look(classes)

    def chunks() -> Any:
        return (cache.read(np.arange(i, min(i + 1024, index.images))) for i in range(0, index.images, 1024))

    return Look(classes, chunks, cache.read)


def default_sampling(config: RunConfig) -> Sampling:
    """The sampler of a run's configuration."""
    sample = config.sample
    return Sampling(sample.sampler, sample.steps, sample.spacing, sample.eta, sample.variance)


def label_of(images_seen: int, dataset_images: int, batch_size_images: int) -> str:
    """`epoch-0080`, or `images-000012345` for a checkpoint inside an epoch."""
    epochs = epochs_completed_by(images_seen, dataset_images, batch_size_images)
    return f"epoch-{epochs[-1]:04d}" if epochs else f"images-{images_seen:09d}"


def draw_run_grid(
    run: Store, painter: Painter, index: DatasetIndex, images_seen: int, cache: ImageCache | None
) -> None:
    """Draws the run's standard grid into its folder; collective."""
    config = painter.config
    seeds, sampling = range(config.sample.images), default_sampling(config)
    images = painter.draw(seeds, sampling, config.sample.batch_size, "sampling")
    if painter.accelerator.is_main_process:
        label = label_of(images_seen, index.images, config.train.batch_size)
        look = look_for(config, index, cache if config.sample.nearest else None)
        run.put(f"{SAMPLES}/{label}-{sampling.sampler}-{sampling.steps}.png", look.grid(images, seeds))


def run_sampling(request: SampleRequest, stop: StopFlag) -> None:
    """Draws from the chosen checkpoints of a run and prints where each picture lies.

    Raises:
        MissingInputError: no such run or checkpoint; the message names those there are.
        BadDataError: a checkpoint is damaged; the message names the object.
    """
    plan = plan_sampling(request)
    run, config, index = plan.run, plan.config, plan.index
    sampling = replace(default_sampling(config), sampler=plan.sampler, steps=plan.steps)  # type: ignore[arg-type]
    seeds: Sequence[int] = range(config.sample.images)
    gif_seeds: Sequence[int] = range(GIF_SEEDS)
    if request.seeds:
        seeds = parse_numbers(request.seeds, "--seeds")
        gif_seeds = seeds[:GIF_SEEDS]
    accelerator = compute.build_accelerator("fp32")
    painter = Painter(config, accelerator, request.precision or config.train.precision, stop)
    cache = _training_cache(plan, request, accelerator, stop)
    look, how = look_for(config, index, cache), _how(request, sampling)
    is_standard = how == _how(SampleRequest("", ""), default_sampling(config))
    grids: list[tuple[str, Images]] = []
    for ref in plan.checkpoints:
        _load_weights(run, ref, "model" if request.raw else "ema", painter.network, accelerator)
        label = label_of(ref.images_seen, index.images, config.train.batch_size)
        if request.grid:
            started = time.monotonic()
            images = painter.draw(seeds, sampling, request.batch_size or config.sample.batch_size, label)
            if accelerator.is_main_process:
                rate = len(seeds) / (time.monotonic() - started)
                unit, number = label.split("-")
                grids.append((f"{unit} {int(number):,}", images))
                _publish(run, f"{label}-{how}.png", look.grid(images, seeds), f"{rate:.2f} images/s")
        if request.gif and accelerator.is_main_process:
            name = f"denoising-{label}.gif" if is_standard else f"denoising-{label}-{how}.gif"
            _publish(run, name, painter.denoising_gif(gif_seeds, sampling))
    if len(grids) > 1:
        words = _file_words(request.checkpoints, "-")
        _publish(run, f"comparison-{words}-{how}.png", figures.png(figures.comparison(grids)))


def _how(request: SampleRequest, sampling: Sampling) -> str:
    """All that decides the images of a checkpoint, as part of a name: what differs does not overwrite each other."""
    how = f"{sampling.sampler}-{sampling.steps}{'-raw' if request.raw else ''}"
    return f"{how}-seeds-{_file_words(request.seeds, '_')}" if request.seeds else how


def _file_words(numbers: str, comma: str) -> str:
    words = "".join(numbers.split()).replace(",", comma)
    # File systems end names at 255 bytes.
    return words if len(words) <= 80 else hashlib.sha256(words.encode()).hexdigest()[:16]


def _training_cache(
    plan: SamplePlan, request: SampleRequest, accelerator: Accelerator, stop: StopFlag
) -> ImageCache | None:
    config, index = plan.config, plan.index
    wanted = config.sample.nearest if request.nearest is None else request.nearest
    if not (wanted and request.grid and accelerator.is_main_process):
        return None
    return open_cache(
        plan.bucket,
        dataset_key(config.data.dataset, index.size),
        index,
        cache_dir=default_cache_dir(),
        budget_bytes=int(config.data.cache_gigabytes * 1e9),
        should_stop=stop,
    )


def _load_weights(run: Store, ref: CheckpointRef, group: str, network: UNet, accelerator: Accelerator) -> None:
    def load() -> None:
        with opened(run, ref, (group,)) as restored:
            restored.copy_into({group: {name: value.detach() for name, value in network.named_parameters()}})

    compute.on_main_first(accelerator, load)
    if dist.is_initialized():
        for parameter in network.parameters():
            dist.broadcast(parameter.detach(), src=0)


def _publish(run: Store, name: str, data: bytes, note: str = "") -> None:
    key = f"{SAMPLES}/{name}"
    run.put(key, data)
    print(f"{run.uri_of(key)}{f'  ({note})' if note else ''}")
