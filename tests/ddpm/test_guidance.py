"""Guidance against diffusers' guiders, and the evaluations that it needs."""

from math import inf

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm.model import Guidance, guided, make_denoiser
from ddpm.objective import Condition
from ddpm.process import Point, Prediction, Process, RectifiedFlow, linear_schedule, points_of

SHAPE = (5, 3, 4, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0])
NULL = 3


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def point_of(process: Process, number: int) -> Point[float]:
    return points_of(process.numbered(torch.tensor([number])))[0]


def test_guidance_and_its_rescaling_equal_diffusers() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    better, worse, point = normal(0), normal(1), point_of(linear_schedule(), 500)
    for scale, rescale in ((0.0, 0.0), (1.5, 0.0), (7.5, 0.0), (7.5, 0.7), (3.0, 1.0)):
        judge = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
        judge.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(900))
        denoise = guided(lambda x, point: x, lambda x, point: (better, worse), Guidance(scale, rescale=rescale))
        assert_close(denoise(normal(2), point), judge.forward(better, worse).pred, msg=f"{scale} {rescale}")


def test_where_and_from_what_it_guides() -> None:
    process, asked = linear_schedule(), list[str]()

    def network_of(name: str, value: float):
        def network(x: Tensor, t: Tensor, told: Condition) -> Tensor:
            asked.append(f"{name}{len(x)}")
            null = (told.labels == NULL).float().view(-1, 1, 1, 1)
            return torch.cat([torch.zeros_like(x) + value - 0.1 * null, torch.zeros_like(x) + 2 * value - 1], dim=1)

        return network

    def denoiser(guidance: Guidance, **how):
        network, x_0 = network_of("better", 0.5), Prediction("x0")
        return make_denoiser(network, process, x_0, Condition(LABELS), guidance=guidance, null_class=NULL, **how)

    points = [point_of(process, number) for number in (900, 500, 100)]
    ratios = [point.sigma / point.alpha for point in points]
    worse = network_of("worse", 0.3)
    for guidance, how, expected, who in (
        (Guidance(2.0), {}, [0.6, 0.6, 0.6], ["better10"] * 3),
        (Guidance(2.0, (ratios[2], ratios[1])), {}, [0.5, 0.6, 0.5], ["better5", "better10", "better5"]),
        (Guidance(2.0, (0.0, inf)), {"worse": worse}, [0.7] * 3, ["better5", "worse5"] * 3),
        (Guidance(9.0), {"worse": worse}, [1.0] * 3, ["better5", "worse5"] * 3),
        (Guidance(1.0, (0.0, 1.0)), {}, [0.5] * 3, ["better5"] * 3),
        (Guidance(0.0), {}, [0.4] * 3, ["better10"] * 3),
    ):
        asked.clear()
        denoise = denoiser(guidance, **how)
        found = [denoise(normal(0), point) for point in points]
        for image, value in zip(found, expected, strict=True):
            assert_close(image, torch.full(SHAPE, value), msg=f"{guidance} {how}: {image[0, 0, 0, 0]} {value}")
        assert asked == who, guidance
        # The share of β, (1 + v)/2, is not guided.
        with_share = denoiser(guidance, with_share=True, **how)(normal(0), points[1])
        assert_close(with_share[:, :3], found[1])
        assert_close(with_share[:, 3:], torch.full(SHAPE, 0.5))
    # Where nothing is left of the image, as at the end of a rectified flow, σ/α is infinite.
    flow_end = point_of(RectifiedFlow(), 999)
    answers = [
        guided(lambda x, point: x, lambda x, point: (x, 0 * x), Guidance(2.0, (0.5, high)))(normal(0), flow_end)
        for high in (inf, 80.0)
    ]
    assert_close(answers[0], 2 * normal(0))
    assert_close(answers[1], normal(0))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_self_conditioning_sees_the_estimate_before(scale: float, clip: bool) -> None:
    """Each evaluation sees the newest estimate from more noise: zeros where a trajectory or RePaint begins again."""
    process, seen = linear_schedule(), list[Tensor]()

    def network(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        seen.append(told.x_start)
        return x * (0.5 + 0.2 * told.labels.view(-1, 1, 1, 1))

    denoise = make_denoiser(
        network,
        process,
        Prediction("x0"),
        Condition(LABELS, torch.zeros(SHAPE)),
        clip=clip,
        guidance=Guidance(scale),
        null_class=NULL,
    )
    # A step of Heun's method ends where the next one begins; then a jump, a trajectory, and one of a single step.
    visits = [(500, None), (400, 0), (400, 0), (300, 2), (450, None), (350, 4), (500, None), (500, None)]
    estimates = [denoise(3 * normal(seed), point_of(process, number)) for seed, (number, _) in enumerate(visits)]
    assert (max(estimate.abs().max() for estimate in estimates) > 1) != clip
    times = 1 if scale == 1 else 2
    for given, (_, before) in zip(seen, visits, strict=True):
        told = torch.zeros(SHAPE) if before is None else estimates[before]
        assert_close(given, told.repeat_interleave(times, dim=0))
