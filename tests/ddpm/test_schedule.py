"""Schedules against published values and diffusers, the forward process, and the conversions."""

import diffusers
import pytest
import torch

from ddpm.schedule import NoiseSchedule, cosine_schedule, linear_schedule, make_schedule

T = 1000


# Computed with 40 decimal digits.
@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (0, 0.9999),
        (9, 0.99810520478583461889),
        (38, 0.98150702538185392691),
        (237, 0.55624462176401216186),
        (499, 0.07858724288177823734),
        (962, 8.4079528429874446911e-5),
        (999, 4.0358297653756833148e-5),
    ],
)
def test_linear_golden_values(timestep: int, expected: float) -> None:
    schedule = linear_schedule()
    assert schedule.alphas_cumprod[timestep].item() == pytest.approx(expected, rel=1e-7)
    assert schedule.alpha_bar(timestep) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("timestep", "expected"), [(0, 0.999958715775178), (499, 0.49384359044063775), (999, 2.4287669070348567e-9)]
)
def test_cosine_golden_values(timestep: int, expected: float) -> None:
    schedule = cosine_schedule()
    assert schedule.alphas_cumprod[timestep].item() == pytest.approx(expected, rel=1e-7)
    assert schedule.alpha_bar(timestep) == pytest.approx(expected, rel=1e-12)


def test_derived_tables_keep_their_digits() -> None:
    """1 - ᾱ at t = 0 is 1e-4; computed from a float32 ᾱ it would be off by 1e-4 of itself."""
    schedule = linear_schedule()
    assert schedule.sqrt_one_minus_alphas_cumprod[0].item() == pytest.approx(1e-2, rel=1e-7)
    sigma = schedule.snr.rsqrt()
    assert sigma[0].item() == pytest.approx(0.01000050003, rel=1e-6)
    assert sigma[-1].item() == pytest.approx(157.4, rel=1e-3)
    alphas_cumprod = torch.tensor(schedule.alphas_cumprod_host, dtype=torch.float64)
    assert torch.equal(schedule.sqrt_alphas_cumprod, alphas_cumprod.sqrt().float())
    assert int((schedule.snr >= 5).sum()) == 130
    assert int((schedule.snr >= 1).sum()) == 259
    for table in (schedule.betas, schedule.alphas_cumprod, schedule.sqrt_alphas_cumprod, schedule.snr):
        assert table.dtype == torch.float32
        assert table.shape == (T,)


def test_half_precision_would_lose_the_first_timesteps() -> None:
    rounded = linear_schedule().alphas_cumprod.bfloat16().float()
    assert bool((rounded[:10] == 1).all())
    assert rounded[10] < 1


@pytest.mark.parametrize(("kind", "diffusers_name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("num_timesteps", [7, 1000, 4000])
def test_betas_equal_diffusers(kind: str, diffusers_name: str, num_timesteps: int) -> None:
    judge = diffusers.DDPMScheduler(num_train_timesteps=num_timesteps, beta_schedule=diffusers_name)
    schedule = make_schedule(kind, num_timesteps)
    assert schedule.num_timesteps == num_timesteps
    torch.testing.assert_close(schedule.betas, judge.betas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_forward_process_and_velocity_equal_diffusers(kind: str) -> None:
    schedule = make_schedule(kind, T)
    judge = diffusers.DDPMScheduler(beta_schedule="linear" if kind == "linear" else "squaredcos_cap_v2")
    x_start, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 300, 500, 800, 999])
    expected = judge.add_noise(x_start, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(x_start, noise, timesteps), expected, rtol=1e-5, atol=1e-5)
    expected = judge.get_velocity(x_start, noise, timesteps)
    torch.testing.assert_close(schedule.velocity(x_start, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_forward_process_has_the_moments_of_q() -> None:
    schedule = linear_schedule()
    x_start = torch.full((4, 1, 300, 300), 0.7)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 38, 237, 999])
    x_t = schedule.add_noise(x_start, noise, timesteps)
    mean = torch.tensor([0.7 * schedule.alpha_bar(t) ** 0.5 for t in timesteps.tolist()])
    std = torch.tensor([(1 - schedule.alpha_bar(t)) ** 0.5 for t in timesteps.tolist()])
    assert torch.allclose(x_t.mean(dim=(1, 2, 3)), mean, rtol=0, atol=0.01)
    assert torch.allclose(x_t.std(dim=(1, 2, 3)), std, rtol=0.01)


def test_forward_process_of_half_precision_images_is_float32() -> None:
    schedule = linear_schedule()
    x_start = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    noise = torch.ones(2, 3, 4, 4)
    x_t = schedule.add_noise(x_start, noise, torch.tensor([0, 9]))
    assert x_t.dtype == torch.float32
    # The noise of the first timesteps survives: 0.01 and √(1-0.998105).
    residual = x_t - schedule.sqrt_alphas_cumprod[[0, 9]].view(-1, 1, 1, 1) * x_start.float()
    assert torch.allclose(residual[0], torch.tensor(0.01), atol=1e-6)
    assert torch.allclose(residual[1], torch.tensor(0.0435292), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_conversions_invert_the_forward_process(kind: str, prediction: str) -> None:
    schedule = make_schedule(kind, T)
    x_start, noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([0, 250, 500, 900])
    x_t = schedule.add_noise(x_start, noise, timesteps)
    output = noise if prediction == "epsilon" else schedule.velocity(x_start, noise, timesteps)
    recovered = schedule.x_start_from(output, x_t, timesteps, prediction)
    torch.testing.assert_close(recovered, x_start, rtol=0, atol=2e-5)
    torch.testing.assert_close(schedule.noise_from(x_start, x_t, timesteps), noise, rtol=0, atol=2e-4)


def test_v_prediction_is_exact_where_no_signal_is_left() -> None:
    """The reason to choose it: at ᾱ = 2e-9 an error of ε is multiplied by 20,000, an error of v by one."""
    schedule = cosine_schedule()
    x_start, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    last = torch.tensor([T - 1])
    x_t, v = schedule.add_noise(x_start, noise, last), schedule.velocity(x_start, noise, last)
    error = schedule.x_start_from(v + 0.01, x_t, last, "v") - x_start
    assert torch.allclose(error, torch.tensor(-0.01), atol=1e-5)
    error = schedule.x_start_from(noise + 0.01, x_t, last, "epsilon") - x_start
    assert torch.allclose(error, torch.tensor(-202.9), rtol=0.01)


def test_device_and_the_clean_end() -> None:
    schedule = linear_schedule(10).to("meta")
    assert schedule.snr.device.type == schedule.betas.device.type == "meta"
    assert schedule.num_timesteps == 10
    assert schedule.alpha_bar(0) == pytest.approx(0.9999, rel=1e-12)
    assert schedule.alpha_bar(-1) == 1.0


def test_impossible_schedules_are_refused() -> None:
    for make in (linear_schedule, cosine_schedule):
        with pytest.raises(ValueError, match="at least one timestep"):
            make(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        linear_schedule(10, beta_end=1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoiseSchedule.from_betas(torch.tensor([0.1, float("nan")], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'sigmoid'.*linear or cosine"):
        make_schedule("sigmoid", T)
    with pytest.raises(ValueError, match=r"'x0'.*epsilon or v"):
        linear_schedule().x_start_from(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0]), "x0")
