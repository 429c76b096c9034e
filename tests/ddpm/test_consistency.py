"""Sampling in one or two steps: the loss against the published code's formula, and jumps against a known flow."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks.solvers import Mixture, rms
from ddpm.catalogue import Consistency, Diffusion
from ddpm.consistency import ConsistencyObjective
from ddpm.grids import make_grid, numbered_points
from ddpm.model import make_denoiser
from ddpm.networks.layers import dropout_of
from ddpm.objective import Condition, Drawn
from ddpm.process import CLEAN, Point, Prediction, make_process
from ddpm.samplers import consistency
from tests.ddpm.known import build, no_noise, normal

IMAGES, SEED = 6, 3
COSINE = Diffusion("cosine")
STAGED = Consistency(stage_images=12, factor=2.0, draws_mean=-1.1, draws_std=2.0, huber=0.01)


def objective(schedule: str, prediction: str, tuning: Consistency = STAGED) -> ConsistencyObjective:
    diffusion = Diffusion(schedule, prediction=prediction, objective="consistency")
    return ConsistencyObjective(make_process(diffusion), Prediction(prediction), diffusion, tuning=tuning)


@pytest.mark.parametrize("first_image", [0, 18, 30, 1200])
@pytest.mark.parametrize("kind", ["unet", "edm2"])
def test_loss_and_gradients_are_those_of_ecm(kind: str, first_image: int) -> None:
    """Geng et al.'s loss, in σ and with EDM's preconditioning; its sum over the pixels is a mean here."""
    tuned, numbers = objective("edm", "edm"), first_image + torch.arange(IMAGES)
    x_start, noise = normal(0, (2, IMAGES, 3, 16, 16), torch.float32)
    x_start.mul_(0.5).clamp_(-1, 1)
    network = build(kind, dropout=0.3)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    drawn = Drawn.of(tuned.draw(SEED, numbers, IMAGES))

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        return [torch.zeros(()) if gradient is None else gradient for gradient in found]

    with dropout_of(SEED, first_image):
        found = tuned.losses(network, x_start, noise, drawn)
        found_gradients = gradients(found)
    sigma, stage = drawn.sigma.double(), [0, 1, 2, 7][[0, 18, 30, 1200].index(first_image)]
    share = 1 - 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-sigma))
    less = (sigma * share).clamp(min=0)

    def preconditioned(sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma.float().view(-1, 1, 1, 1)
        root = (sigma**2 + 0.25).sqrt()
        x = x_start + sigma * noise
        output = network(x / root, (sigma.log() / 4).flatten(), Condition())
        return 0.25 / root**2 * x + 0.5 * sigma / root * output

    with dropout_of(SEED, first_image):
        with torch.no_grad():
            target = torch.where(less.view(-1, 1, 1, 1) > 0, preconditioned(less.clamp(min=1e-6)), x_start)
        squares = (preconditioned(sigma) - target).square().sum(dim=(1, 2, 3))
        size, weight = x_start[0].numel(), 1 / sigma.float() ** 2 + 1 / 0.25
        c = 0.01 * math.sqrt(size)
        expected = weight * ((squares + c**2).sqrt() - c) / math.sqrt(size)
        expected_gradients = gradients(expected)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


def test_draws_follow_their_distribution_and_stages_the_batches() -> None:
    tuned = objective("edm", "edm")
    log_sigma = tuned.draw(SEED, torch.arange(20_000), 20_000)[2].double().log()
    assert float(log_sigma.clamp(max=4).mean()) == pytest.approx(-1.1, abs=0.05)
    assert float(log_sigma.clamp(max=4).std()) == pytest.approx(2.0, abs=0.05)
    # The batch of images 8 to 15 is in the first stage as a whole, and the last stage has no end.
    stages = [tuned.draw(SEED, torch.tensor([first, first + 7]), 8) for first in (8, 16, 10**9)]
    for points, gap in zip(stages, (1 / 2, 1 / 4, 1 / 256), strict=True):
        tau, less = points[2], points[8]
        assert_close(less, (tau * (1 - gap * (1 + 8 * torch.sigmoid(-tau)))).clamp(min=0), rtol=1e-5, atol=1e-6)


def test_more_steps_renoise_as_diffusers() -> None:
    from diffusers import LCMScheduler

    judge, process = LCMScheduler(beta_schedule="squaredcos_cap_v2", timestep_scaling=1e6), make_process(COSINE)
    judge.set_timesteps(timesteps=[900, 400, 100])
    x, noises = normal(1, dtype=torch.float32), torch.Generator().manual_seed(0)
    expected, points = x, numbered_points(process, [900, 400, 100])
    for t in judge.timesteps.tolist():
        expected = judge.step(torch.tanh(expected + t / 1000), t, expected, noises, return_dict=False)[0]

    def denoise(x: torch.Tensor, point: Point[float]) -> torch.Tensor:
        return Prediction("epsilon").x_start(torch.tanh(x + point.t / 1000), x, point)

    again = torch.Generator().manual_seed(0)
    found = consistency(denoise, x, points, lambda draw: torch.randn(x.shape, generator=again))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow"])
def test_levels_of_two_steps(schedule: str) -> None:
    """80 and 0.89, wherever the process ends: 0.82 is that of Song et al. 2023 for CIFAR-10."""
    first, second, last = make_grid(make_process(Diffusion(schedule)), 2, "renoise")
    assert (first.sigma / first.alpha, second.sigma / second.alpha) == pytest.approx((80, 0.8**0.5), rel=1e-6)
    assert last == CLEAN


class Small(nn.Module):
    """A network for images of two pixels."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, width = scale, 128
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, _: Condition) -> torch.Tensor:
        angles = self.scale * t[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0])
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)).view_as(x)


def mixture(seed: int, images: int) -> torch.Tensor:
    data, generator = Mixture(), torch.Generator().manual_seed(seed)
    of = torch.multinomial(data.shares, images * 2, replacement=True, generator=generator)
    values = data.means[of] + data.stds[of] * torch.randn(images * 2, generator=generator, dtype=torch.float64)
    return values.view(images, 1, 1, 2).float()


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "prediction"), [("edm", "edm"), ("flow", "flow"), ("cosine", "v")])
def test_one_step_ends_where_the_flow_ends(schedule: str, prediction: str) -> None:
    """Nine peaks: the jump from noise leads to the end of the exact trajectory, and nearer to it with training."""
    steps, batch_images = 3000, 512
    tuning = Consistency(stage_images=steps * batch_images // 8, factor=2.0, draws_mean=-0.5, draws_std=2.0, huber=0.1)
    tuned, data = objective(schedule, prediction, tuning), Mixture()
    torch.manual_seed(0)
    network = Small(1.0 if schedule == "edm" else 0.003)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    denoise = make_denoiser(network, tuned.process, tuned.prediction, clip=False)
    points, images = make_grid(tuned.process, 1, "renoise"), mixture(0, 200_000)
    noise = max(1.0, points[0].sigma) * normal(5, (500, 1, 1, 2))
    exact, errors = data.flow(noise, points[0], CLEAN), list[float]()
    for step in range(steps):
        chosen = images[torch.randint(len(images), (batch_images,))]
        drawn = Drawn.of(tuned.draw(SEED, step * batch_images + torch.arange(batch_images), batch_images))
        optimizer.zero_grad()
        tuned.losses(network, chosen, torch.randn_like(chosen), drawn).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % (steps // 3) == steps // 3 - 1:
            jumped = consistency(denoise, noise.float(), points, no_noise)
            errors.append(rms(jumped - exact) / float(images.std()))
    assert errors[0] > errors[-1] <= 0.1, errors
