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
"""Images of a row between two seeds, or a given one with its results."""
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
            given = plan.given.image[None]
        else:
            assert plan.index is not None
            cache = uncached_images(plan.bucket, records.dataset_key_of(plan.config), plan.index)
            given = cache.read(np.array(plan.given.numbers))
        self._shown = {"given": given}
        self._images = torch.tensor(given).permute(0, 3, 1, 2).to(painter.device).float() / 127.5 - 1
        if plan.given.unknown is None:
            edit = editing.inverted if self._editing.mode == "invert" else editing.from_image
            self._edit = partial(edit, strength=self._editing.strength)
        else:
            unknown = torch.from_numpy(plan.given.unknown).to(painter.device)
            path = editing.resampled(sampling.steps, resamplings=self._editing.resamplings)
            self._edit = partial(editing.inpaint, unknown=unknown, path=path)
            self._shown["masked"] = np.where(plan.given.unknown[:, :, None], np.uint8(_HIDDEN), given)
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
        """Returns a picture with a row per pair of seeds, or with rows per given image, which comes first.

        Between the given image and the results of `inpaint` is what the network sees of the image.
        """
        scale = max(1, 96 // max(images.shape[1:3]))
        if self._editing.mode == "interpolate":
            names = [f"{a} to {b}" for a, b in zip(seeds[::2], seeds[1::2], strict=True)]
            return figures.png(figures.image_grid(images, COLUMNS, scale=scale, row_labels=names, title=title))
        count = self._given.images
        of_each = [images[[seed % count == number for seed in seeds]] for number in range(count)]
        made = min(COLUMNS - 1, max(map(len, of_each)))
        heads = [*self._shown, *["made"] * made]
        tiles: list[np.ndarray] = []
        for number, own in enumerate(of_each):
            for start in range(0, len(own), made):
                tiles += [*(shown[number] for shown in self._shown.values()), *own[start : start + made]]
                tiles += [np.full_like(images[0], 255)] * (-len(tiles) % len(heads))
        picture = figures.image_grid(np.stack(tiles), len(heads), 8, scale, column_labels=heads, title=title)
        return figures.png(picture)
