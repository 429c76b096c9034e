"""`ddpm report`."""

from pathlib import Path
from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import BucketUri


def ddpm_report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="Name of the run. Default: all runs.", autocompletion=completion.runs)
    ] = "",
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write, such as page.html. Default: in the bucket."
        ),
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
