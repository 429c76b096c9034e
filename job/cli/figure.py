"""`ddpm figure`: schedule, noising, denoising."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm.catalogue import SCHEDULES, Diffusion
from job import DEFAULT_BUCKET
from job.cli.options import DEFAULT_HANG_AFTER, BucketUri, Dataset, RunOption, Size

app = typer.Typer(
    help="Pictures that explain: the schedule, noised images, the denoising.\n\nExample: ddpm figure schedule",
    no_args_is_help=True,
)

_TABLES = [name for name, schedule in SCHEDULES.items() if schedule.has_betas]
Schedule = Annotated[str, typer.Option("--schedule", metavar="NAME", help=f"One of {', '.join(_TABLES)}.")]
Picture = Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="Where to write it.")]


@app.command("schedule")
def figure_schedule(
    kind: Schedule = Diffusion.schedule,
    timesteps: Annotated[
        int, typer.Option(metavar="N", min=2, max=1_000_000, help="Number of diffusion steps T.")
    ] = Diffusion.timesteps,
    output: Picture = Path("schedule.png"),
) -> None:
    """Plot β (left axis) and ᾱ (right axis) over the timesteps.

    Example: ddpm figure schedule --schedule cosine -o cosine.png
    """
    from job.sampling.noise_pictures import schedule_picture

    schedule_picture(kind, timesteps, output)


@app.command("noising")
def figure_noising(
    dataset: Dataset,
    timesteps: Annotated[
        str, typer.Option(metavar="LIST", help="One timestep (0 to 999) per image, comma-separated.")
    ] = "962,237,38,39,988,559,299,226,985,791,859,485",
    kind: Schedule = Diffusion.schedule,
    size: Size = None,
    output: Picture = Path("noising.png"),
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Show images beside their noised versions q(x_t|x_0); both alone lie beside it.

    Example: ddpm figure noising --dataset landscape-sample
    """
    from job.sampling.noise_pictures import noising_picture

    noising_picture(bucket, dataset, size, timesteps=timesteps, kind=kind, output=output)


@app.command("denoising")
def figure_denoising(
    run: RunOption,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="One image each, such as 0-11, up to 12.")] = "",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Make a GIF of a run's network turning noise into images.

    It shows the newest checkpoint in 20 frames, 5 per second, and goes into the run's folder in the bucket.

    Example: ddpm figure denoising --run landscape-sample
    """
    from job.commands import sample_command
    from job.requests import SampleRequest

    request = SampleRequest(run, bucket, seeds=seeds, gif=True, with_grid=False)
    sample_command(request, 1, DEFAULT_HANG_AFTER, stop_after="")
