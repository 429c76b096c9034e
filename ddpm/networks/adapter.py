"""Networks of users: a class with `__init__(image_shape, num_classes, …)` and `forward(x, t, labels=None)`.

Both may take more by name: `__init__` the numbers of `GIVEN`, `forward` the inputs of `Condition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.networks.layers import Dropout, dropout_of
from ddpm.objective import Condition

GIVEN = ("image_shape", "num_classes", "out_channels", "augmentation_labels", "condition_channels", "vector_size")
"""The arguments of `__init__` that follow from images and training: (C, H, W); the classes, with the one for images
without a class; the channels of the output; the width of `Condition.augmentation`; the channels of `Condition.image`;
the numbers in `Condition.vector`."""


def build_adapted(kind: type[nn.Module], settings: dict[str, Any], **given: Any) -> nn.Module:
    """Builds a network of a user as one of this package, whose parameters keep their names.

    Args:
        kind: its class.
        settings: further arguments of its `__init__`.
        given: all of `GIVEN`.
    """
    takes = signature(kind.__init__).parameters
    inputs = [name for name in Condition._fields if name in signature(kind.forward).parameters]

    class Adapted(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            answer: Tensor = super().forward(x, t, **{name: getattr(condition, name) for name in inputs})
            return answer

    Adapted.__name__ = Adapted.__qualname__ = kind.__name__
    network: nn.Module = Adapted(**{name: given[name] for name in GIVEN if name in takes}, **settings)
    for number, module in enumerate(network.modules()):
        if isinstance(module, Dropout):
            module.number = number
    return network


def check_adapted(network: nn.Module, image_shape: Sequence[int], out_channels: int, condition: Condition) -> None:
    """Checks that a network can train with equal bits after each resume, by one batch of noise on its device.

    Args:
        network: the network, in training mode. Its gradients are None afterwards.
        image_shape: (C, H, W) of the images.
        out_channels: channels of the output.
        condition: the inputs of the training, for two images.

    Raises:
        ValueError: the output has another shape, a parameter gets no gradient, a buffer changes, or the network draws
            random numbers.
    """
    device, images = next(network.parameters(), torch.empty(0)).device, 2
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(images, *image_shape, generator=generator).to(device), torch.rand(images, generator=generator)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    # A GPU's generator begins anew with each batch.
    before = torch.get_rng_state()
    with dropout_of(seed=0, first_image_number=0):
        output = network(x, t.to(device), condition)
    with dropout_of(seed=0, first_image_number=0), torch.no_grad():
        again = network(x, t.to(device), condition)
    wanted = [images, out_channels, *image_shape[1:]]
    found = [*output.shape] if isinstance(output, Tensor) else type(output).__name__
    if found != wanted:
        raise ValueError(f"forward returns {found} for x of {[*x.shape]}, and the training needs {wanted}")
    if changed := [name for name, buffer in network.named_buffers() if not torch.equal(buffer, buffers[name])]:
        why = "as batch normalisation does: the result would depend on the number of processes; use group normalisation"
        raise ValueError(f"forward changes the buffer {changed[0]}, {why}")
    # Other libraries have generators of their own.
    if not (torch.equal(before, torch.get_rng_state()) and torch.allclose(output, again, equal_nan=True)):
        why = "as nn.Dropout does: a resume would draw others; use ddpm.networks.layers.Dropout"
        raise ValueError(f"forward draws random numbers, {why}")
    output.float().square().mean().backward()
    unused = [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None]
    network.zero_grad(set_to_none=True)
    if unused:
        raise ValueError(
            f"forward does not use the parameter {unused[0]} ({len(unused):,} in all): it gets no gradient"
        )
