"""`ddpm sample`."""

from typing import Annotated, Any

import typer

from job.cli.drawing import with_drawing_options
from job.cli.options import (
    DEFAULT_HANG_AFTER,
    BatchSize,
    BucketUri,
    Checkpoints,
    HangAfter,
    Processes,
    RunOption,
    SampledClasses,
    SliceOption,
    StopAfter,
)


@with_drawing_options
def ddpm_sample(
    context: typer.Context,
    run: RunOption,
    checkpoints: Checkpoints = "latest",
    seeds: Annotated[str, typer.Option(metavar="LIST", help="One image per seed, such as 0-63 or 1,5,9-12.")] = "",
    classes: SampledClasses = "",
    autoguidance: Annotated[
        str | None, typer.Option(metavar="[RUN@]EPOCH", help="Guide away from this weaker checkpoint, such as 30.")
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="NAME", help="inpaint, img2img, invert or interpolate. Default: new images.")
    ] = "",
    image: Annotated[
        str, typer.Option(metavar="LIST|FILE", help="Image numbers in the dataset, such as 0-3, or a file.")
    ] = "",
    mask: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Part to replace: half, centre, or the white of a file.")
    ] = "",
    resamplings: Annotated[
        int | None, typer.Option(metavar="N", help="Passes of inpaint over each stretch of ten steps. Default: 10.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="0..1", help="Share of the steps to take. Default: img2img 0.6, invert 1.")
    ] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also make a GIF of the denoising of the first 12 seeds.")] = False,
    nearest: Annotated[
        bool | None,
        typer.Option("--nearest/--no-nearest", help="Show the nearest training image beside each sample, or not."),
    ] = None,
    batch_size: BatchSize = None,
    count: Annotated[
        int | None, typer.Option(metavar="IMAGES", min=1, help="Save this many images, one per seed.")
    ] = None,
    save: Annotated[
        str, typer.Option(metavar="KIND", help="Format for --count: shards (tar files; the default) or png.")
    ] = "",
    slice_: SliceOption = "",
    first_seed: Annotated[
        int | None,
        typer.Option(metavar="K", min=0, max=10**17, help="Seed of the first image for --count. Default: 0."),
    ] = None,
    processes: Processes = None,
    hang_after: HangAfter = DEFAULT_HANG_AFTER,
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
    **drawing: Any,
) -> None:
    """Sample images from a run's checkpoints.

    An image depends only on the checkpoint, the options and its seed. The section `sample` of the run's configuration
    has the defaults; the name of a picture lists the differences from them. Each checkpoint gets a grid in the run's
    folder in the bucket. Several checkpoints also get one picture with a row for each.

    --count saves the images themselves, in pieces of up to 256. The same command resumes an interrupted one, also with
    other --slice or --processes, and makes no committed piece twice. While the run still trains, give an epoch,
    because `latest` changes with the next checkpoint.

    Examples:

        ddpm sample --run celeba --checkpoints 30,80,490 --seeds 0-63

        ddpm sample --run celeba --sampler ddpm --steps 1000 --gif

        ddpm sample --run celeba --checkpoints 490 --count 50000 --slice 0/4

        ddpm sample --run celeba --mode inpaint --image 0-3 --mask half
    """
    from job.commands import sample_command
    from job.jobs.command_line import request_of
    from job.requests import SampleRequest

    sample_command(request_of(SampleRequest, context.params), processes, hang_after, stop_after)
