"""Scores of a run's samples while it trains: a row of its metrics every few epochs."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from job.config import method
from job.evaluation.evaluate import features_of, real_features, scored
from job.evaluation.evaluation_plan import reference_of
from job.evaluation.extractors import locate_extractor
from job.evaluation.feature_folder import Named
from job.plan import Plan
from job.processes.ranks import Ranks
from job.progress import note
from job.runs.drawings import score_name
from job.runs.metric_rows import Row
from job.sampling.painter import Painter
from job.stop import Stop


class Evaluator:
    """Scores a run's samples against the features of real images, which are computed once."""

    def __init__(self, plan: Plan, ranks: Ranks, stop: Stop) -> None:
        """Computes the features of the real images, which may take minutes. Collective.

        Raises:
            StoppedError: a stop was requested; the same command resumes.
        """
        self._chosen, self._sample, pictures = plan.config.evaluate, plan.config.sample, plan.pictures()
        assert pictures is not None
        found = locate_extractor(self._chosen.extractor, plan.bucket)
        self._extract = found.load(ranks.device)
        reference = reference_of(pictures, found.extractor, self._chosen.references)
        check = partial(stop.check, "while looking at real images")
        self._real = real_features(plan, reference, self._extract, ranks, stop=stop, check=check) or {}

    def scores(self, painter: Painter) -> Row:
        """Returns the scores of the painter's network by name on the main process, and {} on the others. Collective.

        Raises:
            StoppedError: one of the processes got a stop request; it raises on all of them at once.
        """
        chosen, sample = self._chosen, self._sample

        def features(images: np.ndarray) -> np.ndarray:
            return features_of(self._extract, images, painter.device)["features"].numpy()

        sampling, seeds = method.sampling_of(sample), range(chosen.images)
        drawn = painter.draw_together(seeds, sampling, sample.batch_size, "drawing for scores", kept=features)
        row: Row = {}

        def score() -> None:
            of_drawn: Named = {"features": torch.from_numpy(drawn)}
            values, floor, counts = scored(chosen.metrics, of_drawn, self._real, painter.stop, "scoring")
            row.update({score_name(name, chosen.extractor): value for name, value in values.items()})
            row.update({f"real {score_name(name, chosen.extractor)}": value for name, value in floor.items()})
            shown = [
                f"{score_name(name, chosen.extractor)} {value:.4g} (real images {floor[name]:.4g})"
                for name, value in values.items()
                if not name.endswith("_std")
            ]
            note(f"{chosen.images:,} images: {', '.join(shown)}; real ones are {counts[0]:,} against {counts[1]:,}")

        painter.ranks.on_main(score)
        return row
