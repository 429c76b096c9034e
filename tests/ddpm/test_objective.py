"""The loss against its definition, and the weights against what they mean for x_0."""

import pytest
import torch
from torch import Tensor, nn

from ddpm.objective import Objective
from ddpm.schedule import linear_schedule, make_schedule

SCHEDULE = linear_schedule()
TIMESTEPS = torch.tensor([0, 129, 130, 259, 700, 999])
X_START, NOISE, OUTPUT = torch.randn(3, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_is_the_mean_squared_error_of_what_the_network_makes_of_x_t(prediction: str) -> None:
    labels = torch.tensor([5, 4, 3, 2, 1, 0])
    target = NOISE if prediction == "epsilon" else SCHEDULE.velocity(X_START, NOISE, TIMESTEPS)
    for output in (OUTPUT, target):

        def network(x_t: Tensor, timesteps: Tensor, given: Tensor | None, output: Tensor = output) -> Tensor:
            assert torch.equal(x_t, SCHEDULE.add_noise(X_START, NOISE, TIMESTEPS))
            assert timesteps is TIMESTEPS and given is labels
            return output

        losses = Objective(SCHEDULE, prediction).losses(network, X_START, TIMESTEPS, NOISE, labels)
        expected = [nn.functional.mse_loss(output[i], target[i]).item() for i in range(6)]
        assert losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_min_snr_loss_is_the_same_for_both_predictions(kind: str) -> None:
    """Both weights are min(SNR, γ) times the squared error of x_0."""
    schedule, gamma = make_schedule(kind, 1000), 5.0
    timesteps = torch.tensor([20, 129, 130, 259, 600, 800])
    x_estimate = X_START + 0.1 * OUTPUT
    x_t = schedule.add_noise(X_START, NOISE, timesteps)
    implied_noise = schedule.noise_from(x_estimate, x_t, timesteps)
    implied = {"epsilon": implied_noise, "v": schedule.velocity(x_estimate, implied_noise, timesteps)}

    snr = torch.tensor([schedule.alpha_bar(t) / (1 - schedule.alpha_bar(t)) for t in timesteps.tolist()])
    expected = snr.clamp(max=gamma) * (x_estimate - X_START).square().mean(dim=(1, 2, 3))
    for prediction, output in implied.items():
        objective = Objective(schedule, prediction, gamma)
        losses = objective.losses(lambda x, t, y, output=output: output, X_START, timesteps, NOISE)
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)


def test_half_precision_network_gives_float32_losses_and_gradients() -> None:
    network = nn.Conv2d(3, 3, 1)

    def autocast(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        assert x.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x)
        assert output.dtype == torch.bfloat16
        return output

    losses = Objective(SCHEDULE, "v", 5.0).losses(autocast, X_START, TIMESTEPS, NOISE)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert network.weight.grad.dtype == torch.float32
    assert network.weight.grad.abs().min() > 0


def test_losses_never_wait_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    objective = Objective(SCHEDULE.to("meta"), "v", 5.0)
    images, timesteps = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    assert objective.losses(lambda x, t, y: x, images, timesteps, images).shape == (6,)


def test_an_snr_that_underflows_leaves_the_weights_finite() -> None:
    schedule = make_schedule("linear", 20_000)
    assert schedule.snr.min() == 0
    for prediction in ("epsilon", "v"):
        weights = Objective(schedule, prediction, 5.0).weights(torch.arange(20_000))
        assert torch.isfinite(weights).all()
        assert prediction == "v" or weights[-1] == 1


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'eps'.*epsilon or v"):
        Objective(SCHEDULE, "eps")
