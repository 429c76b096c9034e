"""Samplers: from noise to images, as flat functions of a denoiser and the points to visit.

A denoiser maps (x_t, point) to an estimate of x_0, so samplers do not depend on the network's prediction or the
process. Coefficients are float64 on the host: no step waits for the device. A sampler requests noise by the number of
the draw, from 1; draw 0 is the noise at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise
from math import exp, expm1, inf, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.catalogue import SampleOptions
from ddpm.objective import SHARES
from ddpm.process import Point, Process, points_of

Points = Sequence[Point[float]]
"""The points that a sampler visits, from that of x to where it ends."""

Denoiser = Callable[[Tensor, Point[float]], Tensor]
"""(x_t [B, C, H, W], point) → the estimated x_0, float32 [B, C, H, W]; for `learned_range` [B, 2C, H, W]: x_0 and the
share of β_t."""

NoiseAt = Callable[[int], Tensor]
"""Number of a draw → standard normal noise, float32 [B, C, H, W]."""

Sampler = Callable[[Denoiser, Tensor, Points, NoiseAt], Tensor]
"""(denoiser, x at the first point, points, noise) → x at the last point."""

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -4 / 3, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -3 / 8))
"""Weights of the last slopes, from the newest, for orders 1 to 4."""
NOTHING_LEFT = 1e-3
"""Smallest α for a step over σ/α: the first step of a cosine leads from 20,000 to a few, nearly the whole way."""


class Visit(NamedTuple):
    """A visited point with x_t and the estimated x_0, [B, C, H, W] each."""

    point: Point[float]
    x: Tensor
    x_start: Tensor

    @property
    def epsilon(self) -> Tensor:
        """Returns the noise in x_t, which is the slope of x/α over σ/α along the probability flow."""
        return (self.x - self.point.alpha * self.x_start) / self.point.sigma


Step = Callable[[Sequence[Visit], Point[float]], Tensor]
"""(the last visits, from the newest; the next point) → x at that point."""


def ancestral(
    denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt, variance: str = SampleOptions.variance
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_s ~ q(x_s | x_t, x_0), on any grid of any process.

    Args:
        denoise: the denoiser.
        x: float32 [B, C, H, W], at the first point.
        points: the points to visit, each with less noise.
        noise_at: the noise of each step that does not end at the clean image.
        variance: variance of that noise: the posterior's β̃_t (`fixed_small`), β_t (`fixed_large`; Ho et al. 2020,
            section 3.2), or learnt, between them.

    Returns:
        x at the last point, float32 [B, C, H, W].
    """
    draws = count(1)
    for point, after in pairwise(points):
        answer, channels = denoise(x, point), x.shape[1]
        x_start, share = answer[:, :channels], SHARES.get(variance, answer[:, channels:])
        # q(x_t | x_s) has mean (α_t/α_s) x_s and this variance, which is β_t where no timestep is left out.
        alpha = point.alpha / after.alpha
        beta = point.sigma**2 - (alpha * after.sigma) ** 2
        x = (after.alpha * beta / point.sigma**2) * x_start + (alpha * after.sigma**2 / point.sigma**2) * x
        if after.sigma:
            x = x + sqrt(beta) * (after.sigma / point.sigma) ** (1 - share) * noise_at(next(draws))
    return x


def ddim(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt, eta: float = SampleOptions.eta) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16), with ε derived from x_t and the (clipped) x_0.

    It is Euler's method on the probability-flow ODE in σ/α, and for η = 1 Euler's ancestral one (Karras et al. 2022;
    k-diffusion), which is `ancestral` with `fixed_small`.

    Args:
        denoise: the denoiser.
        x: float32 [B, C, H, W], at the first point.
        points: the points to visit.
        noise_at: the noise of each step that does not end at the clean image; not called for η = 0.
        eta: η in [0, 1], the share of random noise.

    Returns:
        x at the last point, float32 [B, C, H, W].
    """
    draws = count(1)
    for point, after in pairwise(points):
        x_start = denoise(x, point)
        epsilon = (x - point.alpha * x_start) / point.sigma
        sigma_up = 0.0
        if eta and after.sigma:
            beta = point.sigma**2 - (point.alpha / after.alpha * after.sigma) ** 2
            sigma_up = eta * after.sigma / point.sigma * sqrt(beta)
        # Rounding may give -1e-17 under the root where there is almost no signal.
        x = after.alpha * x_start + sqrt(max(after.sigma**2 - sigma_up**2, 0.0)) * epsilon
        if sigma_up:
            x = x + sigma_up * noise_at(next(draws))
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    points: Points,
    noise_at: NoiseAt,
    process: Process,
    churn: float = SampleOptions.churn,
    steps: int = 1,
) -> Tensor:
    """Heun's method for x/α over σ/α, with churn (Karras et al. 2022, algorithm 2, with S_min 0, S_max ∞, S_noise 1).

    It evaluates the denoiser twice per step. A step to the clean image, or from nearly pure noise, is Euler's and
    evaluates it once.

    Args:
        denoise: the denoiser.
        x: float32 [B, C, H, W], at the first point.
        points: the points to visit.
        noise_at: the noise of each step whose point is raised; not called for churn 0.
        process: gives the raised points.
        churn: S_churn; before each step σ/α is raised by S_churn over the number of all steps, √2 - 1 at most.
        steps: the number of all steps, which `points` may be a part of.

    Returns:
        x at the last point, float32 [B, C, H, W].
    """
    draws, raised_by = count(1), min(churn / steps, sqrt(2) - 1)
    for point, after in pairwise(points):
        if raised_by and point.alpha >= NOTHING_LEFT:
            ratio = point.sigma / point.alpha
            (raised,) = points_of(process.with_ratio(torch.tensor([ratio * (1 + raised_by)], dtype=torch.float64)))
            added = raised.alpha * ratio * sqrt((1 + raised_by) ** 2 - 1)
            point, x = raised, raised.alpha / point.alpha * x + added * noise_at(next(draws))
        start = Visit(point, x, denoise(x, point))
        x = euler_step([start], after)
        if after.sigma and point.alpha >= NOTHING_LEFT:
            end = Visit(after, x, denoise(x, after))
            x = x + _ratio_gained(point, after) / 2 * (end.epsilon - start.epsilon)
    return x


def consistency(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x_0 at once, then with new noise x_s.

    See `ddim` for the arguments; the network is one that `ddpm.consistency` trained.
    """
    draws = count(1)
    for point, after in pairwise(points):
        x = after.alpha * denoise(x, point)
        if after.sigma:
            x = x + after.sigma * noise_at(next(draws))
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), without noise; see `ddim`."""
    return _multistep(denoise, x, points, exponential_step, 2)


def dpmpp_3m(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt) -> Tensor:
    """DPM-Solver++(3M): `dpmpp_2m` with a third estimate, of third order."""
    return _multistep(denoise, x, points, exponential_step, 3)


def dpmpp_sde_2m(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 6), whose step of first order is that of `ddim` with η = 1."""
    draws = count(1)

    def step(visits: Sequence[Visit], after: Point[float]) -> Tensor:
        forgotten = -expm1(2 * (_log_snr(visits[0].point) - _log_snr(after)))
        x = exponential_step(visits, after, stochastic=True)
        return x + after.sigma * sqrt(forgotten) * noise_at(next(draws)) if after.sigma else x

    return _multistep(denoise, x, points, step, 2)


def ipndm(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt, order: int = SampleOptions.order) -> Tensor:
    """Adams and Bashforth's method for x/α over σ/α (iPNDM: Zhang & Chen 2023), up to order 4, without noise.

    Its weights are exact for evenly spaced σ/α; on other grids its order is 2 at most.
    """
    return _multistep(denoise, x, points, ipndm_step, order)


def deis(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt, order: int = SampleOptions.order) -> Tensor:
    """DEIS (Zhang & Chen 2023, equations 14 and 15) with polynomials in ln(σ/α), as in diffusers, not in t.

    It uses no noise. Its last step, to the clean image, is Euler's.
    """
    return _multistep(denoise, x, points, deis_step, order)


def unipc(denoise: Denoiser, x: Tensor, points: Points, noise_at: NoiseAt, order: int = SampleOptions.order) -> Tensor:
    """UniPC with B_2(h) (Zhao et al. 2023, algorithms 5 and 6), without noise; its order is `order` + 1.

    The estimate at a point also corrects the x of that point.
    """
    visits: list[Visit] = []
    x_start = denoise(x, points[0])
    for point, after in pairwise(points):
        visits = [Visit(point, x, x_start), *visits][:order]
        x = exponential_step(visits, after)
        if after is not points[-1]:
            x_start = denoise(x, after)
            x = exponential_step(visits, after, x_start)
    return x


def _multistep(denoise: Denoiser, x: Tensor, points: Points, step: Step, order: int) -> Tensor:
    visits: list[Visit] = []
    for point, after in pairwise(points):
        visits = [Visit(point, x, denoise(x, point)), *visits][:order]
        x = step(visits, after)
    return x


def euler_step(visits: Sequence[Visit], after: Point[float]) -> Tensor:
    """Returns Euler's step for x/α over σ/α, which equals DDIM's: x_0 and ε stay the same."""
    return after.alpha * visits[0].x_start + after.sigma * visits[0].epsilon


def ipndm_step(visits: Sequence[Visit], after: Point[float]) -> Tensor:
    """Returns Euler's step with a weighted sum of the slopes of all visits."""
    return _adams_step(visits, after, ADAMS_BASHFORTH[len(visits) - 1][1:])


def deis_step(visits: Sequence[Visit], after: Point[float]) -> Tensor:
    """Returns Euler's step with the integral over σ/α of the polynomial in ln(σ/α) through the last slopes."""
    gaps, h = _gaps(visits, after)
    weights = [weight / gap for weight, gap in zip(_slope_weights(gaps, -h), gaps, strict=True)]
    return _adams_step(visits, after, weights)


def _adams_step(visits: Sequence[Visit], after: Point[float], weights: Sequence[float]) -> Tensor:
    """Returns Euler's step with these weights of the earlier slopes; the newest slope has the rest of 1."""
    x, newest = euler_step(visits, after), visits[0]
    for weight, visit in zip(weights, visits[1:], strict=False):
        x = x + _ratio_gained(newest.point, after) * weight * (visit.epsilon - newest.epsilon)
    return x


def exponential_step(
    visits: Sequence[Visit], after: Point[float], x_start: Tensor | None = None, stochastic: bool = False
) -> Tensor:
    """Returns the integral over λ of x_0 by up to three estimates; if it is `stochastic`, the caller adds the noise.

    It is the step of DPM-Solver++ (Lu et al. 2022, equation 9) and of UniP, which are equal, and with the estimate at
    `after`, `x_start`, that of UniC (Zhao et al. 2023, equations 3 and 8). The authors' code of DPM-Solver++(3M), and
    code made from it, has half of the last term, and is therefore of second order.
    """
    newest, (gaps, h) = visits[0], _gaps(visits, after)
    kept, gained = (exp(-h), -expm1(-2 * h)) if stochastic else (1.0, -expm1(-h))
    x = after.sigma / newest.point.sigma * kept * newest.x + after.alpha * gained * newest.x_start
    others = [visit.x_start for visit in visits[1 : len(gaps) + 1]]
    if x_start is not None:
        gaps, others = [*gaps, 1.0], [*others, x_start]
    # ½ as in both papers; the exact solution differs from it only beyond the order of the step.
    weights = [0.5] if len(gaps) == 1 else _slope_weights(gaps, h)
    for weight, gap, other in zip(weights, gaps, others, strict=True):
        x = x + (after.alpha * gained * weight / gap) * (other - newest.x_start)
    return x


def _gaps(visits: Sequence[Visit], after: Point[float]) -> tuple[list[float], float]:
    """Returns the distances in λ from the newest visit to the earlier ones, in units of the step h; and h."""
    start = _log_snr(visits[0].point)
    h = _log_snr(after) - start
    # λ is infinite at the clean image and at pure noise, the first visit: no slope over it is finite.
    earlier = [visit for visit in visits[1:] if visit.point.alpha and after.sigma]
    return [(_log_snr(visit.point) - start) / h for visit in earlier], h


def _slope_weights(gaps: Sequence[float], h: float) -> list[float]:
    """Returns weights of the slopes over these gaps, in units of h, for which integrals of powers of λ are exact."""
    integrals = [-expm1(-h)]
    for power in range(1, len(gaps) + 1):
        # By parts: ∫ τ^power h e^(h (τ - 1)) dτ from 0 to 1.
        integrals.append(1 - power * integrals[-1] / h)
    rows = np.array(gaps) ** np.arange(len(gaps))[:, None]
    weights: list[float] = np.linalg.solve(rows, np.array(integrals[1:]) / integrals[0]).tolist()
    return weights


def _ratio_gained(point: Point[float], after: Point[float]) -> float:
    """Returns the growth of σ/α, in units of x at `after`."""
    return after.sigma - after.alpha * point.sigma / point.alpha


def _log_snr(point: Point[float]) -> float:
    """Returns λ = ln(α/σ), half the logarithm of the SNR."""
    if not point.alpha:
        return -inf
    return log(point.alpha / point.sigma) if point.sigma else inf


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "euler": ddim,
    "euler_ancestral": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_sde_2m": dpmpp_sde_2m,
    "unipc": unipc,
    "ipndm": ipndm,
    "deis": deis,
    "consistency": consistency,
}
"""The samplers of the catalogue, as functions whose further arguments are their options."""


Walk = Callable[[Sampler, Denoiser, Points, NoiseAt], Tensor]
"""(sampler, denoiser, points, noise) → images: `from_noise`, or a function of `editing`."""


def beginning(points: Points, noise_at: NoiseAt) -> Tensor:
    """Returns noise of the first point: of unit variance, or of σ² where a process lets the variance explode."""
    return max(1.0, points[0].sigma) * noise_at(0)


def from_noise(sample: Sampler, denoise: Denoiser, points: Points, noise_at: NoiseAt) -> Tensor:
    """Returns new images."""
    return sample(denoise, beginning(points, noise_at), points, noise_at)
