"""The loss on held-out images, at points and with noise that are always the same for all runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch

from ddpm import randomness
from ddpm.augment import Latents
from ddpm.objective import Condition, Drawn, Objective, spread_over_steps
from ddpm.state import LossLog, loss_row
from job.data.reading.cache import ImageCache
from job.runs.metric_rows import Row
from job.sampling.painter import Painter

SEED = 2**63
"""The seed of points and noise; a run's own seed is smaller."""


def validation_row(
    painter: Painter,
    images: ImageCache,
    objective: Objective,
    *,
    count: int,
    batch_size: int,
    latents: Latents | None = None,
) -> Row:
    """Returns the mean loss as `val_loss`, and by quarters of the draws as `val_loss_q0` and so on. Collective.

    The points are spread evenly over the draws, which lowers the variance. `val_bits_per_dim` is the variational bound
    on pixels with independent noise, to which each image adds one step.

    Args:
        painter: has the weights, such as averaged ones.
        images: the held-out images.
        objective: the training objective.
        count: the largest number of images.
        batch_size: images per batch on each process.
        latents: the distribution of latents, for a run on them.

    Raises:
        StoppedError: one of the processes got a stop request; it raises on all of them at the same batch.
    """
    numbers = np.linspace(0, images.index.images - 1, min(count, images.index.images)).astype(np.int64)
    # Images are in order of classes: without a permutation each class would get its own part of the draws.
    strata = randomness.training_uniforms(SEED, torch.arange(len(numbers))).argsort()
    spread = replace(objective, diffusion=replace(objective.diffusion, stratified=True))
    points = spread.draw(SEED, strata, len(numbers))
    steps, stands_for = (part[strata] for part in spread_over_steps(objective.process.num_timesteps, len(numbers)))
    log, bits = LossLog(painter.device), LossLog(painter.device)
    is_bounded = not (painter.config.diffusion.offset_noise or latents)
    of_ranks = painter.shared_out(len(numbers), batch_size)
    # Every process checks as often as the first one, which has the most images: the others would wait for it for ever.
    for _, of_batch in zip_longest(of_ranks[0], of_ranks[painter.ranks.rank]):
        painter.check_agreed("while validating")
        if not of_batch:
            continue
        places = np.array(of_batch)
        x_start, noise, condition = _noised(places, images, numbers[places], painter, latents)
        drawn = Drawn(*points[:, places].to(painter.device))
        with torch.inference_mode():
            losses = objective.losses(painter.predict, x_start, noise, drawn, condition)
            log.add(losses, drawn.quartile)
            if is_bounded:
                at = steps[places], stands_for[places]
                bits.add(objective.bits_per_dim(painter.predict, x_start, noise, *at, condition), drawn.quartile)
    painter.agreement.finish()
    row = {f"val_{name}": value for name, value in loss_row(log.reduced()).items()}
    return row | ({"val_bits_per_dim": loss_row(bits.reduced())["loss"]} if is_bounded else {})


def _noised(
    numbers: np.ndarray, images: ImageCache, indices: np.ndarray, painter: Painter, latents: Latents | None
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Returns images without augmentation, and what a loss needs beside them, on the painter's device.

    Args:
        numbers: decide the noise, int64 [b], and the sample of latents.
        images: the dataset.
        indices: of the images, int64 [b].
        painter: has the settings of the run.
        latents: the distribution of latents, for a run on them.

    Returns:
        The images and the noise, float32 [b, C, H, W], and the classes, if the network learns them.
    """
    stored, on_host = torch.from_numpy(images.read(indices)).to(painter.device), torch.from_numpy(numbers)
    if latents:
        x_start = latents.drawn(SEED, on_host.to(painter.device), stored.view(torch.float16).permute(0, 3, 1, 2))
    else:
        x_start = stored.permute(0, 3, 1, 2) / 127.5 - 1
    offset, shape = painter.config.diffusion.offset_noise, tuple(x_start.shape[1:])
    noise = randomness.training_noise(SEED, on_host, shape, painter.device, offset)
    has_classes = painter.config.model.num_classes
    labels = torch.from_numpy(images.labels(indices)).to(painter.device) if has_classes else None
    return x_start, noise, Condition(labels)
