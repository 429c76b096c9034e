"""Processes against published values, diffusers and lucidrains' formulas; points against each other."""

import math

import pytest
import torch
from torch import Tensor

from ddpm.catalogue import Diffusion
from ddpm.process import (
    CLEAN,
    Point,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    cosine_schedule,
    linear_schedule,
    make_process,
    points_of,
)

T = 1000
# ᾱ_t computed with 40 decimal digits.
GOLDEN = {
    "linear": {
        0: 0.9999,
        9: 0.99810520478583461889,
        38: 0.98150702538185392691,
        237: 0.55624462176401216186,
        499: 0.07858724288177823734,
        962: 8.4079528429874446911e-5,
        999: 4.0358297653756833148e-5,
    },
    "cosine": {0: 0.999958715775178, 499: 0.49384359044063775, 999: 2.4287669070348567e-9},
}
ALL = ("linear", "scaled_linear", "cosine", "sigmoid", "edm", "flow")


def numbers(*chosen: int) -> Tensor:
    return torch.tensor(chosen)


def test_golden_values() -> None:
    for name, expected in GOLDEN.items():
        point = make_process(Diffusion(name, T)).numbered(torch.tensor(list(expected)))
        assert point.t.tolist() == list(expected)
        for found, alpha_bar in zip(point.alpha.square().tolist(), expected.values(), strict=True):
            assert found == pytest.approx(alpha_bar, rel=1e-12), name
    snr = (lambda point: (point.alpha / point.sigma) ** 2)(linear_schedule().numbered(torch.arange(T)))
    assert (int((snr >= 5).sum()), int((snr >= 1).sum())) == (130, 259)


def test_noise_keeps_its_digits() -> None:
    """1 - ᾱ at t = 0 is 1e-4; computed from a float32 ᾱ it would be off by 1e-4 of itself."""
    first, last = points_of(linear_schedule().numbered(numbers(0, T - 1)))
    assert first.sigma == pytest.approx(1e-2, rel=1e-12)
    assert first.sigma / first.alpha == pytest.approx(0.0100005000375, rel=1e-10)
    assert last.sigma / last.alpha == pytest.approx(157.4, rel=1e-3)
    rescaled = linear_schedule().with_zero_terminal_snr()
    assert points_of(rescaled.numbered(numbers(T - 1))) == [Point(T - 1, 0.0, 1.0)]
    assert rescaled.alphas_cumprod[0] == pytest.approx(0.9999, rel=1e-12)


def test_every_process_finds_its_own_points() -> None:
    for name in ALL:
        process = make_process(Diffusion(name, T))
        point = process.numbered(torch.arange(T))
        ratio = point.sigma / point.alpha
        assert all(part.dtype == torch.float64 for part in point)
        assert (ratio.diff() > 0).all() and (point.t.diff() > 0).all(), name
        # That of pure noise cannot be given as a number.
        some = slice(0, T - (name == "flow"), 37)
        for found, known in zip(process.with_ratio(ratio[some]), point, strict=True):
            torch.testing.assert_close(found, known[some], rtol=1e-9, atol=1e-9, msg=name)
        between = process.with_ratio(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        torch.testing.assert_close(between.sigma / between.alpha, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        u = torch.tensor([1e-9, 0.25, 0.999999], dtype=torch.float64)
        assert (process.uniform(u).t.diff() > 0).all(), name
    assert CLEAN.alpha == 1 and CLEAN.sigma == 0


def test_t_lies_between_timesteps() -> None:
    import diffusers

    schedule, judge = linear_schedule(), diffusers.EulerDiscreteScheduler()
    sigmas = ((1 - judge.alphas_cumprod) / judge.alphas_cumprod).double().sqrt()
    ratio = torch.tensor([0.02, 0.3, 1.7, 40.0], dtype=torch.float64)
    expected = judge._sigma_to_t(ratio.numpy(), sigmas.log().numpy())
    assert schedule.with_ratio(ratio).t.tolist() == pytest.approx(expected.tolist(), abs=0.02)
    beyond = schedule.with_ratio(torch.tensor([1e-6, 1e6], dtype=torch.float64))
    assert beyond.t.tolist() == [0, T - 1]


def test_edm_and_flow_are_published() -> None:
    edm = VarianceExploding(T, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    first, last = points_of(edm.numbered(numbers(0, T - 1)))
    assert (first.sigma, last.sigma) == (pytest.approx(0.002), pytest.approx(80))
    assert last == Point(pytest.approx(math.log(80) / 4), 1.0, pytest.approx(80))
    assert edm.input_scale(1.2) == pytest.approx(1 / 1.3)
    assert edm.uniform(torch.tensor([0.5], dtype=torch.float64)).sigma.item() == pytest.approx(0.4)
    flow = RectifiedFlow(T)
    assert points_of(flow.numbered(numbers(249, T - 1))) == [Point(250, 0.75, 0.25), Point(1000, 0, 1)]
    for process in (flow, linear_schedule()):
        assert process.input_scale(0.3) == 1


def test_impossible_processes_are_refused() -> None:
    for make, message in (
        (lambda: linear_schedule(0), "at least one timestep"),
        (lambda: cosine_schedule(0), "at least one timestep"),
        (lambda: linear_schedule(10, beta_end=1.5), "between 0 and 1"),
        (lambda: VariancePreserving.from_betas(torch.tensor([0.1, torch.nan])), "between 0 and 1"),
        (lambda: VariancePreserving.from_betas(torch.tensor([1.0, 0.1])), "between 0 and 1"),
        (lambda: make_process(Diffusion("laplace")), r"'laplace'.*linear.*flow"),
        (lambda: make_process(Diffusion("edm", zero_terminal_snr=True)), "'edm' does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
