"""DDIM written down once more, as a judge of what is drawn."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.objective import Condition
from job.config import method
from job.runs.checkpoints import list_checkpoints, load_weights
from job.runs.records import existing_config
from job.store import open_store

Estimate = Callable[[Tensor, float, float], Tensor]
"""(x_t, t, ᾱ_t) → x_0."""


def ddim_50(estimate: Estimate, x: Tensor) -> Tensor:
    """All steps of DDIM's equation 12 on the cosine schedule of 50 timesteps (Nichol & Dhariwal 2021)."""
    curve = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(51)]
    alphas_cumprod = np.cumprod([max(after / before, 0.001) for before, after in pairwise(curve)])
    for t, after in pairwise(range(49, -2, -1)):
        now, then = alphas_cumprod[t], alphas_cumprod[after] if after >= 0 else 1.0
        x_start = estimate(x, float(t), now)
        x = then**0.5 * x_start + (1 - then) ** 0.5 * (x - now**0.5 * x_start) / (1 - now) ** 0.5
    return x


def estimate_of(bucket: Path, run: str, labels: Tensor | None, checkpoint: int = -1, weights: str = "ema") -> Estimate:
    """What the averaged weights of a run that predicts v estimate."""
    store = open_store(str(bucket))
    network, folder = method.build_network(existing_config(store, run), torch.device("cpu")).eval(), f"runs/{run}"
    load_weights(store.sub(folder), list_checkpoints(store.sub(folder))[checkpoint], weights, network)

    @torch.no_grad()
    def estimate(x: Tensor, t: float, alphas_cumprod: float) -> Tensor:
        v = network(x, torch.full((len(x),), t), Condition(labels))
        return alphas_cumprod**0.5 * x - (1 - alphas_cumprod) ** 0.5 * v

    return estimate
