"""The pipeline: datasets, runs and checkpoints in buckets, the command line, and how a job is started and stopped.

`job.load("gs://my-bucket/runs/celeba").sample(16, seed=0)` draws from a run.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.sampling.loading import load as load

__version__ = version("ddpm-job")

DEFAULT_BUCKET = "./bucket"
"""Where datasets and runs lie if nobody says it."""


def __getattr__(name: str) -> Any:
    # Every command imports this, and most need no tensors.
    if name == "load":
        from job.sampling.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
