"""Images: `ddpm sample`, `evaluate` and `figure`."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm.catalogue import SCHEDULES
from job.cli import command
from job.options import BucketUri, Dataset, Option, RunOption, Size
from job.requests import EvaluateRequest, SampleRequest

app = typer.Typer(
    help="Figures of the method: noise schedule, noised images, denoising.\n\nExample: ddpm figure schedule",
    no_args_is_help=True,
)

OfRun = Annotated[str, Option("--run NAME", "Show the run's own schedule.")]
Picture = Annotated[Path, Option("--output -o PNG", "File to write.")]
Schedule = Annotated[
    str,
    Option(
        "--schedule NAME",
        f"Noise schedule: {', '.join(SCHEDULES)}. Default: that of --run, else linear.",
        choices=tuple(SCHEDULES),
    ),
]


def ddpm_sample(request: SampleRequest) -> None:
    """Samples from checkpoints."""
    from job.commands import sample_command

    sample_command(request)


def ddpm_evaluate(request: EvaluateRequest) -> None:
    """Scores samples."""
    from job.commands import evaluate_command

    evaluate_command(request)


@command(app, "schedule")
def figure_schedule(
    run: OfRun = "",
    schedule: Schedule = "",
    timesteps: Annotated[
        int | None, Option("--timesteps N", "Diffusion steps T. Default: those of --run, else 1000.", min=2, max=10_000)
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
    from job.sampling.pictures import schedule_picture

    schedule_picture(bucket, run, schedule, timesteps, output)


@command(app, "noising")
def figure_noising(
    dataset: Dataset = "",
    run: OfRun = "",
    image: Annotated[
        int | None, Option("--image NUMBER", "Show this one image of the dataset, such as 0, at growing t.", min=0)
    ] = None,
    timesteps: Annotated[
        str, Option("--timesteps LIST", "Timesteps from 0 to T-1, such as 0,99,499: one for each tile.")
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
    from job.sampling.pictures import noising_picture

    noising_picture(bucket, run, dataset, size, schedule=schedule, timesteps=timesteps, image=image, output=output)


@command(app, "denoising")
def figure_denoising(
    run: RunOption,
    seeds: Annotated[str, Option("--seeds LIST", "One image per seed, such as 0-11; at most 12.")] = "",
    bucket: BucketUri = "",
) -> None:
    """Make a GIF of a run's network turning noise into images.

    The GIF shows the newest checkpoint, in up to 20 frames at 5 per second. It lies in the run's folder in the bucket.

    Example: ddpm figure denoising --run landscape-sample
    """
    ddpm_sample(SampleRequest(run, bucket=bucket, seeds=seeds, gif=True, with_grid=False))
