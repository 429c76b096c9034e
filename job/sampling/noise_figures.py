"""Figures of the method that need no network: `ddpm figure schedule` and `ddpm figure noising`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm import figures, randomness
from ddpm.catalogue import SCHEDULES, Diffusion
from ddpm.image_size import ImageSize
from ddpm.process import VarianceExploding, VariancePreserving, make_process
from job.config import RunConfig
from job.data.reading.cache import uncached_images
from job.data.shards import find_dataset, load_index
from job.exits import BadRequestError
from job.requests import check_output, parse_numbers
from job.runs.records import existing_config
from job.store import Store, open_store
from job.store.files import write_file

_COLUMNS = 6


def schedule_picture(bucket: str, run: str, schedule: str, timesteps: int | None, output: Path) -> None:
    """Writes the plot of β and ᾱ, or of σ and α of a process without β: that of a run, or the named one.

    Raises:
        BadRequestError: the schedule is unknown or another than the run's, or `output` cannot be written.
        MissingInputError: no such run.
    """
    check_output(output)
    diffusion, _ = _diffusion(open_store(bucket), run, schedule, timesteps)
    process, title = make_process(diffusion), f"{_words(diffusion)}, T = {diffusion.timesteps}"
    if isinstance(process, VariancePreserving):
        curves = {r"$\beta_t$": process.betas, r"$\bar\alpha_t$": process.alphas_cumprod}
    else:
        _, alpha, sigma = process.numbered(torch.arange(process.num_timesteps))
        curves = {r"$\sigma_t$": sigma, r"$\alpha_t$": alpha}
    title = f"{run} · {title}" if run else title
    write_file(output, figures.schedule_figure(curves, title, log=isinstance(process, VarianceExploding)))
    print(output)


def noising_picture(
    bucket_uri: str,
    run: str,
    dataset: str,
    size: ImageSize | None,
    *,
    schedule: str,
    timesteps: str,
    image: int | None,
    output: Path,
) -> None:
    """Writes a figure of images beside q(x_t|x_0), and two more files with the images and the noised images alone.

    With `image` the figure is that one image of the dataset at each of the timesteps, with the same noise.

    Raises:
        BadRequestError: an unknown schedule, a wrong timestep, no such image, or `output` cannot be written.
        MissingInputError: no such dataset or run.
    """
    check_output(output)
    bucket = open_store(bucket_uri)
    diffusion, config = _diffusion(bucket, run, schedule)
    evenly = np.linspace(0, diffusion.timesteps - 1, 2 * _COLUMNS)[image is not None :].round().astype(int).tolist()
    steps = parse_numbers(timesteps, "--timesteps") if timesteps else evenly
    if max(steps) >= diffusion.timesteps:
        raise BadRequestError(f"--timesteps: {max(steps)} is not in 0 to {diffusion.timesteps - 1}")
    if config and not dataset:
        dataset, size = config.data.dataset, config.data.size
    if not dataset:
        raise BadRequestError("--dataset is needed: it names the images, unless --run names a run that saw some")
    index = load_index(bucket, key := find_dataset(bucket, dataset, size))
    if index.encoding:
        raise BadRequestError(f"--dataset {dataset} holds latents, of {index.encoding.source}: name that one")
    if image is not None and image >= index.images:
        raise BadRequestError(f"--image {image}: {index.name} has the images 0 to {index.images - 1:,}")
    numbers = np.linspace(0, index.images - 1, len(steps)).astype(np.int64) if image is None else np.array([image])
    images = uncached_images(bucket, key, index).read(numbers)
    process, x_start = make_process(diffusion), torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = randomness.sampling_noise(torch.arange(len(images)), 0, tuple(x_start.shape[1:]), x_start.device)
    _, alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in process.numbered(torch.tensor(steps)))
    # Scaled to the variance of the images: otherwise most pixels of EDM's noise would be black or white.
    noised = (alpha * x_start + sigma * noise) / sigma.clamp(min=1)
    is_edm = isinstance(process, VarianceExploding)
    labels = [f"sigma = {each:.2g}" for each in sigma.flatten().tolist()] if is_edm else [f"t = {t}" for t in steps]
    if image is None:
        figure = figures.noising_figure(images, noised, labels)
        beside = [output.with_name(f"{output.stem}-{part}{output.suffix}") for part in ("original", "noised")]
        pictures = {output: figure.combined, beside[0]: figure.original, beside[1]: figure.noised}
    else:
        tiles, scale = np.concatenate([images, figures.to_uint8(noised)]), max(1, 96 // max(images.shape[1:3]))
        title = f"{index.name} · image {image:,} · {_words(diffusion)}"
        pictures = {output: figures.image_grid(tiles, _COLUMNS, 4, scale, labels=["the image", *labels], title=title)}
    for path, picture in pictures.items():
        write_file(path, figures.png(picture))
        print(path)


def _diffusion(
    bucket: Store, run: str, schedule: str, timesteps: int | None = None
) -> tuple[Diffusion, RunConfig | None]:
    """Returns the settings of the process of a run, with its configuration, or those that the options name."""
    if run:
        if schedule or timesteps:
            option = "--schedule" if schedule else "--timesteps"
            raise BadRequestError(f"{option}: run {run!r} has a schedule of its own: leave {option} or --run out")
        config = existing_config(bucket, run)
        return config.diffusion, config
    if schedule and schedule not in SCHEDULES:
        raise BadRequestError(f"--schedule {schedule!r}: use {', '.join(SCHEDULES)}")
    usual = Diffusion()
    return replace(usual, schedule=schedule or usual.schedule, timesteps=timesteps or usual.timesteps), None


def _words(diffusion: Diffusion) -> str:
    return f"{diffusion.schedule} schedule" + ", zero terminal SNR" * diffusion.zero_terminal_snr
