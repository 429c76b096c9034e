"""The application: all commands. A command without a request is a function here, whose parameters are its options."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ddpm.catalogue import SCHEDULES
from job.cli import Commands, command, group
from job.data.pack_request import EncodeRequest, EnsureRequest, IndexRequest, PackRequest
from job.exits import MissingInputError
from job.options import (
    AsJson,
    BucketUri,
    Certain,
    Checkpoints,
    Dataset,
    DatasetName,
    NetworkFile,
    OnTarget,
    Option,
    Preset,
    RunOption,
    Sets,
    SettingsFile,
    Size,
    Targets,
)
from job.progress import set_loudness
from job.requests import (
    EvaluateRequest,
    ExportRequest,
    ImportRequest,
    JobRequest,
    SampleRequest,
    SubmitRequest,
    TrainRequest,
)

app = typer.Typer(
    name="ddpm",
    cls=Commands,
    no_args_is_help=True,
    # Rich would read [/PREFIX] as markup, and --help would take three times as long.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data = group("Datasets: pack images, index tars, list, show, verify, delete.", "ddpm data pack ~/photos mine --size 64")
figure = group("Figures of the method: noise schedule and noised images.", "ddpm figure schedule")
runs = group("Runs: list, show, compare, verify, prune, delete.", "ddpm runs show celeba")
submit = group(
    "Start a command as a job, such as on a cluster or a cloud VM.", "ddpm submit train --dataset celeba --on local"
)
jobs = group("Submitted jobs: list, status, logs, cancel.", "ddpm jobs status train-celeba --on gke")

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
JobName = Annotated[str, Option("JOB", "Name of the job, such as train-celeba.")]
OnOneTarget = Annotated[str, Option("--on TARGET", "Target of the job. Default: search all targets of the file.")]
EXAMPLES: dict[type[JobRequest], str] = {
    TrainRequest: "--dataset celeba --on gke --gpus 8 --max-hours 48",
    SampleRequest: "--run celeba --count 50000 --slices 4 --on gke",
    EvaluateRequest: "--run celeba --count 50000 --on gke",
    PackRequest: "gs://photos/all.zip mine --size 64 --slices 8 --on gke",
    IndexRequest: "gs://theirs/{00000..00099}.tar laion --size 64 --on gke",
    EncodeRequest: "mine --autoencoder gs://models/vae --slices 8 --on gke",
}
"""The commands that can be jobs, each with an example."""


def _print_version(show: bool) -> None:
    if show:
        from job import __version__

        typer.echo(f"ddpm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also log each request to a bucket, with its duration.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")] = False,
) -> None:
    """Pack images, train a diffusion model (DDPM) on them and sample from it, in jobs that never lose work.

    All datasets and runs lie in a bucket: a folder, or a URI such as gs://NAME.

    Example: ddpm data pack photos.zip mine --size 64 && ddpm train --dataset mine
    """
    set_loudness(verbose=verbose, quiet=quiet)
    try:
        Path.cwd()
    except FileNotFoundError:
        # Without a working folder PyTorch's library of linear algebra does not load, and relative paths mean nothing.
        raise MissingInputError("the working folder is gone: use cd to change to one that exists") from None


def ddpm_train(request: TrainRequest) -> None:
    """Trains a run."""
    from job.processes.launcher import early_ranks
    from job.stop import deadline

    # The ranks inherit the deadline.
    with deadline(request.stop_after), early_ranks(request.processes, request.hang_after_seconds) as go:
        from job.commands import train_command

        train_command(request, go)


app.add_typer(data, name="data")
command(data, "pack", "job.commands:pack_command", PackRequest)
command(data, "index", "job.commands:pack_command", IndexRequest)
command(data, "encode", "job.commands:encode_command", EncodeRequest)
command(data, "ensure", "job.commands:ensure_command", EnsureRequest)
command(app, "train", ddpm_train, TrainRequest)
command(app, "sample", "job.commands:sample_command", SampleRequest)


@partial(command, app, "ema", "job.verbs.averages:make_averages")
def ema(
    name: RunOption,
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


command(app, "evaluate", "job.commands:evaluate_command", EvaluateRequest)
command(app, "import", "job.exchange.importing:import_run", ImportRequest)
command(app, "export", "job.exchange.exporting:export_run", ExportRequest)


@partial(command, app, "config", "job.verbs.settings:show_config")
def config(
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


app.add_typer(figure, name="figure")
app.add_typer(runs, name="runs")


@partial(command, app, "replay", "job.replay:replay_run")
def replay(
    name: RunName,
    image: Annotated[int, Option("--image N", "Number of images seen, a multiple of the batch size.", min=0)],
    to: Annotated[str, Option("--to DIR|URI", "New or empty folder for the state. Default: print hashes only.")] = "",
    verify: Annotated[
        bool, Option("--verify", "Begin before the checkpoint at N, and compare with it; 65 if they differ.")
    ] = False,
    network: NetworkFile = "",
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


@partial(command, app, "report", "job.report.bucket_page:write_report")
def ddpm_report(
    name: Annotated[str, Option("[RUN]", "Name of the run. Default: all runs.")] = "",
    open_it: Annotated[bool, Option("--open", "Open the page in the browser.")] = False,
    output: Annotated[
        Path | None, Option("--output -o HTML", "File to write, such as page.html. Default: in the bucket.")
    ] = None,
    bucket: BucketUri = "",
) -> None:
    """Write the page of a run, or of all runs.

    It is one HTML file that needs no network. A run writes its page, report.html in its folder, with each sample grid
    and at its end. This command updates it. Without RUN it writes report.html of the bucket: all runs with their newest
    grids, any of them compared.

    Example: ddpm report celeba --open
    """


app.add_typer(submit, name="submit")
app.add_typer(jobs, name="jobs")


@partial(command, app, "doctor", "job.jobs.doctor:check_target")
def doctor(
    on: OnTarget = "local",
    bucket: BucketUri = "",
    no_bucket: Annotated[bool, Option("--no-bucket", "Skip the checks of the bucket.")] = False,
    as_json: Annotated[bool, Option("--json", "Print all lines as JSON, at the end.")] = False,
    targets: Targets = None,
) -> None:
    """Check in seconds whether a target has all that a job needs.

    Prints one line per check, with the remedy. Exits with 0, or with the code that a job would have for the first check
    that failed.

    Example: ddpm doctor --on gke --bucket gs://my-bucket
    """


@partial(command, data, "list", "job.verbs.datasets:list_datasets")
def data_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the datasets in the bucket.

    Example: ddpm data list --bucket gs://my-bucket
    """


@partial(command, data, "show", "job.verbs.datasets:show_dataset")
def data_show(
    name: DatasetName,
    size: Size = None,
    output: Annotated[Path | None, Option("--output -o PNG", "File of the preview. Default: in the bucket.")] = None,
    open_it: Annotated[bool, Option("--open", "Open the preview in the browser.")] = False,
    as_json: AsJson = False,
    bucket: BucketUri = "",
) -> None:
    """Show the facts of a dataset, and a preview.

    Example: ddpm data show landscape-sample --open
    """


@partial(command, data, "verify", "job.verbs.datasets:verify_named")
def data_verify(name: DatasetName, size: Size = None, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every hash and image of a dataset.

    It names each damaged object.

    Example: ddpm data verify celeba --bucket gs://my-bucket
    """


@partial(command, data, "delete", "job.verbs.upkeep:delete_dataset")
def data_delete(name: DatasetName, size: Size = None, certain: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a dataset, or the remains of an unfinished one.

    Example: ddpm data delete mine --size 64 --yes
    """


@partial(command, runs, "list", "job.verbs.run_listing:list_runs")
def runs_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the runs in the bucket.

    Example: ddpm runs list --bucket gs://my-bucket
    """


@partial(command, runs, "show", "job.verbs.run_listing:show_run")
def runs_show(name: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Show state, progress, checkpoints and attempts of a run.

    It also prints the URI of its page, which has the pictures.

    Example: ddpm runs show celeba --bucket gs://my-bucket
    """


@partial(command, runs, "compare", "job.verbs.run_listing:compare_runs")
def runs_compare(
    first: RunName,
    second: Annotated[str, Option("OTHER", "Name of the run to compare with.")],
    since_epoch: Annotated[float, Option("--since-epoch EPOCH", "Leave out all epochs before this one.", min=0)] = 0.0,
    bucket: BucketUri = "",
) -> None:
    """Compare the losses of two runs of one seed, image by image.

    Such runs see the same images with the same noise at the same steps, so most of the random error cancels out. The
    command prints mean differences with standard errors: by quarter of the noise levels, and on held-out images.

    Example: ddpm runs compare celeba celeba-v --since-epoch 10
    """


@partial(command, runs, "verify", "job.verbs.upkeep:verify_named_run")
def runs_verify(name: RunName, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every object of a run, and name each that is corrupt.

    An object can be corrupt, truncated, missing or unknown. The command reads the whole run but its page once, also
    while it trains. It exits with 65 if it finds a problem.

    Example: ddpm runs verify celeba --bucket gs://my-bucket
    """


@partial(command, runs, "prune", "job.verbs.upkeep:prune_run")
def runs_prune(
    name: RunName,
    keep_last: Annotated[int | None, Option("--keep-last N", "Use N as checkpoint.keep_last.", min=1)] = None,
    dry_run: Annotated[bool, Option("--dry-run", "Only print what would be deleted, and why.")] = False,
    bucket: BucketUri = "",
) -> None:
    """Delete old checkpoints and the remains of killed attempts.

    The rules of the run decide. The command keeps the newest intact checkpoint and each one that another process reads.
    It refuses to work while the run trains.

    Example: ddpm runs prune celeba --keep-last 1 --dry-run
    """


@partial(command, runs, "delete", "job.verbs.upkeep:delete_run")
def runs_delete(name: RunName, certain: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a run: its checkpoints, pictures and metrics.

    The command refuses to work while another process trains the run or samples from it. The same command finishes an
    interrupted deletion.

    Example: ddpm runs delete celeba --yes
    """


@partial(command, figure, "schedule", "job.sampling.pictures:schedule_picture")
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


@partial(command, figure, "noising", "job.sampling.pictures:noising_picture")
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


for kind, example in EXAMPLES.items():
    words = " ".join(kind.command)
    command(
        submit,
        kind.command[-1],
        "job.jobs.submit:submit_command",
        kind,
        SubmitRequest,
        help=f"Start `ddpm {words}` as a job. It takes all options of `ddpm {words} --help`, and these.\n\n"
        f"Example: ddpm submit {kind.command[-1]} {example}",
    )


@partial(command, jobs, "list", "job.jobs.overview:list_jobs")
def jobs_list(on: OnOneTarget = "", as_json: AsJson = False, targets: Targets = None) -> None:
    """List the jobs on one target, or on all targets.

    Example: ddpm jobs list --on gke
    """


@partial(command, jobs, "status", "job.jobs.overview:show_job")
def jobs_status(
    name: JobName,
    on: OnOneTarget = "",
    targets: Targets = None,
    bucket_of_run: Annotated[str, Option("--bucket URI", "Bucket of its run. Default: the job's own.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show state, progress and attempts of a job.

    The engine reports the state of the job. The bucket holds the progress of its run and the attempts, also when the
    machine is gone.

    Example: ddpm jobs status train-celeba --on gke
    """


@partial(command, jobs, "logs", "job.jobs.overview:print_logs")
def jobs_logs(
    name: JobName,
    follow: Annotated[bool, Option("--follow -f", "Follow the output until the job ends, or Ctrl-C.")] = False,
    on: OnOneTarget = "",
    targets: Targets = None,
) -> None:
    """Print the output of a job.

    Example: ddpm jobs logs train-celeba --on gke -f
    """


@partial(command, jobs, "cancel", "job.jobs.overview:cancel_job")
def jobs_cancel(name: JobName, on: OnOneTarget = "", targets: Targets = None) -> None:
    """Stop a job. It saves first; the same submit command resumes it.

    Example: ddpm jobs cancel train-celeba --on gke
    """
