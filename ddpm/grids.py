"""Grids: the points of a process that a sampler visits, from noise to the clean image."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.catalogue import GRIDS
from ddpm.process import CLEAN, Point, Process, RectifiedFlow, VariancePreserving, points_of
from ddpm.samplers import Denoiser, Visit, euler_step, unipc

LARGEST_RATIO, LEAST_RATIO = 80.0, 0.01
"""σ/α at the start of the grid `renoise`, and where it would end: two steps are at 80 and 0.89. Song et al. 2023 and
Geng et al. 2024 start at 80, and take the second step of CIFAR-10 at 0.82."""
RHO = 7.0
"""ρ of Karras et al. 2022, section 3.2."""


def make_grid(process: Process, steps: int, grid: str) -> list[Point[float]]:
    """Returns the points to visit.

    Args:
        process: the process.
        steps: number of points, 1..T.
        grid: its name in the catalogue, which describes it. Tables round to whole timesteps, and move equal ones up.

    Returns:
        `steps` different points, from the most noise to the least, and the clean image.

    Raises:
        ValueError: for steps outside 1..T, an unknown grid, or a grid over σ/α on a process that ends in pure noise.
    """
    T = process.num_timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, the timesteps of the process, not {steps}")
    computed = [name for name in GRIDS if name != "found"]
    if grid not in computed:
        raise ValueError(f"unknown grid {grid!r}: choose one of {', '.join(computed)}")
    if grid == "renoise":
        last = process.numbered(torch.tensor([T - 1]))
        # Infinite where a process ends in pure noise.
        first = (last.sigma / last.alpha).clamp(max=LARGEST_RATIO)
        shares = torch.arange(steps, dtype=torch.float64) / steps
        return [*points_of(process.with_ratio(first * (LEAST_RATIO / first) ** shares)), CLEAN]
    if GRIDS[grid].by_ratio:
        return [*_by_ratio(process, steps, grid), CLEAN]
    # Only a table has no points between its numbers.
    is_table = isinstance(process, VariancePreserving)
    return numbered_points(process, _numbers(T, steps, grid, round if is_table else float))


def numbered_points(process: Process, numbers: Sequence[float]) -> list[Point[float]]:
    """Returns the points of these numbers, which are whole ones for a table of ᾱ, and the clean image."""
    return [*points_of(process.numbered(torch.from_numpy(np.array(numbers)))), CLEAN]


def shifted(process: Process, points: Sequence[Point[float]], shift: float) -> list[Point[float]]:
    """Returns points of a rectified flow, moved to the noise that fits an image of `shift` times the height.

    σ becomes s σ/(1 + (s - 1) σ), which multiplies σ/α by s (Esser et al. 2024, section 5.3.2).

    Raises:
        ValueError: the process is not a rectified flow.
    """
    if not isinstance(process, RectifiedFlow):
        raise ValueError("shift moves the points of a rectified flow: leave it at 1 for other processes")
    sigma = torch.tensor([point.sigma for point in points[:-1]], dtype=torch.float64)
    return [*points_of(process.uniform(shift * sigma / (1 + (shift - 1) * sigma))), points[-1]]


def find_grid(denoise: Denoiser, x: Tensor, process: Process, steps: int, candidates: int) -> list[int]:
    """Returns the points that a sampler should visit, by dynamic programming (GITS: Chen et al. 2024, section 4).

    The cost of a step from i to k is the error at k of Euler's method that starts on the fine trajectory at i; the cost
    of a grid is their sum. The error of the sampler's own steps also depends on its earlier points. Costs that include
    this dependence give uneven steps, on which errors grow: in practice the costs of Euler's method are better.

    Args:
        denoise: the denoiser.
        x: a few images at the process's last point, float32 [B, C, H, W].
        process: the process.
        steps: number of points to visit.
        candidates: number of points of the grid `trailing` to choose from; the time grows with its square.

    Returns:
        The numbers of the points, from the most noise to the least.

    Raises:
        ValueError: there are more steps than candidates.
    """
    numbers = _numbers(process.num_timesteps, candidates, "trailing")
    points, last = numbered_points(process, numbers), len(numbers)
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be between 1 and {last}, the points to choose from, not {steps}")
    visits: list[Visit] = []

    def remembered(x: Tensor, point: Point[float]) -> Tensor:
        visits.append(Visit(point, x, denoise(x, point)))
        return visits[-1].x_start

    end = unipc(remembered, x, points, lambda draw: x)
    trajectory = [*(visit.x for visit in visits), end]
    costs = np.full((last + 1, last + 1), np.inf)
    for i, visit in enumerate(visits):
        missed = [euler_step([visit], points[k]) - trajectory[k] for k in range(i + 1, last + 1)]
        costs[i, i + 1 :] = torch.stack([error.square().mean().sqrt() for error in missed]).cpu().numpy()
    cost, came_from = costs[0], list[np.ndarray]()
    for _ in range(steps - 1):
        through = cost[:, None] + costs
        came_from.append(through.argmin(0))
        cost = through.min(0)
    found = [last]
    for best in reversed(came_from):
        found.append(int(best[found[-1]]))
    return [numbers[i] for i in (0, *found[:0:-1])]


def _numbers(T: int, steps: int, grid: str, whole: Callable[[float], Any] = round) -> list[Any]:
    last = max(steps - 1, 1)
    if grid == "leading":
        numbers = [i * (T // steps) for i in range(steps)]
    elif grid == "trailing":
        numbers = [whole(T * (i + 1) / steps) - 1 for i in range(steps)]
    elif grid == "linspace":
        numbers = [whole(i * (T - 1) / last) for i in range(steps)] if steps > 1 else [T - 1]
    else:
        gap = math.sqrt(0.8 * T) / last
        numbers = [int((i * gap) ** 2) for i in range(steps)]
    different = [max(i, number) for i, number in enumerate(numbers)]
    return different[::-1]


def _by_ratio(process: Process, steps: int, grid: str) -> list[Point[float]]:
    ends = process.numbered(torch.tensor([process.num_timesteps - 1, 0]))
    if not ends.alpha.all():
        raise ValueError(f"the grid {grid} needs a process that leaves something of the image: choose another grid")
    first, last = ends.sigma / ends.alpha
    between = torch.linspace(0, 1, steps, dtype=torch.float64)
    if grid == "log_snr":
        return points_of(process.with_ratio(first * (last / first) ** between))
    first, last = first ** (1 / RHO), last ** (1 / RHO)
    return points_of(process.with_ratio((first + between * (last - first)) ** RHO))
