"""Grids: which points of a process a sampler visits, from noise to the clean image."""

import math
from typing import Literal, get_args

import torch

from ddpm.process import CLEAN, Point, Process, points_of

Grid = Literal["leading", "trailing", "linspace", "quadratic", "karras"]
RHO = 7.0
"""ρ of Karras et al. 2022, section 3.2."""


def make_grid(process: Process, steps: int, grid: Grid) -> list[Point[float]]:
    """The points to visit.

    Args:
        process: what is walked through.
        steps: how many, 1..T.
        grid: `leading`: numbers 0, c, 2c … with c = T // steps. `trailing`: T-1, T-1-T/steps …, rounded; it and
            `linspace` begin at T-1, where x_T is the noise the network was trained on (Lin et al. 2024, table 2).
            `linspace`: T-1 to 0, rounded. `quadratic`: squares of evenly spaced numbers up to √(0.8 T), rounded down
            (Song et al. 2021, appendix D.2). `karras`: evenly spaced (σ/α)^(1/7) (Karras et al. 2022, equation 5).
            Of equal numbers all but one are moved up.

    Returns:
        `steps` different points, from the most noise to the least, and the clean image.

    Raises:
        ValueError: for steps outside 1..T, an unknown grid, or `karras` on a process that leaves nothing of the image.
    """
    T = process.num_timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, the timesteps of the process, not {steps}")
    if grid not in get_args(Grid):
        raise ValueError(f"unknown grid {grid!r}: choose one of {', '.join(get_args(Grid))}")
    if grid == "karras":
        return [*_karras(process, steps), CLEAN]
    last = max(steps - 1, 1)
    if grid == "leading":
        numbers = [i * (T // steps) for i in range(steps)]
    elif grid == "trailing":
        numbers = [round(T * (i + 1) / steps) - 1 for i in range(steps)]
    elif grid == "linspace":
        numbers = [round(i * (T - 1) / last) for i in range(steps)] if steps > 1 else [T - 1]
    else:
        gap = math.sqrt(0.8 * T) / last
        numbers = [int((i * gap) ** 2) for i in range(steps)]
    different = [max(i, number) for i, number in enumerate(numbers)]
    return [*points_of(process.numbered(torch.tensor(different[::-1]))), CLEAN]


def _karras(process: Process, steps: int) -> list[Point[float]]:
    ends = process.numbered(torch.tensor([process.num_timesteps - 1, 0]))
    if not ends.alpha.all():
        raise ValueError("the grid karras needs a process that leaves something of the image: choose another grid")
    first, last = (ends.sigma / ends.alpha) ** (1 / RHO)
    between = torch.linspace(0, 1, steps, dtype=torch.float64)
    return points_of(process.with_ratio((first + between * (last - first)) ** RHO))
