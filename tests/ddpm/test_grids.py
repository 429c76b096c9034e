"""Grids against diffusers and the papers they come from."""

from itertools import pairwise, product

import numpy as np
import pytest

from ddpm.grids import make_grid
from ddpm.process import CLEAN, RectifiedFlow, VarianceExploding, linear_schedule

T = 1000
LINEAR = linear_schedule(T)


def timesteps(steps: int, grid: str, num_timesteps: int = T) -> list[int]:
    """Of the numbered points that a grid on the linear schedule visits."""
    *points, clean = make_grid(linear_schedule(num_timesteps), steps, grid)
    assert clean == CLEAN and all(point.t == round(point.t) for point in points)
    return [round(point.t) for point in points]


def test_every_grid_of_timesteps_descends_without_repeats() -> None:
    kinds = ("leading", "trailing", "linspace", "quadratic")
    for grid, num_timesteps in product(kinds, (1, 2, 3, 4, 5, 10, 37, 1000)):
        for steps in {*range(1, min(num_timesteps, 40) + 1), num_timesteps - num_timesteps // 9, num_timesteps}:
            visited = timesteps(steps, grid, num_timesteps)
            assert len(visited) == steps
            assert all(a > b for a, b in pairwise(visited))
            assert visited[-1] >= 0 and visited[0] < num_timesteps
        assert timesteps(num_timesteps, grid, num_timesteps) == list(range(num_timesteps))[::-1]


def test_timesteps_equal_diffusers() -> None:
    import diffusers

    for grid, steps in product(("leading", "trailing", "linspace"), (2, 7, 10, 16, 50, 100, 250, 999, 1000)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=grid)
        scheduler.set_timesteps(steps)
        assert timesteps(steps, grid) == scheduler.timesteps.tolist(), (grid, steps)
    assert timesteps(1, "linspace") == timesteps(1, "trailing") == [999]


def test_quadratic_is_the_grid_of_the_ddim_paper() -> None:
    """The paper's has repeats among its smallest timesteps; only these are moved."""
    assert timesteps(5, "quadratic") == [800, 450, 200, 50, 0]
    for steps, moved in ((10, 0), (20, 0), (50, 3), (100, 12)):
        squares = [int(s) for s in np.linspace(0, np.sqrt(0.8 * T), steps) ** 2]
        grid = timesteps(steps, "quadratic")[::-1]
        assert grid[: moved + 1] == list(range(moved + 1)), steps
        assert grid[moved + 1 :] == squares[moved + 1 :], steps


def test_karras_is_the_grid_of_the_edm_paper() -> None:
    steps, rho = 18, 7
    ramp = np.linspace(0, 1, steps)
    for process, largest, smallest in (
        (VarianceExploding(), 80.0, 0.002),
        (LINEAR, 157.4072, 0.01000050004),
    ):
        *points, clean = make_grid(process, steps, "karras")
        expected = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
        assert [point.sigma / point.alpha for point in points] == pytest.approx(expected.tolist(), rel=1e-5)
        assert clean == CLEAN


def test_impossible_grids_are_refused() -> None:
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match=f"between 1 and 1000.*not {steps}"):
            make_grid(LINEAR, steps, "trailing")
    with pytest.raises(ValueError, match=r"'cosine'.*leading.*karras"):
        make_grid(LINEAR, 10, "cosine")
    for process in (RectifiedFlow(), LINEAR.with_zero_terminal_snr()):
        with pytest.raises(ValueError, match="karras needs a process that leaves something"):
            make_grid(process, 10, "karras")
