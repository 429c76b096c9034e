"""The hardware a process runs on: device, precision, memory layout."""

from __future__ import annotations

import os
from typing import Literal

import psutil
import torch
from torch import nn

from ddpm.objective import Condition
from job.config import RunConfig


def best_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the hardware computes in it; elsewhere autocast would only be slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def describe_device(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3, torch 2.9.1`: all that rounding depends on, but for the number of processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        # Each thread adds up a part.
        name = f"{torch.get_num_threads()}-thread CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}"


def peak_memory_bytes(device: torch.device) -> int:
    """What tensors took of a GPU's memory at most since this was asked last; of the machine's what the process has."""
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def settle_buckets(network: nn.Module, config: RunConfig, images: int, device: torch.device) -> None:
    """Has DDP lay out its buckets as it will keep them, by a pass whose gradients are dropped. Collective.

    It does so after the first pass of an attempt. Sums over three processes and more depend on the layout, and so a run
    that was resumed would be rounded otherwise than one that was not. With as many images as a step has: for another
    number of them the network would be compiled once more.
    """
    size, channels = config.data.size, config.data.channels
    assert size is not None and channels is not None
    x = torch.zeros(images, channels, size, size, device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device) if config.model.num_classes else None
    estimate = x if config.diffusion.self_conditioning else None
    network(x, torch.zeros(images, device=device), Condition(labels, estimate)).sum().backward()
    network.zero_grad()


def why_slow(step_seconds: float, waited_seconds: float) -> str:
    """The likely cause of a step that took so long, of which it waited for images, and what to look at."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if waited_seconds > step_seconds / 2:
        return "it waited for images, so the bucket or the disk of the cache is slow"
    if load > 1.5 * cores:
        return f"{load:.0f} threads want the {cores} cores of this machine; `top` shows whose they are"
    return "look for a throttled processor or GPU (`nvidia-smi -q -d PERFORMANCE`) and for swapped memory (`vmstat 1`)"
