"""`ddpm runs blame`: the images of the batches around a spike that carry it.

A loss depends on the image, on its noise level and on its noise. So the batches are replayed at fixed noise levels,
spread evenly over the draws, with other noise at each, and the weights from before. At one level all images compare:
each log-loss is put into robust deviations from the median (Iglewicz and Hoaglin 1993, "How to Detect and Handle
Outliers"). Their mean over the levels is high for an image that is odd, and not for one that had bad luck with its
noise. No image has to be left out and learnt without, and all odd ones are found at once.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm import figures
from ddpm.epochs import images_at_epoch
from ddpm.objective import Drawn
from ddpm.training import LossLog
from job.config import method
from job.data.autoencoder import latents_of
from job.data.cache import uncached_images
from job.data.keys import keys_of
from job.data.order import order_of
from job.data.shards import dataset_key
from job.evaluation.validation import noised_as
from job.exits import BadRequestError
from job.processes.ranks import Agreement
from job.progress import Progress
from job.requests import check_output
from job.runs.listing import print_table
from job.sampling.noise_pictures import write_picture
from job.sampling.painter import Painter
from job.stop import Stop
from job.training.replay import Replay

LEVELS = 9
"""Replays at fixed noise levels; one more has the noise of the run."""
STANDS_OUT = 5.0
"""Deviations from which on an image is called odd."""
SHOWN = 10


class Suspect(NamedTuple):
    """An image of the window."""

    deviations: float
    """Distance of its log-loss from the median, over all noise levels, in robust standard deviations."""
    image_number: int
    dataset_index: int
    loss: float
    """As the run had it."""
    expected: float
    """The median of the window at the same noise level."""


class _ImageLosses(LossLog):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.losses = list[Tensor]()

    def add(self, losses: Tensor, quartiles: Tensor) -> None:
        """Keeps the loss of each image."""
        self.losses.append(losses)


def suspects_of(replay: Replay, first_image: int, last_image: int) -> list[Suspect]:
    """Replays a window of whole batches, `1 + LEVELS` times; returns its images, the most suspicious first.

    Raises:
        MissingInputError, BadDataError, StoppedError: as `Replay`.
    """
    config, numbers = replay.stored, np.arange(first_image, last_image)
    indices = order_of(replay.index, config).indices(numbers)
    replay.begin(first_image)
    replay.train_to(first_image)
    painter = Painter(config, replay.ranks, config.train.precision, replay.stop, Agreement(1, flags=1))
    painter.network.load_state_dict(replay.state.model.state_dict())
    objective, latents = method.objective_of(config), latents_of(replay.index)
    levels, losses = (np.arange(LEVELS) + 0.5) / LEVELS, np.empty((LEVELS, len(numbers)))
    with Progress("replaying with other noise", total=losses.size) as bar:
        for level, start in product(range(LEVELS), range(0, len(numbers), replay.batch_size)):
            bar.update(level * len(numbers) + start)
            replay.stop.check(f"at noise level {level} of {LEVELS}", "the same command begins again")
            part = slice(start, start + replay.batch_size)
            noise_numbers = numbers[part] * LEVELS + level
            x, noise, condition = noised_as(noise_numbers, replay.images, indices[part], painter, latents)
            points = objective.at(torch.full((len(x),), levels[level], dtype=torch.float64)).to(x.device)
            losses[level, part] = objective.losses(painter.predict, x, noise, Drawn(*points), condition).cpu()
    replay.state.log = log = _ImageLosses(replay.ranks.device)
    replay.train_to(last_image)
    shares = objective.shares(config.train.seed, torch.from_numpy(numbers), replay.batch_size)
    expected = np.interp(shares.numpy(), levels, np.median(losses, axis=1))
    deviations = _deviations(_deviations(np.log(losses)).mean(axis=0))
    columns = (deviations, numbers, indices, torch.cat(log.losses).double().cpu(), expected)
    return sorted(map(Suspect, *(column.tolist() for column in columns)), reverse=True)


def _deviations(values: np.ndarray) -> np.ndarray:
    """Returns the distances from the median of each row in robust standard deviations."""
    from_median = values - np.median(values, axis=-1, keepdims=True)
    # The median of the absolute values of a normal distribution is 0.6745 σ.
    return 0.6745 * from_median / np.maximum(np.median(np.abs(from_median), axis=-1, keepdims=True), 1e-12)


def blame_run(bucket_uri: str, name: str, around: int, window: int | None, output: Path | None) -> None:
    """Prints the most suspicious images around an image of a run; `output` is a PNG file for pictures of them.

    Raises:
        BadRequestError: the run does not come to this image, or the picture cannot be written.
        MissingInputError, BadDataError, StoppedError: as `Replay`.
    """
    from rich.table import Table

    replay = Replay(bucket_uri, name, Stop().install())
    config, index, batch_size = replay.of_run.config, replay.index, replay.batch_size
    if around > (end := images_at_epoch(config.train.epochs, index.images, batch_size)):
        raise BadRequestError(f"--around {around}: run {name!r} ends at image {end:,}")
    if output is not None:
        check_output(output)
        # A run on latents learns bytes that nobody can look at.
        pictures = replay.of_run.pictures() or index
        cache = uncached_images(replay.of_run.bucket, dataset_key(pictures.name, pictures.size), pictures)
    half = -(-(window or 2 * min(config.log.every_images, index.images)) // 2)
    first, last = max(0, around - half), min(end, around + half)
    first, last = first - first % batch_size, last + -last % batch_size
    found = suspects_of(replay, first, last)
    odd, shown = sum(one.deviations >= STANDS_OUT for one in found), found[:SHOWN]
    print(f"images {first:,} to {last:,}, {1 + LEVELS} times: {odd or 'none'} with {STANDS_OUT:g} deviations or more")
    table = Table("key", "image", "epoch", "loss", "expected", "deviations", box=None)
    keys = keys_of(replay.images.source, indices := np.array([one.dataset_index for one in shown]))
    for key, one in zip(keys, shown, strict=True):
        values = (f"{value:.4g}" for value in (one.loss, one.expected, one.deviations))
        table.add_row(key, f"{one.image_number:,}", f"{one.image_number / index.images:.3f}", *values)
    print_table(table, "")
    if output is not None:
        captions = [f"{key}: {one.deviations:.1f}" for key, one in zip(keys, shown, strict=True)]
        title = f"{name} · around image {around:,} · deviations of the log-loss"
        images, scale = cache.read(indices), max(1, 96 // pictures.size.width)
        write_picture(output, figures.png(figures.image_grid(images, 5, 4, scale, captions, title=title)))
        print(output)
