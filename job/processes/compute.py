"""The hardware a process runs on: device, precision, memory layout, and the Accelerate object that knows them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ddpm.unet import UNet
from job.config import RunConfig
from job.processes.group import rendezvous_seconds

if TYPE_CHECKING:
    from accelerate import Accelerator


def best_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the hardware computes in it; elsewhere autocast would only be slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def build_accelerator(precision: str, deterministic: bool = False) -> Accelerator:
    """Joins the process group, if there is one, and picks this process's device.

    Args:
        precision: `fp32` or `bf16`.
        deterministic: ask for bit-equal kernels.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=rendezvous_seconds())),
        ],
    )


def describe_device(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3, torch 2.9.1`: all that rounding depends on, but for the number of processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return f"{name}, torch {torch.__version__}"


def _cpu_name() -> str:
    with suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1].strip()
    return platform.machine() or "CPU"


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
