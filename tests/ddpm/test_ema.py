"""The averaged weights: their formula, their precision, and who takes them over."""

import pytest
import torch
from torch import nn

from ddpm.ema import EMA, AverageSettings


def test_decay_warms_up_with_batches_seen() -> None:
    assert AverageSettings(0.9999, warmup=False).decay_at(0, 128) == 0.9999
    for images_seen, expected in (
        (0, 1 / 10),
        (64, 1.5 / 10.5),
        (128, 2 / 11),
        (128 * 90, 0.91),
        (128 * 10**6, 0.9999),
    ):
        assert AverageSettings(0.9999, warmup=True).decay_at(images_seen, 128) == pytest.approx(expected), images_seen


def test_average_starts_as_a_copy_and_follows_the_recurrence() -> None:
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


def test_average_of_a_half_precision_model_is_float32() -> None:
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


def test_a_model_takes_the_averages_over_and_leaves_them_alone() -> None:
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
