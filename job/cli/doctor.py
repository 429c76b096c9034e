"""`ddpm doctor`."""

from typing import Annotated

import typer

from job.cli.options import BucketUri, OnTarget, Targets


def doctor(
    on: OnTarget = "local",
    bucket: BucketUri = "",
    no_bucket: Annotated[bool, typer.Option("--no-bucket", help="Skip the checks of the bucket.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all lines as JSON, at the end.")] = False,
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
