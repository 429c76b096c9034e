"""Sampling: the painter of `ddpm sample` against diffusers' DDIM pipeline at its defaults, at equal steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.measuring import Figure, Turns, take_turns
from benchmarks.subject import HALF_WIDTH, TINY, diffusers_twin, forget_accelerator, run_config
from ddpm.generation import Sampling
from job.config import RunConfig
from job.processes import compute
from job.processes.ranks import Agreement, meet
from job.sampling.painter import Painter
from job.stop import NEVER

AT_LEAST = 1.7


def measure(quick: bool) -> list[Figure]:
    """Samples batches in turn from networks that stay warm."""
    steps, batch_size = (2, 2) if quick else (10, 32)
    precision = compute.best_precision()
    turns = in_turn(TINY if quick else HALF_WIDTH, steps, batch_size, precision, turns=2 if quick else 3)
    ours, peer = (batch_size / median(times) for times in (turns.ours, turns.peer))
    return [
        Figure(
            "sample_ratio",
            "sampling: ours / diffusers' DDIM pipeline, ×",
            turns.speedups,
            at_least=AT_LEAST if precision == "bf16" else None,
            beside=f"batch {batch_size}, {steps} steps: {ours:.2f} images/s in {precision}, "
            f"peer {peer:.2f} images/s in fp32",
            raw={
                **turns.raw(),
                "batch_size_images": batch_size,
                "steps": steps,
                "precision": precision,
                "our_images_per_second": ours,
                "peer_images_per_second": peer,
            },
        )
    ]


def in_turn(
    sets: tuple[str, ...],
    steps: int,
    batch_size: int,
    precision: str,
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Times batches of a network with these settings."""
    config = run_config(sets)
    painter, sampling = painter_of(config, precision), Sampling("ddim", steps, "leading")
    return take_turns(
        "drawing images",
        lambda: painter.draw_together(range(batch_size), sampling, batch_size, "our turn"),
        diffusers_sampler(diffusers_twin(painter.network, config), steps, batch_size),
        turns=turns,
        clock=clock,
    )


def painter_of(config: RunConfig, precision: str) -> Painter:
    """Returns the painter of `ddpm sample`, with initial weights."""
    forget_accelerator()
    return Painter(config, meet(NEVER), precision, NEVER, Agreement(1, flags=1))


def diffusers_sampler(twin: Any, steps: int, batch_size: int) -> Callable[[], object]:
    """Returns a function that draws a batch with diffusers' DDIM pipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline: Any = DDIMPipeline(twin.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")
