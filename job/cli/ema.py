"""`ddpm ema`."""

from typing import Annotated

import typer

from job.cli.options import BucketUri, Checkpoints, RunOption


def ddpm_ema(
    run: RunOption,
    std: Annotated[
        float,
        typer.Option(metavar="STD", min=0.001, max=0.28, help="Width: share of the training so far, such as 0.13."),
    ],
    checkpoints: Checkpoints = "latest",
    bucket: BucketUri = "",
) -> None:
    """Make an average of a run's weights after training.

    The command makes an EMA of another width from snapshots of other averages. A run keeps them if it has ema.stds and
    ema.snapshot_epochs. The average lies beside its checkpoint and is deleted with it. `ddpm sample --weights ema-STD`
    uses it.

    Example: ddpm ema --run celeba --std 0.13 --checkpoints 490
    """
    from job.verbs.averages import make_averages

    make_averages(bucket, run, std, checkpoints)
