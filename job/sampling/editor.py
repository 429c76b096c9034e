"""Editing of given images and interpolation between two seeds: the routes of sampling, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from ddpm import editing, figures
from ddpm.generation import Sampling, Walk
from job.data.cache import uncached_images
from job.runs import records
from job.sampling.painter import Painter, Route
from job.sampling.sampling_plan import SamplePlan

COLUMNS = 8
"""Images of a row: a given one with its results, or those between two seeds."""
PAIRS = 4
"""The default number of rows between seeds."""
_HIDDEN = 128
"""The grey of the part that inpaint replaces."""


class Editor:
    """The given images of a plan, on the device, and the routes of sampling from them.

    Seed k has image k mod n of the n given ones. Interpolation between seeds has no given images.
    """

    def __init__(self, plan: SamplePlan, painter: Painter, sampling: Sampling) -> None:
        assert plan.given is not None
        self._given, self._painter = plan.given, painter
        self._editing, self.evaluations = plan.given.editing, painter.evaluations_of(sampling)
        if self._editing.mode == "interpolate":
            return
        if plan.given.image is not None:
            self._shown = plan.given.image[None]
        else:
            assert plan.index is not None
            cache = uncached_images(plan.bucket, records.dataset_key_of(plan.config), plan.index)
            self._shown = cache.read(np.array(plan.given.numbers))
        self._images = torch.tensor(self._shown).permute(0, 3, 1, 2).to(painter.device).float() / 127.5 - 1
        if plan.given.unknown is None:
            edit = editing.inverted if self._editing.mode == "invert" else editing.from_image
            self._edit = partial(edit, strength=self._editing.strength)
        else:
            unknown = torch.from_numpy(plan.given.unknown).to(painter.device)
            path = editing.resampled(sampling.steps, resamplings=self._editing.resamplings)
            self._edit = partial(editing.inpaint, unknown=unknown, path=path)
            self._shown = np.where(plan.given.unknown[:, :, None], np.uint8(_HIDDEN), self._shown)
        image = torch.zeros(1, *painter.image_shape)
        of_image = {"image": image} | ({"unknown": image == 0} if plan.given.unknown is not None else {})
        self.evaluations = painter.evaluations_of(sampling, partial(self._edit, **of_image))

    def default_seeds(self) -> range:
        """Returns the seeds of a picture by default."""
        # Inversion does not depend on the seed without a sampler's noise, so one seed per image is enough.
        of_mode = {"interpolate": 2 * PAIRS, "invert": self._given.images}
        return range(of_mode.get(self._editing.mode, self._given.images * (COLUMNS - 1)))

    def drawn_seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """Returns the seed of each image of a picture."""
        return [seed for seed in seeds[::2] for _ in range(COLUMNS)] if self._editing.mode == "interpolate" else seeds

    def route(self, seeds: Sequence[int]) -> Route:
        """Returns the route to the images of these seeds, of a picture or a piece."""
        return Route(self.evaluations, partial(self._walk, seeds))

    def _walk(self, seeds: Sequence[int], places: Sequence[int]) -> Walk:
        device = self._painter.device
        if self._editing.mode == "interpolate":
            others = torch.tensor([seeds[place // COLUMNS * 2 + 1] for place in places], device=device)
            weight = torch.tensor([place % COLUMNS / (COLUMNS - 1) for place in places], device=device)
            return partial(editing.interpolate, other=self._painter.noise_of(others), weight=weight)
        return partial(self._edit, image=self._images[[seeds[place] % len(self._images) for place in places]])

    def grid(self, images: np.ndarray, seeds: Sequence[int], title: str) -> bytes:
        """Returns a picture with a row per pair of seeds, or with rows per given image, which comes first."""
        scale = max(1, 96 // images.shape[1])
        if self._editing.mode == "interpolate":
            names = [f"{a} to {b}" for a, b in zip(seeds[::2], seeds[1::2], strict=True)]
            return figures.png(figures.image_grid(images, COLUMNS, scale=scale, row_labels=names, title=title))
        tiles: list[np.ndarray] = []
        columns = 2 if self._editing.mode == "invert" else COLUMNS
        for number, given in enumerate(self._shown):
            own = images[[seed % len(self._shown) == number for seed in seeds]]
            for start in range(0, len(own), columns - 1):
                tiles += [given, *own[start : start + columns - 1]]
                tiles += [np.full_like(given, 255)] * (-len(tiles) % columns)
        return figures.png(figures.image_grid(np.stack(tiles), columns, scale=scale, title=title))
