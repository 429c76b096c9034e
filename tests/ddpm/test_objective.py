"""The loss and the bound against definitions, published formulas, 50 digits, and the entropy of known distributions."""

import math
from dataclasses import replace
from itertools import product

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.objective import Condition, Drawn, Objective, log_likelihood_of_levels, posteriors, spread_over_steps
from ddpm.process import (
    Point,
    Prediction,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    cosine_schedule,
    linear_schedule,
    make_process,
)
from tests.ddpm.known import levels, normal

LINEAR = linear_schedule()
X_START, NOISE, OUTPUT = normal(0, (3, 6, 3, 8, 8), torch.float32)
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
    options = SampleOptions(clip="unclipped" not in weighting)
    return Objective(make_process(diffusion), Prediction(prediction), diffusion, sample_options=options)


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


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), POSSIBLE)
def test_loss_is_the_weighted_error(schedule: str, prediction: str, weighting: str) -> None:
    """In float32, also of an output in bfloat16."""
    learnt, (condition, twice) = objective(schedule, prediction, weighting), given(weighting)
    drawn = Drawn.of(learnt.draw(3, NUMBERS, 6))
    alpha = published_signal(schedule, drawn.t.double())
    sigma = {"edm": (4 * drawn.t.double()).exp(), "flow": 1 - alpha}.get(schedule, (1 - alpha**2).sqrt())
    torch.testing.assert_close(drawn.weight, learnt.weights(Point(drawn.t, alpha, sigma)).float(), rtol=1e-5, atol=0)
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
    for output in (OUTPUT, OUTPUT.bfloat16(), target):
        # With the posterior's variance, a perfect estimate has no divergence from it.
        answer, told = torch.cat([output, -torch.ones_like(output)], 1).requires_grad_(), list[Condition]()

        def network(x_t: Tensor, t: Tensor, given: Condition, answer: Tensor = answer, told=told) -> Tensor:
            torch.testing.assert_close(x_t, scale * (point.alpha * X_START + point.sigma * NOISE))
            assert t is drawn.t and given.labels is condition.labels
            assert torch.is_grad_enabled() == (len(told) == twice)
            told.append(given)
            return answer if learnt.diffusion.learns_variance else answer[:, :3]

        losses = learnt.losses(network, X_START, NOISE, drawn, condition, twice)
        missed, weight = output.float() - target, drawn.weight.view(-1, 1, 1, 1)
        expected = (weight * missed.square()).mean(dim=(1, 2, 3))
        if output is target or not learnt.diffusion.learns_variance:
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        else:
            assert (losses > expected).all()
        assert losses.dtype == torch.float32
        # By the bound no gradient reaches the estimate.
        (gradient,) = torch.autograd.grad(losses.sum(), answer)
        steepest = 2 * weight * missed / output[0].numel()
        torch.testing.assert_close(gradient[:, :3].float(), steepest, rtol=1e-2, atol=1e-6)
        assert told[0] is condition
        if twice:
            x_t = point.alpha * X_START + point.sigma * NOISE
            estimate = learnt.prediction.x_start(output.float(), x_t, point)
            shown = estimate.clamp(-1, 1) if learnt.sample_options.clip else estimate
            torch.testing.assert_close(told[1].x_start, shown)


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
            # EDM's (σ² + σ_data²)/(σ σ_data)², at α = 1, is this.
            "edm": snr + 0.5**-2,
        }
        if isinstance(process, RectifiedFlow):
            # That of the velocity (x_t - x_0)/σ, with σ of 0.05 at least (Li & He 2025).
            expected = expected | {"flow": point.sigma.clamp(min=0.05) ** -2}
            del expected["edm"]
        for (weighting, on_x_start), kind in product(expected.items(), ("epsilon", "x0", "v", "flow", "edm")):
            if kind != "epsilon" or process.numbered(torch.tensor([999])).alpha:
                learnt = Objective(process, Prediction(kind), Diffusion(weighting=weighting, gamma=gamma))
                found = learnt.weights(point) * learnt.prediction.error_factor(point)
                torch.testing.assert_close(found, on_x_start, rtol=1e-9, atol=0, msg=f"{process} {weighting} {kind}")
    # In float32 the SNR at the end of 20,000 timesteps is 0, and 0/0 no number.
    long = linear_schedule(20_000)
    for weighting, kind in (("plain", "v"), ("min_snr", "v"), ("min_snr", "epsilon")):
        learnt = Objective(long, Prediction(kind), Diffusion(weighting=weighting))
        weights = learnt.weights(long.numbered(torch.arange(20_000)))
        assert torch.isfinite(weights.float()).all()
        assert weights[-1] == pytest.approx(0 if (weighting, kind) == ("min_snr", "v") else 1)


def log_normal(mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> Diffusion:
    return Diffusion(draws="log_normal", draws_mean=mean, draws_std=std, stratified=stratified)


NORMAL = replace(log_normal(), variance="learned_range")


def test_draws_follow_their_distributions() -> None:
    count = 50_000
    for process, draws, quantile_of in (
        (VarianceExploding(), log_normal(), lambda d: torch.special.ndtr((d.sigma.log() + 1.2) / 1.2)),
        (RectifiedFlow(), Diffusion(), lambda d: d.sigma),
        (RectifiedFlow(), log_normal(0, 1), lambda d: torch.special.ndtr((d.sigma / d.alpha).log())),
        (LINEAR, log_normal(0, 0.5), lambda d: torch.special.ndtr((d.sigma / d.alpha).log() / 0.5)),
        (LINEAR, Diffusion(), lambda d: (d.t + 0.5) / 1000),
    ):
        drawn = Drawn.of(Objective(process, Prediction("v"), draws).draw(1, torch.arange(count), 128))
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


def test_losses_never_wait_for_the_device() -> None:
    """On the meta device any look at a value raises."""
    images = torch.empty(6, 3, 8, 8, device="meta")
    for learnt, parts in ((objective("cosine", "v", "min_snr"), 1), (objective("linear", "v", "snr with variance"), 2)):
        drawn = Drawn.of(learnt.draw(0, NUMBERS, 6).to("meta"))
        asked = (images, images, drawn, given("")[0], True)
        losses = learnt.losses(lambda x, t, condition, parts=parts: torch.cat([x] * parts, 1), *asked)
        assert losses.shape == (6,)


def test_likelihoods_of_levels_have_their_digits() -> None:
    mpmath.mp.dps = 50
    levels_of = [(255, std, level) for std in (0.002, 0.01, 0.3, 5.0) for level in (0, 1, 100, 254, 255)]
    for most, std, level in [*levels_of, (65535, 0.002, 0), (65535, 0.002, 9000), (65535, 0.002, 65535)]:
        x = level / (most / 2) - 1
        for off in (0.0, 0.4 / 255, -0.05, 0.4, -1.5):
            log_variance = torch.tensor(2 * math.log(std))
            mean = torch.tensor(x + off)
            found = log_likelihood_of_levels(torch.tensor(x), mean, log_variance, most + 1).item()
            centre, s = mpmath.mpf(mean.item()), mpmath.exp(mpmath.mpf(log_variance.item()) / 2)
            half = mpmath.mpf(1) / most
            upper = (x + half - centre) / s if level < most else mpmath.inf
            lower = (x - half - centre) / s if level > 0 else -mpmath.inf
            # In the right tail both are 1 to any number of digits.
            upper, lower = (-lower, -upper) if lower > 0 else (upper, lower)
            expected = float(mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower)))
            assert found == pytest.approx(expected, rel=1e-3, abs=2e-4), (std, level, off)


def test_likelihoods_of_levels_have_their_gradients() -> None:
    x = (torch.arange(0, 256, 5).double() / 127.5 - 1).view(1, 1, 4, 13)

    def likelihood(log_variance: Tensor) -> Tensor:
        return log_likelihood_of_levels(x, torch.full_like(x, 0.3), log_variance)

    assert torch.autograd.gradcheck(likelihood, torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))


class Published:
    """Tables of a schedule as in improved-diffusion's `GaussianDiffusion`, and terms of the bound, in float64."""

    def __init__(self, betas: Tensor) -> None:
        self.products = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1).double(), self.products[:-1]])
        self.posterior = betas * (1 - before) / (1 - self.products)
        log_small = torch.cat([self.posterior[1:2], self.posterior[1:]]).log()
        self.log_variances = {"fixed_small": log_small, "fixed_large": betas.log()}
        self.on_x_start = betas * before.sqrt() / (1 - self.products)
        self.on_x_t = (1 - before) * (1 - betas).sqrt() / (1 - self.products)

    def noised(self, t: int, x_0: Tensor, noise: Tensor) -> Tensor:
        return self.products[t].sqrt() * x_0 + (1 - self.products[t]).sqrt() * noise

    def bits(self, t: int, x_0: Tensor, x_t: Tensor, estimate: Tensor, log_variance: Tensor) -> Tensor:
        """The term of a step for each image, per dimension."""
        model = Normal(self.on_x_start[t] * estimate + self.on_x_t[t] * x_t, (log_variance / 2).exp())
        if t:
            true = Normal(self.on_x_start[t] * x_0 + self.on_x_t[t] * x_t, self.posterior[t].sqrt())
            nats = kl_divergence(true, model)
        else:
            # Outermost levels reach to infinity.
            upper = torch.where(x_0 > 0.999, 1, model.cdf(x_0 + 1 / 255))
            lower = torch.where(x_0 < -0.999, 0, model.cdf(x_0 - 1 / 255))
            nats = -(upper - lower).clamp(min=1e-300).log()
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


IMAGES = levels(normal(0, (4, 3, 8, 8), torch.float32))


@pytest.mark.parametrize("schedule", [LINEAR, cosine_schedule()], ids=["linear", "cosine"])
def test_hybrid_loss_is_the_published_one(schedule: VariancePreserving) -> None:
    """The bound teaches the variance alone."""
    published, numbers = Published(schedule.betas), (0, 1, 400, 999)
    learnt = Objective(schedule, Prediction("v"), Diffusion(variance="learned_range", stratified=True))
    drawn = Drawn.of(learnt.draw(0, torch.tensor(numbers), 1000))
    assert drawn.t.tolist() == [*numbers]
    noise, x_0 = normal(1, IMAGES.shape, torch.float32), IMAGES.double()
    answer = (0.5 * normal(2, (4, 6, 8, 8), torch.float32)).requires_grad_()
    losses = learnt.losses(lambda x, t, condition: answer, IMAGES, noise, drawn)
    (gradient,) = torch.autograd.grad(losses.sum(), answer)
    output, v = answer.double().chunk(2, dim=1)
    for i, t in enumerate(numbers):
        alpha, sigma = published.products[t].sqrt(), (1 - published.products[t]).sqrt()
        simple = (output[i] - (alpha * noise[i] - sigma * x_0[i])).square().mean()
        x_t, share = published.noised(t, x_0[i], noise[i]), (v[i] + 1) / 2
        small, large = (log_variance[t] for log_variance in published.log_variances.values())
        estimate, log_variance = alpha * x_t - sigma * output[i].detach(), share * large + (1 - share) * small
        bound = published.bits(t, *(each[None] for each in (x_0[i], x_t, estimate, log_variance)))
        expected = simple + 1e-3 * 1000 * bound.sum()
        if t or expected < 500:
            assert losses[i].item() == pytest.approx(expected.item(), rel=2e-4), t
            (judged,) = torch.autograd.grad(expected, answer, retain_graph=True)
            torch.testing.assert_close(gradient[i], judged[i], rtol=1e-3, atol=1e-4 * judged[i].abs().max().item())


@pytest.mark.parametrize("chosen", ["fixed_large", "fixed_small"])
def test_bits_per_dim_are_hos(chosen: str) -> None:
    """`_prior_bpd` and the clipped `_vb_terms_bpd` of his and OpenAI's code."""
    T, x_0 = 12, IMAGES.double()
    published = Published(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))
    objective = Objective(linear_schedule(T), Prediction("epsilon"), sample_options=SampleOptions(variance=chosen))
    # At the last step the variance is the posterior's in both.
    log_variances = torch.cat([published.log_variances["fixed_small"][:1], published.log_variances[chosen][1:]])
    left, ends = published.products[-1], Normal(torch.zeros(()).double(), 1)
    prior = kl_divergence(Normal(left.sqrt() * x_0, (1 - left).sqrt()), ends)
    expected, found = prior.mean(dim=(1, 2, 3)) / math.log(2), 0.0
    for t in range(T):
        noise = normal(1 + t, IMAGES.shape)
        # Good enough that no level is out of reach.
        epsilon, x_t = 0.9 * noise + 0.05, published.noised(t, x_0, noise)
        estimate = (x_t - (1 - published.products[t]).sqrt() * epsilon) / published.products[t].sqrt()
        expected = expected + published.bits(t, x_0, x_t, estimate.clamp(-1, 1), log_variances[t])
        numbers, all_steps = torch.full((len(x_0),), t), torch.full((len(x_0),), float(T))
        given = epsilon.float()
        found = found + objective.bits_per_dim(lambda *_, e=given: e, IMAGES, noise.float(), numbers, all_steps) / T
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_bits_of_a_known_distribution() -> None:
    """The steps back to normal images are normal: with their variance a few reach the bound."""
    std, T = 0.15, 40
    images = levels(std * normal(3, (32, 1, 24, 24), torch.float32))
    # The outermost levels, which reach to infinity, are seven deviations away.
    of_images, half = Normal(torch.zeros(()).double(), std), 1 / 255
    expected = -(of_images.cdf(images.double() + half) - of_images.cdf(images.double() - half)).log()
    # Noise below a level's width would show the levels, which are no normal images.
    exploding = VarianceExploding(T, sigma_min=0.02, sigma_max=20)
    ends = {"beta_start": 0.002, "beta_end": 0.4}
    for process in (linear_schedule(T, **ends), cosine_schedule(T), RectifiedFlow(T), exploding):
        t, alpha, sigma = process.numbered(torch.arange(T))
        left = (std * sigma).square() / ((alpha * std).square() + sigma.square())
        steps = posteriors(alpha, sigma)
        # The uncertainty of x_0 adds to the posterior's variance.
        known = torch.where(torch.arange(T) > 0, steps.log_small.exp(), 0)
        best = (known + steps.on_x_start.square() * left).log()
        shares = (best - steps.log_small) / (steps.log_large - steps.log_small)

        def network(x, told, condition, process=process, t=t, alpha=alpha, sigma=sigma, shares=shares) -> Tensor:
            n = int((t - told[0]).abs().argmin())
            estimate = alpha[n] * std**2 / ((alpha[n] * std) ** 2 + sigma[n] ** 2) * x / process.input_scale(sigma[n])
            return torch.cat([estimate, torch.full_like(x, 2 * shares[n] - 1)], dim=1).float()

        learnt = Objective(process, Prediction("x0"))
        # Only tables of betas have a loss that teaches it, but all have the bound.
        object.__setattr__(learnt, "diffusion", Diffusion(variance="learned_range"))
        fixed = Objective(process, Prediction("x0"))
        found, of_beta = torch.zeros(32), torch.zeros(32)
        for n in range(T):
            numbers, all_steps = torch.full((32,), n), torch.full((32,), float(T))
            drawn = (images, normal(9 + n, images.shape, torch.float32), numbers, all_steps)
            found += learnt.bits_per_dim(network, *drawn) / T
            of_beta += fixed.bits_per_dim(lambda x, t, c, f=network: f(x, t, c)[:, :1], *drawn) / T
        assert found.shape == (32,)
        assert found.mean().item() == pytest.approx(expected.mean().item() / math.log(2), abs=0.02), process
        assert (of_beta > found + 0.05).all(), process


def test_few_images_estimate_all_steps() -> None:
    """They give the bound of all 1,000 steps, with an exact denoiser of normal images."""
    std = 0.3

    def network(x, t, condition) -> Tensor:
        alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in process.numbered(t.long())[1:])
        return alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * x

    for process in (linear_schedule(), cosine_schedule(4000)):
        objective, T, found = Objective(process, Prediction("x0")), process.num_timesteps, {}
        for count in (15, 60, 2048, T):
            images = levels(std * normal(3, (count, 1, 16, 16), torch.float32))
            numbers, stands_for = spread_over_steps(T, count)
            assert numbers.min() == 0 and numbers.max() < T
            assert stands_for.mean().item() == pytest.approx(T, rel=1e-4)
            bits = objective.bits_per_dim(network, images, normal(4, images.shape, torch.float32), numbers, stands_for)
            found[count] = bits.mean().item()
        assert all(found[count] == pytest.approx(found[T], rel=0.1) for count in found), found
