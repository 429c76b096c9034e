"""The averaged weights: their formula, their precision, and who takes them over."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from mpmath import mp, mpf
from torch import nn

from ddpm.ema import EMA, Exponential, PowerFunction, Stored, reconstruct


def test_decay_warms_up_with_batches_seen() -> None:
    assert Exponential(0.9999, warmup="none").decay_at(0, 128) == 0.9999
    for images_seen, expected in (
        (0, 1 / 10),
        (64, 1.5 / 10.5),
        (128, 2 / 11),
        (128 * 90, 0.91),
        (128 * 10**6, 0.9999),
    ):
        found = Exponential(0.9999, warmup="ratio").decay_at(images_seen, 128)
        assert found == pytest.approx(expected), images_seen


def test_other_warm_ups_are_published() -> None:
    for inv_gamma, power in ((1.0, 2 / 3), (7.0, 0.9)):
        theirs = EMAModel([], decay=0.995, use_ema_warmup=True, inv_gamma=inv_gamma, power=power)
        ours = Exponential(0.995, "power", inv_gamma, power)
        for n in (1, 2, 3, 10, 500, 10**6):
            assert ours.decay_at(24 * n, 24) == pytest.approx(theirs.get_decay(n), rel=1e-12), n
    # A half-life of 500,000 images, and of 5 % of the images before this batch until these are 10 million.
    for images_seen in (512, 1024, 51_200, 5_000_192, 10_000_384, 200_000_000):
        half_life = min(500_000, 0.05 * (images_seen - 512))
        expected = 0.5 ** (512 / half_life) if half_life else 0.0
        found = Exponential(0.5 ** (512 / 500_000), "edm").decay_at(images_seen, 512)
        assert found == pytest.approx(expected, rel=1e-12), images_seen


def test_power_functions_have_their_width() -> None:
    """The standard deviation of a density γ τ^γ, by its moments in 50 digits; and the two γ that the paper names."""
    assert [PowerFunction(std).gamma for std in (0.05, 0.1)] == pytest.approx([16.97, 6.94], abs=5e-3)
    with mp.workdps(50):
        for std in (0.001, 0.05, 0.13, 0.28):
            gamma = mpf(PowerFunction(std).gamma)
            mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
            assert float(mp.sqrt(square - mean**2)) == pytest.approx(std, rel=1e-7), std


def profiles(std: float, steps: int) -> np.ndarray:
    """Row n: what the weights after each step count in the average after step n, by the recurrence; [steps, steps]."""
    rows = np.zeros((steps, steps))
    for step in range(steps):
        decay = PowerFunction(std).decay_at(24 * (step + 1), 24)
        rows[step] = decay * rows[step - 1]
        rows[step, step] = 1 - decay
    return rows


def test_averages_add_up_to_others() -> None:
    """By the profiles themselves, step by step, where `reconstruct` integrates."""
    total, stds = 600, (0.05, 0.1)
    kept = {std: profiles(std, total) for std in stds}
    for std in (0.04, 0.05, 0.07, 0.15, 0.2):
        wanted = profiles(std, total)[-1]
        for every, bound in ((20, 0.03), (150, 0.3)):
            ends = [(std, step) for std in stds for step in range(every, total + 1, every)]
            terms = np.stack([kept[std][step - 1] for std, step in ends])
            factors, error = reconstruct([Stored(std, 24 * step) for std, step in ends], Stored(std, 24 * total))
            found = np.linalg.norm(factors @ terms - wanted) / np.linalg.norm(wanted)
            assert error == pytest.approx(found, rel=0.05, abs=1e-7), (std, every)
            assert error < bound, (std, every)
            # No factors that add up to one come nearer.
            assert factors.sum() == pytest.approx(1, abs=1e-12)
            heavy = np.vstack([terms.T, np.full(len(ends), 1e3)])
            best = np.linalg.lstsq(heavy, np.append(wanted, 1e3))[0]
            nearest = np.linalg.norm(best @ terms - wanted) / np.linalg.norm(wanted)
            assert found == pytest.approx(nearest, rel=0.02, abs=1e-6), (std, every)


def test_average_follows_the_recurrence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
    ema = EMA(model)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for decay in (0.1, 0.5, 0.9, 0.9999, 0.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, decay)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
        assert ema.shadow.keys() == expected.keys()
        for name, average in ema.shadow.items():
            torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)
            assert not average.requires_grad


def test_average_of_half_precision_is_float32() -> None:
    """In bfloat16 a step of 1e-4 of the way is lost: 1 + 1e-4 is 1."""
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = EMA(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(10):
        ema.update(model, 0.9999)
    assert ema.shadow["weight"].dtype == torch.float32
    assert torch.allclose(ema.shadow["weight"], torch.tensor(2 - 0.9999**10), atol=1e-6)
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_models_copy_the_averages() -> None:
    source = nn.Conv2d(3, 4, 3)
    target = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = EMA(source)
    ema.copy_to(target)
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)
    assert target.weight.requires_grad and target.weight.is_contiguous(memory_format=torch.channels_last)
    nn.init.zeros_(target.weight)
    assert torch.equal(ema.shadow["weight"], source.weight)


def test_update_never_waits_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    model = nn.Linear(3, 3, device="meta")
    ema = EMA(model)
    ema.update(model, 0.99)
    assert ema.shadow["weight"].device.type == "meta"
