"""Pictures that need no run of the network: the schedule and noised images."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import torch

from ddpm import figures, randomness
from ddpm.schedule import make_schedule
from job.cache import default_cache_dir, open_cache
from job.config import DiffusionConfig
from job.exits import BadRequestError, MissingInputError
from job.requests import parse_numbers
from job.shards import find_dataset, load_index
from job.store import open_store

CACHE_BYTES = 32 * 10**9


def schedule_picture(kind: str, num_timesteps: int, output: Path) -> None:
    """Writes the plot of β and ᾱ."""
    _known_schedule(kind)
    schedule = make_schedule(kind, num_timesteps)  # type: ignore[arg-type]
    _write(output, figures.schedule_figure(schedule.betas.numpy(), schedule.alphas_cumprod.numpy(), kind))


def noising_picture(bucket_uri: str, dataset: str, size: int | None, timesteps: str, kind: str, output: Path) -> None:
    """Writes images beside q(x_t|x_0), and the two bare grids beside that."""
    _known_schedule(kind)
    steps, schedule = parse_numbers(timesteps, "--timesteps"), make_schedule(kind, 1000)  # type: ignore[arg-type]
    if max(steps) >= schedule.num_timesteps:
        raise BadRequestError(f"--timesteps: {max(steps)} is not in 0 to {schedule.num_timesteps - 1}")
    bucket = open_store(bucket_uri)
    key = find_dataset(bucket, dataset, size)
    index = load_index(bucket, key)
    if len(steps) > index.images:
        raise BadRequestError(f"--timesteps has {len(steps)} entries, but {index.name} only {index.images} images")
    cache = open_cache(bucket, key, index, cache_dir=default_cache_dir(), budget_bytes=CACHE_BYTES)
    images = cache.read(np.linspace(0, index.images - 1, len(steps)).astype(np.int64))
    x_start = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = randomness.sampling_noise(
        torch.arange(len(steps)), schedule.num_timesteps, tuple(x_start.shape[1:]), x_start.device
    )
    noised = schedule.add_noise(x_start, noise, torch.tensor(steps))
    figure = figures.noising_figure(images, noised, steps)
    _write(output, figures.png(figure.combined))
    for part in ("original", "noised"):
        _write(output.with_name(f"{output.stem}-{part}{output.suffix}"), figures.png(getattr(figure, part)))


def _known_schedule(kind: str) -> None:
    kinds = get_args(DiffusionConfig.model_fields["schedule"].annotation)
    if kind not in kinds:
        raise BadRequestError(f"there is no schedule {kind!r} (there are: {', '.join(kinds)})")


def _write(path: Path, data: bytes) -> None:
    if not path.parent.is_dir():
        raise MissingInputError(f"there is no folder {path.parent} to write {path.name} into")
    path.write_bytes(data)
    print(path)
