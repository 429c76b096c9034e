"""`ddpm runs`: list, show, compare, verify, prune, delete."""

from typing import Annotated

import typer

from job import DEFAULT_BUCKET
from job.cli import completion
from job.cli.options import AsJson, BucketUri, Certain

app = typer.Typer(
    help="Runs in the bucket: how they are going, whether they are whole.\n\nExample: ddpm runs show celeba",
    no_args_is_help=True,
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of the run, such as celeba.", autocompletion=completion.runs)
]


@app.command("list")
def runs_list(as_json: AsJson = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """List the runs in the bucket.

    Example: ddpm runs list --bucket gs://my-bucket
    """
    from job.runs.listing import list_runs

    list_runs(bucket, as_json=as_json)


@app.command("show")
def runs_show(run: RunName, as_json: AsJson = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """Show a run: state, progress, checkpoints, attempts, where its pictures lie.

    Example: ddpm runs show celeba --bucket gs://my-bucket
    """
    from job.runs.listing import show_run

    show_run(bucket, run, as_json=as_json)


@app.command("compare")
def runs_compare(
    first: RunName,
    second: Annotated[
        str,
        typer.Argument(metavar="OTHER", help="Name of the run to compare it with.", autocompletion=completion.runs),
    ],
    since_epoch: Annotated[float, typer.Option(metavar="EPOCH", min=0, help="Leave out what was before.")] = 0.0,
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Compare the losses of two runs of one seed, image by image.

    Such runs see the same images with the same noise at the same steps, so that luck cancels out: the error beside the
    difference is what is left of it. By quarter of the draws, from least to most noise, and on held-out images.

    Example: ddpm runs compare celeba celeba-v --since-epoch 10
    """
    from job.runs.comparison import compare_runs

    compare_runs(bucket, first, second, since_epoch)


@app.command("verify")
def runs_verify(run: RunName, as_json: AsJson = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """Check every object of a run, and name each that is not as it was written.

    One may be rotten, cut off, missing, swapped or foreign. Reads all of the run once, also while it trains. Ends with
    65 if anything is wrong.

    Example: ddpm runs verify celeba --bucket gs://my-bucket
    """
    from job.runs.listing import verify_named_run

    verify_named_run(bucket, run, as_json=as_json)


@app.command("prune")
def runs_prune(
    run: RunName,
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the newest. Default: the run's checkpoint.keep_last.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would go, and why.")] = False,
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Delete old checkpoints, as the run's rules have it, and leftovers.

    Leftovers are what killed attempts left behind. Never the newest checkpoint that verifies, nor one that is being
    read. Refused while the run trains.

    Example: ddpm runs prune celeba --keep-last 1 --dry-run
    """
    from job.runs.removal import prune_run

    prune_run(bucket, run, keep_last=keep_last, dry_run=dry_run)


@app.command("delete")
def runs_delete(run: RunName, yes: Certain = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """Delete a run: its checkpoints, pictures and metrics, or what is left of one.

    Refused while somebody trains it or samples from it.

    Example: ddpm runs delete celeba --yes
    """
    from job.runs.removal import delete_run

    delete_run(bucket, run, certain=yes)
