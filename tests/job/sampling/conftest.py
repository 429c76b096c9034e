"""Drawing from the run `walk`, for tests of what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from job.method import sampling_of
from job.processes.ranks import Agreement, meet
from job.requests import SampleRequest
from job.sampling.painter import Painter
from job.sampling.plan import plan_sampling
from job.stop import NEVER

Draw = Callable[..., np.ndarray]


@pytest.fixture
def draw(walked: Path) -> Draw:
    """Draws seeds with the newest averaged weights: int16 [n, 16, 16, 3]."""

    def draw(seeds, batch_size, precision="fp32", **chosen) -> np.ndarray:
        AcceleratorState._reset_state(reset_partial_state=True)
        plan = plan_sampling(SampleRequest("walk", str(walked)))
        painter = Painter(plan.config, meet(NEVER), precision, NEVER, Agreement(1, flags=1))
        painter.load(plan.run, plan.checkpoints[0], "ema")
        sampling = sampling_of(plan.sample.model_copy(update=chosen))
        return painter.draw(seeds, sampling, batch_size, "test").astype(np.int16)

    return draw
