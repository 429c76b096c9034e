"""Sampling from the run `walk`, for tests of what is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from job.config.method import sampling_of
from job.processes.ranks import Agreement, meet
from job.requests import SampleRequest
from job.sampling.painter import Painter
from job.sampling.sampling_plan import plan_sampling
from job.stop import NEVER
from tests.job.command_line import ddpm_here, settings, succeeded
from tests.job.conftest import MadeOnce

Draw = Callable[..., np.ndarray]


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
        return painter.sample_together(seeds, sampling_of(plan.config.sample), batch_size, "test").astype(np.int16)

    return draw
