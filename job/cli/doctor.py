"""`ddpm doctor`."""

from typing import Annotated

import typer

from job.cli.options import OnTarget, Targets


def doctor(
    on: OnTarget = "local",
    bucket: Annotated[
        str, typer.Option(metavar="URI", help="Default: the target's, else DDPM_BUCKET, else ./bucket.")
    ] = "",
    no_bucket: Annotated[bool, typer.Option("--no-bucket", help="Look at no bucket.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON, at the end.")] = False,
    targets: Targets = None,
) -> None:
    """Look whether a job on a target would have what it needs, line by line.

    A line for each thing, with what to do. Ends with 0, or with the code that a job would end with for want of the
    first thing that is missing.

    Example: ddpm doctor --on gke --bucket gs://my-bucket
    """
    from job.jobs.doctor import checks_of, report
    from job.jobs.targets import chosen_target, load_targets

    target = chosen_target(load_targets(targets), on)
    uri = "" if no_bucket else bucket or target.usual_bucket
    if code := report(checks_of(target, uri), as_json):
        raise SystemExit(int(code))
