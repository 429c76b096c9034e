"""The application: all commands, of which those about runs are in `runs`. Each imports its work late, and calls it."""

from pathlib import Path
from typing import Annotated

import typer

from job.cli import Commands, command, group, late, runs
from job.data.pack_request import EncodeRequest, EnsureRequest, IndexRequest, PackRequest
from job.exchange.exchange_requests import ExportRequest, ImportRequest
from job.exits import MissingInputError
from job.options import AsJson, BucketUri, Certain, DatasetName, OnTarget, Option, Size, Targets
from job.progress import set_loudness
from job.requests import EvaluateRequest, JobRequest, SampleRequest, SubmitRequest, TrainRequest

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
jobs = group("Submitted jobs: list, status, logs, cancel.", "ddpm jobs status train-celeba --on gke")
submit = group(
    "Start a command as a job, such as on a cluster or a cloud VM.", "ddpm submit train --dataset celeba --on local"
)
app.add_typer(data, name="data")
command(data, "pack", PackRequest)(late("job.commands:pack_command"))
command(data, "index", IndexRequest)(late("job.commands:pack_command"))
command(data, "encode", EncodeRequest)(late("job.commands:encode_command"))
command(data, "ensure", EnsureRequest)(late("job.commands:ensure_command"))
command(app, "train", TrainRequest)(runs.ddpm_train)
command(app, "sample", SampleRequest)(late("job.commands:sample_command"))
command(app, "ema")(runs.ddpm_ema)
command(app, "evaluate", EvaluateRequest)(late("job.commands:evaluate_command"))
command(app, "import", ImportRequest)(late("job.exchange.importing:import_run"))
command(app, "export", ExportRequest)(late("job.exchange.exporting:export_run"))
command(app, "config")(runs.ddpm_config)
app.add_typer(runs.figure, name="figure")
app.add_typer(runs.app, name="runs")
command(app, "replay")(runs.ddpm_replay)
command(app, "report")(runs.ddpm_report)
app.add_typer(submit, name="submit")
app.add_typer(jobs, name="jobs")

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


@command(data, "list")
def data_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the datasets in the bucket.

    Example: ddpm data list --bucket gs://my-bucket
    """
    from job.verbs.datasets import list_datasets

    list_datasets(bucket, as_json=as_json)


@command(data, "show")
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
    from job.verbs.datasets import show_dataset

    show_dataset(bucket, name, size, output, open_it=open_it, as_json=as_json)


@command(data, "verify")
def data_verify(name: DatasetName, size: Size = None, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every hash and image of a dataset.

    It names each damaged object.

    Example: ddpm data verify celeba --bucket gs://my-bucket
    """
    from job.verbs.datasets import verify_named

    verify_named(bucket, name, size, as_json=as_json)


@command(data, "delete")
def data_delete(name: DatasetName, size: Size = None, yes: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a dataset, or the remains of an unfinished one.

    Example: ddpm data delete mine --size 64 --yes
    """
    from job.verbs.upkeep import delete_dataset

    delete_dataset(bucket, name, size, yes)


for kind, example in EXAMPLES.items():
    words = " ".join(kind.command)
    command(
        submit,
        kind.command[-1],
        kind,
        SubmitRequest,
        help=f"Start `ddpm {words}` as a job. It takes all options of `ddpm {words} --help`, and these.\n\n"
        f"Example: ddpm submit {kind.command[-1]} {example}",
    )(late("job.jobs.submit:submit_command"))


@command(jobs, "list")
def jobs_list(on: OnOneTarget = "", as_json: AsJson = False, targets: Targets = None) -> None:
    """List the jobs on one target, or on all targets.

    Example: ddpm jobs list --on gke
    """
    from job.jobs.overview import Search, list_jobs

    list_jobs(Search(on, targets), as_json=as_json)


@command(jobs, "status")
def jobs_status(
    job: JobName,
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
    from job.jobs.overview import Search, show_job

    show_job(job, Search(on, targets), bucket_of_run, as_json=as_json)


@command(jobs, "logs")
def jobs_logs(
    job: JobName,
    follow: Annotated[bool, Option("--follow -f", "Follow the output until the job ends, or Ctrl-C.")] = False,
    on: OnOneTarget = "",
    targets: Targets = None,
) -> None:
    """Print the output of a job.

    Example: ddpm jobs logs train-celeba --on gke -f
    """
    from job.jobs.overview import Search, print_logs

    print_logs(job, Search(on, targets), follow=follow)


@command(jobs, "cancel")
def jobs_cancel(job: JobName, on: OnOneTarget = "", targets: Targets = None) -> None:
    """Stop a job. It saves first; the same submit command resumes it.

    Example: ddpm jobs cancel train-celeba --on gke
    """
    from job.jobs.overview import Search, cancel_job

    cancel_job(job, Search(on, targets))


@command(app, "doctor")
def ddpm_doctor(
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
    from job.jobs.doctor import checks_of, report
    from job.jobs.targets import target_on
    from job.progress import note

    target = target_on(on, targets, note)
    if code := report(checks_of(target, "" if no_bucket else bucket), as_json):
        raise SystemExit(int(code))
