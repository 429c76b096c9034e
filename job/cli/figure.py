"""`ddpm figure`: schedule, noising, denoising."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm.catalogue import SCHEDULES
from job.cli import completion
from job.cli.options import DEFAULT_HANG_AFTER, BucketUri, Dataset, RunOption, Size

app = typer.Typer(
    help="Figures of the method: noise schedule, noised images, denoising.\n\nExample: ddpm figure schedule",
    no_args_is_help=True,
)

Schedule = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Noise schedule: {', '.join(SCHEDULES)}. Default: that of --run, else linear.",
        autocompletion=completion.names(tuple(SCHEDULES)),
    ),
]
OfRun = Annotated[
    str, typer.Option("--run", metavar="NAME", help="Show the run's own schedule.", autocompletion=completion.runs)
]
Picture = Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="File to write.")]


@app.command("schedule")
def figure_schedule(
    run: OfRun = "",
    schedule: Schedule = "",
    timesteps: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, max=10_000, help="Diffusion steps T. Default: those of --run, else 1000."),
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
    from job.sampling.noise_figures import schedule_picture

    schedule_picture(bucket, run, schedule, timesteps, output)


@app.command("noising")
def figure_noising(
    dataset: Dataset = "",
    run: OfRun = "",
    image: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", min=0, help="Show this one image of the dataset, such as 0, at growing t."),
    ] = None,
    timesteps: Annotated[
        str, typer.Option(metavar="LIST", help="Timesteps from 0 to T-1, such as 0,99,499: one for each tile.")
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
    from job.sampling.noise_figures import noising_picture

    noising_picture(bucket, run, dataset, size, schedule=schedule, timesteps=timesteps, image=image, output=output)


@app.command("denoising")
def figure_denoising(
    run: RunOption,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="One image per seed, such as 0-11; at most 12.")] = "",
    bucket: BucketUri = "",
) -> None:
    """Make a GIF of a run's network turning noise into images.

    The GIF shows the newest checkpoint, in up to 20 frames at 5 per second. It lies in the run's folder in the bucket.

    Example: ddpm figure denoising --run landscape-sample
    """
    from job.commands import sample_command
    from job.requests import SampleRequest

    request = SampleRequest(run, bucket, seeds=seeds, gif=True, with_grid=False)
    sample_command(request, 1, DEFAULT_HANG_AFTER, stop_after="")
