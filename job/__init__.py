"""The pipeline: datasets, runs and checkpoints in buckets, the command line, and how a job is started and stopped."""

from importlib.metadata import version

__version__ = version("ddpm-job")

DEFAULT_BUCKET = "./bucket"
"""Where datasets and runs lie if nobody says it."""
