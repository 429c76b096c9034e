"""`ddpm runs`: list, show, compare, verify, prune, delete; and `ddpm replay`."""

from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import AsJson, BucketUri, Certain

app = typer.Typer(
    help="Runs: list, show, compare, verify, prune, delete.\n\nExample: ddpm runs show celeba",
    no_args_is_help=True,
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of the run, such as celeba.", autocompletion=completion.runs)
]


@app.command("list")
def runs_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the runs in the bucket.

    Example: ddpm runs list --bucket gs://my-bucket
    """
    from job.verbs.run_listing import list_runs

    list_runs(bucket, as_json=as_json)


@app.command("show")
def runs_show(run: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Show state, progress, checkpoints and attempts of a run.

    It also prints the URIs of its page and pictures.

    Example: ddpm runs show celeba --bucket gs://my-bucket
    """
    from job.verbs.run_listing import show_run

    show_run(bucket, run, as_json=as_json)


@app.command("compare")
def runs_compare(
    first: RunName,
    second: Annotated[
        str, typer.Argument(metavar="OTHER", help="Name of the run to compare with.", autocompletion=completion.runs)
    ],
    since_epoch: Annotated[
        float, typer.Option(metavar="EPOCH", min=0, help="Leave out all epochs before this one.")
    ] = 0.0,
    bucket: BucketUri = "",
) -> None:
    """Compare the losses of two runs of one seed, image by image.

    Such runs see the same images with the same noise at the same steps, so most of the random error cancels out. The
    command prints mean differences with standard errors: by quarter of the noise levels, and on held-out images.

    Example: ddpm runs compare celeba celeba-v --since-epoch 10
    """
    from job.verbs.run_listing import compare_runs

    compare_runs(bucket, first, second, since_epoch)


@app.command("verify")
def runs_verify(run: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every object of a run, and name each that is corrupt.

    An object can be corrupt, truncated, missing or unknown. The command reads the whole run but its page once, also
    while it trains. It exits with 65 if it finds a problem.

    Example: ddpm runs verify celeba --bucket gs://my-bucket
    """
    from job.verbs.run_listing import verify_named_run

    verify_named_run(bucket, run, as_json=as_json)


@app.command("prune")
def runs_prune(
    run: RunName,
    keep_last: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use N as checkpoint.keep_last.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted, and why.")] = False,
    bucket: BucketUri = "",
) -> None:
    """Delete old checkpoints and the remains of killed attempts.

    The rules of the run decide. The command keeps the newest intact checkpoint and each one that another process reads.
    It refuses to work while the run trains.

    Example: ddpm runs prune celeba --keep-last 1 --dry-run
    """
    from job.verbs.removal import prune_run

    prune_run(bucket, run, keep_last=keep_last, dry_run=dry_run)


@app.command("delete")
def runs_delete(run: RunName, yes: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a run: its checkpoints, pictures and metrics.

    The command refuses to work while another process trains the run or samples from it. The same command finishes an
    interrupted deletion.

    Example: ddpm runs delete celeba --yes
    """
    from job.verbs.removal import delete_run

    delete_run(bucket, run, certain=yes)


def ddpm_replay(
    run: RunName,
    image: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of images seen, a multiple of the batch size.")
    ],
    to: Annotated[
        str, typer.Option(metavar="DIR|URI", help="New or empty folder for the state. Default: print hashes only.")
    ] = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Begin before the checkpoint at N, and compare with it; 65 if they differ.")
    ] = False,
    bucket: BucketUri = "",
) -> None:
    """Recompute the state of a run after N images.

    The command restores weights, averages and optimiser from the nearest checkpoint before, and trains again up to N,
    without a change to the run. It prints the SHA-256 of each file that a checkpoint at N would have. On the code and
    the kind of device of the run these are its exact bits; otherwise the command says that they may differ. `ddpm
    import` makes a run from the folder.

    Examples:

        ddpm replay celeba --image 1280000

        ddpm replay celeba --image 1280000 --to celeba-at-1280000

        ddpm replay celeba --image 2048000 --verify --bucket gs://my-bucket
    """
    from job.training.replay import replay_run

    replay_run(bucket, run, image, to, verify=verify)
