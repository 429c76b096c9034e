"""Grids and steps against diffusers, whole samplers against data whose denoiser is known exactly."""

import math
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm.samplers import (
    ancestral_step,
    ddim_step,
    make_denoiser,
    sample_ancestral,
    sample_ddim,
    timestep_grid,
)
from ddpm.schedule import NoiseSchedule, cosine_schedule, linear_schedule

T = 1000
SHAPE = (2, 3, 4, 4)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def assert_row_close(row: object, found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda said: f"{row}: {said}")


def no_noise(t: int) -> Tensor:
    raise AssertionError("noise was asked for")


def judge(kind: type, schedule: NoiseSchedule, **config: object):
    """A diffusers scheduler of x_0-prediction on our float64 table: its own float32 one has 1 - ᾱ_0 to 3 digits."""
    scheduler = kind(num_train_timesteps=T, prediction_type="sample", clip_sample=False, **config)
    scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod_host, dtype=torch.float64)
    return scheduler


class TestGrid:
    def test_every_grid_descends_without_repeats(self) -> None:
        for spacing, num_timesteps in product(("leading", "trailing", "quadratic"), (1, 2, 3, 4, 5, 10, 37, 1000)):
            for steps in {*range(1, min(num_timesteps, 40) + 1), num_timesteps - num_timesteps // 9, num_timesteps}:
                grid = timestep_grid(num_timesteps, steps, spacing)
                assert len(grid) == steps
                assert all(a > b for a, b in pairwise(grid))
                assert grid[-1] >= 0
                assert grid[0] < num_timesteps
            assert timestep_grid(num_timesteps, num_timesteps, spacing) == list(range(num_timesteps))[::-1]

    def test_equals_diffusers(self) -> None:
        import diffusers

        for spacing, steps in product(("leading", "trailing"), (1, 2, 7, 10, 16, 50, 100, 250, 999, 1000)):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            assert timestep_grid(T, steps, spacing) == scheduler.timesteps.tolist(), (spacing, steps)

    def test_quadratic_is_the_grid_of_the_ddim_paper(self) -> None:
        """The paper's has repeats among its smallest timesteps; only these are moved."""
        assert timestep_grid(T, 5, "quadratic") == [800, 450, 200, 50, 0]
        for steps, moved in ((10, 0), (20, 0), (50, 3), (100, 12)):
            squares = [int(s) for s in np.linspace(0, np.sqrt(0.8 * T), steps) ** 2]
            grid = timestep_grid(T, steps, "quadratic")[::-1]
            assert grid[: moved + 1] == list(range(moved + 1)), steps
            assert grid[moved + 1 :] == squares[moved + 1 :], steps


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
class TestStep:
    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_ancestral_equals_diffusers(self, make: Callable[[], NoiseSchedule], variance: str) -> None:
        import diffusers

        schedule, x_t, x_start = make(), normal(0), normal(1).clamp(-1, 1)
        scheduler = judge(diffusers.DDPMScheduler, schedule, variance_type=variance)
        for t, t_prev in ((999, 998), (999, 979), (500, 250), (40, 20), (2, 1), (1, 0), (0, -1)):
            scheduler.set_timesteps(timesteps=[t, t_prev] if t_prev >= 0 else [t])
            expected = scheduler.step(x_start, t, x_t, generator=torch.Generator().manual_seed(2)).prev_sample
            step = ancestral_step(schedule, x_t, x_start, t, t_prev, normal(2), variance)
            assert_row_close(f"{t} to {t_prev}", step, expected)

    @pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
    def test_ddim_equals_diffusers(self, make: Callable[[], NoiseSchedule], eta: float) -> None:
        import diffusers

        schedule, x_t, x_start = make(), normal(0), normal(1).clamp(-1, 1)
        scheduler = judge(diffusers.DDIMScheduler, schedule, set_alpha_to_one=True)
        for t, steps in ((999, 1000), (999, 50), (500, 4), (40, 50), (1, 1000), (0, 1000)):
            scheduler.set_timesteps(steps)
            expected = scheduler.step(x_start, t, x_t, eta=eta, variance_noise=normal(2)).prev_sample
            step = ddim_step(schedule, x_t, x_start, t, t - T // steps, eta, normal(2))
            assert_row_close(f"t = {t} of {steps} steps", step, expected)


def smooth_network(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """Some function of x_t and t that a network could be."""
    return torch.tanh(1.3 * x.roll(1, -1) + timesteps.view(-1, 1, 1, 1) / T - 0.4)


@pytest.mark.parametrize("sampler", ["ddim", "fixed_small", "fixed_large"])
@pytest.mark.parametrize(("prediction", "clip"), [("epsilon", True), ("epsilon", False), ("v", True), ("v", False)])
def test_whole_trajectories_equal_diffusers(sampler: str, prediction: str, clip: bool) -> None:
    """Unchanged diffusers, whose tables are float32: three digits less."""
    import diffusers

    schedule, ddim = linear_schedule(), sampler == "ddim"
    denoise = make_denoiser(smooth_network, schedule, prediction, clip=clip)
    config = {
        "prediction_type": "epsilon" if prediction == "epsilon" else "v_prediction",
        "clip_sample": clip,
        **({} if ddim else {"variance_type": sampler}),
    }
    for spacing, steps in (*((("trailing", 20),) if ddim else ()), ("leading", 30), ("leading", 1000)):
        kind = diffusers.DDIMScheduler if ddim else diffusers.DDPMScheduler
        scheduler = kind(num_train_timesteps=T, timestep_spacing=spacing, **config)
        scheduler.set_timesteps(steps)
        expected = normal(0)
        for t in scheduler.timesteps:
            output = smooth_network(expected, t.expand(len(expected)), None)
            generator = torch.Generator().manual_seed(int(t) + 1)
            how = {"use_clipped_model_output": True} if ddim else {"generator": generator}
            expected = scheduler.step(output, t, expected, **how).prev_sample
        grid = timestep_grid(T, steps, spacing)
        if ddim:
            x_0 = sample_ddim(denoise, normal(0), schedule, grid, no_noise)
        else:
            x_0 = sample_ancestral(denoise, normal(0), schedule, grid, lambda t: normal(t + 1), sampler)
        assert_close(x_0, expected, rtol=1e-3, atol=1e-3)


class TestContract:
    def test_noise_is_asked_for_where_it_is_used_and_every_step_is_shown_with_its_estimate(self) -> None:
        for sample, choice, expected in (
            (sample_ancestral, "fixed_large", [900, 400]),
            (sample_ddim, 0.5, [900, 400]),
            (sample_ddim, 0.0, []),
        ):
            asked, seen = [], []

            def noise_at(t: int, asked: list[int] = asked) -> Tensor:
                asked.append(t)
                return normal(t)

            def show(*step: object, seen: list[tuple[object, ...]] = seen) -> None:
                seen.append(step)

            x_0 = sample(lambda x_t, t: 0.5 * x_t, normal(0), linear_schedule(), [900, 400, 7], noise_at, choice, show)
            assert asked == expected
            assert [t for t, _, _ in seen] == [900, 400, 7]
            assert torch.equal(seen[0][1], normal(0))
            assert all(torch.equal(x_start, 0.5 * x_t) for _, x_t, x_start in seen)
            assert_close(x_0, seen[-1][2], rtol=1e-6, atol=1e-7)

    def test_the_network_gets_timesteps_and_labels_and_its_answer_becomes_float32_without_gradients(self) -> None:
        layer, labels = torch.nn.Conv2d(3, 3, 1).bfloat16(), torch.tensor([3, 1])

        def network(x: Tensor, timesteps: Tensor, given: Tensor | None) -> Tensor:
            assert (timesteps.tolist(), timesteps.dtype) == ([500, 500], torch.int64)
            assert given is labels
            return layer(x.bfloat16())

        estimate = make_denoiser(network, linear_schedule(), "epsilon", labels)(normal(0), 500)
        assert (estimate.dtype, estimate.requires_grad) == (torch.float32, False)
        assert estimate.abs().max() == 1, "clipped unless it is said otherwise"

    def test_sampling_never_waits_for_the_device(self) -> None:
        """On the meta device any look at a value raises."""
        schedule = linear_schedule().to("meta")
        denoise = make_denoiser(smooth_network, schedule, "v")
        x_T = torch.empty(SHAPE, device="meta")
        assert sample_ddim(denoise, x_T, schedule, [900, 3], lambda t: x_T, 1.0).shape == SHAPE
        assert sample_ancestral(denoise, x_T, schedule, [900, 3], lambda t: x_T, "fixed_large").shape == SHAPE

    def test_bad_arguments_are_refused(self) -> None:
        schedule, x = linear_schedule(), normal(0)
        for steps in (0, -1, T + 1):
            with pytest.raises(ValueError, match=f"between 1 and 1000.*not {steps}"):
                timestep_grid(T, steps, "trailing")
        with pytest.raises(ValueError, match="'karras'"):
            timestep_grid(T, 10, "karras")
        for eta in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match="eta must be between 0 and 1"):
                sample_ddim(lambda x_t, t: x_t, x, schedule, [10], no_noise, eta)
        with pytest.raises(ValueError, match=r"'learned'.*fixed_small or fixed_large"):
            ancestral_step(schedule, x, x, 10, 5, x, "learned")
        with pytest.raises(ValueError, match="needs noise"):
            ancestral_step(schedule, x, x, 10, 5, None, "fixed_small")
        with pytest.raises(ValueError, match="needs noise"):
            ddim_step(schedule, x, x, 10, 5, 1.0, None)
