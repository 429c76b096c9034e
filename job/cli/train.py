"""`ddpm train`."""

from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import (
    DEFAULT_HANG_AFTER,
    BucketUri,
    Dataset,
    HangAfter,
    Preset,
    Processes,
    Sets,
    SettingsFile,
    StopAfter,
)

_FROM = "Begin a new run with the weights of another: a name, or a URI such as gs://theirs/runs/celeba@490."


def ddpm_train(
    dataset: Dataset,
    run: Annotated[
        str, typer.Option(metavar="NAME", help="Default: the dataset's name.", autocompletion=completion.runs)
    ] = "",
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train up to this epoch, counted from the start of the run.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="RUN[@EPOCH]", help=_FROM, autocompletion=completion.runs)
    ] = None,
    weights: Annotated[str, typer.Option(metavar="NAME", help="For --from: ema, ema-STD, model. Default: ema.")] = "",
    preset: Preset = "",
    sets: Sets = None,
    config: SettingsFile = None,
    tracker: Annotated[
        str, typer.Option(metavar="NAME", help="Also send the metrics to wandb or mlflow; none: stop sending.")
    ] = "",
    processes: Processes = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Wait this long if another process holds the run.")
    ] = 0.0,
    open_page: Annotated[
        bool,
        typer.Option(
            "--open", help="Open the run's page in a browser: it reloads itself, unless its bucket is remote."
        ),
    ] = False,
    hang_after: HangAfter = DEFAULT_HANG_AFTER,
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
) -> None:
    """Train a run, or resume it: the same command does both.

    The command continues from the newest intact checkpoint, on every GPU of the machine. Ctrl-C saves, and exits
    with 75.

    Examples:

        ddpm train --dataset celeba --bucket gs://my-bucket

        ddpm train --dataset mine --epochs 200 --set train.batch_size=64

        ddpm train --dataset mine --epochs 20 --from celeba@490 --set train.learning_rate=2e-5
    """
    from job.processes.launcher import early_ranks
    from job.stop import deadline

    # The ranks inherit the deadline.
    with deadline(stop_after), early_ranks(processes, hang_after) as go:
        from job.commands import train_command
        from job.requests import TrainRequest

        request = TrainRequest(
            dataset=dataset,
            bucket=bucket,
            run=run,
            preset=preset,
            epochs=epochs,
            sets=tuple(sets or ()),
            config_file=config,
            wait_seconds=wait,
            tracker=tracker,
            open_page=open_page,
            from_=from_,
            weights=weights,
        )
        train_command(request, processes, hang_after, stop_after, go)
