"""Samplers against diffusers step by step and over whole trajectories, and what they ask of whom."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm.generation import make_denoiser
from ddpm.grids import make_grid
from ddpm.guidance import Guidance
from ddpm.objective import Condition
from ddpm.prediction import Prediction
from ddpm.process import (
    CLEAN,
    Point,
    Process,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    cosine_schedule,
    linear_schedule,
    points_of,
)
from ddpm.samplers import ancestral, ddim

T = 1000
SHAPE = (2, 3, 4, 4)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def no_noise(draw: int) -> Tensor:
    raise AssertionError("noise was asked for")


def visited(process: Process, *numbers: int) -> list[Point[float]]:
    """These numbered points; -1 is the clean image."""
    return [points_of(process.numbered(torch.tensor([number])))[0] if number >= 0 else CLEAN for number in numbers]


def judge(kind: type, schedule: VariancePreserving, **config: object):
    """A diffusers scheduler of x_0-prediction on our float64 table: its own float32 one has 1 - ᾱ_0 to 3 digits."""
    scheduler = kind(num_train_timesteps=T, prediction_type="sample", clip_sample=False, **config)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
class TestStep:
    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
    def test_ancestral_equals_diffusers(self, make: Callable[[], VariancePreserving], variance: str) -> None:
        import diffusers

        schedule, x_t, x_start = make(), normal(0), normal(1).clamp(-1, 1)
        scheduler = judge(diffusers.DDPMScheduler, schedule, variance_type=variance)
        output, answer = x_start, x_start
        if variance == "learned_range":
            output, answer = torch.cat([x_start, normal(3)], 1), torch.cat([x_start, (normal(3) + 1) / 2], 1)
        for t, t_prev in ((999, 998), (999, 979), (500, 250), (40, 20), (2, 1), (1, 0), (0, -1)):
            scheduler.set_timesteps(timesteps=[t, t_prev] if t_prev >= 0 else [t])
            expected = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(2)).prev_sample
            points = visited(schedule, t, t_prev)
            step = ancestral(lambda x, point: answer, x_t, points, lambda draw: normal(2), variance)
            assert_close(step, expected, rtol=0, atol=1e-6, msg=f"{t} to {t_prev}")

    @pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
    def test_ddim_equals_diffusers(self, make: Callable[[], VariancePreserving], eta: float) -> None:
        import diffusers

        schedule, x_t, x_start = make(), normal(0), normal(1).clamp(-1, 1)
        scheduler = judge(diffusers.DDIMScheduler, schedule, set_alpha_to_one=True)
        for t, steps in ((999, 1000), (999, 50), (500, 4), (40, 50), (1, 1000), (0, 1000)):
            scheduler.set_timesteps(steps)
            expected = scheduler.step(x_start, t, x_t, eta=eta, variance_noise=normal(2)).prev_sample
            points = visited(schedule, t, t - T // steps)
            step = ddim(lambda x, point: x_start, x_t, points, lambda draw: normal(2), eta)
            assert_close(step, expected, rtol=0, atol=1e-6, msg=f"t = {t} of {steps} steps")


def smooth_network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Some function of x_t and t that a network could be."""
    return torch.tanh(1.3 * x.roll(1, -1) + t.view(-1, 1, 1, 1) / T - 0.4)


@pytest.mark.parametrize("sampler", ["ddim", "fixed_small", "fixed_large"])
@pytest.mark.parametrize(("prediction", "clip"), [("epsilon", True), ("epsilon", False), ("v", True), ("v", False)])
def test_whole_trajectories_equal_diffusers(sampler: str, prediction: str, clip: bool) -> None:
    """Unchanged diffusers, whose tables are float32: three digits less."""
    import diffusers

    schedule, is_ddim = linear_schedule(), sampler == "ddim"
    denoise = make_denoiser(smooth_network, schedule, Prediction(prediction), clip=clip)
    config = {
        "prediction_type": "epsilon" if prediction == "epsilon" else "v_prediction",
        "clip_sample": clip,
        **({} if is_ddim else {"variance_type": sampler}),
    }
    for grid, steps in (*((("trailing", 20),) if is_ddim else ()), ("leading", 30), ("leading", 1000)):
        kind = diffusers.DDIMScheduler if is_ddim else diffusers.DDPMScheduler
        scheduler = kind(num_train_timesteps=T, timestep_spacing=grid, **config)
        scheduler.set_timesteps(steps)
        expected = normal(0)
        for draw, t in enumerate(scheduler.timesteps, 1):
            output = smooth_network(expected, t.expand(len(expected)), Condition())
            generator = torch.Generator().manual_seed(draw)
            how = {"use_clipped_model_output": True} if is_ddim else {"generator": generator}
            expected = scheduler.step(output, t, expected, **how).prev_sample
        points = make_grid(schedule, steps, grid)
        if is_ddim:
            x_0 = ddim(denoise, normal(0), points, no_noise)
        else:
            x_0 = ancestral(denoise, normal(0), points, normal, sampler)
        assert_close(x_0, expected, rtol=1e-3, atol=1e-3)


def test_ddim_is_euler_s_method_in_sigma_and_its_ancestral_one() -> None:
    """diffusers' Euler schedulers are k-diffusion's: x/α over σ/α, noise of standard deviation 1 at the start."""
    import diffusers

    schedule = linear_schedule()
    denoise = make_denoiser(smooth_network, schedule, Prediction("epsilon"), clip=False)
    for kind, eta in ((diffusers.EulerDiscreteScheduler, 0.0), (diffusers.EulerAncestralDiscreteScheduler, 1.0)):
        scheduler = kind(num_train_timesteps=T, timestep_spacing="trailing")
        scheduler.set_timesteps(20)
        points = make_grid(schedule, 20, "trailing")
        expected = normal(0) / points[0].alpha
        for draw, t in enumerate(scheduler.timesteps, 1):
            output = smooth_network(scheduler.scale_model_input(expected, t), t.expand(len(expected)), Condition())
            noise = torch.Generator().manual_seed(draw)
            expected = scheduler.step(output, t, expected, generator=noise).prev_sample
        assert_close(ddim(denoise, normal(0), points, normal, eta), expected, rtol=1e-3, atol=2e-3)


def test_ddim_with_all_noise_on_the_full_grid_is_ancestral_sampling() -> None:
    schedule = cosine_schedule(50)
    denoise = make_denoiser(smooth_network, schedule, Prediction("v"))
    points = make_grid(schedule, 50, "trailing")
    expected = ancestral(denoise, normal(0), points, normal, "fixed_small")
    assert_close(ddim(denoise, normal(0), points, normal, 1.0), expected, rtol=1e-5, atol=1e-5)


class Gaussian:
    """Images from a normal distribution, whose denoiser and probability flow are known exactly on any process."""

    mean, std = 0.3, 0.4

    def denoise(self, x: Tensor, point: Point[float]) -> Tensor:
        """E[x_0 | x_t]."""
        variance = (point.alpha * self.std) ** 2 + point.sigma**2
        return self.mean + point.alpha * self.std**2 / variance * (x - point.alpha * self.mean)

    def flow(self, x: Tensor, start: Point[float], end: Point[float]) -> Tensor:
        """Where the probability flow leads: the same quantile of the distribution at `end`."""
        stds = [((point.alpha * self.std) ** 2 + point.sigma**2) ** 0.5 for point in (start, end)]
        return end.alpha * self.mean + stds[1] / stds[0] * (x - start.alpha * self.mean)


PROCESSES: Sequence[Process] = (linear_schedule(), cosine_schedule(), VarianceExploding(sigma_max=20), RectifiedFlow())


def test_ddim_follows_the_probability_flow_of_every_process_to_first_order() -> None:
    data = Gaussian()
    for process in PROCESSES:
        errors = []
        for steps in (25, 50, 100):
            points = make_grid(process, steps, "trailing")
            x = points[0].sigma * normal(0).double()
            found = ddim(data.denoise, x, points, no_noise)
            errors.append((found - data.flow(x, points[0], CLEAN)).abs().max().item())
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2, rel=0.25), (process, errors)


def test_ddim_backwards_finds_the_noise_of_an_image() -> None:
    data = Gaussian()
    for process in PROCESSES:
        points = make_grid(process, 500, "trailing")[-2::-1]
        image = 0.3 + 0.4 * normal(1).double()
        noise = ddim(data.denoise, image, points, no_noise)
        assert_close(noise, data.flow(image, points[0], points[-1]), rtol=0.02, atol=0.02)


def test_ancestral_samples_have_the_data_s_mean_and_deviation() -> None:
    data, shape = Gaussian(), (1, 1, 200, 200)

    def noise(draw: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)

    for process in PROCESSES:
        points = make_grid(process, 200, "trailing")
        for sample in (ancestral, partial(ancestral, variance="fixed_large"), partial(ddim, eta=1.0)):
            x = sample(data.denoise, points[0].sigma * noise(0), points, noise)
            assert x.mean().item() == pytest.approx(data.mean, abs=0.02), process
            assert x.std().item() == pytest.approx(data.std, rel=0.06), process


class TestContract:
    def test_noise_is_asked_for_where_it_is_used_by_the_number_of_the_draw(self) -> None:
        for sample, expected in (
            (partial(ancestral, variance="fixed_large"), [1, 2]),
            (partial(ddim, eta=0.5), [1, 2]),
            (ddim, []),
        ):
            asked, seen = [], []

            def noise_at(draw: int, asked: list[int] = asked) -> Tensor:
                asked.append(draw)
                return normal(draw)

            def denoise(x: Tensor, point: Point[float], seen: list[float] = seen) -> Tensor:
                seen.append(point.t)
                return 0.5 * x

            sample(denoise, normal(0), visited(linear_schedule(), 900, 400, 7, -1), noise_at)
            assert asked == expected
            assert seen == [900, 400, 7]

    def test_the_network_gets_the_point_and_the_condition_and_its_answer_becomes_float32_without_gradients(
        self,
    ) -> None:
        layer, condition, steps = torch.nn.Conv2d(3, 3, 1).bfloat16(), Condition(torch.tensor([3, 1])), []
        edm = VarianceExploding()
        (point,) = visited(edm, 700)

        def network(x: Tensor, t: Tensor, given: Condition) -> Tensor:
            assert (t.tolist(), t.dtype) == ([pytest.approx(point.t)] * 2, torch.float32)
            assert given is condition
            assert_close(x, normal(0) / (point.sigma**2 + 0.25) ** 0.5)
            return layer(x.bfloat16())

        def keep(*step: object) -> None:
            steps.append(step)

        estimate = make_denoiser(network, edm, Prediction("edm"), condition, callback=keep)(normal(0), point)
        assert (estimate.dtype, estimate.requires_grad) == (torch.float32, False)
        assert estimate.abs().max() <= 1, "clipped unless it is said otherwise"
        ((at, x_t, x_start),) = steps
        assert at is point and torch.equal(x_t, normal(0)) and x_start is estimate

    def test_sampling_never_waits_for_the_device(self) -> None:
        """On the meta device any look at a value raises."""
        x, schedule = torch.empty(SHAPE, device="meta"), linear_schedule()
        denoise = make_denoiser(smooth_network, schedule, Prediction("v"))
        points = visited(schedule, 900, 3, -1)
        assert ddim(denoise, x, points, lambda draw: x, 1.0).shape == SHAPE
        assert ancestral(denoise, x, points, lambda draw: x, "fixed_large").shape == SHAPE
        with_share = make_denoiser(
            lambda x, t, told: torch.cat([x, x], dim=1),
            schedule,
            Prediction("v"),
            Condition(torch.empty(2, dtype=torch.int64, device="meta"), x),
            guidance=Guidance(2.0, rescale=0.5),
            null_class=3,
            with_share=True,
        )
        assert ancestral(with_share, x, points, lambda draw: x, "learned_range").shape == SHAPE
