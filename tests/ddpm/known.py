"""Noise by its number, normal images, of which denoiser and flow are known, and small networks of every kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import networks
from ddpm.catalogue import NETWORKS
from ddpm.objective import Condition
from ddpm.process import Point, Process, points_of

SHAPE = (2, 3, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def no_noise(draw: int) -> Tensor:
    raise AssertionError("the sampler asks for noise")


def levels(values: Tensor) -> Tensor:
    """Rounded to one of 256 levels."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def point_of(process: Process, number: int) -> Point[float]:
    return points_of(process.numbered(torch.tensor([number])))[0]


@dataclass(frozen=True)
class Gaussian:
    """Images of independent pixels from one normal distribution."""

    mean: float = 0.3
    std: float = 0.4

    def std_at(self, point: Point[float]) -> float:
        """The deviation of x_t."""
        return ((point.alpha * self.std) ** 2 + point.sigma**2) ** 0.5

    def denoise(self, x: Tensor, point: Point[float]) -> Tensor:
        """E[x_0 | x_t]."""
        gain = point.alpha * self.std**2 / self.std_at(point) ** 2
        return self.mean + gain * (x - point.alpha * self.mean)

    def flow(self, x: Tensor, start: Point[float], end: Point[float]) -> Tensor:
        """Where the probability flow leads: the same quantile of the distribution at `end`."""
        return end.alpha * self.mean + self.std_at(end) / self.std_at(start) * (x - start.alpha * self.mean)


SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": 8, "channel_mults": (1, 2), "attention_sizes": (8,), "layers_per_level": 1, "norm_groups": 4},
    "edm2": {"channels": 8, "channel_mults": (1, 2), "attention_sizes": (8,), "layers_per_level": 1}
    | {"head_channels": 8},
    "dit": {"width": 16, "depth": 2, "heads": 2},
    "dome": {},
}
"""Options of a small network of each kind; dome's has one size."""
TOLD = tuple(kind for kind, network in NETWORKS.items() if network.takes_estimates)
"""The kinds that take estimates and labels of augmentation."""


def build(kind: str, **changes: Any) -> nn.Module:
    """A small network with weights that leave no branch at zero and keep activations of order one."""
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": 0}
    network = networks.build(kind, **{**shape, **SMALL.get(kind, {}), **changes})
    randomise(network)
    return network


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Gives each weight a variance of one over its inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def inputs(channels: int = 3, size: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor]:
    """Four images of this height and width, and their timesteps."""
    return normal(1, (4, channels, *size), torch.float32), torch.tensor([0.0, 0.2, 17.0, 999.0])


def assert_equal_gradients(
    ours: nn.Module,
    output: Tensor,
    theirs: nn.Module,
    expected: Tensor,
    names: Callable[[str], list[str]] = lambda name: [name],
) -> None:
    """Compares the gradients of both outputs' squares; several of their parameters may stand for one of ours."""
    output.square().mean().backward()
    expected.square().mean().backward()
    known = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = torch.stack([known[there] for there in names(name)]).sum(dim=0)
        scale = gradient.abs().max().item()
        # A constant that is added to all keys moves no attention weight: its gradient is rounding alone.
        rounding = 1e-7 if name.endswith("to_k.bias") else 1e-8
        assert scale > rounding or name.endswith("to_k.bias"), name
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * scale + rounding, msg=name)


def of_classes(*labels: int) -> Condition:
    return Condition(torch.tensor(labels))
