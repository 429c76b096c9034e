"""Sampling from the run `walk`, for tests of what is drawn, and DDIM written down once more as a judge of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from ddpm.objective import Condition
from job.config import method
from job.processes.ranks import Agreement, meet
from job.requests import SampleRequest
from job.runs.checkpoints import list_checkpoints, load_weights
from job.runs.records import existing_config
from job.sampling.painter import Painter
from job.sampling.sampling_plan import plan_sampling
from job.stop import NEVER
from job.store import open_store
from tests.job.command_line import ddpm_here, settings, succeeded
from tests.job.conftest import MadeOnce

Draw = Callable[..., np.ndarray]
Estimate = Callable[[Tensor, float, float], Tensor]
"""(x_t, t, ᾱ_t) → x_0."""


@pytest.fixture(scope="session")
def learned(walked: Path, made_once: MadeOnce) -> Path:
    """A bucket like `walked` with a run `all` beside, of all that a network can learn; not to be changed."""
    learnt = {"model__label_dropout": "0.3", "diffusion__self_conditioning": "true", "train__learning_rate": "0.01"}
    kept = {"checkpoint__keep_last": "1", "checkpoint__keep_epochs": "1", "sample__nearest": "false"}
    sets = settings(diffusion__variance="learned_range", **learnt, **kept)

    def fill(folder: Path) -> None:
        shutil.copytree(walked, folder)
        words = ("--dataset", "tiles", "--run", "all", "--bucket", folder, "--epochs", 2)
        succeeded(ddpm_here("train", *words, *sets))

    return made_once("learned", fill)


@pytest.fixture
def draw(learned: Path) -> Draw:
    """Draws seeds with the newest averaged weights: int16 [n, 16, 16, 3]."""

    def draw(seeds, batch_size, precision="fp32", run="walk", **chosen) -> np.ndarray:
        AcceleratorState._reset_state(reset_partial_state=True)
        plan = plan_sampling(SampleRequest(run, bucket=str(learned), chosen=chosen))
        painter = Painter(plan.config, meet(NEVER), precision, Agreement(1, flags=1))
        painter.load(plan.run, plan.checkpoints[0], "ema")
        if plan.worse:
            painter.load_worse(plan.worse)
        sampling = method.sampling_of(plan.config.sample)
        return painter.sample_together(seeds, sampling, batch_size, "test").astype(np.int16)

    return draw


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
