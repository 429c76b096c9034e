"""Options that several commands share."""

from typing import Annotated

import typer

Bucket = Annotated[
    str,
    typer.Option(
        "--bucket",
        envvar="DDPM_BUCKET",
        help="Where datasets and runs lie: gs://NAME[/PREFIX] or a local folder.",
        show_envvar=True,
    ),
]
Run = Annotated[str, typer.Option("--run", help="Name of the run, such as celeba.")]
Dataset = Annotated[str, typer.Option("--dataset", help="Name of a packed dataset, such as celeba.")]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Processes on this machine. Default: one per GPU, or one."),
]

DEFAULT_BUCKET = "./bucket"
EMBEDDED = "landscape-sample"
