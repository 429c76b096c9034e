"""The bound against closed forms, 50 digits, the published formulas and the entropy of a known distribution."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.objective import Condition, Drawn, Objective, log_likelihood_of_levels, posteriors, spread_over_steps
from ddpm.process import Prediction, RectifiedFlow, VarianceExploding, cosine_schedule, linear_schedule

SHAPE = (4, 3, 8, 8)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(values: Tensor) -> Tensor:
    """Rounded to one of 256 levels."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def test_likelihoods_of_levels_have_their_digits() -> None:
    mpmath.mp.dps = 50
    for std in (0.002, 0.01, 0.3, 5.0):
        for level in (0, 1, 100, 254, 255):
            x = level / 127.5 - 1
            for off in (0.0, 0.4 / 255, -0.05, 0.4, -1.5):
                log_variance = torch.tensor(2 * math.log(std))
                mean = torch.tensor(x + off)
                found = log_likelihood_of_levels(torch.tensor(x), mean, log_variance).item()
                centre, s = mpmath.mpf(mean.item()), mpmath.exp(mpmath.mpf(log_variance.item()) / 2)
                half = mpmath.mpf(1) / 255
                upper = (x + half - centre) / s if level < 255 else mpmath.inf
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


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule()], ids=["linear", "cosine"])
def test_hybrid_loss_is_the_published_one(schedule) -> None:
    """Tables as in improved-diffusion's `GaussianDiffusion`, terms from torch's distributions in float64."""
    betas, products = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1).double(), products[:-1]])
    posterior = betas * (1 - before) / (1 - products)
    clipped = torch.cat([posterior[1:2], posterior[1:]])
    on_x_start, on_x_t = betas * before.sqrt() / (1 - products), (1 - before) * (1 - betas).sqrt() / (1 - products)
    learnt = Objective(schedule, Prediction("v"), Diffusion(variance="learned_range", stratified=True))
    drawn = Drawn(*learnt.draw(0, torch.tensor([0, 1, 400, 999]), 1000))
    assert drawn.t.tolist() == [0, 1, 400, 999]
    x_start, noise, weight = levels(normal(0)), normal(1), torch.tensor(0.1, requires_grad=True)
    x_t = drawn.alpha.view(-1, 1, 1, 1) * x_start + drawn.sigma.view(-1, 1, 1, 1) * noise

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.cat([x * 0.4 + weight, x.sin() * 1.5 + weight], 1)

    losses = learnt.losses(network, x_start, noise, drawn)
    output, v = network(x_t, drawn.t, Condition()).detach().double().chunk(2, dim=1)
    x, x_0 = x_t.double(), x_start.double()
    for i, t in enumerate((0, 1, 400, 999)):
        alpha, sigma = products[t].sqrt(), (1 - products[t]).sqrt()
        simple = (output[i] - (alpha * noise[i] - sigma * x_start[i])).square().mean()
        estimate = alpha * x[i] - sigma * output[i]
        share = (v[i] + 1) / 2
        variance = (share * betas[t].log() + (1 - share) * clipped[t].log()).exp()
        mean = on_x_start[t] * estimate + on_x_t[t] * x[i]
        if t:
            true = Normal(on_x_start[t] * x_0[i] + on_x_t[t] * x[i], posterior[t].sqrt())
            term = kl_divergence(true, Normal(mean, variance.sqrt())).mean()
        else:
            # Outermost levels reach to infinity.
            model = Normal(mean, variance.sqrt())
            upper = torch.where(x_0[i] > 0.999, 1, model.cdf(x_0[i] + 1 / 255))
            lower = torch.where(x_0[i] < -0.999, 0, model.cdf(x_0[i] - 1 / 255))
            term = -(upper - lower).clamp(min=1e-300).log().mean()
        expected = simple + 1e-3 * 1000 * term / math.log(2)
        if t or expected < 500:
            assert losses[i].item() == pytest.approx(expected.item(), rel=2e-4), t


def test_the_bound_teaches_variance_alone() -> None:
    learnt = Objective(linear_schedule(), Prediction("epsilon"), Diffusion(variance="learned_range"))
    plain = Objective(linear_schedule(), Prediction("epsilon"))
    drawn = Drawn(*learnt.draw(0, torch.arange(4), 4))
    gradients = []
    for objective in (learnt, plain):
        output = (0.5 * normal(2, (4, 6, 8, 8))).requires_grad_()
        answer = output if objective is learnt else output[:, :3]
        objective.losses(lambda x, t, c, answer=answer: answer, levels(normal(0)), normal(1), drawn).sum().backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0][:, :3], gradients[1][:, :3])
    assert (gradients[0][:, 3:].flatten(1).norm(dim=1) > 0).all()


def test_bits_of_a_known_distribution() -> None:
    """Of normal images the steps back are normal: with their variance the bound is reached, however few they are."""
    std, T = 0.15, 40
    images = levels(std * normal(3, (32, 1, 24, 24)))
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
        # What is not known of x_0 adds to the posterior's variance.
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
        found, of_beta = (
            torch.stack(
                [
                    objective.bits_per_dim(
                        answer, images, normal(9 + n, images.shape), torch.full((32,), n), torch.full((32,), float(T))
                    )
                    for n in range(T)
                ]
            ).mean(0)
            for objective, answer in ((learnt, network), (fixed, lambda x, t, c, f=network: f(x, t, c)[:, :1]))
        )
        assert found.shape == (32,)
        assert found.mean().item() == pytest.approx(expected.mean().item() / math.log(2), abs=0.02), process
        assert (of_beta > found + 0.05).all(), process


def test_few_images_estimate_all_steps() -> None:
    """Of the bound that all of 1,000 steps give, with an exact denoiser of normal images."""
    std = 0.3

    def network(x, t, condition) -> Tensor:
        alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in process.numbered(t.long())[1:])
        return alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * x

    for process in (linear_schedule(), cosine_schedule(4000)):
        objective, T, found = Objective(process, Prediction("x0")), process.num_timesteps, {}
        for count in (15, 60, 2048, T):
            images = levels(std * normal(3, (count, 1, 16, 16)))
            numbers, stands_for = spread_over_steps(T, count)
            assert numbers.min() == 0 and numbers.max() < T
            assert stands_for.mean().item() == pytest.approx(T, rel=1e-4)
            bits = objective.bits_per_dim(network, images, normal(4, images.shape), numbers, stands_for)
            found[count] = bits.mean().item()
        assert all(found[count] == pytest.approx(found[T], rel=0.1) for count in found), found


@pytest.mark.parametrize("chosen", ["fixed_large", "fixed_small"])
def test_bits_per_dim_equal_hos_loop(chosen: str) -> None:
    """`_prior_bpd` and `_vb_terms_bpd`, clipped, in NumPy as Ho et al.'s and OpenAI's code have them."""
    T, x_0 = 12, levels(normal(0)).double().numpy()
    betas = np.linspace(1e-4, 0.02, T)
    alphas_cumprod = (1 - betas).cumprod()
    before = np.append(1, alphas_cumprod[:-1])
    posterior = betas * (1 - before) / (1 - alphas_cumprod)
    log_true = np.log([posterior[1], *posterior[1:]])
    log_model = {"fixed_small": log_true, "fixed_large": np.log([posterior[1], *betas[1:]])}[chosen]
    mean, variance = alphas_cumprod[-1] ** 0.5 * x_0, 1 - alphas_cumprod[-1]
    expected = 0.5 * (-1 - np.log(variance) + variance + mean**2).mean(axis=(1, 2, 3))

    def cdf(x: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    found = 0.0
    objective = Objective(linear_schedule(T), Prediction("epsilon"), sample_options=SampleOptions(variance=chosen))
    for t in range(T):
        noise = normal(1 + t)
        x_t = alphas_cumprod[t] ** 0.5 * x_0 + (1 - alphas_cumprod[t]) ** 0.5 * noise.numpy()
        # Good enough that no level is out of reach, where the code above stops at 1e-12.
        epsilon = 0.9 * noise.numpy() + 0.05
        estimate = (x_t - (1 - alphas_cumprod[t]) ** 0.5 * epsilon) / alphas_cumprod[t] ** 0.5
        on_x_start = betas[t] * before[t] ** 0.5 / (1 - alphas_cumprod[t])
        on_x_t = (1 - before[t]) * (1 - betas[t]) ** 0.5 / (1 - alphas_cumprod[t])
        means = [on_x_start * x + on_x_t * x_t for x in (x_0, estimate.clip(-1, 1))]
        if t:
            away = (means[0] - means[1]) ** 2 * np.exp(-log_model[t])
            term = 0.5 * (-1 + log_model[t] - log_true[t] + np.exp(log_true[t] - log_model[t]) + away)
        else:
            upper, lower = (cdf((x_0 - means[1] + end) * np.exp(-log_model[t] / 2)) for end in (1 / 255, -1 / 255))
            likely = np.where(x_0 < -0.999, upper, np.where(x_0 > 0.999, 1 - lower, upper - lower))
            term = -np.log(likely.clip(min=1e-12))
        expected = expected + term.mean(axis=(1, 2, 3))
        given = torch.from_numpy(epsilon).float()
        numbers, all_steps = torch.full((len(x_0),), t), torch.full((len(x_0),), float(T))
        found = found + objective.bits_per_dim(lambda *_, e=given: e, levels(normal(0)), noise, numbers, all_steps) / T
    assert found.tolist() == pytest.approx((expected / np.log(2)).tolist(), rel=1e-3)
