"""The price of equal bits: a step by slots against one by DDP; and the kernels whose bits depend on threads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from benchmarks.measuring import Figure, Turns, take_turns
from benchmarks.training_step import OurLoop, pack_for_loops
from job.processes import compute
from job.processes.group import Group, usable_cores

AT_MOST = 1.1
PROCESSES = (1, 2)


def measure(quick: bool) -> list[Figure]:
    """Times steps of both kinds in turn in the same processes, and compares kernels on one and two threads."""
    precision, figures = compute.best_precision(), list[Figure]()
    with TemporaryDirectory(prefix="ddpm-bench-") as name:
        folder = Path(name)
        pack_for_loops(folder, quick)
        for processes in PROCESSES:
            group = Group.of(processes)
            multiprocessing.spawn(_both_kinds, (group, folder, quick, precision), processes)
            found = json.loads((folder / "turns.json").read_text())
            turns = Turns(found["by_slots"], found["by_ddp"])
            by_slots, by_ddp = median(turns.ours), median(turns.peer)
            figures.append(
                Figure(
                    f"exact_cost_{processes}",
                    f"exact step on {processes} process{'es' * (processes > 1)}: by slots / {found['other']}, ×",
                    [1 / speedup for speedup in turns.speedups],
                    at_most=AT_MOST,
                    beside=f"{found['slots']} slots {by_slots:.3g} s, {found['other']} {by_ddp:.3g} s in {precision}",
                    raw=turns.raw() | {"slots": found["slots"]},
                )
            )
    return [*figures, *_kernels()]


def _both_kinds(rank: int, group: Group, folder: Path, quick: bool, precision: str) -> None:
    os.environ.update(group.environment(rank))
    torch.set_num_threads(max(1, usable_cores() // group.processes))
    exact, other = (OurLoop(folder, quick, precision, exact=exact) for exact in ("true", "false"))
    turns = take_turns("exact steps", exact.step, other.step, 2 if quick else 5, 1 if quick else 2)
    slots = exact.session.slots
    assert slots is not None and other.session.slots is None
    if rank == 0:
        name = "DDP" if group.processes > 1 else "PyTorch's threads"
        found = {"by_slots": turns.ours, "by_ddp": turns.peer, "slots": slots.count, "other": name}
        (folder / "turns.json").write_text(json.dumps(found))
    for loop in (exact, other):
        loop.close()


def _kernels() -> list[Figure]:
    """Counts the kernels of a network whose bits depend on the number of threads, or of images beside."""
    torch.manual_seed(0)
    x, tokens = torch.randn(8, 64, 16, 16), torch.randn(8, 64, 256)
    weight, dense = torch.randn(64, 64, 3, 3), torch.randn(256, 256)

    kernels: dict[str, tuple[Tensor, Tensor | None, Callable[[Tensor, Tensor], Tensor]]] = {
        "convolution": (x, weight, lambda images, w: F.conv2d(images, w, padding=1)),
        "linear": (tokens, dense, F.linear),
        "attention": (tokens, dense, lambda images, w: F.scaled_dot_product_attention(images, images, images)),
        "group norm": (x, weight, lambda images, w: F.group_norm(images, 8)),
        "mean": (x, weight, lambda images, w: images.square().mean(dim=(1, 2, 3))),
        "norm of all": (x, weight, lambda images, w: images.norm()),
    }
    by_threads, by_images = dict[str, bool](), dict[str, bool]()
    usual = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and compute.best_precision() == "fp32":
            continue
        for name, (images, parameter, kernel) in kernels.items():
            found = {}
            for threads, count in ((1, 8), (2, 8), (1, 2)):
                torch.set_num_threads(threads)
                given, w = (each.to(dtype).detach().requires_grad_() for each in (images[:count].clone(), parameter))
                answer = kernel(given, w)
                gradients = torch.autograd.grad(answer.float().square().sum(), (given, w), allow_unused=True)
                found[threads, count] = [answer, *gradients]
            for part, place in (("", 0), (", gradient of the input", 1), (", gradient of the weights", 2)):
                one, two, few = (found[key][place] for key in ((1, 8), (2, 8), (1, 2)))
                if one is None:
                    continue
                key = f"{name}{part} in {str(dtype).removeprefix('torch.')}"
                by_threads[key] = not torch.equal(one, two)
                # The norm of all images mixes them.
                if place < 2 and one.ndim and name != "norm of all":
                    by_images[key] = not torch.equal(one[:2], few)
    torch.set_num_threads(usual)
    return [
        Figure(
            f"exact_kernels_by_{kind}",
            f"kernels whose bits depend on the number of {kind}, of {len(found)}",
            [float(sum(found.values()))],
            beside="; ".join(name for name, differs in found.items() if differs) or "not one",
            raw=found,
        )
        for kind, found in (("threads", by_threads), ("images", by_images))
    ]
