"""The hardware of a process: device, precision, memory, speed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch
from torch import nn

from ddpm import memory
from ddpm.catalogue import Train
from ddpm.slots import Slots, kernels_of
from job.config import RunConfig
from job.config.method import condition_of_zeros
from job.platform import system_version, usable_cores
from job.processes.ranks import Ranks, own_device

_BF16 = ("avx512_bf16", "amx_bf16")
"""The instructions with which a CPU computes in bf16."""
_FP16_CAPABILITY = (7, 0)
"""The compute capability from which on NVIDIA's GPUs compute fast in fp16: V100, T4, RTX 20."""
_MOST_SLOTS = 8
"""The most slots of a batch by default: each costs a pass, and a CPU keeps gradients for each thread."""
_SLOT_IMAGES = 8
"""The images of a slot from which on its overhead is small, though all threads of a CPU have slots."""


def best_precision() -> Literal["fp32", "bf16", "fp16"]:
    """Returns bf16 where the hardware computes in it, else fp16 on a GPU; elsewhere autocast would only be slower."""
    device = own_device().type
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability() >= _FP16_CAPABILITY else "fp32"
    # Nobody has measured whether autocast pays on Apple's GPUs.
    if device == "mps":
        return "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in _BF16) else "fp32"


def suited(batch_size_images: int) -> dict[str, Any]:
    """Returns the settings that suit this machine, for a run that leaves them open, by key.

    Slots are at least as many as the CPU has threads, or eight, and then as many as the batch has parts of eight
    images: they cost nothing that sharing a batch among threads does not cost anyway.
    """
    cores = usable_cores() if own_device().type == "cpu" else 1
    slots = min(_MOST_SLOTS, batch_size_images, max(cores, batch_size_images // _SLOT_IMAGES))
    found = {"train.precision": best_precision(), "train.slots": slots, "train.slot_threads": max(1, cores // slots)}
    # A GPU runs out of memory by an error, a CPU mostly by a kill, which leaves nothing to decide.
    return found | ({"train.micro_batch_size": "auto"} if own_device().type != "cpu" else {})


def memory_of_gpu_gib() -> float:
    """Returns the memory in GiB of the smallest GPU of this machine; 0 without one, or if the CPU is asked for."""
    gpus = range(torch.cuda.device_count() if own_device().type == "cuda" else 0)
    return min((float(torch.cuda.get_device_properties(i).total_memory) / 2**30 for i in gpus), default=0.0)


def slots_of(train: Train, ranks: Ranks) -> Slots | None:
    """Returns the slots that the processes share; None if they add gradients in an order of their own."""
    is_wanted = ranks.device.type == "cpu" if train.exact is None else train.exact
    if not is_wanted or not train.slots or train.slots < ranks.world_size:
        return None
    return Slots(train.slots, train.batch_size, ranks.rank, ranks.world_size)


def describe_device(device: torch.device, train: Train, is_exact: bool = False, of_averages: str | None = None) -> str:
    """Returns `NVIDIA H100 80GB HBM3, torch 2.9.1`: all that rounding depends on, except the number of processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) + ", compiled" * train.compile
        if of_averages == "cpu":
            name += ", averages on the CPU"
    elif device.type == "mps":
        name = f"{torch.backends.mps.get_name()} (mps), {system_version()}"
    else:
        kernels = kernels_of(train.precision)
        name = f"CPU with {torch.backends.cpu.get_cpu_capability()}, kernels {kernels}"
        if not is_exact:
            # Each thread adds up a part, so that their number decides about rounding.
            name = f"{torch.get_num_threads()}-thread {name}"
    if is_exact:
        threads = f" of {train.slot_threads} threads" if device.type == "cpu" else ""
        name += f", {train.slots} slots{threads}"
    if isinstance(train.micro_batch_size, int):
        name += f", {train.micro_batch_size:,} images at once"
    return f"{name}, torch {torch.__version__}"


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak of a GPU's memory since the last call; what Apple's holds; on a CPU that of the process."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def fitting_images(model: nn.Module, config: RunConfig, images: int, ranks: Ranks) -> int:
    """Returns the most images, at most `images`, whose pass fits the memory of every process, by halving. Collective.

    The passes are those of the model without DDP: a process that failed inside of DDP's backward would leave the others
    waiting. They are not compiled either, and need more: DDP would not overlap its sums with a graph that was compiled
    before. The second one meets the gradients of the first, as micro-batches do.

    Raises:
        torch.OutOfMemoryError: one image does not fit some process.
    """
    while True:
        failed = False
        try:
            for _ in range(2):
                _pass(model.forward, config, images, ranks.device)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            failed = True
        model.zero_grad()
        if not (failures := ranks.sum(failed)[0]):
            return images
        memory.free()
        if images == 1:
            raise torch.OutOfMemoryError(f"one image does not fit {failures} of {ranks.world_size} processes")
        images = (images + 1) // 2


def settle_buckets(network: nn.Module, config: RunConfig, images: int, device: torch.device) -> None:
    """Makes DDP lay out its gradient buckets as it will keep them, by a pass whose gradients are dropped. Collective.

    DDP lays them out after the first pass of an attempt. Sums over three or more processes depend on the layout: a
    resumed run would be rounded otherwise than an uninterrupted one. The pass has as many images as a step: for another
    number the network would be compiled once more.
    """
    _pass(network, config, images, device)
    network.zero_grad()


def _pass(network: Callable[..., torch.Tensor], config: RunConfig, images: int, device: torch.device) -> None:
    """Passes black images forward and backward through a network."""
    x = torch.zeros(images, *config.image_shape, device=device)
    condition = condition_of_zeros(config, images, device)
    network(x, torch.zeros(images, device=device), condition).sum().backward()


def why_slow(step_seconds: float, waited_seconds: float) -> str:
    """Returns the likely cause of a slow step, `waited_seconds` of which it waited for images, and a remedy."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if waited_seconds > step_seconds / 2:
        return "it waited for images: the bucket or the disk of the cache is slow"
    if load > 1.5 * cores:
        return f"{load:.0f} threads share the {cores} cores of this machine: `top` shows their processes"
    return "look for a throttled processor or GPU (`nvidia-smi -q -d PERFORMANCE`) and for swapped memory (`vmstat 1`)"
