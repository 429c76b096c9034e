"""Samplers against diffusers step by step and over whole trajectories, and their orders of convergence."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import log, log2, sqrt

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.solvers import ORDERS, Mixture, errors_by_steps, orders, refined, rms
from ddpm.grids import make_grid
from ddpm.model import Sampling
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
    Denoiser,
    Sampler,
    Step,
    Visit,
    ancestral,
    ddim,
    deis,
    deis_step,
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_sde_2m,
    from_noise,
    heun,
    ipndm_step,
    unipc,
)
from tests.ddpm.known import Gaussian, no_noise, normal, point_of

T = 1000
PROCESSES: Sequence[Process] = (linear_schedule(), cosine_schedule(), VarianceExploding(sigma_max=20), RectifiedFlow())


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
@pytest.mark.parametrize("share", ["fixed_small", "fixed_large", "learned_range", 0.0, 0.4, 1.0])
def test_single_steps_equal_diffusers(make: Callable[[], VariancePreserving], share: str | float) -> None:
    """Ancestral ones by their variance, DDIM's by η; on our float64 table, as theirs has 1 - ᾱ_0 to three digits."""
    import diffusers

    schedule, x_t, x_start, noise = make(), normal(0), normal(1).clamp(-1, 1), normal(2)
    config = {"num_train_timesteps": T, "prediction_type": "sample", "clip_sample": False}
    output, answer = x_start, x_start
    if share == "learned_range":
        output, answer = torch.cat([x_start, normal(3)], 1), torch.cat([x_start, (normal(3) + 1) / 2], 1)
    for t, t_prev in ((999, 998), (999, 979), (500, 250), (40, 20), (2, 1), (1, 0), (0, -1)):
        if isinstance(share, str):
            judge = diffusers.DDPMScheduler(**config, variance_type=share)
            judge.set_timesteps(timesteps=[t, t_prev] if t_prev >= 0 else [t])
            sampler, how = partial(ancestral, variance=share), {"generator": torch.Generator().manual_seed(2)}
        else:
            judge = diffusers.DDIMScheduler(**config, set_alpha_to_one=True)
            judge.set_timesteps(T // (t - t_prev))
            sampler, how = partial(ddim, eta=share), {"eta": share, "variance_noise": noise}
        judge.alphas_cumprod = schedule.alphas_cumprod
        expected = judge.step(output, t, x_t, **how).prev_sample
        points = [point_of(schedule, t), point_of(schedule, t_prev) if t_prev >= 0 else CLEAN]
        step = sampler(lambda x, point: answer, x_t, points, lambda draw: noise)
        assert_close(step, expected, rtol=0, atol=1e-6, msg=f"{t} to {t_prev}")


def lambdas(process: Process, steps: int, first: float, last: float) -> list[Point[float]]:
    """Points with evenly spaced ln(α/σ), and none that is clean."""
    return points_of(process.with_ratio(torch.linspace(-first, -last, steps + 1, dtype=torch.float64).exp()))


def estimate(x: Tensor, point: Point[float]) -> Tensor:
    """Some x_0, as a function of x/α and σ/α, so that it is the same on every process."""
    ratio = point.sigma / point.alpha
    return torch.tanh(1.3 * (x / point.alpha).roll(1, -1) / (1 + ratio) + 0.2 * log(ratio))


def asked(sampler: Sampler, points: Sequence[Point[float]], x: Tensor, denoise: Denoiser) -> list[Tensor]:
    """The questions to a denoiser, and the end."""
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


def test_churn_is_edms() -> None:
    """Algorithm 2 as it is printed, for D(x; σ) with x/α and σ/α for x and σ."""
    S_churn = 2.0
    for process in (linear_schedule(), VarianceExploding(), RectifiedFlow()):
        points = [*lambdas(process, 12, -4.0, 3.5), CLEAN]
        t = [point.sigma / point.alpha for point in points]
        start = points[0].sigma * normal(0)
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


def test_heuns_first_step_of_a_cosine() -> None:
    """There σ/α falls from 20,000 to a few, over which no slope says anything."""
    data, process = Mixture(), cosine_schedule()
    points = make_grid(process, 8, "trailing")
    exact = data.flow(normal(0), points[0], CLEAN)
    errors = [rms(f(data.denoise, normal(0), points, no_noise) - exact) for f in (partial(heun, process=process), ddim)]
    assert errors[0] < 0.7 * errors[1], errors


def test_new_images_begin_with_noise() -> None:
    """And end where the flow leads from there; EDM's begin with σ_max, and where variance is kept, with 1."""
    data = Gaussian()
    for process, deviation in zip(PROCESSES, (1, 1, 20, 1), strict=True):
        points = make_grid(process, 400, "trailing")
        found = from_noise(ddim, data.denoise, points, normal)
        expected = data.flow(deviation * normal(0), points[0], CLEAN)
        assert_close(found, expected, rtol=0.02, atol=0.01)


@pytest.mark.slow
def test_every_sampler_converges_with_its_order() -> None:
    """On a mixture of three Gaussians, from 160 to 320 steps, on processes that are as different as can be."""
    by_process = errors_by_steps((160, 320))
    measured = {name: [orders(errors[name])[0] for errors in by_process.values()] for name in ORDERS}
    for name, (_, order) in ORDERS.items():
        assert min(measured[name]) > order - 0.35, (name, measured)
    # Not more either, on all of them: the table says what they are.
    assert {name: round(min(measured[name])) for name in ORDERS} == {name: order for name, (_, order) in ORDERS.items()}


@pytest.mark.parametrize(("take", "evenly"), [(ipndm_step, True), (deis_step, False)])
def test_steps_of_ipndm_and_deis(take: Step, evenly: bool) -> None:
    """From points that are visited exactly: a whole trajectory also begins with lower orders. iPNDM needs even σ/α."""
    data, process, x = Gaussian(), VarianceExploding(), normal(0)
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


def test_samplers_with_noise_converge() -> None:
    """On a Gaussian all is linear: image b gets draw b alone, and the squares of all together are the variance."""
    data = Gaussian(mean=0.0)
    for (sampler, order), process in product(
        (
            (ancestral, 1),
            (partial(ancestral, variance="fixed_large"), 1),
            (partial(ddim, eta=1.0), 1),
            (dpmpp_sde_2m, 2),
        ),
        PROCESSES,
    ):
        errors = []
        for steps in (80, 160):
            points = refined(process, steps)
            draws = torch.eye(steps + 1, dtype=torch.float64)[..., None, None, None]
            first, last = data.std_at(points[0]), data.std_at(points[-1])
            x = sampler(data.denoise, first * draws[0], points, draws.__getitem__)
            errors.append(abs(float(x.square().sum().sqrt()) - last))
        assert log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), (sampler, process, errors)
