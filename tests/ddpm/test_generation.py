"""From a network to images: denoisers with guidance and self-conditioning, editing, and what never waits.

Judges are diffusers' guiders, its RePaint and inversion, and normal distributions whose conditionals are known.
"""

from functools import partial
from itertools import pairwise
from math import inf

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.solvers import Mixture, rms
from ddpm import editing
from ddpm.grids import make_grid
from ddpm.model import Guidance, guided, make_denoiser
from ddpm.objective import Condition
from ddpm.process import CLEAN, Point, Prediction, RectifiedFlow, VarianceExploding, cosine_schedule, linear_schedule
from ddpm.samplers import Visit, ancestral, ddim
from tests.ddpm.known import SHAPE, Gaussian, no_noise, normal, of_classes, point_of

LINEAR = linear_schedule()
PROCESSES = (LINEAR, VarianceExploding(sigma_max=20), RectifiedFlow())
CLASSES, NULL, X = of_classes(1, 0), 3, normal(0, dtype=torch.float32)


def test_network_gets_point_and_condition() -> None:
    layer, steps = torch.nn.Conv2d(3, 3, 1).bfloat16(), []
    edm, x_t = VarianceExploding(), normal(0).float()
    point = point_of(edm, 700)

    def network(x: Tensor, t: Tensor, given: Condition) -> Tensor:
        assert (t.tolist(), t.dtype) == ([pytest.approx(point.t)] * 2, torch.float32)
        assert given is CLASSES
        assert_close(x, x_t / (point.sigma**2 + 0.25) ** 0.5)
        return layer(x.bfloat16())

    def keep(*step: object) -> None:
        steps.append(step)

    estimate = make_denoiser(network, edm, Prediction("edm"), CLASSES, callback=keep)(x_t, point)
    assert (estimate.dtype, estimate.requires_grad) == (torch.float32, False)
    assert estimate.abs().max() <= 1, "clipped unless it is said otherwise"
    ((at, given_x, x_start),) = steps
    assert at is point and given_x is x_t and x_start is estimate


def test_guidance_and_its_rescaling_equal_diffusers() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    better, worse, point = normal(0), normal(1), point_of(LINEAR, 500)
    for scale, rescale in ((0.0, 0.0), (1.5, 0.0), (7.5, 0.0), (7.5, 0.7), (3.0, 1.0)):
        judge = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
        judge.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(900))
        denoise = guided(lambda x, point: x, lambda x, point: (better, worse), Guidance(scale, rescale=rescale))
        assert_close(denoise(normal(2), point), judge.forward(better, worse).pred, msg=f"{scale} {rescale}")


def test_where_and_from_what_it_guides() -> None:
    asked = list[str]()

    def network_of(name: str, value: float):
        def network(x: Tensor, t: Tensor, told: Condition) -> Tensor:
            asked.append(f"{name}{len(x)}")
            null = (told.labels == NULL).float().view(-1, 1, 1, 1)
            return torch.cat([torch.zeros_like(x) + value - 0.1 * null, torch.zeros_like(x) + 2 * value - 1], dim=1)

        return network

    def denoiser(guidance: Guidance, **how):
        network, x_0 = network_of("better", 0.5), Prediction("x0")
        return make_denoiser(network, LINEAR, x_0, CLASSES, guidance=guidance, null_class=NULL, **how)

    points = [point_of(LINEAR, number) for number in (900, 500, 100)]
    ratios = [point.sigma / point.alpha for point in points]
    worse = network_of("worse", 0.3)
    for guidance, how, expected, who in (
        (Guidance(2.0), {}, [0.6, 0.6, 0.6], ["better4"] * 3),
        (Guidance(2.0, (ratios[2], ratios[1])), {}, [0.5, 0.6, 0.5], ["better2", "better4", "better2"]),
        (Guidance(2.0, (0.0, inf)), {"worse": worse}, [0.7] * 3, ["better2", "worse2"] * 3),
        (Guidance(9.0), {"worse": worse}, [1.0] * 3, ["better2", "worse2"] * 3),
        (Guidance(1.0, (0.0, 1.0)), {}, [0.5] * 3, ["better2"] * 3),
        (Guidance(0.0), {}, [0.4] * 3, ["better4"] * 3),
    ):
        asked.clear()
        denoise = denoiser(guidance, **how)
        found = [denoise(X, point) for point in points]
        for image, value in zip(found, expected, strict=True):
            assert_close(image, torch.full(SHAPE, value), msg=f"{guidance} {how}: {image[0, 0, 0, 0]} {value}")
        assert asked == who, guidance
        # The share of β, (1 + v)/2, is not guided.
        with_share = denoiser(guidance, with_share=True, **how)(X, points[1])
        assert_close(with_share[:, :3], found[1])
        assert_close(with_share[:, 3:], torch.full(SHAPE, 0.5))
    # Where nothing is left of the image, as at the end of a rectified flow, σ/α is infinite.
    flow_end = point_of(RectifiedFlow(), 999)
    only_x = Guidance(2.0, (0.5, inf)), Guidance(2.0, (0.5, 80.0))
    answers = [guided(lambda x, point: x, lambda x, point: (x, 0 * x), how)(X, flow_end) for how in only_x]
    assert_close(answers[0], 2 * X)
    assert_close(answers[1], X)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_self_conditioning_sees_the_estimate_before(scale: float, clip: bool) -> None:
    """Each evaluation sees the newest estimate from more noise: zeros where a trajectory or RePaint begins again."""
    seen = list[Tensor]()

    def network(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        seen.append(told.x_start)
        return x * (0.5 + 0.2 * told.labels.view(-1, 1, 1, 1))

    told = CLASSES._replace(x_start=torch.zeros(SHAPE))
    how = {"clip": clip, "guidance": Guidance(scale), "null_class": NULL}
    denoise = make_denoiser(network, LINEAR, Prediction("x0"), told, **how)
    # A step of Heun's method ends where the next one begins; then a jump, a trajectory, and one of a single step.
    visits = [(500, None), (400, 0), (400, 0), (300, 2), (450, None), (350, 4), (500, None), (500, None)]
    xs = [3 * normal(seed, dtype=torch.float32) for seed in range(len(visits))]
    estimates = [denoise(x, point_of(LINEAR, number)) for x, (number, _) in zip(xs, visits, strict=True)]
    assert (max(estimate.abs().max() for estimate in estimates) > 1) != clip
    times = 1 if scale == 1 else 2
    for given, (_, before) in zip(seen, visits, strict=True):
        told = torch.zeros(SHAPE) if before is None else estimates[before]
        assert_close(given, told.repeat_interleave(times, dim=0))


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
    judge.alphas_cumprod, judge.betas = schedule.alphas_cumprod, schedule.betas
    judge.final_alpha_cumprod = torch.ones(()).double()
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


def test_images_follow_the_flow() -> None:
    """From an image with noise, from an image to its noise, and back; inversion ignores a learnt variance."""
    data, image = Gaussian(), 0.3 + 0.4 * normal(1)

    def begun(denoise, x: Tensor, points, noise_at) -> Tensor:
        return x

    def with_share(x: Tensor, point: Point[float]) -> Tensor:
        return torch.cat([data.denoise(x, point), torch.full_like(x, 0.5)], dim=1)

    for process in PROCESSES:
        points = make_grid(process, 400, "trailing")
        assert [len(editing.last_points(points, strength)) for strength in (0.001, 0.25, 0.5)] == [2, 101, 201]
        for strength in (0.5, 0.9, 1.0):
            start, *_ = editing.last_points(points, strength)
            how = {"image": image, "strength": strength}
            noised = start.alpha * image + start.sigma * normal(0)
            found = editing.from_image(ddim, data.denoise, points, normal, **how)
            assert_close(found, data.flow(noised, start, CLEAN), rtol=0.03, atol=0.02)
            noise, same = (
                editing.inverted(begun, denoise, points, no_noise, **how) for denoise in (data.denoise, with_share)
            )
            assert_close(noise, data.flow(image, CLEAN, start), rtol=0.03, atol=0.01, msg=f"{process} {strength}")
            assert_close(same, noise)
            assert_close(editing.inverted(ddim, data.denoise, points, no_noise, **how), image, rtol=0.03, atol=0.01)


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
                x = judge.step(
                    Visit(point := point_of(process, int(t)), x, data.denoise(x, point)).epsilon, t, x
                ).prev_sample
        theirs.append(rms(x - image))
    assert ours[0] < 0.6 * theirs[0] and ours[1] < 0.25 * theirs[1] and ours[2] < 0.1 * theirs[2], (ours, theirs)
    assert ours[2] < 0.3 * ours[1], ours


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


def test_sampling_never_waits_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    x, points = torch.empty(SHAPE, device="meta"), [*(point_of(LINEAR, number) for number in (900, 500, 3)), CLEAN]

    def denoiser(with_share: bool, **how):
        condition = Condition(torch.empty(2, dtype=torch.int64, device="meta"), x)
        network, v = (lambda x, t, told: torch.cat([x] * (1 + with_share), dim=1)), Prediction("v")
        return make_denoiser(network, LINEAR, v, condition, null_class=NULL, with_share=with_share, **how)

    denoise, guidance, start = denoiser(False), Guidance(2.0, rescale=0.5), lambda draw: x
    for found in (
        ddim(denoise, x, points, start, 1.0),
        ancestral(denoise, x, points, start, "fixed_large"),
        ancestral(denoiser(True, guidance=guidance), x, points, start, "learned_range"),
        editing.inpaint(ddim, denoise, points, start, image=x, unknown=x > 0, path=editing.resampled(3, 1, 2)),
        editing.from_image(ddim, denoise, points, start, image=x, strength=0.5),
        editing.inverted(ddim, denoise, points, start, image=x, strength=0.5),
        editing.interpolate(ddim, denoise, points, start, other=start, weight=x[:, 0, 0, 0]),
    ):
        assert found.shape == SHAPE
