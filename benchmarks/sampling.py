"""Sampling: the painter of `ddpm sample` against diffusers' DDIM pipeline, at equal steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.measuring import Figure, Turns, take_turns
from benchmarks.subject import HALF_WIDTH, TINY, diffusers_twin, forget_accelerator, run_config
from ddpm.model import Sampling
from job.config import RunConfig
from job.processes import compute
from job.processes.ranks import Agreement, meet
from job.sampling.painter import Painter
from job.stop import NEVER

AT_LEAST = 1.8
AT_LEAST_OF_BEST = 1.1


def measure(quick: bool) -> list[Figure]:
    """Samples batches in turn from networks that stay warm: the peer at its defaults, and under autocast."""
    steps, batch_size = (2, 2) if quick else (10, 32)
    precision, sets = compute.best_precision(), TINY if quick else HALF_WIDTH
    peers = {"sample_ratio": (torch.float32, AT_LEAST), "sample_best_ratio": (torch.bfloat16, AT_LEAST_OF_BEST)}
    figures = []
    for key, (dtype, at_least) in peers.items():
        # Without instructions for it, bf16 is not the peer's best.
        if precision == "bf16" or dtype is torch.float32:
            turns = in_turn(sets, steps, batch_size, precision, turns=2 if quick else 3, dtype=dtype)
            ours, peer = (batch_size / median(times) for times in (turns.ours, turns.peer))
            in_dtype = str(dtype).removeprefix("torch.")
            figures.append(
                Figure(
                    key,
                    f"sampling: ours / diffusers' DDIM pipeline in {in_dtype}, ×",
                    turns.speedups,
                    at_least=at_least if precision == "bf16" else None,
                    beside=f"batch {batch_size}, {steps} steps: {ours:.2f} images/s in {precision}, peer {peer:.2f}",
                    raw=turns.raw() | {"batch_size_images": batch_size, "steps": steps, "precision": precision},
                )
            )
    return figures


def in_turn(
    sets: tuple[str, ...],
    steps: int,
    batch_size: int,
    precision: str,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
) -> Turns:
    """Times batches of a network with these settings; the peer computes in `dtype`, by autocast."""
    config = run_config(sets)
    painter, sampling = painter_of(config, precision), Sampling("ddim", steps, "leading")
    return take_turns(
        "drawing images",
        lambda: painter.sample_together(range(batch_size), sampling, batch_size, "our turn"),
        diffusers_sampler(diffusers_twin(painter.network, config), steps, batch_size, dtype),
        turns=turns,
        clock=clock,
    )


def painter_of(config: RunConfig, precision: str) -> Painter:
    """Returns the painter of `ddpm sample`, with initial weights."""
    forget_accelerator()
    return Painter(config, meet(NEVER), precision, Agreement(1, flags=1))


def diffusers_sampler(
    twin: Any, steps: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """Returns a function that draws a batch with diffusers' DDIM pipeline, on a CPU under autocast for another type."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline: Any = DDIMPipeline(twin.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")

    return draw
