"""`ddpm jobs`: list, status, logs, cancel."""

from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import AsJson, Targets

app = typer.Typer(
    help="Jobs that were submitted: how they are going, what they print, and how to stop them.\n\n"
    "Example: ddpm jobs status train-celeba --on gke",
    no_args_is_help=True,
)

JobName = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Name of the job, such as train-celeba.", autocompletion=completion.jobs),
]
OnOneTarget = Annotated[
    str, typer.Option(metavar="TARGET", help="Where it is. Default: all targets of the file are asked.")
]


@app.command("list")
def list_(on: OnOneTarget = "", as_json: AsJson = False, targets: Targets = None) -> None:
    """List the jobs on a target, or on all of them.

    Example: ddpm jobs list --on gke
    """
    from job.jobs.overview import Search, list_jobs

    list_jobs(Search(on, targets), as_json=as_json)


@app.command()
def status(
    job: JobName,
    on: OnOneTarget = "",
    targets: Targets = None,
    bucket: Annotated[str, typer.Option(metavar="URI", help="Where its run lies. Default: the target's bucket.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show how a job is going, also when its machine is gone.

    The engine tells about the job, the run's folder in the bucket about its progress and its attempts.

    Example: ddpm jobs status train-celeba --on gke
    """
    from job.jobs.overview import Search, show_job

    show_job(job, Search(on, targets), bucket, as_json=as_json)


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over, or Ctrl-C.")] = False,
    on: OnOneTarget = "",
    targets: Targets = None,
) -> None:
    """Print what a job printed.

    Example: ddpm jobs logs train-celeba --on gke -f
    """
    from job.jobs.overview import Search, print_logs

    print_logs(job, Search(on, targets), follow=follow)


@app.command()
def cancel(job: JobName, on: OnOneTarget = "", targets: Targets = None) -> None:
    """Stop a job: it saves first, and the same submit goes on from there.

    Example: ddpm jobs cancel train-celeba --on gke
    """
    from job.jobs.overview import Search, cancel_job

    cancel_job(job, Search(on, targets))
