"""`ddpm runs`: list, show."""

from typing import Annotated

import typer

from job.cli.options import DEFAULT_BUCKET, Bucket

app = typer.Typer(help="Runs in the bucket: how they are going.", no_args_is_help=True)


@app.command("list")
def list_(bucket: Bucket = DEFAULT_BUCKET) -> None:
    """List the runs in the bucket."""
    from job.overview import list_runs

    list_runs(bucket)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    bucket: Bucket = DEFAULT_BUCKET,
) -> None:
    """Show a run: state, progress, checkpoints, attempts, where its pictures lie.

    Example: ddpm runs show celeba --bucket gs://my-bucket
    """
    from job.overview import show_run

    show_run(bucket, run)
