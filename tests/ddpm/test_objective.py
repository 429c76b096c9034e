"""The loss against its definition, weights against what they mean for x_0, draws against their distributions."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.objective import Condition, Drawn, Objective
from ddpm.process import Point, Prediction, Process, RectifiedFlow, VarianceExploding, linear_schedule, make_process

LINEAR = linear_schedule()
X_START, NOISE, OUTPUT = torch.randn(3, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.arange(6)
POSSIBLE = [
    ("linear", "epsilon", "plain"),
    ("linear", "epsilon", "plain with variance"),
    ("cosine", "v", "plain with itself"),
    ("cosine", "x0", "snr with variance and itself"),
    ("linear", "epsilon", "plain with itself unclipped"),
    ("cosine", "v", "min_snr"),
    ("sigmoid", "x0", "snr"),
    ("edm", "edm", "plain"),
    ("edm", "v", "edm"),
    ("flow", "flow", "soft_min_snr"),
]


def objective(schedule: str, prediction: str, weighting: str = "plain") -> Objective:
    """A weighting "with variance" learns that as well; "unclipped" is about its own estimate."""
    variance = "learned_range" if "variance" in weighting else "fixed"
    diffusion = Diffusion(schedule, prediction=prediction, weighting=weighting.split()[0], variance=variance)
    return Objective(
        make_process(diffusion),
        Prediction(prediction),
        diffusion,
        sample_options=SampleOptions(clip="unclipped" not in weighting),
    )


def given(weighting: str) -> tuple[Condition, bool]:
    """The condition, and whether it is to hold the network's own estimate: "with itself"."""
    twice = "itself" in weighting
    return Condition(NUMBERS.flip(0), torch.zeros_like(X_START) if twice else None), twice


def published_signal(schedule: str, t: Tensor) -> Tensor:
    """α where the network is told t, by the formula of each paper; but for the last timestep, whose β is capped."""
    u = torch.arange(1001, dtype=torch.float64) / 1000
    if schedule in ("edm", "flow"):
        return torch.ones_like(t) if schedule == "edm" else 1 - t / 1000
    curve = {
        "linear": torch.cat([torch.ones(1).double(), (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)]),
        "cosine": ((u + 0.008) / 1.008 * math.pi / 2).cos().square(),
        "sigmoid": (3 * torch.ones(1).double()).sigmoid() - (6 * u - 3).sigmoid(),
    }[schedule]
    return (curve / curve[0])[t.long() + 1].sqrt()


def published_weight(weighting: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """On the error of the output, for the predictions that `POSSIBLE` has with each weighting."""
    snr = (alpha / sigma).square()
    return {
        "plain": torch.ones_like(snr),
        "snr": snr,
        "min_snr": snr.clamp(max=5) / (snr + 1),
        "soft_min_snr": 5 * snr / (5 + snr) * sigma**2,
        "edm": (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * sigma**2 / (1 + sigma**2) ** 2,
    }[weighting]


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), POSSIBLE)
def test_loss_is_the_weighted_error(schedule: str, prediction: str, weighting: str) -> None:
    learnt, (condition, twice) = objective(schedule, prediction, weighting), given(weighting)
    drawn = Drawn(*learnt.draw(3, NUMBERS, 6))
    alpha = published_signal(schedule, drawn.t.double())
    sigma = {"edm": (4 * drawn.t.double()).exp(), "flow": 1 - alpha}.get(schedule, (1 - alpha**2).sqrt())
    weights = published_weight(weighting.split()[0], alpha, sigma)
    point = Point(drawn.t, alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1))
    scale = (point.sigma**2 + 0.25) ** -0.5 if schedule == "edm" else 1.0
    target = {
        "epsilon": NOISE,
        "x0": X_START,
        "v": point.alpha * NOISE - point.sigma * X_START,
        "flow": NOISE - X_START,
        # (x_0 - c_skip x_t)/c_out.
        "edm": (point.sigma**2 * X_START - 0.25 * point.sigma * NOISE) / (0.5 * point.sigma) * scale,
    }[prediction]
    for output in (OUTPUT, target):
        # With the posterior's variance, a perfect estimate has no divergence from it.
        answer, told = torch.cat([output, -torch.ones_like(output)], 1), list[Condition]()

        def network(x_t: Tensor, t: Tensor, given: Condition, answer: Tensor = answer, told=told) -> Tensor:
            torch.testing.assert_close(x_t, scale * (point.alpha * X_START + point.sigma * NOISE))
            assert t is drawn.t and given.labels is condition.labels
            assert torch.is_grad_enabled() == (len(told) == twice)
            told.append(given)
            return answer if learnt.diffusion.learns_variance else answer[:, :3]

        losses = learnt.losses(network, X_START, NOISE, drawn, condition, twice)
        expected = [w * nn.functional.mse_loss(output[i], target[i]).item() for i, w in enumerate(weights.tolist())]
        if output is target or not learnt.diffusion.learns_variance:
            assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        else:
            assert (losses > torch.tensor(expected)).all()
        assert losses.dtype == torch.float32
        assert told[0] is condition
        if twice:
            estimate = learnt.prediction.x_start(output, point.alpha * X_START + point.sigma * NOISE, point)
            torch.testing.assert_close(
                told[1].x_start, estimate.clamp(-1, 1) if learnt.sample_options.clip else estimate
            )


def test_weights_mean_errors_of_x_start() -> None:
    """Equal errors of x_0 cost the same by every prediction; plain ones cost what the output's error is."""
    gamma = 5.0
    for process in (LINEAR, VarianceExploding(), RectifiedFlow()):
        point = process.numbered(torch.tensor([20, 129, 400, 700]))
        snr = (point.alpha / point.sigma).square()
        expected = {
            "snr": snr,
            "min_snr": snr.clamp(max=gamma),
            "soft_min_snr": snr * gamma / (snr + gamma),
            "edm": (point.sigma**2 + 0.25 * point.alpha**2) / (0.5 * point.sigma * point.alpha) ** 2,
        }
        if process is LINEAR:
            expected["edm"] = snr + 4
        for (weighting, on_x_start), kind in product(expected.items(), ("epsilon", "x0", "v", "flow", "edm")):
            if isinstance(process, RectifiedFlow) and (kind == "epsilon" or weighting == "edm"):
                continue
            learnt = Objective(process, Prediction(kind), Diffusion(weighting=weighting, gamma=gamma))
            found = learnt.weights(point) * learnt.prediction.error_factor(point)
            torch.testing.assert_close(found, on_x_start, rtol=1e-9, atol=0, msg=f"{process} {weighting} {kind}")
    plain = Objective(LINEAR, Prediction("v")).weights(LINEAR.numbered(torch.arange(1000)))
    assert plain.tolist() == [1.0] * 1000


def test_flow_weighting_is_the_velocitys_error() -> None:
    """(x_t - x_0)/σ on a rectified flow, as JiT has it, with σ of 0.05 at least (Li & He 2025)."""
    sigma = torch.tensor([0.01, 0.04, 0.3, 0.99], dtype=torch.float64)
    point, (x_0, noise, x_hat) = RectifiedFlow().uniform(sigma), torch.randn(3, 4, 50, dtype=torch.float64)
    x_t = (1 - sigma[:, None]) * x_0 + sigma[:, None] * noise
    velocity, estimated = ((x_t - x) / sigma.clamp(min=0.05)[:, None] for x in (x_0, x_hat))
    expected = (estimated - velocity).square().mean(dim=1)
    by_velocity = Diffusion(weighting="flow")
    weights = Objective(RectifiedFlow(), Prediction("x0"), by_velocity).weights(point)
    torch.testing.assert_close(weights * (x_hat - x_0).square().mean(dim=1), expected)
    # An output that is the velocity has that error as it is.
    weights = Objective(RectifiedFlow(), Prediction("flow"), by_velocity).weights(point)
    assert weights[2:].tolist() == pytest.approx([1, 1])


def log_normal(mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> Diffusion:
    return Diffusion(draws="log_normal", draws_mean=mean, draws_std=std, stratified=stratified)


def test_draws_follow_their_distributions() -> None:
    count = 50_000
    for process, draws, quantile_of in (
        (VarianceExploding(), log_normal(), lambda d: torch.special.ndtr((d.sigma.log() + 1.2) / 1.2)),
        (RectifiedFlow(), Diffusion(), lambda d: d.sigma),
        (RectifiedFlow(), log_normal(0, 1), lambda d: torch.special.ndtr((d.sigma / d.alpha).log())),
        (LINEAR, log_normal(0, 0.5), lambda d: torch.special.ndtr((d.sigma / d.alpha).log() / 0.5)),
        (LINEAR, Diffusion(), lambda d: (d.t + 0.5) / 1000),
    ):
        drawn = Drawn(*Objective(process, Prediction("v"), draws).draw(1, torch.arange(count), 128))
        quantiles, even = quantile_of(drawn), (torch.arange(count) + 0.5) / count
        # Kolmogorov and Smirnov's bound for one draw in 1,500.
        assert (quantiles.sort().values - even).abs().max() < 2 / count**0.5, draws
        assert (drawn.quartile == (quantiles * 4).floor()).float().mean() > 0.999, draws


def test_stratified_draws_spread_each_batch() -> None:
    batch = 32
    for process, draws in ((RectifiedFlow(), Diffusion(stratified=True)), (LINEAR, log_normal(stratified=True))):
        learnt = Objective(process, Prediction("v"), draws)
        whole = learnt.draw(7, torch.arange(64 * batch), batch)
        for rank in range(3):
            assert torch.equal(learnt.draw(7, torch.arange(64 * batch)[rank::3], batch), whole[:, rank::3])
        if draws.draws == "uniform":
            sigma = whole[2].view(64, batch)
            assert torch.equal((sigma * batch).floor(), torch.arange(batch).float().expand(64, batch))
            # The mean of a batch strays a batch's size less than that of independent draws.
            assert sigma.mean(dim=1).std().item() == pytest.approx((1 / 12 / batch) ** 0.5 / batch, rel=0.3)


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), POSSIBLE)
def test_half_precision_networks_give_float32_losses(schedule: str, prediction: str, weighting: str) -> None:
    learnt, gradients, (condition, twice) = objective(schedule, prediction, weighting), {}, given(weighting)
    drawn = Drawn(*learnt.draw(0, NUMBERS, 6))
    for enabled in (False, True):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 3 * (1 + learnt.diffusion.learns_variance), 1)

        def autocast(x: Tensor, t: Tensor, condition: Condition, network=network, enabled=enabled) -> Tensor:
            assert x.dtype == t.dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return network(x if condition.x_start is None else x + 0.3 * condition.x_start)

        losses = learnt.losses(autocast, X_START, NOISE, drawn, condition, twice)
        assert losses.dtype == torch.float32
        losses.mean().backward()
        gradients[enabled] = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert (gradients[True] - gradients[False]).norm() < 0.02 * gradients[False].norm()


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), POSSIBLE)
def test_gradients_are_those_of_finite_differences(schedule: str, prediction: str, weighting: str) -> None:
    learnt = objective(schedule, prediction, weighting)
    drawn = Drawn(*learnt.draw(0, NUMBERS[:2], 6).double())
    x_start, noise = X_START[:2, :1, :2, :2].double(), NOISE[:2, :1, :2, :2].double()

    class Double(Tensor):
        """A network's answer of this kind stays in double precision."""

        def float(self) -> Tensor:  # type: ignore[override]
            return self

    def loss(weight: Tensor) -> Tensor:
        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            if not learnt.diffusion.learns_variance:
                return (x * weight + weight.sin()).as_subclass(Double)
            # By the bound no gradient reaches the estimate, which differences would see.
            return torch.cat([x * 0.4, x.sin() * weight], 1).as_subclass(Double)

        return learnt.losses(network, x_start, noise, drawn).as_subclass(Tensor)

    assert torch.autograd.gradcheck(loss, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))


def test_losses_never_wait_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    images = torch.empty(6, 3, 8, 8, device="meta")
    for learnt, parts in ((objective("cosine", "v", "min_snr"), 1), (objective("linear", "v", "snr with variance"), 2)):
        drawn = Drawn(*learnt.draw(0, NUMBERS, 6).to("meta"))
        losses = learnt.losses(
            lambda x, t, condition, parts=parts: torch.cat([x] * parts, 1), images, images, drawn, given("")[0], True
        )
        assert losses.shape == (6,)


def test_weights_are_finite_without_signal() -> None:
    """In float32 the SNR at the end of 20,000 timesteps is 0, and 0/0 no number."""
    point = linear_schedule(20_000).numbered(torch.arange(20_000))
    for kind in ("epsilon", "v"):
        weights = (
            Objective(linear_schedule(20_000), Prediction(kind), Diffusion(weighting="min_snr")).weights(point).float()
        )
        assert torch.isfinite(weights).all()
        assert kind == "v" or math.isclose(weights[-1], 1)


def test_impossible_objectives_are_refused() -> None:
    processes: list[Process] = [RectifiedFlow(), LINEAR.with_zero_terminal_snr()]
    for process in processes:
        with pytest.raises(ValueError, match="epsilon does not determine the image"):
            Objective(process, Prediction("epsilon"))
    for process, draws in ((RectifiedFlow(), "uniform"), (LINEAR, "log_normal")):
        with pytest.raises(ValueError, match="a table of betas, at points drawn uniformly"):
            Objective(process, Prediction("v"), Diffusion(draws=draws, variance="learned_range"))
    with pytest.raises(ValueError, match=r"'p2'.*plain.*edm"):
        objective("linear", "v", "p2")
