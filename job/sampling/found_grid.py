"""The grid `found`: the points that suit a run's own network best, found once for each number of steps and kept."""

from __future__ import annotations

from itertools import count

import torch

from ddpm.generation import beginning
from ddpm.grids import find_grid, numbered_points
from job.config.method import sampling_of
from job.exits import BadRequestError
from job.progress import Progress
from job.runs.drawings import FoundGrid
from job.runs.layout import ObjectKind
from job.sampling.painter import Painter
from job.sampling.sampling_plan import SamplePlan, found_points
from job.sealed import code_version, utc_now
from job.store import ObjectExistsError

IMAGES = 16
"""So many show how a network's ways bend: those of all images bend alike (Chen et al. 2024, section 3)."""
CANDIDATES = 100


def find_points(plan: SamplePlan, painter: Painter) -> tuple[int, ...]:
    """Finds the points to visit on the newest chosen checkpoint, for all that is drawn in so many steps. Collective.

    Raises:
        BadRequestError: there are more steps than points to choose from.
        StoppedError: this process was asked to stop meanwhile.
    """
    run, sample, steps = plan.run, plan.sample, plan.sample.steps
    candidates, key = min(CANDIDATES, painter.process.num_timesteps), ObjectKind.FOUND_GRID.key(steps=sample.steps)
    if steps > candidates:
        raise BadRequestError(f"--grid found: chooses among {candidates} points, so it takes up to {candidates} steps")

    ref = max(plan.checkpoints)
    painter.load(run, ref, sample.weights)

    def find() -> tuple[int, ...]:
        asked = count(1)

        def advance(*_: object) -> None:
            painter.check_stopped()
            bar.update(next(asked))

        with Progress(f"finding {steps} points", total=candidates, unit="points") as bar:
            seeds = torch.arange(IMAGES, device=painter.device)
            usual = sample.model_copy(update={"guidance": 1.0, "variance": "fixed_small"})
            denoise = painter.denoiser(seeds, sampling_of(usual), advance)
            (first, *_) = numbered_points(painter.process, [painter.process.num_timesteps - 1])
            with torch.inference_mode():
                x = beginning([first], painter.noise_of(seeds))
                numbers = find_grid(denoise, x, painter.process, steps, candidates)
        grid = FoundGrid(
            steps=steps,
            numbers=tuple(numbers),
            checkpoint=ref.key,
            weights=sample.weights,
            created=utc_now(),
            code_version=code_version(),
        )
        try:
            run.create(key, grid.to_json())
        except ObjectExistsError:
            return found_points(run, steps, painter.process.num_timesteps)
        return grid.numbers

    return painter.ranks.on_main(find)
