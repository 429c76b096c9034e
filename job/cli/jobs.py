"""`ddpm jobs`: list, status, logs, cancel."""

from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import AsJson, Targets

app = typer.Typer(
    help="Submitted jobs: list, status, logs, cancel.\n\nExample: ddpm jobs status train-celeba --on gke",
    no_args_is_help=True,
)

JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="Name of the job, such as train-celeba.", autocompletion=completion.jobs)
]
OnOneTarget = Annotated[
    str, typer.Option(metavar="TARGET", help="Target of the job. Default: search all targets of the file.")
]


@app.command("list")
def list_(on: OnOneTarget = "", as_json: AsJson = False, targets: Targets = None) -> None:
    """List the jobs on one target, or on all targets.

    Example: ddpm jobs list --on gke
    """
    from job.jobs.overview import Search, list_jobs

    list_jobs(Search(on, targets), as_json=as_json)


@app.command()
def status(
    job: JobName,
    on: OnOneTarget = "",
    targets: Targets = None,
    bucket: Annotated[str, typer.Option(metavar="URI", help="Bucket of its run. Default: the job's own.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show state, progress and attempts of a job.

    The engine reports the state of the job. The bucket holds the progress of its run and the attempts, also when the
    machine is gone.

    Example: ddpm jobs status train-celeba --on gke
    """
    from job.jobs.overview import Search, show_job

    show_job(job, Search(on, targets), bucket, as_json=as_json)


@app.command()
def logs(
    job: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the output until the job ends, or Ctrl-C.")
    ] = False,
    on: OnOneTarget = "",
    targets: Targets = None,
) -> None:
    """Print the output of a job.

    Example: ddpm jobs logs train-celeba --on gke -f
    """
    from job.jobs.overview import Search, print_logs

    print_logs(job, Search(on, targets), follow=follow)


@app.command()
def cancel(job: JobName, on: OnOneTarget = "", targets: Targets = None) -> None:
    """Stop a job. It saves first; the same submit command resumes it.

    Example: ddpm jobs cancel train-celeba --on gke
    """
    from job.jobs.overview import Search, cancel_job

    cancel_job(job, Search(on, targets))
