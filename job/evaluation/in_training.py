"""Scores of a run's samples while it trains: a row of its metrics every few epochs."""

from __future__ import annotations

import numpy as np
import torch

from job.config import method
from job.evaluation.evaluate import references, scored, seen
from job.evaluation.evaluation_plan import reference_of
from job.evaluation.extractors import locate_extractor
from job.evaluation.feature_folder import Named
from job.plan import Plan
from job.progress import note
from job.runs.metric_rows import Row
from job.runs.scores import score_name
from job.sampling.painter import Painter


class Evaluator:
    """Scores a run's samples against the features of real images, which are computed once."""

    def __init__(self, plan: Plan, painter: Painter) -> None:
        """Computes the features of the real images, which may take minutes. Collective.

        Raises:
            StoppedError: this process was asked to stop; the same command goes on.
        """
        self._chosen, self._sample, pictures = plan.config.evaluate, plan.config.sample, plan.pictures()
        assert pictures is not None
        found = locate_extractor(self._chosen.extractor, plan.bucket)
        self._see = found.load(painter.device)
        reference = reference_of(pictures, found.extractor, self._chosen.references)
        self._real = references(plan, reference, painter, self._see) or {}

    def scores(self, painter: Painter) -> Row:
        """Returns the scores of the painter's network by name on the main process, and {} on the others. Collective.

        Raises:
            StoppedError: on all processes at once, when any of them was asked to stop.
        """
        chosen, sample = self._chosen, self._sample

        def features(images: np.ndarray) -> np.ndarray:
            return seen(self._see, images, painter.device)["features"].numpy()

        sampling, seeds = method.sampling_of(sample), range(chosen.images)
        drawn = painter.draw_together(seeds, sampling, sample.batch_size, "drawing for scores", kept=features)
        row: Row = {}

        def score() -> None:
            of_drawn: Named = {"features": torch.from_numpy(drawn)}
            values, floor, counts = scored(chosen.metrics, of_drawn, self._real, painter.stop, "scoring")
            row.update({score_name(name, chosen.extractor): value for name, value in values.items()})
            row.update({f"real {score_name(name, chosen.extractor)}": value for name, value in floor.items()})
            told = [
                f"{score_name(name, chosen.extractor)} {value:.4g} (real images {floor[name]:.4g})"
                for name, value in values.items()
                if not name.endswith("_std")
            ]
            note(f"{chosen.images:,} images: {', '.join(told)}; real ones are {counts[0]:,} against {counts[1]:,}")

        painter.ranks.on_main(score)
        return row
