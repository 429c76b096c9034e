"""`ddpm sample`, and the pictures that training makes: grids, comparisons and GIFs into the run's folder.

RUN/samples/epoch-0080-ddim-100.png              one image per seed, from the averaged weights
            comparison-30-80-490-ddim-100.png    the same seeds under several checkpoints
            denoising-epoch-0080.gif             20 frames from noise to image
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ddpm import figures
from ddpm.epochs import epochs_completed_by
from ddpm.generation import Sampling, generate
from ddpm.schedule import make_schedule
from ddpm.unet import UNet
from job import compute, runs
from job.cache import ImageCache, default_cache_dir, open_cache
from job.checkpoints import CheckpointRef, choose, opened
from job.config import RunConfig
from job.exits import BadConfigError, StoppedError
from job.progress import Progress
from job.requests import SampleRequest, parse_numbers
from job.shards import DatasetIndex, dataset_key, load_index
from job.stopping import StopFlag
from job.store import Store, open_store

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
        """The way from noise to image for a few seeds, as a GIF."""
        shown = figures.denoising_timesteps(sampling.timesteps(self.schedule.num_timesteps), GIF_FRAMES)
        frames: list[Images] = []

        def keep(t: int, x_t: torch.Tensor, x_start: torch.Tensor) -> None:
            if t in shown[:-1]:
                frames.append(figures.to_uint8(x_t))

        frames.append(figures.to_uint8(self.generate(seeds, sampling, keep)))
        return figures.denoising_gif(frames)


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
    bucket = open_store(request.bucket)
    run = runs.run_store(bucket, request.run)
    config = runs.existing_config(run, request.run)
    assert config.data.size is not None
    index = load_index(bucket, dataset_key(config.data.dataset, config.data.size))
    sampling = _sampling_of(request, config)
    seeds = parse_numbers(request.seeds, "--seeds") if request.seeds else list(range(config.sample.images))
    refs = choose(run, request.run, request.checkpoints, index.images, config.train.batch_size)
    accelerator = compute.build_accelerator("fp32")
    painter = Painter(config, accelerator, request.precision or config.train.precision, stop)
    cache = _training_cache(bucket, config, index, request, accelerator, stop)
    look, how = look_for(config, index, cache), f"{sampling.sampler}-{sampling.steps}{'-raw' if request.raw else ''}"
    grids: list[tuple[str, Images]] = []
    for ref in refs:
        _load_weights(run, ref, "model" if request.raw else "ema", painter.network, accelerator)
        label = label_of(ref.images_seen, index.images, config.train.batch_size)
        if request.grid:
            started = time.monotonic()
            images = painter.draw(seeds, sampling, request.batch_size or config.sample.batch_size, label)
            if accelerator.is_main_process:
                rate = len(seeds) / (time.monotonic() - started)
                grids.append((label.replace("-0", " ").replace("-", " "), images))
                _publish(run, f"{label}-{how}.png", look.grid(images, seeds), f"{rate:.2f} images/s")
        if request.gif and accelerator.is_main_process:
            _publish(run, f"denoising-{label}.gif", painter.denoising_gif(seeds[:GIF_SEEDS], sampling))
    if len(grids) > 1:
        words = request.checkpoints.replace(",", "-").replace(" ", "")
        _publish(run, f"comparison-{words}-{how}.png", figures.png(figures.comparison(grids)))


def _sampling_of(request: SampleRequest, config: RunConfig) -> Sampling:
    base = default_sampling(config)
    sampler = request.sampler or base.sampler
    # The run's step count is meant for its own sampler: ancestral sampling with a few steps is noise.
    steps = request.steps or (base.steps if sampler == base.sampler else config.diffusion.timesteps)
    if steps > config.diffusion.timesteps:
        raise BadConfigError(f"--steps {steps} exceeds the run's diffusion.timesteps={config.diffusion.timesteps}")
    return Sampling(sampler, steps, base.spacing, base.eta, base.variance)  # type: ignore[arg-type]


def _training_cache(
    bucket: Store,
    config: RunConfig,
    index: DatasetIndex,
    request: SampleRequest,
    accelerator: Accelerator,
    stop: StopFlag,
) -> ImageCache | None:
    wanted = config.sample.nearest if request.nearest is None else request.nearest
    if not (wanted and request.grid and accelerator.is_main_process):
        return None
    return open_cache(
        bucket,
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
