"""Figures that need no network: the schedule and noised images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ddpm import figures, randomness
from ddpm.catalogue import SCHEDULES, Diffusion
from ddpm.image_size import ImageSize
from ddpm.process import Process, VarianceExploding, VariancePreserving, make_process
from job.config import RunConfig
from job.data.cache import uncached_images
from job.data.shards import find_dataset, load_index
from job.exits import BadRequestError
from job.requests import check_output, parse_numbers
from job.runs.records import existing_config
from job.store import Store, open_store
from job.store.files import os_errors, temporary_beside

_TIMESTEPS = (962, 237, 38, 39, 988, 559, 299, 226, 985, 791, 859, 485)
"""Of twelve images, for T = 1000."""
_COLUMNS = 6


@dataclass(frozen=True)
class NoiseRequest:
    """A process: that of a run, or the one that the options name."""

    bucket: str
    run: str = ""
    schedule: str = ""
    timesteps: int | None = None

    def config(self) -> RunConfig | None:
        """Returns the configuration of the run; None without one.

        Raises:
            BadRequestError: an option is about another process than the run's.
            MissingInputError: no such run.
        """
        if not self.run:
            return None
        if self.schedule or self.timesteps:
            option = "--schedule" if self.schedule else "--timesteps"
            raise BadRequestError(f"{option}: run {self.run!r} has a schedule of its own: leave {option} or --run out")
        return existing_config(open_store(self.bucket), self.run)

    def diffusion(self, config: RunConfig | None) -> Diffusion:
        """Returns the settings of the process, of the run's configuration if there is one.

        Raises:
            BadRequestError: the schedule is unknown.
        """
        if config:
            return config.diffusion
        if self.schedule and self.schedule not in SCHEDULES:
            raise BadRequestError(f"--schedule {self.schedule!r}: use {', '.join(SCHEDULES)}")
        usual = Diffusion()
        return replace(usual, schedule=self.schedule or usual.schedule, timesteps=self.timesteps or usual.timesteps)


def schedule_picture(request: NoiseRequest, output: Path) -> None:
    """Writes the plot of β and ᾱ, or of σ and α of a process without β.

    Raises:
        BadRequestError: the schedule is unknown, or `output` cannot be written.
        MissingInputError: no such run.
    """
    check_output(output)
    diffusion = request.diffusion(request.config())
    process, title = make_process(diffusion), f"{_words(diffusion)}, T = {diffusion.timesteps}"
    if isinstance(process, VariancePreserving):
        curves = {r"$\beta_t$": process.betas, r"$\bar\alpha_t$": process.alphas_cumprod}
    else:
        _, alpha, sigma = process.numbered(torch.arange(process.num_timesteps))
        curves = {r"$\sigma_t$": sigma, r"$\alpha_t$": alpha}
    title = f"{request.run} · {title}" if request.run else title
    write_picture(output, figures.schedule_figure(curves, title, log=isinstance(process, VarianceExploding)))
    print(output)


def noising_picture(
    request: NoiseRequest, dataset: str, size: ImageSize | None, *, timesteps: str, image: int | None, output: Path
) -> None:
    """Writes a figure of images beside q(x_t|x_0), and two more files with the images and the noised images alone.

    With `image` the figure is that one image of the dataset at each of the timesteps, with the same noise.

    Raises:
        BadRequestError: an unknown schedule, a wrong timestep, no such images, or `output` cannot be written.
        MissingInputError: no such dataset or run.
    """
    check_output(output)
    config = request.config()
    diffusion = request.diffusion(config)
    steps = _timesteps(timesteps, diffusion.timesteps, is_growing=image is not None)
    if config and not dataset:
        dataset, size = config.data.dataset, config.data.size
    if not dataset:
        raise BadRequestError("--dataset is needed: it names the images, unless --run names a run that saw some")
    images, name = _images(open_store(request.bucket), dataset, size, image=image, count=len(steps))
    noised, labels = _noised(images, make_process(diffusion), steps)
    if image is None:
        beside = {part: output.with_name(f"{output.stem}-{part}{output.suffix}") for part in ("original", "noised")}
        figure = figures.noising_figure(images, noised, labels)
        pictures = {path: getattr(figure, part) for part, path in {"combined": output, **beside}.items()}
    else:
        tiles, labels = np.concatenate([images, figures.to_uint8(noised)]), ["the image", *labels]
        scale, title = max(1, 96 // max(images.shape[1:3])), f"{name} · image {image:,} · {_words(diffusion)}"
        pictures = {output: figures.image_grid(tiles, _COLUMNS, 4, scale, labels=labels, title=title)}
    for path, picture in pictures.items():
        write_picture(path, figures.png(picture))
        print(path)


def _timesteps(text: str, num_timesteps: int, *, is_growing: bool) -> list[int]:
    """Returns the timesteps that a person named, or else twelve, or eleven that grow.

    Raises:
        BadRequestError: the text has another form, or a timestep that does not exist.
    """
    if not text:
        growing = np.linspace(0, num_timesteps - 1, 2 * _COLUMNS)[1:].round().astype(int).tolist()
        return growing if is_growing else [t * num_timesteps // 1000 for t in _TIMESTEPS]
    if max(steps := parse_numbers(text, "--timesteps")) >= num_timesteps:
        raise BadRequestError(f"--timesteps: {max(steps)} is not in 0 to {num_timesteps - 1}")
    return steps


def _images(
    bucket: Store, dataset: str, size: ImageSize | None, *, image: int | None, count: int
) -> tuple[figures.Images, str]:
    """Returns one image of a dataset, uint8 [1, H, W, C], or `count` evenly spaced ones; and the dataset's name."""
    key = find_dataset(bucket, dataset, size)
    index = load_index(bucket, key)
    if index.encoding:
        raise BadRequestError(f"--dataset {dataset} holds latents, of {index.encoding.source}: name that one")
    if image is not None and image >= index.images:
        raise BadRequestError(f"--image {image}: {index.name} has the images 0 to {index.images - 1:,}")
    if image is None and count > index.images:
        raise BadRequestError(f"--timesteps has {count:,} entries, but {index.name} only {index.images:,} images")
    numbers = np.linspace(0, index.images - 1, count).astype(np.int64) if image is None else np.array([image])
    return uncached_images(bucket, key, index).read(numbers), index.name


def _noised(images: figures.Images, process: Process, steps: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """Returns x_t of uint8 [B or 1, H, W, C] as float [B, C, H, W], and its labels; a single image has one noise."""
    x_start = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = randomness.sampling_noise(torch.arange(len(images)), 0, tuple(x_start.shape[1:]), x_start.device)
    _, alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in process.numbered(torch.tensor(steps)))
    labels = [f"t = {step}" for step in steps]
    if isinstance(process, VarianceExploding):
        labels = [f"sigma = {each:.2g}" for each in sigma.flatten().tolist()]
    # Scaled to the variance of the images: otherwise most pixels of EDM's noise would be black or white.
    return (alpha * x_start + sigma * noise) / sigma.clamp(min=1), labels


def _words(diffusion: Diffusion) -> str:
    return f"{diffusion.schedule} schedule" + ", zero terminal SNR" * diffusion.zero_terminal_snr


def write_picture(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing.

    Raises:
        DiskFullError, NoPermissionError: the file cannot be written.
    """
    with os_errors(path), temporary_beside(path) as (temporary, file):
        file.write(data)
        file.flush()
        temporary.replace(path)
