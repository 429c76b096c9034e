"""The device that computes: a GPU of CUDA, ROCm or Apple, or the CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_cpu_asked_for() -> bool:
    """Returns whether Accelerate's variable asks for the CPU. Imports no torch."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")


def best_device(processes: int = 1) -> torch.device:
    """Returns the first GPU, `cuda` for NVIDIA's and AMD's and `mps` for Apple's, else the CPU.

    Several processes of a Mac share its CPU: no backend of torch.distributed takes tensors of `mps`.
    """
    import torch

    if is_cpu_asked_for():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() and processes == 1 else "cpu")


def exact_device(device: torch.device | str) -> torch.device:
    """Returns the device that computes for another what must be exact: the CPU for `mps`, which has no float64."""
    import torch

    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
