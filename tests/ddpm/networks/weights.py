"""Weights and inputs that show a wrong network, where fresh weights would give zeros."""

import torch
from torch import Tensor, nn


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Weights that leave no branch at zero and keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def inputs(channels: int = 3, shape: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor]:
    """Four images of this height and width, and their timesteps."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, *shape, generator=generator), torch.tensor([0.0, 0.2, 17.0, 999.0])
