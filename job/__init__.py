"""The pipeline: datasets, runs and checkpoints in buckets, the command line, and the start and stop of jobs.

`job.train("~/photos", size=64, epochs=20)` trains from Python, and `job.load("gs://my-bucket/runs/celeba").sample(16)`
samples from a run. `job.python` has these functions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.python import Run, evaluate, export, pack, sample, submit, train
    from job.sampling.painter import load_run

    __version__: str
    load = load_run

__all__ = ["Run", "evaluate", "export", "load", "pack", "sample", "submit", "train"]


def __getattr__(name: str) -> Any:
    # Every command imports this module. Without late imports each would load PyTorch, and the parser of the version.
    if name == "__version__":
        from importlib.metadata import version

        return version("ddpm-job")
    if name == "load":
        from job.sampling.painter import load_run

        return load_run
    if name in __all__:
        from job import python

        return getattr(python, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
