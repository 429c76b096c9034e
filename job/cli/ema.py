"""`ddpm ema`."""

from typing import Annotated

import typer

from job import DEFAULT_BUCKET
from job.cli.options import BucketUri, Checkpoints, RunOption


def ddpm_ema(
    run: RunOption,
    std: Annotated[
        float, typer.Option(metavar="STD", min=0.001, max=0.28, help="Width, as a share of the training so far.")
    ],
    checkpoints: Checkpoints = "latest",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Make an average of a run's weights that was not kept while it trained.

    It is put together from snapshots of other averages, which a run keeps with ema.stds and ema.snapshot_epochs, and
    lies beside its checkpoint, with which it goes. `ddpm sample --weights ema-STD` draws from it.

    Example: ddpm ema --run celeba --std 0.13 --checkpoints 490
    """
    from job.runs.averages import make_averages

    make_averages(bucket, run, std, checkpoints)
