"""Grids against diffusers and the papers they come from."""

from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch

from benchmarks.solvers import Mixture, rms
from ddpm.grids import find_grid, make_grid, numbered_points
from ddpm.model import Sampling
from ddpm.process import CLEAN, RectifiedFlow, VarianceExploding, cosine_schedule, linear_schedule
from ddpm.samplers import ddim, unipc
from tests.ddpm.gaussian import no_noise

T = 1000
LINEAR = linear_schedule(T)


def timesteps(steps: int, grid: str, num_timesteps: int = T) -> list[int]:
    """Of the numbered points that a grid on the linear schedule visits."""
    *points, clean = make_grid(linear_schedule(num_timesteps), steps, grid)
    assert clean == CLEAN and all(point.t == round(point.t) for point in points)
    return [round(point.t) for point in points]


def test_shift_is_diffusers() -> None:
    import diffusers

    for shift, steps in product((0.5, 1.0, 3.0, 5.5), (1, 7, 28)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        points = Sampling("ddim", steps, "trailing", shift=shift).points(RectifiedFlow())
        assert [point.sigma for point in points] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
        assert [point.t for point in points[:-1]] == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
        assert [point.alpha + point.sigma for point in points] == pytest.approx([1] * (steps + 1))
    with pytest.raises(ValueError, match="rectified flow"):
        Sampling("ddim", 5, "trailing", shift=3.0).points(LINEAR)


@pytest.mark.parametrize(("grid", "last"), [("trailing", 1 / 7), ("linspace", 1 / T)])
def test_processes_without_a_table_are_not_rounded(grid: str, last: float) -> None:
    """A flow's σ is spaced evenly, and EDM's ln σ."""
    flow, edm = (make_grid(process, 7, grid)[:-1] for process in (RectifiedFlow(), VarianceExploding()))
    expected = np.linspace(1, last, 7)
    assert [point.sigma for point in flow] == pytest.approx(expected.tolist(), rel=1e-12)
    of_edm = 0.002 * 40_000 ** ((expected * T - 1) / (T - 1))
    assert [point.sigma for point in edm] == pytest.approx(of_edm.tolist(), rel=1e-9)


def test_grids_of_timesteps_descend() -> None:
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


def test_quadratic_is_the_ddim_papers() -> None:
    """The paper's has repeats among its smallest timesteps; only these are moved."""
    assert timesteps(5, "quadratic") == [800, 450, 200, 50, 0]
    for steps, moved in ((10, 0), (20, 0), (50, 3), (100, 12)):
        squares = [int(s) for s in np.linspace(0, np.sqrt(0.8 * T), steps) ** 2]
        grid = timesteps(steps, "quadratic")[::-1]
        assert grid[: moved + 1] == list(range(moved + 1)), steps
        assert grid[moved + 1 :] == squares[moved + 1 :], steps


def test_karras_is_the_edm_papers() -> None:
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


def test_log_snr_is_diffusers_exponential_sigmas() -> None:
    """And the network is told the timestep there, which diffusers cuts to a whole one."""
    from diffusers import DEISMultistepScheduler

    process = cosine_schedule(T)
    judge = DEISMultistepScheduler(trained_betas=process.betas.numpy(), use_exponential_sigmas=True)
    for steps in (2, 10, 37):
        judge.set_timesteps(steps)
        *points, clean = make_grid(process, steps, "log_snr")
        found = [point.sigma / point.alpha for point in points]
        # Their tables are float32: of 1 - ᾱ three digits are left where there is least noise.
        assert found == pytest.approx(judge.sigmas[:-1].tolist(), rel=1e-3)
        assert [point.t for point in points] == pytest.approx([t + 0.5 for t in judge.timesteps.tolist()], abs=0.6)
        assert clean == CLEAN
    *points, _ = make_grid(VarianceExploding(), 7, "log_snr")
    assert [point.sigma for point in points] == pytest.approx(np.geomspace(80, 0.002, 7).tolist())


def test_impossible_grids_are_refused() -> None:
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match=f"between 1 and 1000.*not {steps}"):
            make_grid(LINEAR, steps, "trailing")
    with pytest.raises(ValueError, match=r"'cosine'.*leading.*karras"):
        make_grid(LINEAR, 10, "cosine")
    for process, grid in product((RectifiedFlow(), LINEAR.with_zero_terminal_snr()), ("karras", "log_snr")):
        with pytest.raises(ValueError, match=f"{grid} needs a process that leaves something"):
            make_grid(process, 10, grid)


def test_found_grid_is_the_best() -> None:
    """Every choice of 4 among 9 points, judged by the errors of Euler's method from where the exact way is."""
    data, process = Mixture(), cosine_schedule(100)
    candidates = make_grid(process, 9, "trailing")
    x = np.hypot(0.5 * candidates[0].alpha, candidates[0].sigma) * torch.linspace(-2, 2, 41).double().view(-1, 1, 1, 1)
    # What `find_grid` takes for exact.
    trajectory = [unipc(data.denoise, x, candidates[: i + 1], no_noise) for i in range(10)]

    def missed(i: int, k: int) -> float:
        end = ddim(data.denoise, trajectory[i], [candidates[i], candidates[k]], no_noise)
        return rms(end - trajectory[k]) / np.hypot(candidates[k].alpha, candidates[k].sigma)

    ways = [(0, *between, 9) for between in combinations(range(1, 9), 3)]
    best = min(ways, key=lambda way: sum(missed(i, k) for i, k in pairwise(way)))
    found = find_grid(data.denoise, x, process, 4, 9)
    assert found == [round(candidates[i].t) for i in best[:-1]]

    exact = data.flow(x, candidates[0], CLEAN)
    fine = find_grid(data.denoise, x, process, 8, 100)
    errors = [
        rms(ddim(data.denoise, x, points, no_noise) - exact)
        for points in (numbered_points(process, fine), make_grid(process, 8, "trailing"))
    ]
    assert errors[0] < 0.8 * errors[1], errors
    with pytest.raises(ValueError, match="between 1 and 9, the points to choose from, not 10"):
        find_grid(data.denoise, x, process, 10, 9)
