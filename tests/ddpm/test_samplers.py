"""Samplers against diffusers step by step and over whole trajectories, their orders, and what they ask of whom."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from math import expm1, log, log2, sqrt

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.solvers import ORDERS, Mixture, errors_by_steps, orders, refined, rms
from ddpm.generation import Sampling, from_noise, make_denoiser
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
from ddpm.samplers import (
    Step,
    Visit,
    ancestral,
    ddim,
    deis,
    deis_step,
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_sde_2m,
    heun,
    ipndm,
    ipndm_step,
    unipc,
)

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


@pytest.mark.parametrize(
    ("sampler", "prediction", "clip"),
    [("ddim", "epsilon", True), ("ddim", "v", False), ("fixed_small", "epsilon", False), ("fixed_large", "v", True)],
)
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
    for grid, steps in (*((("trailing", 20),) if is_ddim else ()), ("leading", 30)):
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


Denoise = Callable[[Tensor, Point[float]], Tensor]


def lambdas(process: Process, steps: int, first: float, last: float) -> list[Point[float]]:
    """Points with evenly spaced ln(α/σ), and none that is clean."""
    return points_of(process.with_ratio(torch.linspace(-first, -last, steps + 1, dtype=torch.float64).exp()))


def estimate(x: Tensor, point: Point[float]) -> Tensor:
    """Some x_0, as a function of x/α and σ/α, so that it is the same on every process."""
    ratio = point.sigma / point.alpha
    return torch.tanh(1.3 * (x / point.alpha).roll(1, -1) / (1 + ratio) + 0.2 * log(ratio))


def asked(sampler: Callable[..., Tensor], points: Sequence[Point[float]], x: Tensor, denoise: Denoise) -> list[Tensor]:
    """What a denoiser is asked, and the end."""
    seen: list[Tensor] = []

    def remembered(x: Tensor, point: Point[float]) -> Tensor:
        seen.append(x)
        return denoise(x, point)

    end = sampler(remembered, x, points, normal)
    return [*seen, end]


def asked_by_diffusers(kind: type, points: Sequence[Point[float]], x: Tensor, **config: object) -> list[Tensor]:
    """The same of a multistep scheduler of diffusers at our float64 points."""
    scheduler = kind(num_train_timesteps=T, prediction_type="sample", **config)
    scheduler.set_timesteps(len(points) - 1)
    scheduler.set_begin_index(0)
    flow, seen = config.get("use_flow_sigmas"), [x]
    scheduler.sigmas = torch.tensor([point.sigma if flow else point.sigma / point.alpha for point in points]).double()
    stochastic = str(config.get("algorithm_type")).startswith("sde")
    for draw, (t, point) in enumerate(zip(scheduler.timesteps, points, strict=False), 1):
        noise = {"variance_noise": normal(draw)} if stochastic else {}
        seen.append(scheduler.step(estimate(seen[-1], point), t, seen[-1], **noise).prev_sample)
    return seen


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:__array_wrap__")
def test_multistep_samplers_equal_diffusers() -> None:
    """On the way to the clean image, and to another point; on a process that keeps the variance, and a flow."""
    from diffusers import DEISMultistepScheduler as DEIS
    from diffusers import DPMSolverMultistepScheduler as DPM
    from diffusers import UniPCMultistepScheduler as UniPC

    n = 20
    dpm = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    without_corrector = {"solver_order": 3, "disable_corrector": list(range(n))}
    for process, flow in ((linear_schedule(), False), (RectifiedFlow(), True)):
        points = [*lambdas(process, n - 1, -4.5, 3.5), CLEAN]
        x = points[0].alpha * 90 * normal(0)
        for sampler, kind, config, different in (
            (dpmpp_2m, DPM, dpm, 0),
            (dpmpp_sde_2m, DPM, dpm | {"algorithm_type": "sde-dpmsolver++"}, 0),
            (partial(unipc, order=1), UniPC, {"solver_order": 1}, 0),
            (partial(unipc, order=2), UniPC, {"solver_order": 2}, 0),
            # Theirs takes the last step but one at second order.
            (partial(unipc, order=3), UniPC, {"solver_order": 3}, 2),
            # Its predictor is DPM-Solver++(3M) with the whole of its last term.
            (dpmpp_3m, UniPC, without_corrector, 2),
            # Theirs ends at the least noise: its step to the clean image is not a number.
            (partial(deis, order=2), DEIS, {"solver_order": 2}, 1),
            (partial(deis, order=3), DEIS, {"solver_order": 3}, 1),
        ):
            ours = asked(sampler, points, x, estimate)
            theirs = asked_by_diffusers(kind, points, x, use_flow_sigmas=flow, **config)
            assert len(ours) == len(theirs) == n + 1
            for step, pair in enumerate(zip(ours[: n + 1 - different], theirs, strict=False)):
                assert_close(*pair, rtol=0, atol=2e-5, msg=f"{kind.__name__} {config}, step {step}, flow {flow}")


def test_the_third_order_of_diffusers_dpmpp_3m_lacks_half_of_its_last_term() -> None:
    """The paper's integral of D''/2 (λ - λ_s)² is α φ_3 h² D'', where D'' is twice what their D2 is."""
    from diffusers import DPMSolverMultistepScheduler as DPM

    points = lambdas(linear_schedule(), 3, -1.0, 1.0)
    (x, *_), estimates = asked(dpmpp_3m, points, normal(0), estimate), []

    def remembered(x: Tensor, point: Point[float]) -> Tensor:
        estimates.append(estimate(x, point))
        return estimates[-1]

    ours = dpmpp_3m(remembered, x, points, no_noise)
    theirs = asked_by_diffusers(DPM, points, x, solver_order=3, final_sigmas_type="sigma_min", lower_order_final=False)
    h = 2 / 3
    curvature = (estimates[2] - 2 * estimates[1] + estimates[0]) / 2
    phi = 1 + expm1(-h) / h
    assert_close(ours - theirs[-1], points[-1].alpha * (0.5 - phi / h) * curvature, rtol=1e-3, atol=1e-6)


def test_heun_and_ipndm_equal_diffusers() -> None:
    from diffusers import HeunDiscreteScheduler, IPNDMScheduler

    points = make_grid(linear_schedule(), 20, "karras")
    scheduler = HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)
    ratios = torch.tensor([point.sigma / point.alpha for point in points], dtype=torch.float64)
    scheduler.sigmas = torch.cat([ratios[:1], ratios[1:-1].repeat_interleave(2), ratios[-1:]])
    expected = normal(0) / points[0].alpha
    visited = [points[0], *(point for point in points[1:-1] for _ in range(2))]
    for t, point in zip(scheduler.timesteps, visited, strict=True):
        expected = scheduler.step(estimate(point.alpha * expected, point), t, expected).prev_sample
    assert_close(heun(estimate, normal(0), points, no_noise, linear_schedule()), expected, rtol=0, atol=2e-5)

    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)
    scheduler.alphas = torch.tensor([point.alpha for point in points], dtype=torch.float64)
    scheduler.betas = torch.tensor([point.sigma for point in points], dtype=torch.float64)
    expected = normal(0).double()
    for t, point in zip(scheduler.timesteps, points, strict=False):
        epsilon = (expected - point.alpha * estimate(expected, point)) / point.sigma
        v = (epsilon - point.sigma * expected) / point.alpha
        expected = scheduler.step(v, t, expected).prev_sample
    assert_close(ipndm(estimate, normal(0).double(), points, no_noise, 4), expected)


def test_churn_is_that_of_the_edm_paper() -> None:
    """Algorithm 2 as it is printed, for D(x; σ) with x/α and σ/α for x and σ."""
    S_churn = 2.0
    for process in (linear_schedule(), VarianceExploding(), RectifiedFlow()):
        points = [*lambdas(process, 12, -4.0, 3.5), CLEAN]
        t = [point.sigma / point.alpha for point in points]
        start = points[0].sigma * normal(0).double()
        x = start / points[0].alpha

        def D(x: Tensor, sigma: float) -> Tensor:
            return estimate(x, Point(0.0, 1.0, sigma))

        for i in range(len(t) - 1):
            t_hat = t[i] + min(S_churn / (len(t) - 1), sqrt(2) - 1) * t[i]
            x = x + sqrt(t_hat**2 - t[i] ** 2) * normal(i + 1)
            d = (x - D(x, t_hat)) / t_hat
            after = x + (t[i + 1] - t_hat) * d
            if t[i + 1]:
                d_after = (after - D(after, t[i + 1])) / t[i + 1]
                after = x + (t[i + 1] - t_hat) * (d / 2 + d_after / 2)
            x = after
        sampling = Sampling("heun", len(t) - 1, "trailing", churn=S_churn)
        assert_close(sampling.solver(process)(estimate, start, points, normal), x)
        # The same in one step alone, as in-painting takes them.
        first = sampling.solver(process)(estimate, start, points[:2], normal)
        assert_close(first, heun(estimate, start, points[:2], normal, process, S_churn / (len(t) - 1)))


def test_ddim_with_all_noise_is_ancestral_sampling() -> None:
    for process, steps in product((cosine_schedule(50), VarianceExploding()), (50, 7)):
        points = make_grid(process, steps, "trailing")
        expected = ancestral(estimate, normal(0), points, normal, "fixed_small")
        assert_close(ddim(estimate, normal(0), points, normal, 1.0), expected, rtol=1e-5, atol=1e-5)


def test_heun_s_first_step_of_a_cosine_is_euler_s() -> None:
    """There σ/α falls from 20,000 to a few, over which no slope says anything."""
    data, process = Mixture(), cosine_schedule()
    points = make_grid(process, 8, "trailing")
    exact = data.flow(normal(0).double(), points[0], CLEAN)
    errors = [
        rms(f(data.denoise, normal(0).double(), points, no_noise) - exact)
        for f in (partial(heun, process=process), ddim)
    ]
    assert errors[0] < 0.7 * errors[1], errors


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


def test_new_images_begin_with_noise_of_the_deviation_that_their_process_has() -> None:
    """And end where the flow leads from there; EDM's begin with σ_max, and where variance is kept, with 1."""
    data = Gaussian()
    for process, deviation in zip(PROCESSES, (1, 1, 20, 1), strict=True):
        points = make_grid(process, 400, "trailing")
        found = from_noise(ddim, data.denoise, points, lambda draw: normal(draw).double())
        expected = data.flow(deviation * normal(0).double(), points[0], CLEAN)
        assert_close(found, expected, rtol=0.02, atol=0.01)


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


def test_every_sampler_converges_with_its_order() -> None:
    """On a mixture of three Gaussians, from 160 to 320 steps, on processes that are as different as can be."""
    by_process = errors_by_steps((160, 320))
    measured = {name: [orders(errors[name])[0] for errors in by_process.values()] for name in ORDERS}
    for name, (_, order) in ORDERS.items():
        assert min(measured[name]) > order - 0.35, (name, measured)
    # Not more either, on all of them: the table says what they are.
    assert {name: round(min(measured[name])) for name in ORDERS} == {name: order for name, (_, order) in ORDERS.items()}


@pytest.mark.parametrize(("take", "evenly"), [(ipndm_step, True), (deis_step, False)])
def test_a_step_of_ipndm_and_of_deis_has_its_order(take: Step, evenly: bool) -> None:
    """From points that are visited exactly: a whole trajectory also begins with lower orders. iPNDM needs even σ/α."""
    data, process, x = Gaussian(), VarianceExploding(), normal(0).double()
    for order in (1, 2, 3, 4):
        errors = []
        for step in (0.04, 0.02):
            steps = torch.arange(-1, order, dtype=torch.float64)
            ratios = 1 + step * (steps if evenly else steps + 0.2 * steps**2)
            after, *before = points_of(process.with_ratio(ratios))
            xs = [data.flow(x, before[0], point) for point in (after, *before)]
            visits = [Visit(point, at, data.denoise(at, point)) for point, at in zip(before, xs[1:], strict=True)]
            errors.append(float((take(visits, after) - xs[0]).abs().mean()))
        assert log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.3), order


def test_samplers_with_noise_converge_to_the_data_s_deviation_with_their_order() -> None:
    """On a Gaussian all is linear: image b gets draw b alone, and the squares of all together are the variance."""
    data = Gaussian()
    data.mean = 0.0
    for sampler, order in (
        (ancestral, 1),
        (partial(ancestral, variance="fixed_large"), 1),
        (partial(ddim, eta=1.0), 1),
        (dpmpp_sde_2m, 2),
    ):
        for process in PROCESSES:
            errors = []
            for steps in (80, 160):
                points, draws = (
                    refined(process, steps),
                    torch.eye(steps + 1, dtype=torch.float64)[..., None, None, None],
                )
                first, last = (sqrt((end.alpha * data.std) ** 2 + end.sigma**2) for end in (points[0], points[-1]))
                x = sampler(data.denoise, first * draws[0], points, draws.__getitem__)
                errors.append(abs(float(x.square().sum().sqrt()) - last))
            assert log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), (sampler, process, errors)


def test_ddim_backwards_finds_the_noise_of_an_image() -> None:
    data = Gaussian()
    for process in PROCESSES:
        points = make_grid(process, 500, "trailing")[-2::-1]
        image = 0.3 + 0.4 * normal(1).double()
        noise = ddim(data.denoise, image, points, no_noise)
        assert_close(noise, data.flow(image, points[0], points[-1]), rtol=0.02, atol=0.02)


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
