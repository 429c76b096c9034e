"""The hardware a process runs on: device, precision, memory layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from ddpm.unet import UNet
from job.config import RunConfig


def best_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the hardware computes in it; elsewhere autocast would only be slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def describe_device(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3, torch 2.9.1`: all that rounding depends on, but for the number of processes."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}"


def build_network(config: RunConfig, device: torch.device) -> UNet:
    """The U-Net of a resolved configuration, initialised from the run's seed, in the layout that suits the device."""
    assert config.data.size is not None and config.data.channels is not None
    torch.manual_seed(config.train.seed)
    network = UNet(
        image_size=config.data.size,
        in_channels=config.data.channels,
        **config.model.model_dump(exclude={"num_classes"}),
        num_classes=config.model.num_classes or 0,
    ).to(device)
    if device.type == "cuda":
        # channels_last wins on GPUs and loses on CPUs (oneDNN picks its own layout there).
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]] | None:
    """A bf16 autocast context for sampling, or none for fp32."""
    if precision != "bf16":
        return None
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
