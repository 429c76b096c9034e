"""Figures that need no network: the schedule and noised images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ddpm import figures, randomness
from ddpm.process import TABLES, VariancePreserving
from job.data.cache import uncached_images
from job.data.shards import find_dataset, load_index
from job.exits import BadRequestError
from job.requests import check_output, parse_numbers
from job.store import open_store
from job.store.files import os_errors, temporary_beside


def schedule_picture(kind: str, num_timesteps: int, output: Path) -> None:
    """Writes the plot of β and ᾱ.

    Raises:
        BadRequestError: the schedule is unknown, or `output` cannot be written.
    """
    schedule = _checked_schedule(kind, num_timesteps, output)
    write_picture(output, figures.schedule_figure(schedule.betas.numpy(), schedule.alphas_cumprod.numpy(), kind))
    print(output)


def noising_picture(bucket_uri: str, dataset: str, size: int | None, timesteps: str, kind: str, output: Path) -> None:
    """Writes a figure of images beside q(x_t|x_0), and two more files with the images and the noised images alone.

    Raises:
        BadRequestError: an unknown schedule, a wrong timestep, too few images, or `output` cannot be written.
        MissingInputError: no such dataset.
    """
    schedule, steps = _checked_schedule(kind, 1000, output), parse_numbers(timesteps, "--timesteps")
    if max(steps) >= schedule.num_timesteps:
        raise BadRequestError(f"--timesteps: {max(steps)} is not in 0 to {schedule.num_timesteps - 1}")
    bucket = open_store(bucket_uri)
    key = find_dataset(bucket, dataset, size)
    index = load_index(bucket, key)
    if index.encoding:
        raise BadRequestError(f"--dataset {dataset} holds latents, of {index.encoding.source}: name that one")
    if len(steps) > index.images:
        raise BadRequestError(f"--timesteps has {len(steps):,} entries, but {index.name} only {index.images:,} images")
    chosen = np.linspace(0, index.images - 1, len(steps)).astype(np.int64)
    images = uncached_images(bucket, key, index).read(chosen)
    x_start = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = randomness.sampling_noise(torch.arange(len(steps)), 0, tuple(x_start.shape[1:]), x_start.device)
    _, alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in schedule.numbered(torch.tensor(steps)))
    noised = alpha * x_start + sigma * noise
    figure = figures.noising_figure(images, noised, steps)
    beside = {part: output.with_name(f"{output.stem}-{part}{output.suffix}") for part in ("original", "noised")}
    for part, path in {"combined": output, **beside}.items():
        write_picture(path, figures.png(getattr(figure, part)))
        print(path)


def _checked_schedule(kind: str, num_timesteps: int, output: Path) -> VariancePreserving:
    if kind not in TABLES:
        raise BadRequestError(f"--schedule {kind!r}: use {', '.join(TABLES)}")
    check_output(output)
    return TABLES[kind](num_timesteps)


def write_picture(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing.

    Raises:
        DiskFullError, NoPermissionError: the file cannot be written.
    """
    with os_errors(path), temporary_beside(path) as (temporary, file):
        file.write(data)
        file.flush()
        temporary.replace(path)
