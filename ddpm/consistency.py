"""Consistency training: a network that maps every point of a trajectory to its end, for sampling in one or two steps.

The two points of an image share its noise and its masks of dropout. All is written in σ/α, so that the points and the
estimates of any process and prediction serve: x_t/α is the x of a process whose variance explodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm import randomness
from ddpm.catalogue import GUIDED, STAGES, Consistency
from ddpm.conditions import without
from ddpm.networks.layers import repeat_dropout
from ddpm.objective import QUARTILES, UNCONDITIONAL, Condition, Drawn, Network, Objective
from ddpm.process import Point

NEARER_AT_LITTLE_NOISE = 8.0
"""k of the curriculum 1 + k sigmoid(-b t) with b = 1 (Geng et al. 2024, section 3.3 and their code)."""
TEACHER = "teacher"
"""The name of the average that keeps the first weights, with which the teacher guides."""


def stage_at(tuning: Consistency, images_seen: int) -> int:
    """Returns the stage of the curriculum, 0 to `STAGES` - 1, of the batch that begins after so many images."""
    assert tuning.stage_images, "the length of a stage follows from that of the run"
    return min(images_seen // tuning.stage_images, STAGES - 1)


@dataclass(frozen=True, eq=False)
class ConsistencyObjective(Objective):
    """The distance of two estimates of x_0 along a trajectory (Song et al. 2023, equation 9; Geng et al. 2024)."""

    tuning: Consistency = field(default_factory=Consistency)
    teacher: Network | None = None
    """A denoiser in evaluation mode, whose trajectories the network learns with `tuning.guidance` other than 1."""
    null_class: int = 0
    """The number of the class for images without a class, for guidance."""

    def draw(self, seed: int, image_numbers: Tensor, batch_size_images: int) -> Tensor:
        """Draws for each image a point with ratio σ/α = τ, log-normal, and one with less noise, ρ < τ.

        ρ = τ max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-τ))): in the first stages ρ is 0 at little noise, where the
        network learns to denoise; in the last it is nearly τ. The stage depends on the first image of the batch.

        Returns:
            float32 [10, B] on the host, for `Drawn.of`; `further` has t, α, σ and the input's scale at ρ, and σ = 0
            where the clean image is the target.
        """
        tuning, u = self.tuning, randomness.training_uniforms(seed, image_numbers)
        if self.diffusion.stratified:
            u = (image_numbers % batch_size_images + u) / batch_size_images
        last = self.process.numbered(torch.tensor([self.process.num_timesteps - 1]))
        log_ratio = tuning.draws_mean + tuning.draws_std * torch.special.ndtri(u)
        ratio = torch.minimum(log_ratio.exp(), last.sigma / last.alpha)
        stage = [stage_at(tuning, n - n % batch_size_images) for n in image_numbers.tolist()]
        gap = tuning.factor ** -(torch.tensor(stage, dtype=torch.float64) + 1)
        less = ratio * (1 - gap * (1 + NEARER_AT_LITTLE_NOISE * torch.sigmoid(-ratio))).clamp(min=0)
        point, is_clean = self.process.with_ratio(ratio), less == 0
        # A network has no input for a σ of 0, and its output there is not used.
        other = self.process.with_ratio(torch.where(is_clean, ratio, less))
        scales = self.process.input_scale(point.sigma), self.process.input_scale(other.sigma)
        weight = ratio**-2 + self.prediction.sigma_data**-2
        rows = *point, scales[0], weight, (u * QUARTILES).floor(), other.t, other.alpha
        return torch.stack([*rows, other.sigma * ~is_clean, scales[1]]).float()

    def losses(
        self,
        network: Network,
        x_start: Tensor,
        noise: Tensor,
        drawn: Drawn,
        condition: Condition = UNCONDITIONAL,
        conditions_on_itself: bool = False,
    ) -> Tensor:
        """Returns the loss of each image: the distance of the two estimates, of which the nearer one has no gradient.

        Returns:
            float32 [B]: (1/τ² + 1/σ_data²) (√(‖Δ‖² + c²) - c) with ‖Δ‖² averaged over the pixels: Geng et al.'s code
            has their sum, which is √(C H W) times as much.
        """
        assert drawn.further is not None
        t, alpha, sigma, scale = drawn.further
        point = Point(drawn.t, drawn.alpha, drawn.sigma)
        with torch.no_grad():
            end, direction = self._line(x_start, noise, point, drawn.input_scale, condition)
            estimate = self._estimate(network, end, direction, Point(t, alpha, sigma), scale, condition)
            target = torch.where(sigma.view(-1, 1, 1, 1) > 0, estimate, end)
        repeat_dropout()
        difference = self._estimate(network, x_start, noise, point, drawn.input_scale, condition) - target
        c = self.tuning.huber
        return drawn.weight * ((difference.square().mean(dim=(1, 2, 3)) + c**2).sqrt() - c)

    def _line(
        self, x_start: Tensor, noise: Tensor, at: Point[Tensor], scale: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Returns the x_0 and the noise of the nearer point.

        With a teacher this is Euler's step along its guided flow (Song et al. 2023, algorithm 2; Luo et al. 2023,
        "Latent Consistency Models", section 4.2): x_0 is D = D_null + w (D_cond - D_null), and the noise (x_t - α D)/σ.
        """
        if self.tuning.guidance == 1:
            return x_start, noise
        assert self.teacher is not None, "the unguided loss would be another one"
        less = without(condition, [(name, True) for name in GUIDED.values() if name], self.null_class)
        better, worse = (self._estimate(self.teacher, x_start, noise, at, scale, each) for each in (condition, less))
        end = worse + self.tuning.guidance * (better - worse)
        return end, noise + (at.alpha / at.sigma).view(-1, 1, 1, 1) * (x_start - end)

    def _estimate(
        self, network: Network, x_start: Tensor, noise: Tensor, at: Point[Tensor], scale: Tensor, condition: Condition
    ) -> Tensor:
        """Returns the network's x_0 for the images with this noise."""
        alpha, sigma, scale = (row.view(-1, 1, 1, 1) for row in (at.alpha, at.sigma, scale))
        x_t = alpha * x_start + sigma * noise
        return self.prediction.x_start(network(scale * x_t, at.t, condition).float(), x_t, Point(at.t, alpha, sigma))
