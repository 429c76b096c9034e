"""The loss on images that no run learns from, at points and with noise that are the same for all runs, always."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ddpm import randomness
from ddpm.latents import Latents
from ddpm.objective import Condition, Drawn, Objective
from ddpm.training import LossLog, loss_row
from ddpm.variance import spread_over_steps
from job.data.cache import ImageCache
from job.runs.metric_rows import Row
from job.sampling.painter import Painter

SEED = 2**63
"""Of the points and the noise; a run's own seed is smaller."""


def validation_row(
    painter: Painter,
    images: ImageCache,
    objective: Objective,
    count: int,
    batch_size: int,
    latents: Latents | None = None,
) -> Row:
    """The mean loss of averaged weights as `val_loss`, and by quarters of the draws as `val_loss_q0` …. Collective.

    The points are spread evenly over the draws, so that the row strays less than one of as many learnt images.
    `val_bits_per_dim` is the variational bound, of which each image gives one step; it is about pixels, and about
    independent noise.

    Args:
        painter: with the weights.
        images: the held-out images.
        objective: what is learnt.
        count: images that are looked at, at most.
        batch_size: images at a time and process.
        latents: how they are drawn, if latents are learnt.

    Raises:
        StoppedError: on all processes at the same batch, when any of them was asked to stop.
    """
    numbers = np.linspace(0, images.index.images - 1, min(count, images.index.images)).astype(np.int64)
    # Which image gets which part of the draws must not go by the order of the images, which goes by class.
    strata = randomness.training_uniforms(SEED, torch.arange(len(numbers))).argsort()
    spread = replace(objective, diffusion=replace(objective.diffusion, stratified=True))
    points = spread.draw(SEED, strata, len(numbers))
    steps, stands_for = (part[strata] for part in spread_over_steps(objective.process.num_timesteps, len(numbers)))
    log, bits, classes = LossLog(painter.device), LossLog(painter.device), painter.config.model.num_classes
    offset = painter.config.diffusion.offset_noise
    is_bounded = not (offset or latents)
    rank, world_size = painter.ranks.rank, painter.ranks.world_size
    # Every process asks as often as the first one, which has the most.
    for start in range(0, len(numbers[::world_size]), batch_size):
        painter.check_agreed("while validating")
        places = np.arange(len(numbers))[rank::world_size][start : start + batch_size]
        if not len(places):
            continue
        stored = torch.from_numpy(images.read(numbers[places])).to(painter.device)
        if latents:
            moments = stored.view(torch.float16).permute(0, 3, 1, 2)
            x_start = latents.drawn(SEED, torch.from_numpy(places).to(painter.device), moments)
        else:
            x_start = stored.permute(0, 3, 1, 2) / 127.5 - 1
        shape = tuple(x_start.shape[1:])
        noise = randomness.training_noise(SEED, torch.from_numpy(places), shape, painter.device, offset)
        labels = torch.from_numpy(images.labels(numbers[places])).to(painter.device) if classes else None
        drawn = Drawn(*points[:, places].to(painter.device))
        with torch.inference_mode():
            condition = Condition(labels)
            losses = objective.losses(painter.predict, x_start, noise, drawn, condition)
            log.add(losses, drawn.quartile)
            if is_bounded:
                at = steps[places], stands_for[places]
                bits.add(objective.bits_per_dim(painter.predict, x_start, noise, *at, condition), drawn.quartile)
    painter.agreement.finish()
    row = {f"val_{name}": value for name, value in loss_row(log.reduced()).items()}
    return row if not is_bounded else row | {"val_bits_per_dim": loss_row(bits.reduced())["loss"]}
