"""Sampling in one or two steps: the loss against the published code's formula, and jumps against a known flow."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
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
from tests.ddpm.known import build, no_noise, normal, randomise

IMAGES, BATCH_IMAGES, SEED = 6, 512, 3
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


@pytest.mark.parametrize("first_image", [0, 1200])
def test_a_guided_teacher_gives_the_nearer_point(first_image: int) -> None:
    """In ε: Luo et al. 2023 guide it, and step by DDIM (Song et al. 2021, equation 12). Image 3 has no class."""
    tuned = objective("cosine", "epsilon", replace(STAGED, guidance=2.5, draws_std=1.0))
    student, teacher = (build("unet", num_classes=3, null_class=True, dropout=dropout) for dropout in (0.3, 0.0))
    randomise(teacher, seed=1)
    x_start, noise = normal(0, (2, IMAGES, 3, 16, 16), torch.float32)
    drawn = Drawn.of(tuned.draw(SEED, first_image + torch.arange(IMAGES), IMAGES))
    labels, none = torch.tensor([0, 1, 2, 3, 0, 1]), torch.full((IMAGES,), 3)
    t, s = drawn.t, drawn.further[0]
    alpha, sigma, alpha_s, sigma_s = (row.view(-1, 1, 1, 1) for row in (*drawn[1:3], *drawn.further[1:3]))
    with dropout_of(SEED, first_image):
        guided = replace(tuned, teacher=teacher.eval(), null_class=3)
        found = guided.losses(student, x_start, noise, drawn, Condition(labels))

    x_t = alpha * x_start + sigma * noise
    with torch.no_grad(), dropout_of(SEED, first_image):
        epsilon = (1 + 1.5) * teacher(x_t, t, Condition(labels)) - 1.5 * teacher(x_t, t, Condition(none))
        ended = (x_t - sigma * epsilon) / alpha
        x_s = alpha_s * ended + sigma_s * epsilon
        target = (x_s - sigma_s * student(x_s, s, Condition(labels))) / alpha_s
        target = torch.where(sigma_s > 0, target, ended)
        squares = ((x_t - sigma * student(x_t, t, Condition(labels))) / alpha - target).square().mean(dim=(1, 2, 3))
    expected = ((alpha / sigma).flatten() ** 2 + 4) * ((squares + 0.01**2).sqrt() - 0.01)
    assert (sigma_s == 0).any() == (first_image == 0)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


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

    def __init__(self, scale: float, classes: int = 0) -> None:
        super().__init__()
        self.scale, self.classes, width = scale, classes, 128
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 8 + classes, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        angles = self.scale * t[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0])
        parts = [x.flatten(1), angles.sin(), angles.cos()]
        if condition.labels is not None:
            parts.append(one_hot(condition.labels, self.classes))
        return self.layers(torch.cat(parts, dim=1)).view_as(x)


def mixture(seed: int, images: int) -> torch.Tensor:
    data, generator = Mixture(), torch.Generator().manual_seed(seed)
    of = torch.multinomial(data.shares, images * 2, replacement=True, generator=generator)
    values = data.means[of] + data.stds[of] * torch.randn(images * 2, generator=generator, dtype=torch.float64)
    return values.view(images, 1, 1, 2).float()


def tuned_to(steps: int, guidance: float = 1.0) -> Consistency:
    """Stages that end with so many steps of 512 images."""
    stage_images = steps * BATCH_IMAGES // 8
    return Consistency(stage_images, 2.0, draws_mean=-0.5, draws_std=2.0, huber=0.1, guidance=guidance)


def learning(
    tuned: ConsistencyObjective, network: Small, steps: int, batch: Callable[[], tuple[torch.Tensor, Condition]]
) -> Iterator[None]:
    """Trains the network on drawn images; yields after each third of the steps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen, condition = batch()
        drawn = Drawn.of(tuned.draw(SEED, step * BATCH_IMAGES + torch.arange(BATCH_IMAGES), BATCH_IMAGES))
        optimizer.zero_grad()
        tuned.losses(network, chosen, torch.randn_like(chosen), drawn, condition).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % (steps // 3) == steps // 3 - 1:
            yield


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "prediction"), [("edm", "edm"), ("flow", "flow"), ("cosine", "v")])
def test_one_step_ends_where_the_flow_ends(schedule: str, prediction: str) -> None:
    """Nine peaks: the jump from noise leads to the end of the exact trajectory, and nearer to it with training."""
    tuned, data = objective(schedule, prediction, tuned_to(3000)), Mixture()
    torch.manual_seed(0)
    network = Small(1.0 if schedule == "edm" else 0.003)
    denoise = make_denoiser(network, tuned.process, tuned.prediction, clip=False)
    points, images = make_grid(tuned.process, 1, "renoise"), mixture(0, 200_000)
    noise = max(1.0, points[0].sigma) * normal(5, (500, 1, 1, 2))
    exact, errors = data.flow(noise, points[0], CLEAN), list[float]()
    for _ in learning(tuned, network, 3000, lambda: (images[torch.randint(len(images), (BATCH_IMAGES,))], Condition())):
        jumped = consistency(denoise, noise.float(), points, no_noise)
        errors.append(rms(jumped - exact) / float(images.std()))
    assert errors[0] > errors[-1] <= 0.1, errors


MEANS, DEVIATION = torch.tensor([[-0.5, 0.4], [0.3, 0.5], [0.1, -0.6]]), 0.3


def of_three_classes(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """F of the denoiser of normal images, of one class or, with the fourth, of any (Karras et al. 2022, table 1)."""
    sigma = (4 * t).exp()[:, None]
    root = (sigma**2 + 0.25).sqrt()
    away, variance = (x.flatten(1) * root)[:, None] - MEANS, (DEVIATION**2 + sigma**2)[:, :, None]
    likely = (-(away**2) / (2 * variance)).sum(dim=2).softmax(dim=1)
    shares = torch.where(condition.labels[:, None] == 3, likely, one_hot(condition.labels, 4)[:, :3])
    denoised = (shares[:, :, None] * (MEANS + DEVIATION**2 / variance * away)).sum(dim=1)
    return (denoised * root / (0.5 * sigma) - 0.5 / sigma * x.flatten(1)).view_as(x)


@pytest.mark.slow
def test_one_step_ends_where_the_guided_flow_ends() -> None:
    """Three classes, whose exact denoiser is the teacher."""
    tuned = replace(objective("edm", "edm", tuned_to(2000, guidance=2.0)), teacher=of_three_classes, null_class=3)
    torch.manual_seed(0)
    network = Small(1.0, classes=4)

    def batch() -> tuple[torch.Tensor, Condition]:
        classes = torch.randint(3, (BATCH_IMAGES,))
        images = MEANS[classes] + DEVIATION * torch.randn(BATCH_IMAGES, 2)
        return images.view(-1, 1, 1, 2), Condition(classes)

    (first, _), labels = make_grid(tuned.process, 1, "renoise"), torch.arange(600) % 3
    x = noise = first.sigma * normal(5, (600, 1, 1, 2), torch.float32)
    for sigma, less in pairwise([*torch.logspace(math.log10(first.sigma), -3, 500), torch.tensor(0.0)]):
        root, t = (sigma**2 + 0.25).sqrt(), (sigma.log() / 4).expand(600)
        outputs = [of_three_classes(x / root, t, Condition(those)) for those in (labels, torch.full((600,), 3))]
        of_class, of_any = (0.25 / root**2 * x + 0.5 * sigma / root * output for output in outputs)
        x = x + (less - sigma) / sigma * (x - (2 * of_class - of_any))
    denoise = make_denoiser(network, tuned.process, tuned.prediction, Condition(labels), clip=False)
    errors = [rms(denoise(noise, first) - x) / float(x.std()) for _ in learning(tuned, network, 2000, batch)]
    assert errors[0] > errors[-1] <= 0.1, errors
