"""The meaning of a network's output: q x_0 + p ε, for a prediction of ε, x_0, v, the flow or EDM's F.

With x_t = α x_0 + σ ε this is one linear system, so one line recovers x_0 and one factor relates the errors.
"""

from dataclasses import dataclass

from torch import Tensor

from ddpm.catalogue import PREDICTIONS, Diffusion
from ddpm.process import Number, Point

CONSTANT = {"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}
"""(q, p) of the predictions that have the same at all points."""


@dataclass(frozen=True)
class Prediction:
    """A meaning of the output. Points have floats, or tensors that broadcast against the images."""

    kind: str
    sigma_data: float = Diffusion.sigma_data
    """Standard deviation of the images, for `edm`."""

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.kind!r}: choose one of {', '.join(PREDICTIONS)}")

    def coefficients(self, point: Point[Number]) -> tuple[Number | float, Number | float]:
        """Returns (q, p) at a point; for F those of Karras et al. 2022, table 1, for any α."""
        if self.kind in CONSTANT:
            return CONSTANT[self.kind]
        if self.kind == "v":
            return -point.sigma, point.alpha
        signal = point.alpha * self.sigma_data
        inverse_root = (point.sigma**2 + signal**2) ** -0.5
        return point.sigma * inverse_root / self.sigma_data, -signal * inverse_root

    def target(self, x_start: Tensor, noise: Tensor, point: Point[Number]) -> Tensor:
        """Returns the target of the output, in the images' shape [B, C, H, W]."""
        q, p = self.coefficients(point)
        return q * x_start + p * noise

    def x_start(self, output: Tensor, x_t: Tensor, point: Point[Number]) -> Tensor:
        """Returns the x_0 that an output for x_t implies, float32 [B, C, H, W]; ε implies no x_0 where α is 0."""
        q, p = self.coefficients(point)
        return (p * x_t - point.sigma * output) / (p * point.alpha - point.sigma * q)

    def error_factor(self, point: Point[Number]) -> Number | float:
        """Returns |output - target|² over |x̂_0 - x_0|²: SNR for ε, SNR + 1 for v, EDM's λ for F."""
        q, p = self.coefficients(point)
        return (q - p * point.alpha / point.sigma) ** 2
