"""The pipeline: datasets, runs and checkpoints in buckets, the command line, and the start and stop of jobs.

`job.load("gs://my-bucket/runs/celeba").sample(16, seed=0)` samples from a run.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.sampling.loading import load as load

__version__ = version("ddpm-job")

DEFAULT_BUCKET = "./bucket"
"""The bucket if neither an option, a variable nor a target names one."""


def __getattr__(name: str) -> Any:
    # Every command imports this module. Without the late import each would load PyTorch.
    if name == "load":
        from job.sampling.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
