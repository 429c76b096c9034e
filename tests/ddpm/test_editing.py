"""Editing against diffusers' RePaint, and normal distributions whose conditionals are known."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.solvers import Mixture, rms
from ddpm import editing
from ddpm.grids import make_grid
from ddpm.process import CLEAN, Point, RectifiedFlow, VarianceExploding, cosine_schedule, linear_schedule, points_of
from ddpm.samplers import Visit, ancestral, ddim
from tests.ddpm.gaussian import SHAPE, Gaussian, no_noise, normal


def test_repaint_equals_diffusers() -> None:
    """Published counts: T = 250, j = r = 10. Its step is DDIM's; jumps of one timestep need one noise in both."""
    import diffusers

    judge = diffusers.RePaintScheduler(eta=0.0, clip_sample=False)
    for steps, jump, resamplings in ((250, 10, 10), (100, 10, 3), (95, 10, 2), (40, 1, 5), (10, 10, 10), (25, 7, 4)):
        judge.set_timesteps(steps, jump, resamplings)
        indices = (judge.timesteps // (1000 // steps)).tolist()
        expected, before = [], steps
        for index in indices:
            expected += [index] if index < before else []
            before = index
        path = editing.resampled(steps, jump, resamplings)
        assert [steps - 1 - start for start, end in pairwise(path) if end > start] == expected
        assert (path[0], path[-1]) == (0, steps)

    schedule, image, hidden = linear_schedule(30), normal(1).clamp(-1, 1), torch.arange(4) > 1
    judge = diffusers.RePaintScheduler(num_train_timesteps=30, eta=0.0, clip_sample=False)
    judge.alphas_cumprod, judge.betas, judge.final_alpha_cumprod = (
        schedule.alphas_cumprod,
        schedule.betas,
        torch.ones(()).double(),
    )
    judge.set_timesteps(30, 1, 3)
    expected, before, draw = normal(0), 30, 1
    for index in judge.timesteps.tolist():
        noise = torch.Generator().manual_seed(draw)
        if index < before:
            epsilon = torch.tanh(expected + index / 30)
            expected = judge.step(epsilon, index, expected, image, (~hidden).double(), generator=noise).prev_sample
            draw += index > 0
        else:
            expected = judge.undo_step(expected, before, generator=noise)
            draw += 1
        before = index

    def denoise(x: Tensor, point: Point[float]) -> Tensor:
        return (x - point.sigma * torch.tanh(x + point.t / 30)) / point.alpha

    path = editing.resampled(30, 1, 3)
    points = make_grid(schedule, 30, "trailing")
    found = editing.inpaint(ddim, denoise, points, normal, image=image, unknown=hidden, path=path)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_inpainting_follows_the_known_part() -> None:
    """Pairs of pixels with correlation 0.9: resampling brings the mean and deviation of the second near the truth."""
    count, std, correlation = 4000, 0.4, 0.9
    shape, known = (count, 1, 1, 2), 0.5
    covariance = std**2 * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    image = torch.full(shape, known, dtype=torch.float64)
    hidden = torch.tensor([False, True])

    def denoise(x: Tensor, point: Point[float]) -> Tensor:
        gain = point.alpha * covariance @ (point.alpha**2 * covariance + point.sigma**2 * torch.eye(2)).inverse()
        return x @ gain.T

    for process in (cosine_schedule(), VarianceExploding(sigma_max=20), RectifiedFlow()):
        points, means = make_grid(process, 60, "trailing"), []
        for resamplings in (1, 10):
            path = editing.resampled(60, 5, resamplings)
            found = editing.inpaint(
                ancestral, denoise, points, partial(normal, shape=shape), image=image, unknown=hidden, path=path
            )
            assert torch.equal(found[..., 0], image[..., 0]), "what is known stays as it is"
            means.append(found[..., 1].mean().item())
        assert means[1] == pytest.approx(correlation * known, abs=0.03), (process, means)
        assert means[0] < means[1] - 0.02, (process, means)
        deviation = found[..., 1].std().item()
        assert deviation == pytest.approx(std * (1 - correlation**2) ** 0.5, rel=0.15), process


def test_from_image_follows_the_flow() -> None:
    data, image = Gaussian(), normal(1).clamp(-1, 1)
    for process in (linear_schedule(), VarianceExploding(sigma_max=20), RectifiedFlow()):
        whole = make_grid(process, 200, "trailing")
        assert [len(editing.last_points(whole, strength)) for strength in (0.001, 0.25, 0.5, 1)] == [2, 51, 101, 201]
        for strength in (0.25, 0.5, 0.9):
            start = whole[200 - round(200 * strength)]
            expected = data.flow(start.alpha * image + start.sigma * normal(0), start, CLEAN)
            found = editing.from_image(ddim, data.denoise, whole, normal, image=image, strength=strength)
            assert_close(found, expected, rtol=0.03, atol=0.02)


def test_inversion_finds_the_noise() -> None:
    """And comes back to the image."""
    data, image, began = Gaussian(), 0.3 + 0.4 * normal(1), list[Tensor]()

    def remembering(denoise, x, points, noise_at) -> Tensor:
        began.append(x)
        return ddim(denoise, x, points, noise_at)

    for process in (linear_schedule(), VarianceExploding(sigma_max=20), RectifiedFlow()):
        points = make_grid(process, 400, "trailing")
        for strength in (0.5, 1.0):
            start, *_ = editing.last_points(points, strength)
            found = editing.inverted(remembering, data.denoise, points, normal, image=image, strength=strength)
            assert_close(began.pop(), data.flow(image, CLEAN, start), rtol=0.03, atol=0.01, msg=f"{process} {strength}")
            assert_close(found, image, rtol=0.03, atol=0.01)


@pytest.mark.parametrize(("make", "table"), [(linear_schedule, "linear"), (cosine_schedule, "squaredcos_cap_v2")])
def test_inversion_is_closer_than_diffusers(make, table) -> None:
    """By as many evaluations, and twice the steps leave a quarter of the error instead of half of it."""
    import diffusers

    data, process = Mixture(), make()
    image = data.means[torch.arange(1200) % 3].view(2, 3, 10, 20) + 0.2 * normal(1, (2, 3, 10, 20))
    config = {"beta_schedule": table, "clip_sample": False, "timestep_spacing": "trailing"}
    judges = diffusers.DDIMInverseScheduler(**config), diffusers.DDIMScheduler(**config)
    ours, theirs = [], []
    for steps in (20, 50, 100):
        points, x = make_grid(process, steps, "trailing"), image
        ours.append(rms(editing.inverted(ddim, data.denoise, points, no_noise, image=image, strength=1.0) - image))
        for judge in judges:
            judge.set_timesteps(steps)
            for t in judge.timesteps:
                (point,) = points_of(process.numbered(t.view(1)))
                x = judge.step(Visit(point, x, data.denoise(x, point)).epsilon, t, x).prev_sample
        theirs.append(rms(x - image))
    assert ours[0] < 0.6 * theirs[0] and ours[1] < 0.25 * theirs[1] and ours[2] < 0.1 * theirs[2], (ours, theirs)
    assert ours[2] < 0.3 * ours[1], ours


def test_inversion_leaves_a_learnt_variance_to_the_sampler() -> None:
    """The second half of twice the channels belongs to ancestral steps alone."""
    data, image, began = Gaussian(), 0.3 + 0.4 * normal(1), list[Tensor]()

    def with_share(x: Tensor, point: Point[float]) -> Tensor:
        return torch.cat([data.denoise(x, point), torch.full_like(x, 0.5)], dim=1)

    for denoise, variance in ((data.denoise, "fixed_small"), (with_share, "learned_range")):

        def remembering(denoise, x, points, noise_at, variance=variance) -> Tensor:
            began.append(x)
            return ancestral(denoise, x, points, noise_at, variance)

        points = make_grid(linear_schedule(), 20, "trailing")
        drawn = editing.inverted(remembering, denoise, points, normal, image=image, strength=0.5)
        assert drawn.shape == image.shape
    assert_close(*began)


def test_between_two_noises_lies_noise() -> None:
    shape = (2000, 3, 4, 4)
    first, second, weight = normal(0, shape), normal(1, shape), torch.full((2000,), 0.3, dtype=torch.float64)
    assert editing.slerp(first, second, weight).std().item() == pytest.approx(1, abs=0.01)
    # On the sphere it is at three tenths of the angle.
    first, second = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (first, second))
    unit = editing.slerp(first, second, weight)
    assert_close(unit.flatten(1).norm(dim=1), torch.ones(2000).double())
    angles = [(first * other).flatten(1).sum(dim=1).acos() for other in (unit, second)]
    assert_close(angles[0], 0.3 * angles[1])
    assert_close(editing.slerp(first, first, weight), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", [ddim, partial(ddim, eta=1.0), ancestral])
def test_interpolation_ends_with_both_images(sampler) -> None:
    points = make_grid(linear_schedule(), 20, "trailing")

    def denoise(x: Tensor, point: Point[float]) -> Tensor:
        return torch.tanh(x)

    def other(draw: int) -> Tensor:
        return normal(1000 + draw)

    weight = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = editing.interpolate(sampler, denoise, points, normal, other=other, weight=weight)
    assert_close(found[0], sampler(denoise, normal(0), points, normal)[0])
    assert_close(found[1], sampler(denoise, other(0), points, other)[1])
    near = editing.interpolate(sampler, denoise, points, normal, other=other, weight=weight * 0.999 + 5e-4)
    assert (near - found).abs().max() < 0.05


def test_editing_never_waits_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    x = torch.empty(SHAPE, device="meta")
    points = points_of(linear_schedule().numbered(torch.tensor([900, 500, 100])))
    for walk in (
        partial(editing.inpaint, image=x, unknown=x > 0, path=editing.resampled(2, 1, 2)),
        partial(editing.from_image, image=x, strength=0.5),
        partial(editing.inverted, image=x, strength=0.5),
        partial(editing.interpolate, other=lambda draw: x, weight=x[:, 0, 0, 0]),
    ):
        assert walk(ddim, lambda x, point: x, points, lambda draw: x).shape == SHAPE
