"""Options that several commands share."""

from typing import Annotated

import typer

Bucket = Annotated[
    str,
    typer.Option(
        "--bucket",
        metavar="URI",
        envvar="DDPM_BUCKET",
        help="Where datasets and runs lie: gs://NAME[/PREFIX] or a local folder.",
        show_envvar=True,
    ),
]
Run = Annotated[str, typer.Option("--run", metavar="NAME", help="Name of the run, such as celeba.")]
Dataset = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Name of a packed dataset, such as celeba.")]
Size = Annotated[int | None, typer.Option("--size", metavar="PIXELS", min=1, help="Height and width of the images.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", metavar="N", min=1, max=64, help="Processes on this machine. Default: one per GPU, or one."
    ),
]

DEFAULT_BUCKET = "./bucket"
