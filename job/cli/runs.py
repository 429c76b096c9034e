"""Runs and images: `ddpm train`, `sample`, `evaluate`, `runs`, `figure`, `replay`, `ema`, `report` and others."""

from pathlib import Path
from typing import Annotated

from ddpm.catalogue import SCHEDULES
from job.cli import command, group
from job.options import (
    AsJson,
    BucketUri,
    Certain,
    Checkpoints,
    Dataset,
    Option,
    Preset,
    RunOption,
    Sets,
    SettingsFile,
    Size,
)
from job.requests import SampleRequest, TrainRequest

app = group("Runs: list, show, compare, verify, prune, delete.", "ddpm runs show celeba")
figure = group("Figures of the method: noise schedule, noised images, denoising.", "ddpm figure schedule")

RunName = Annotated[str, Option("RUN", "Name of the run, such as celeba.")]
OfRun = Annotated[str, Option("--run NAME", "Show the run's own schedule.")]
Picture = Annotated[Path, Option("--output -o PNG", "File to write.")]
Schedule = Annotated[
    str,
    Option(
        "--schedule NAME",
        f"Noise schedule: {', '.join(SCHEDULES)}. Default: that of --run, else linear.",
        choices=tuple(SCHEDULES),
    ),
]


def ddpm_train(request: TrainRequest) -> None:
    """Trains a run."""
    from job.processes.launcher import early_ranks
    from job.stop import deadline

    # The ranks inherit the deadline.
    with deadline(request.stop_after), early_ranks(request.processes, request.hang_after_seconds) as go:
        from job.commands import train_command

        train_command(request, go)


@command(app, "list")
def runs_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the runs in the bucket.

    Example: ddpm runs list --bucket gs://my-bucket
    """
    from job.verbs.run_listing import list_runs

    list_runs(bucket, as_json=as_json)


@command(app, "show")
def runs_show(run: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Show state, progress, checkpoints and attempts of a run.

    It also prints the URIs of its page and pictures.

    Example: ddpm runs show celeba --bucket gs://my-bucket
    """
    from job.verbs.run_listing import show_run

    show_run(bucket, run, as_json=as_json)


@command(app, "compare")
def runs_compare(
    run: RunName,
    other: Annotated[str, Option("OTHER", "Name of the run to compare with.")],
    since_epoch: Annotated[float, Option("--since-epoch EPOCH", "Leave out all epochs before this one.", min=0)] = 0.0,
    bucket: BucketUri = "",
) -> None:
    """Compare the losses of two runs of one seed, image by image.

    Such runs see the same images with the same noise at the same steps, so most of the random error cancels out. The
    command prints mean differences with standard errors: by quarter of the noise levels, and on held-out images.

    Example: ddpm runs compare celeba celeba-v --since-epoch 10
    """
    from job.verbs.run_listing import compare_runs

    compare_runs(bucket, run, other, since_epoch)


@command(app, "verify")
def runs_verify(run: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every object of a run, and name each that is corrupt.

    An object can be corrupt, truncated, missing or unknown. The command reads the whole run but its page once, also
    while it trains. It exits with 65 if it finds a problem.

    Example: ddpm runs verify celeba --bucket gs://my-bucket
    """
    from job.verbs.upkeep import verify_named_run

    verify_named_run(bucket, run, as_json=as_json)


@command(app, "prune")
def runs_prune(
    run: RunName,
    keep_last: Annotated[int | None, Option("--keep-last N", "Use N as checkpoint.keep_last.", min=1)] = None,
    dry_run: Annotated[bool, Option("--dry-run", "Only print what would be deleted, and why.")] = False,
    bucket: BucketUri = "",
) -> None:
    """Delete old checkpoints and the remains of killed attempts.

    The rules of the run decide. The command keeps the newest intact checkpoint and each one that another process reads.
    It refuses to work while the run trains.

    Example: ddpm runs prune celeba --keep-last 1 --dry-run
    """
    from job.verbs.upkeep import prune_run

    prune_run(bucket, run, keep_last=keep_last, dry_run=dry_run)


@command(app, "delete")
def runs_delete(run: RunName, yes: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a run: its checkpoints, pictures and metrics.

    The command refuses to work while another process trains the run or samples from it. The same command finishes an
    interrupted deletion.

    Example: ddpm runs delete celeba --yes
    """
    from job.verbs.upkeep import delete_run

    delete_run(bucket, run, certain=yes)


def ddpm_replay(
    run: RunName,
    image: Annotated[int, Option("--image N", "Number of images seen, a multiple of the batch size.", min=0)],
    to: Annotated[str, Option("--to DIR|URI", "New or empty folder for the state. Default: print hashes only.")] = "",
    verify: Annotated[
        bool, Option("--verify", "Begin before the checkpoint at N, and compare with it; 65 if they differ.")
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
    from job.replay import replay_run

    replay_run(bucket, run, image, to, verify=verify)


def ddpm_ema(
    run: RunOption,
    std: Annotated[
        float, Option("--std STD", "Width: share of the training so far, such as 0.13.", min=0.001, max=0.28)
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


def ddpm_report(
    run: Annotated[str, Option("[RUN]", "Name of the run. Default: all runs.")] = "",
    open_it: Annotated[bool, Option("--open", "Open the page in the browser.")] = False,
    output: Annotated[
        Path | None, Option("--output -o FILE", "File to write, such as page.html. Default: in the bucket.")
    ] = None,
    bucket: BucketUri = "",
) -> None:
    """Write the page of a run, or of all runs.

    It is one HTML file that needs no network. A run writes its page, report.html in its folder, with each sample grid
    and at its end. This command updates it. Without RUN it writes report.html of the bucket: all runs with their newest
    grids, any of them compared.

    Example: ddpm report celeba --open
    """
    from job.report.bucket_page import write_report

    write_report(bucket, run, open_it, output)


def ddpm_config(
    begin: Annotated[str, Option("KEYS", "Only the keys that begin so, such as train or train.adam.")] = "",
    preset: Preset = "",
    sets: Sets = (),
    config_file: SettingsFile = None,
    list_all: Annotated[bool, Option("--list", "List all keys with their values and meanings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the configuration of a new run, or with --list all keys.

    The column `from` has the source of each value. --set overrides --config FILE, which overrides the preset. The
    dataset sets some more values, such as data.size.

    Examples:

        ddpm config --list

        ddpm config --list train

        ddpm config --preset celeba --set train.batch_size=64
    """
    from job.config import list_keys, show_config

    if list_all:
        list_keys(begin, as_json=as_json)
    else:
        show_config(preset, sets, config_file, begin, as_json=as_json)


@command(figure, "schedule")
def figure_schedule(
    run: OfRun = "",
    schedule: Schedule = "",
    timesteps: Annotated[
        int | None, Option("--timesteps N", "Diffusion steps T. Default: those of --run, else 1000.", min=2, max=10_000)
    ] = None,
    output: Picture = Path("schedule.png"),
    bucket: BucketUri = "",
) -> None:
    """Plot β and ᾱ over the timesteps.

    The schedules edm and flow have no β: the plot shows their σ and α.

    Examples:

        ddpm figure schedule --schedule cosine -o cosine.png

        ddpm figure schedule --run celeba
    """
    from job.sampling.pictures import schedule_picture

    schedule_picture(bucket, run, schedule, timesteps, output)


@command(figure, "noising")
def figure_noising(
    dataset: Dataset = "",
    run: OfRun = "",
    image: Annotated[
        int | None, Option("--image NUMBER", "Show this one image of the dataset, such as 0, at growing t.", min=0)
    ] = None,
    timesteps: Annotated[
        str, Option("--timesteps LIST", "Timesteps from 0 to T-1, such as 0,99,499: one for each tile.")
    ] = "",
    schedule: Schedule = "",
    size: Size = None,
    output: Picture = Path("noising.png"),
    bucket: BucketUri = "",
) -> None:
    """Show images beside their noised versions q(x_t|x_0).

    With --run, schedule and dataset are those of the run. Without --image the command shows twelve images, each at
    another t; two more files beside the figure hold the images alone and the noised images alone.

    Examples:

        ddpm figure noising --dataset landscape-sample

        ddpm figure noising --run celeba --image 3
    """
    from job.sampling.pictures import noising_picture

    noising_picture(bucket, run, dataset, size, schedule=schedule, timesteps=timesteps, image=image, output=output)


@command(figure, "denoising")
def figure_denoising(
    run: RunOption,
    seeds: Annotated[str, Option("--seeds LIST", "One image per seed, such as 0-11; at most 12.")] = "",
    bucket: BucketUri = "",
) -> None:
    """Make a GIF of a run's network turning noise into images.

    The GIF shows the newest checkpoint, in up to 20 frames at 5 per second. It lies in the run's folder in the bucket.

    Example: ddpm figure denoising --run landscape-sample
    """
    from job.commands import sample_command

    sample_command(SampleRequest(run, bucket=bucket, seeds=seeds, gif=True, with_grid=False))
