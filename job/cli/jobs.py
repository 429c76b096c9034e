"""Jobs on other machines: `ddpm submit`, `jobs` and `doctor`."""

from typing import Annotated

import typer

from job.cli import command
from job.data.pack_request import EncodeRequest, IndexRequest, PackRequest
from job.options import AsJson, BucketUri, OnTarget, Option, Targets
from job.requests import EvaluateRequest, JobRequest, SampleRequest, SubmitRequest, TrainRequest

app = typer.Typer(
    help="Submitted jobs: list, status, logs, cancel.\n\nExample: ddpm jobs status train-celeba --on gke",
    no_args_is_help=True,
)
submit_app = typer.Typer(
    help="Start a command as a job, such as on a cluster or a cloud VM.\n\n"
    "Example: ddpm submit train --dataset celeba --on local",
    no_args_is_help=True,
)

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


def ddpm_submit(request: JobRequest, how: SubmitRequest) -> None:
    """Starts a command as a job."""
    from job.jobs.submit import submit_command

    submit_command(request, how)


for kind, example in EXAMPLES.items():
    words = " ".join(kind.command)
    command(
        submit_app,
        kind.command[-1],
        kind,
        SubmitRequest,
        help=f"Start `ddpm {words}` as a job. It takes all options of `ddpm {words} --help`, and these.\n\n"
        f"Example: ddpm submit {kind.command[-1]} {example}",
    )(ddpm_submit)


@command(app, "list")
def jobs_list(on: OnOneTarget = "", as_json: AsJson = False, targets: Targets = None) -> None:
    """List the jobs on one target, or on all targets.

    Example: ddpm jobs list --on gke
    """
    from job.jobs.overview import Search, list_jobs

    list_jobs(Search(on, targets), as_json=as_json)


@command(app, "status")
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


@command(app, "logs")
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


@command(app, "cancel")
def jobs_cancel(job: JobName, on: OnOneTarget = "", targets: Targets = None) -> None:
    """Stop a job. It saves first; the same submit command resumes it.

    Example: ddpm jobs cancel train-celeba --on gke
    """
    from job.jobs.overview import Search, cancel_job

    cancel_job(job, Search(on, targets))


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
