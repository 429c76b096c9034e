"""The number formats of the network, and the scale of the loss that fp16 needs.

Weights, moments, averages and the loss itself are fp32; autocast computes the network in the format. fp16 has the
digits of bf16 and three more, and a small range: gradients below 6e-8 vanish in it, unless the loss is scaled
(Micikevicius et al. 2018).
"""

import math

import torch
from torch import Tensor

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats besides fp32, by the names of the settings."""
INITIAL_SCALE, GROWTH_STEPS = 65536.0, 2000
"""The defaults of `torch.amp.GradScaler`, whose rule `LossScale` follows with powers of two, which round nothing."""


def autocast(precision: str, device_type: str) -> torch.autocast:
    """Returns the context, or decorator, in which a network computes in a format of the settings; fp32: as it is."""
    return torch.autocast(device_type, FORMATS.get(precision), enabled=precision in FORMATS)


class LossScale:
    """The factor on the loss in fp16: halved at each overflow, doubled after `GROWTH_STEPS` steps without one.

    Attributes:
        values: the factor, the steps since it changed, and the steps that were left out since the run began; float32
            [3] on the device. They belong to the state: the next step depends on all three.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([INITIAL_SCALE, 0.0, 0.0], device=device)

    @property
    def left_out(self) -> int:
        """The number of steps that were left out. Waits for the device."""
        return int(self.values[2].item())

    def takes_step(self, norm: Tensor) -> bool:
        """Sets the factor of the next step, and returns whether this one is taken. Waits for the device.

        Args:
            norm: of the whole gradient, float32 []; not finite after an overflow. It is the same on all processes, as
                the gradient is, so that they agree.
        """
        found, factor, steps, left_out = torch.cat([norm.view(1), self.values]).tolist()
        is_finite, steps = math.isfinite(found), steps + 1
        if not is_finite:
            factor, steps, left_out = factor / 2, 0, left_out + 1
        elif steps == GROWTH_STEPS:
            factor, steps = factor * 2, 0
        self.values.copy_(torch.tensor([factor, steps, left_out]))
        return is_finite
