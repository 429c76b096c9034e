"""The training loss: the points of a process, the target of the network there, and the weight of each point.

With a learnt variance it includes the variational bound, in bits per dimension: the network learns the place of the
variance between the posterior's and β, on a logarithmic scale, as the share of β (Nichol & Dhariwal 2021, equation 15).
The bound is a sum over the steps (equations 4 to 7) and holds for any points of any process, also for a part of them.
Logarithms are natural except in `bits`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from ddpm import randomness
from ddpm.catalogue import WEIGHTINGS, Diffusion, SampleOptions
from ddpm.device import exact_device
from ddpm.process import Number, Point, Prediction, Process, VariancePreserving, points_of

SHARES = {"fixed_small": 0.0, "fixed_large": 1.0}
"""Place of the variance between β̃_t (0) and β_t (1), on a logarithmic scale (Nichol & Dhariwal 2021, equation 15)."""
QUARTILES = 4
BOUND_WEIGHT = 1e-3
"""λ of the hybrid loss (Nichol & Dhariwal 2021, equation 16), on a bound in bits per dimension as in their code."""
MOST_FLOW_WEIGHT = 400.0
"""Limit of the weight `flow` on the error of x_0: 1/σ² at σ = 0.05, the smallest σ of Li & He 2025."""


class Condition(NamedTuple):
    """The inputs of a network beside x_t and t."""

    labels: Tensor | None = None
    """Class indices, int64 [B]; None for a network without classes."""
    x_start: Tensor | None = None
    """An estimate of x_0 [B, C, H, W] for a network with self-conditioning; None stands for zeros."""
    augmentation: Tensor | None = None
    """Labels of augmentation, float32 [B, n], for a network that takes them; None: the images are not augmented."""
    image: Tensor | None = None
    """A condition image, float32 [B, Cc, H, W] in [-1, 1]; zeros for an image without its condition."""
    image_noise: Tensor | None = None
    """The level of the noise in it, float32 [B], for a network that is told."""
    vector: Tensor | None = None
    """Normalised numbers and 1, float32 [B, k + 1]; zeros for an image without its numbers."""


UNCONDITIONAL = Condition()

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t at the input scale of the process [B, C, H, W], t float32 [B], condition) → output [B, C, H, W]. A network that
learns the variance returns [B, 2C, H, W]; in the second half -1 stands for β̃ and 1 for β (see `SHARES`)."""


class Drawn(NamedTuple):
    """A point for each image of a batch with its scale, weight and quartile, float32 [B] each."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor
    """Factor on x_t for the network's input."""
    weight: Tensor
    """Weight of the squared error of the output."""
    quartile: Tensor
    """0 for the quarter of the draws with the least noise, 3 for that with the most."""
    further: Tensor | None = None
    """Float32 [3, B], a `Posterior`, if the variance is learnt; [4, B], the other points, of `ddpm.consistency`."""

    @classmethod
    def of(cls, table: Tensor) -> "Drawn":
        """Returns the rows of `Objective.draw`."""
        return cls(*table[:6])._replace(further=table[6:])


class Posterior(NamedTuple, Generic[Number]):
    """q(x_s | x_t, x_0) of a step from x_t to x_s, the next point with less noise (Ho et al. 2020, equation 7)."""

    on_x_start: Number
    """Factor on x_0 in its mean."""
    log_small: Number
    """Logarithm of its variance β̃; at the last step, where β̃ is 0, of that before (Nichol & Dhariwal's code)."""
    log_large: Number
    """Logarithm of β, the variance of q(x_t | x_s)."""


@dataclass(frozen=True, eq=False)
class Objective:
    """The squared error of a network's output at drawn points of a process.

    Everything is float32; an autocast belongs around the network alone.
    """

    process: Process
    prediction: Prediction
    diffusion: Diffusion = field(default_factory=Diffusion)
    """How noise levels are drawn and weighted, and whether the variance is learnt by the variational bound."""
    sample_options: SampleOptions = field(default_factory=SampleOptions)
    """Whether self-conditioning shows the network its estimate clipped to [-1, 1], and the variance of the bound."""
    levels: int = 256
    """The values that a pixel may have, for the bound: 65,536 in images of 16 bits."""

    def __post_init__(self) -> None:
        diffusion = self.diffusion
        if diffusion.weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {diffusion.weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
        last = self.process.numbered(torch.tensor([self.process.num_timesteps - 1]))
        if self.prediction.kind == "epsilon" and not last.alpha.all():
            raise ValueError(
                "a prediction of epsilon does not determine the image in pure noise, where the process ends"
            )
        has_betas = isinstance(self.process, VariancePreserving)
        if diffusion.learns_variance and (not has_betas or diffusion.draws != "uniform"):
            raise ValueError("a learnt variance needs a table of betas, at points drawn uniformly")

    @cached_property
    def _posteriors(self) -> Tensor:
        """Returns the posteriors of all timesteps, float64 [3, T]."""
        return torch.stack(posteriors(*self.process.numbered(torch.arange(self.process.num_timesteps))[1:]))

    def draw(self, seed: int, image_numbers: Tensor, batch_size_images: int) -> Tensor:
        """Draws a point for each image, in float64 and rounded once.

        Args:
            seed: the run's seed.
            image_numbers: int64 [B], on the host.
            batch_size_images: size of the global batch, which starts at a multiple of it.

        Returns:
            float32 [6 or more, B] on the host, for `Drawn.of`: one table, so that one copy to the device suffices.
        """
        diffusion, u = self.diffusion, randomness.training_uniforms(seed, image_numbers)
        if diffusion.stratified:
            u = (image_numbers % batch_size_images + u) / batch_size_images
        if diffusion.draws == "uniform":
            point = self.process.uniform(u)
        else:
            log_ratio = diffusion.draws_mean + diffusion.draws_std * torch.special.ndtri(u)
            point = self.process.with_ratio(log_ratio.exp())
        scale = self.process.input_scale(point.sigma)
        steps = self._posteriors[:, point.t.long()] if diffusion.learns_variance else ()
        return torch.stack([*point, scale, self.weights(point), (u * QUARTILES).floor(), *steps]).float()

    def losses(
        self,
        network: Network,
        x_start: Tensor,
        noise: Tensor,
        drawn: Drawn,
        condition: Condition = UNCONDITIONAL,
        conditions_on_itself: bool = False,
    ) -> Tensor:
        """Returns the loss of each image: noises the images, runs the network, and compares.

        Args:
            network: see `Network`.
            x_start: images [B, C, H, W] in [-1, 1].
            noise: standard normal ε, float32 [B, C, H, W].
            drawn: a point for each image.
            condition: the network's further inputs.
            conditions_on_itself: whether these include the network's own estimate, from a first pass without gradient
                (Chen et al. 2023, algorithm 1).

        Returns:
            float32 [B]: each image's squared error, averaged over its pixels and weighted. With a learnt variance it
            adds λ T times the bound's term at this step, whose gradient does not reach the estimate.
        """
        alpha, sigma, scale = (row.view(-1, 1, 1, 1) for row in (drawn.alpha, drawn.sigma, drawn.input_scale))
        x_t = alpha * x_start + sigma * noise
        point, channels = Point(drawn.t, alpha, sigma), x_start.shape[1]
        if conditions_on_itself:
            with torch.no_grad():
                output = network(scale * x_t, drawn.t, condition).float()[:, :channels]
                estimate = self.prediction.x_start(output, x_t, point)
            condition = condition._replace(x_start=estimate.clamp(-1, 1) if self.sample_options.clip else estimate)
        output, share = network(scale * x_t, drawn.t, condition).float().tensor_split([channels], dim=1)
        target = self.prediction.target(x_start, noise, point)
        losses = drawn.weight * (output - target).square().mean(dim=(1, 2, 3))
        if not self.diffusion.learns_variance:
            return losses
        estimate = self.prediction.x_start(output.detach(), x_t, point)
        assert drawn.further is not None
        posterior = Posterior(*drawn.further.view(3, -1, 1, 1, 1))
        bound = _bound(posterior, drawn.t == 0, x_start, estimate, (share + 1) / 2, self.levels)
        return losses + BOUND_WEIGHT * self.process.num_timesteps * bound

    @torch.no_grad()
    def bits_per_dim(
        self,
        network: Network,
        x_start: Tensor,
        noise: Tensor,
        numbers: Tensor,
        stands_for: Tensor,
        condition: Condition = UNCONDITIONAL,
    ) -> Tensor:
        """Estimates the variational bound on -log₂ p(x_0) per dimension, from one step of each image.

        The bound is that of ancestral sampling over all points of any process (Ho et al. 2020, equation 5), with the
        learnt variance or else that of `sample_options`. The last step has β̃ of the step before, as in Ho et al.'s
        `calc_bpd_loop`.

        Args:
            network: see `Network`.
            x_start: images of `levels` levels, float32 [B, C, H, W] in [-1, 1].
            noise: standard normal ε, of the same shape.
            numbers: number of each image's point, int64 [B] in 0..T-1, on the host.
            stands_for: number of steps that it represents, float32 [B]; see `spread_over_steps`.
            condition: the network's further inputs.

        Returns:
            float32 [B].
        """
        points = self.process.numbered(numbers)
        t, alpha, sigma = (part.float().to(x_start.device) for part in points)
        scale = self.process.input_scale(points.sigma).float().to(x_start.device)
        alpha, sigma, scale = (part.view(-1, 1, 1, 1) for part in (alpha, sigma, scale))
        posterior = Posterior(*self._posteriors[:, numbers].float().to(x_start.device).view(3, -1, 1, 1, 1))
        x_t = alpha * x_start + sigma * noise
        output, share = network(scale * x_t, t, condition).float().tensor_split([x_start.shape[1]], dim=1)
        estimate = self.prediction.x_start(output, x_t, Point(t, alpha, sigma)).clamp(-1, 1)
        is_last = (numbers == 0).view(-1, 1, 1, 1).to(x_start.device)
        share = (share + 1) / 2 if self.diffusion.learns_variance else SHARES[self.sample_options.variance] * ~is_last
        (last,) = points_of(self.process.numbered(torch.tensor([self.process.num_timesteps - 1])))
        # The noise at the start of sampling has the standard deviation max(1, σ).
        log_variance, beginning = 2 * math.log(last.sigma), 2 * math.log(max(1.0, last.sigma))
        before = bits(normal_kl(last.alpha * x_start, log_variance, beginning))
        step = _bound(posterior, is_last, x_start, estimate, share, self.levels)
        return before + stands_for.to(x_start.device) * step

    def weights(self, point: Point[Tensor]) -> Tensor:
        """Returns the weight of the squared error of the output, float64 [B]; the catalogue has it on that of x_0."""
        weighting, gamma = self.diffusion.weighting, self.diffusion.gamma
        if weighting == "plain":
            return torch.ones_like(point.sigma)
        snr = (point.alpha / point.sigma).square()
        on_x_start = {
            "snr": snr,
            "min_snr": snr.clamp(max=gamma),
            "soft_min_snr": snr * gamma / (snr + gamma),
            "flow": (1 + snr.sqrt()).square().clamp(max=MOST_FLOW_WEIGHT),
            "edm": snr + self.prediction.sigma_data**-2,
        }
        return on_x_start[weighting] / self.prediction.error_factor(point)


def _bound(
    posterior: Posterior[Tensor], is_last: Tensor, x_start: Tensor, estimate: Tensor, share: Tensor, levels: int
) -> Tensor:
    """Returns the bound's term at each step, bits per dimension [B] (Nichol & Dhariwal 2021, equations 5, 6 and 15)."""
    log_variance = share * posterior.log_large + (1 - share) * posterior.log_small
    kl = normal_kl(posterior.on_x_start * (x_start - estimate), posterior.log_small, log_variance)
    last = -log_likelihood_of_levels(x_start, estimate, log_variance, levels)
    return bits(torch.where(is_last.view(-1, 1, 1, 1), last, kl))


def posteriors(alpha: Tensor, sigma: Tensor) -> Posterior[Tensor]:
    """Returns the step from each of N > 1 points of growing noise to the point before or the clean image; float64."""
    ones, zeros = torch.ones_like(alpha[:1]), torch.zeros_like(sigma[:1])
    alpha_before, sigma_before = torch.cat([ones, alpha[:-1]]), torch.cat([zeros, sigma[:-1]])
    beta = sigma.square() - (alpha / alpha_before * sigma_before).square()
    small = beta * (sigma_before / sigma).square()
    return Posterior(
        on_x_start=alpha_before * beta / sigma.square(),
        log_small=torch.cat([small[1:2], small[1:]]).log(),
        log_large=beta.log(),
    )


def normal_kl(difference: Tensor, log_variance: Tensor | float, other: Tensor | float) -> Tensor:
    """Returns the KL divergence of normal distributions with this difference of means and these log-variances."""
    log_ratio = log_variance - other
    return (_exp(log_ratio) - 1 - log_ratio + difference.square() * _exp(-other)) / 2


def log_likelihood_of_levels(x: Tensor, mean: Tensor, log_variance: Tensor | float, levels: int = 256) -> Tensor:
    """Returns the log-probability of each pixel's level in a normal distribution (Ho et al. 2020, equation 13).

    Pixels `x` have this number of levels in [-1, 1], of which the outermost extend to infinity. It is exact to
    float32's precision, where Ho et al.'s code approximates the error function by tanh, and stops at ln 1e-12.
    """
    scale = _exp(-log_variance / 2)
    z, half = (x - mean) * scale, scale / (levels - 1)
    # By symmetry in the left tail, where the logarithm of a small probability keeps its digits.
    upper, lower = _log_ndtr(half - z.abs()), _log_ndtr(-half - z.abs())
    inside = upper + (-torch.expm1(lower - upper)).log()
    darkest, brightest = _log_ndtr(half + z), _log_ndtr(half - z)
    edge = 1 - 1 / (levels - 1)
    return torch.where(x < -edge, darkest, torch.where(x > edge, brightest, inside))


def _log_ndtr(x: Tensor) -> Tensor:
    """Returns the logarithm of the normal distribution's cumulative function; the host computes it for `mps`."""
    return torch.special.log_ndtr(x.to(exact_device(x.device))).to(x.device)


def bits(nats: Tensor) -> Tensor:
    """Returns nats of each value [B, C, H, W] as bits per dimension [B]."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def spread_over_steps(num_timesteps: int, images: int) -> tuple[Tensor, Tensor]:
    """Returns the step of the bound for each image, and the number of steps that it represents.

    With fewer images than steps, a step represents its neighbours: fewer of them at little noise, since the first steps
    are most of the bound.

    Returns:
        Numbers of points, int64 [images], and weights, float32 [images]: the mean over the images of bits times weights
        estimates the sum over all steps.
    """
    cells, edges = min(images, num_timesteps), [1]
    for cell in range(1, cells + 1):
        edges.append(max(edges[-1] + 1, round((num_timesteps + 1) ** (cell / cells))))
    firsts, ends = torch.tensor(edges[:-1]) - 1, torch.tensor(edges[1:]) - 1
    mine = torch.arange(images) % cells
    shares = images / mine.bincount()
    return ((firsts + ends - 1) // 2)[mine], ((ends - firsts) * shares)[mine].float()


def _exp(x: Tensor | float) -> Tensor | float:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)
