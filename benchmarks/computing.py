"""Training and sampling: a step and a batch against diffusers', and the price of equal bits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from benchmarks.measuring import Figure, faster, in_turn, timed
from benchmarks.peers import DiffusersLoop, diffusers_sampler, diffusers_twin
from benchmarks.subject import HALF_WIDTH, TINY, OurLoop, pack_noise, painter_of, run_config
from ddpm.model import Sampling
from job.platform import usable_cores
from job.processes import compute
from job.processes.group import Group

IMAGES = 1024
STEP_AT_LEAST = 1.8
SAMPLE_AT_LEAST = {"sample_ratio": (torch.float32, 1.8), "sample_best_ratio": (torch.bfloat16, 1.1)}
"""By key the type in which the peer computes, and the target."""
EXACT_AT_MOST = 1.1


def training_step(folder: Path, quick: bool) -> list[Figure]:
    """Times our step and that of diffusers' example at its defaults in turn, on the same U-Net with EMA."""
    precision = compute.best_precision()
    ours, peer = both_loops(folder, precision, quick)
    took = in_turn("training steps", timed(peer=peer.step, ours=ours.step), 2 if quick else 5)
    ours.close()
    batch_size, parameters = ours.session.batch_size, sum(p.numel() for p in ours.session.state.model.parameters())
    return [
        faster(
            "training_step_ratio",
            "training step: diffusers' example / ours",
            took,
            at_least=STEP_AT_LEAST if precision == "bf16" else None,
            beside=f", in fp32 and {precision}: {parameters / 1e6:.1f} M parameters, batch {batch_size}",
            raw={"batch_size_images": batch_size, "parameters": parameters, "precision": precision},
        )
    ]


def both_loops(folder: Path, precision: str, quick: bool) -> tuple[OurLoop, DiffusersLoop]:
    """Returns our loop, and that of diffusers' example with the same initial weights."""
    pack_noise(str(folder / "bucket"), folder / "images", 32 if quick else IMAGES)
    ours = OurLoop(folder, precision, sets=TINY if quick else HALF_WIDTH)
    return ours, DiffusersLoop(ours.session.config, ours.session.state.model)


def sampling(folder: Path, quick: bool) -> list[Figure]:
    """Samples batches in turn from networks that stay warm: the peer at its defaults, and under autocast."""
    steps, batch_size = (2, 2) if quick else (10, 32)
    precision, sets = compute.best_precision(), TINY if quick else HALF_WIDTH
    figures = []
    for key, (dtype, at_least) in SAMPLE_AT_LEAST.items():
        # Without instructions for it, bf16 is not the peer's best.
        if precision == "bf16" or dtype is torch.float32:
            took = samples_in_turn(sets, steps, batch_size, precision, turns=2, dtype=dtype)
            figures.append(
                faster(
                    key,
                    f"sampling: ours / diffusers' DDIM pipeline in {str(dtype).removeprefix('torch.')}",
                    took,
                    at_least=at_least if precision == "bf16" else None,
                    beside=f" in {precision}: batch {batch_size}, {steps} steps",
                    raw={"batch_size_images": batch_size, "steps": steps, "precision": precision},
                )
            )
    return figures


def samples_in_turn(
    sets: tuple[str, ...],
    steps: int,
    batch_size: int,
    precision: str,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[float]]:
    """Times batches of a network with these settings; the peer computes in `dtype`, by autocast."""
    config = run_config(sets)
    painter, way = painter_of(config, precision), Sampling("ddim", steps, "leading")
    peer = diffusers_sampler(diffusers_twin(painter.network, config), steps, batch_size, dtype)
    draw = {"peer": peer, "ours": lambda: painter.sample_together(range(batch_size), way, batch_size, "our turn")}
    return in_turn("drawing images", timed(clock, **draw), turns)


def exact(folder: Path, quick: bool) -> list[Figure]:
    """Times steps by slots against PyTorch's threads and DDP in turn, and compares kernels on one and two threads."""
    figures = list[Figure]()
    pack_noise(str(folder / "bucket"), folder / "images", 32 if quick else IMAGES)
    for processes in (1, 2):
        other = "DDP" if processes > 1 else "PyTorch's threads"
        multiprocessing.spawn(_both_kinds, (Group.of(processes), folder, quick), processes)
        took = json.loads((folder / "took.json").read_text())
        what = f"exact step on {processes} process{'es' * (processes > 1)}: by slots / {other}, ×"
        costs = [slots / ddp for slots, ddp in zip(took["slots"], took["other"], strict=True)]
        beside = f"by slots {median(took['slots']):.3g} s, {other} {median(took['other']):.3g} s"
        figures.append(Figure(f"exact_cost_{processes}", what, costs, at_most=EXACT_AT_MOST, beside=beside, raw=took))
    return [*figures, *_kernels()]


def _both_kinds(rank: int, group: Group, folder: Path, quick: bool) -> None:
    os.environ.update(group.environment(rank))
    torch.set_num_threads(max(1, usable_cores() // group.processes))
    sets, precision = TINY if quick else HALF_WIDTH, compute.best_precision()
    slots, other = (OurLoop(folder, precision, sets=sets, exact=exact) for exact in ("true", "false"))
    assert slots.session.slots is not None and other.session.slots is None
    took = in_turn("exact steps", timed(other=other.step, slots=slots.step), 2 if quick else 5)
    if rank == 0:
        (folder / "took.json").write_text(json.dumps(took))
    for loop in (slots, other):
        loop.close()


def _kernels() -> list[Figure]:
    """Counts the kernels of a network whose bits depend on the number of threads, or of images beside."""
    torch.manual_seed(0)
    x, tokens = torch.randn(8, 64, 16, 16), torch.randn(8, 64, 256)
    weight, dense = torch.randn(64, 64, 3, 3), torch.randn(256, 256)
    kernels: dict[str, tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "convolution": (x, weight, lambda images, w: F.conv2d(images, w, padding=1)),
        "linear": (tokens, dense, F.linear),
        "attention": (tokens, dense, lambda images, w: F.scaled_dot_product_attention(images, images, images)),
        "group norm": (x, weight, lambda images, w: F.group_norm(images, 8)),
        "mean": (x, weight, lambda images, w: images.square().mean(dim=(1, 2, 3))),
        "norm of all": (x, weight, lambda images, w: images.norm()),
    }
    by: dict[str, dict[str, bool]] = {"threads": {}, "images": {}}
    usual = torch.get_num_threads()
    dtypes = [torch.float32] if compute.best_precision() == "fp32" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for name, (images, parameter, kernel) in kernels.items():
            parts = ("", ", gradient of the input", ", gradient of the weights")
            found = [_results(kernel, images, parameter, dtype, *how) for how in ((1, 8), (2, 8), (1, 2))]
            for part, one, two, few in zip(parts, *found, strict=True):
                if one is None:
                    continue
                key = f"{name}{part} in {str(dtype).removeprefix('torch.')}"
                by["threads"][key] = not torch.equal(one, two)
                # The gradient of the weights, and the norm of all images, mix them.
                if "weights" not in part and one.ndim and name != "norm of all":
                    by["images"][key] = not torch.equal(one[:2], few)
    torch.set_num_threads(usual)
    return [
        Figure(
            f"exact_kernels_by_{kind}",
            f"kernels whose bits depend on the number of {kind}, of {len(found)}",
            [float(sum(found.values()))],
            beside="; ".join(name for name, differs in found.items() if differs) or "not one",
            raw=found,
        )
        for kind, found in by.items()
    ]


def _results(
    kernel: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    parameter: Tensor,
    dtype: torch.dtype,
    threads: int,
    few: int,
) -> tuple[Any, ...]:
    """Returns what a kernel gives for the first few images on so many threads, and its gradients."""
    torch.set_num_threads(threads)
    given, weights = (one.to(dtype).detach().requires_grad_() for one in (images[:few].clone(), parameter))
    answer = kernel(given, weights)
    return answer, *torch.autograd.grad(answer.float().square().sum(), (given, weights), allow_unused=True)
