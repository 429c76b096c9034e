"""One line that recovers x_0, whatever was predicted, and one factor between the errors: on points of every process."""

from itertools import product

import pytest
import torch

from ddpm.catalogue import PREDICTIONS
from ddpm.process import Point, Prediction, RectifiedFlow, VarianceExploding, cosine_schedule, linear_schedule

KINDS = tuple(PREDICTIONS)
PROCESSES = (linear_schedule(), cosine_schedule(), VarianceExploding(), RectifiedFlow())
X_START, NOISE, ERROR = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def at(process, *numbers: int, dtype: torch.dtype = torch.float32) -> Point[torch.Tensor]:
    return Point(*(part.to(dtype).view(-1, 1, 1, 1) for part in process.numbered(torch.tensor(numbers))))


def test_every_prediction_gives_the_image_back() -> None:
    for process, kind in product(PROCESSES, KINDS):
        point = at(process, 3, 250, 500, 900)
        prediction, x_t = Prediction(kind), point.alpha * X_START + point.sigma * NOISE
        recovered = prediction.x_start(prediction.target(X_START, NOISE, point), x_t, point)
        scale = max(1.0, float((point.sigma / point.alpha).max()))
        torch.testing.assert_close(recovered, X_START, rtol=0, atol=2e-6 * scale, msg=f"{process} {kind}")


def test_the_factor_relates_the_errors() -> None:
    for process, kind in product(PROCESSES, KINDS):
        point = at(process, 3, 250, 500, 900, dtype=torch.float64)
        prediction, x_start, error = Prediction(kind), X_START.double(), ERROR.double()
        x_t = point.alpha * x_start + point.sigma * NOISE.double()
        target = prediction.target(x_start, NOISE.double(), point)
        on_x_start = (prediction.x_start(target + error, x_t, point) - x_start).square()
        factor = torch.as_tensor(prediction.error_factor(point))
        torch.testing.assert_close(factor * on_x_start, error.square(), rtol=1e-6, atol=1e-9, msg=f"{process} {kind}")
    snr = at(linear_schedule(), 259)
    assert Prediction("epsilon").error_factor(snr).item() == pytest.approx(1, abs=0.01)
    assert Prediction("v").error_factor(snr).item() == pytest.approx(2, abs=0.01)


def test_v_is_exact_without_signal() -> None:
    """The reason to choose it: at ᾱ = 2e-9 an error of ε is multiplied by 20,000, an error of v by one."""
    point = at(cosine_schedule(), 999)
    x_t = point.alpha * X_START + point.sigma * NOISE
    for kind, expected in (("v", -0.01), ("epsilon", -202.9)):
        prediction = Prediction(kind)
        error = prediction.x_start(prediction.target(X_START, NOISE, point) + 0.01, x_t, point) - X_START
        assert torch.allclose(error, torch.tensor(expected), rtol=0.01)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'eps'.*epsilon.*edm"):
        Prediction("eps")
