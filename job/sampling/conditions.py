"""The conditions of samples: those of a dataset's images, of pictures and numbers of a command, or of another run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm import figures, metrics
from ddpm.augment import in_unit_range
from ddpm.conditions import VectorStatistics, bicubic, derived, in_turn, learnt, of_pictures, with_flag
from ddpm.objective import UNCONDITIONAL, Condition
from job.config import RunConfig
from job.data.reading.cache import ImageCache, open_cache
from job.data.shards import DatasetIndex, dataset_key, load_index
from job.exits import BadRequestError
from job.processes.ranks import Ranks
from job.sampling.sampling_plan import SamplePlan

SEED = 2**63
"""The seed of what is drawn for images of a dataset outside of training; a run's own seed is smaller."""


def stored_condition(images: ImageCache, indices: np.ndarray, config: RunConfig, device: torch.device) -> Condition:
    """Returns what a dataset says of its images, by index, int64 [b], as far as the network takes it."""
    has_classes, index = config.model.num_classes, images.index
    return Condition(
        torch.from_numpy(images.labels(indices)).to(device) if has_classes else None,
        image=in_range(images.conditions(indices), device) if index.condition_channels else None,
        vector=with_flag(torch.from_numpy(images.vectors(indices)).to(device)) if index.vector_names else None,
    )


def vectors_of(index: DatasetIndex | None) -> VectorStatistics | None:
    """Returns the statistics of a dataset's numbers; None without any."""
    return (
        VectorStatistics(index.vector_names, index.vector_mean, index.vector_std)
        if index and index.vector_names
        else None
    )


@dataclass(frozen=True)
class Conditions:
    """The conditions of seeds.

    Attributes:
        config: that of the run.
        device: device of the conditions.
        images: a dataset whose images the seeds take in turn, seed k number k mod n, where nothing else is given.
        chosen: returns the condition images and vectors that a command names.
        first: returns the images of another run, uint8 or uint16 [B, h, w, C].
        hidden: the part of its images to fill in, bool [H, W].
        has_pictures: whether the condition images are not those of the dataset.
    """

    config: RunConfig
    device: torch.device
    images: ImageCache | None
    chosen: Callable[[Tensor], Condition] = lambda seeds: UNCONDITIONAL
    first: Callable[[Tensor], np.ndarray] | None = None
    hidden: Tensor | None = None
    has_pictures: bool = False

    def given(self, seeds: Tensor) -> Condition:
        """Returns the condition images and vectors of seeds, int64 [B]."""
        condition, settings = self.chosen(seeds), self.config.condition
        if self.first is not None:
            x, size = in_range(self.first(seeds), self.device), self.config.image_size
            small = settings.small_size(size)
            x = x if x.shape[2:] == small.shape else bicubic(x, *small.shape)
            condition = condition._replace(image=of_pictures(settings.derive, x, size, self.hidden))
        if self.images is None:
            return condition
        indices = (seeds % self.images.index.images).cpu()
        stored = stored_condition(self.images, indices.numpy(), self.config, self.device)
        x = in_range(self.images.read(indices.numpy()), self.device)
        stored = learnt(stored, x, SEED, indices, settings, noise=False)
        image, vector = stored.image if condition.image is None else condition.image, condition.vector
        return Condition(image=image, vector=stored.vector if vector is None else vector)

    def beside(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns what a grid shows beside samples, by caption: condition and, of those of a dataset, true images."""
        found, image = {}, self.given(torch.tensor(seeds, dtype=torch.int64, device=self.device)).image
        if image is not None:
            # Of a masked image these are its colours.
            found["condition"] = figures.to_pixels(image[:, : 3 if image.shape[1] >= 3 else 1])
        if self.images is not None and not self.has_pictures:
            found["truth"] = self.images.read(np.array(seeds) % self.images.index.images)
        return found

    def scores(self, seeds: Sequence[int], images: np.ndarray) -> Tensor | None:
        """Compares samples, uint8 or uint16 [n, H, W, C], with the images whose condition images they have.

        Returns:
            PSNR and SSIM, the mean squared error of the condition made from the sample for values from 0 to 1, and PSNR
            and SSIM of the condition itself, float32 [n, 5]; None without condition images of a dataset.
        """
        if self.images is None or not self.config.condition.channels:
            return None
        numbers, samples = torch.tensor(seeds, dtype=torch.int64), in_range(images, self.device)
        truth = in_range(self.images.read((numbers % self.images.index.images).numpy()), self.device)
        condition = self.given(numbers.to(self.device)).image
        assert condition is not None
        # A condition of another number of channels is compared by its first one.
        channels = truth.shape[1] if condition.shape[1] >= truth.shape[1] else 1
        itself = condition[:, :channels].expand_as(truth)
        error, derive = torch.full((len(samples), 1), math.nan, device=self.device), self.config.condition.derive
        if derive and not derive.startswith("noise"):
            again = derived(derive, samples, SEED, numbers % self.images.index.images)
            error = (again - condition).square().mean(dim=(1, 2, 3))[:, None] / 4
        return torch.cat([metrics.paired(samples, truth), error, metrics.paired(itself, truth)], dim=1).cpu()


def in_range(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Returns uint8 or uint16 [n, H, W, C] as float32 [n, C, H, W] in [-1, 1]."""
    return in_unit_range(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))


def conditions_of(plan: SamplePlan, first: Callable[[Tensor], np.ndarray] | None, ranks: Ranks) -> Conditions | None:
    """Returns the conditions of a command; what it does not name are those of held-out images, else of learnt ones.

    Args:
        plan: what to sample.
        first: see `Conditions`.
        ranks: this process.

    Raises:
        BadRequestError: the run was imported without a dataset, and the command does not name all conditions.
    """
    config, given, device, images = plan.config, plan.conditions, ranks.device, None
    if not config.is_conditioned:
        return None
    has_image = first is not None or given.pictures is not None
    if (config.condition.channels and not has_image) or (config.condition.vector and not given.rows):
        if (index := plan.index) is None:
            raise BadRequestError(
                "the run was imported without the dataset of its conditions: name some by --condition"
            )
        if index.held_out:
            index = load_index(plan.bucket, dataset_key(index.held_out, index.size))
        images = open_cache(plan.bucket, index, config.data.cache_gigabytes * 1e9, ranks.stop)
    hidden = None if given.hidden is None else torch.from_numpy(given.hidden).to(device)
    pictures, vectors = None, vectors_of(plan.index)
    if given.pictures is not None:
        x = in_range(given.pictures, device)
        pictures = of_pictures(config.condition.derive, x, config.image_size, hidden)
    rows = vectors.normalised(given.rows).to(device) if vectors and given.rows else None
    return Conditions(config, device, images, in_turn(pictures, rows), first, hidden, has_image)
