"""Schedules against published values and diffusers, the forward process, and the conversions."""

import pytest
import torch

from ddpm.schedule import NoiseSchedule, cosine_schedule, linear_schedule, make_schedule

T = 1000
DIFFUSERS_NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
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


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_golden_values(kind: str) -> None:
    schedule = make_schedule(kind, T)
    for timestep, expected in GOLDEN[kind].items():
        assert schedule.alphas_cumprod[timestep].item() == pytest.approx(expected, rel=1e-7), timestep
        assert schedule.alpha_bar(timestep) == pytest.approx(expected, rel=1e-12), timestep


def test_derived_tables_keep_their_digits() -> None:
    """1 - ᾱ at t = 0 is 1e-4; computed from a float32 ᾱ it would be off by 1e-4 of itself."""
    schedule = linear_schedule()
    assert schedule.sqrt_one_minus_alphas_cumprod[0].item() == pytest.approx(1e-2, rel=1e-7)
    sigma = schedule.snr.rsqrt()
    assert sigma[0].item() == pytest.approx(0.01000050003, rel=1e-6)
    assert sigma[-1].item() == pytest.approx(157.4, rel=1e-3)
    alphas_cumprod = torch.tensor(schedule.alphas_cumprod_host, dtype=torch.float64)
    assert torch.equal(schedule.sqrt_alphas_cumprod, alphas_cumprod.sqrt().float())
    assert (int((schedule.snr >= 5).sum()), int((schedule.snr >= 1).sum())) == (130, 259)
    for table in (schedule.betas, schedule.alphas_cumprod, schedule.sqrt_alphas_cumprod, schedule.snr):
        assert (table.dtype, table.shape) == (torch.float32, (T,))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_betas_forward_process_and_velocity_equal_diffusers(kind: str) -> None:
    import diffusers

    for num_timesteps in (7, T, 4000):
        judge = diffusers.DDPMScheduler(num_train_timesteps=num_timesteps, beta_schedule=DIFFUSERS_NAMES[kind])
        schedule = make_schedule(kind, num_timesteps)
        assert schedule.num_timesteps == num_timesteps
        torch.testing.assert_close(schedule.betas, judge.betas, rtol=1e-6, atol=1e-7)
    schedule, judge = make_schedule(kind, T), diffusers.DDPMScheduler(beta_schedule=DIFFUSERS_NAMES[kind])
    x_start, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 300, 500, 800, 999])
    expected = judge.add_noise(x_start, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(x_start, noise, timesteps), expected, rtol=1e-5, atol=1e-5)
    expected = judge.get_velocity(x_start, noise, timesteps)
    torch.testing.assert_close(schedule.velocity(x_start, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_forward_process_of_half_precision_images_is_float32() -> None:
    schedule = linear_schedule()
    assert bool((schedule.alphas_cumprod.bfloat16()[:10] == 1).all()), "in bfloat16 these would train on zero noise"
    x_start = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    x_t = schedule.add_noise(x_start, torch.ones(2, 3, 4, 4), torch.tensor([0, 9]))
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
    zero = torch.zeros(1, 1, 1, 1)
    for make, message in (
        (lambda: linear_schedule(0), "at least one timestep"),
        (lambda: cosine_schedule(0), "at least one timestep"),
        (lambda: linear_schedule(10, beta_end=1.5), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas(torch.tensor([0.1, torch.nan], dtype=torch.float64)), "between 0 and 1"),
        (lambda: make_schedule("sigmoid", T), r"'sigmoid'.*linear or cosine"),
        (lambda: linear_schedule().x_start_from(zero, zero, torch.tensor([0]), "x0"), r"'x0'.*epsilon or v"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
