"""The pipeline: datasets, runs and checkpoints in buckets, the command line, and the start and stop of jobs.

`job.load("gs://my-bucket/runs/celeba").sample(16, seed=0)` samples from a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.sampling.painter import load_run

    __version__: str
    load = load_run


def __getattr__(name: str) -> Any:
    # Every command imports this module. Without late imports each would load PyTorch, and the parser of the version.
    if name == "__version__":
        from importlib.metadata import version

        return version("ddpm-job")
    if name == "load":
        from job.sampling.painter import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
