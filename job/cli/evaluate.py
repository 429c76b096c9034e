"""`ddpm evaluate`."""

from typing import Annotated, Any

import typer

from ddpm.catalogue import EXTRACTORS, METRICS
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
    context: typer.Context,
    run: RunOption,
    checkpoints: Checkpoints = "latest",
    count: Annotated[
        int | None, typer.Option(metavar="IMAGES", min=1, max=1_000_000, help="Samples to score, per checkpoint.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(metavar="LIST", help=f"Some of {','.join(METRICS)}. Default: all that can be computed.")
    ] = "",
    extractor: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(EXTRACTORS)}.", autocompletion=names(EXTRACTORS))
    ] = "inception",
    extractor_file: Annotated[
        str, typer.Option(metavar="PATH|URI", help="Weights of that network, if no package and no bucket has them.")
    ] = "",
    references: Annotated[
        int, typer.Option(metavar="IMAGES", min=1, max=1_000_000, help="Largest number of real images to compare with.")
    ] = 50_000,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="Sample sets with other seeds, to measure the spread.")
    ] = 1,
    classes: SampledClasses = "",
    batch_size: BatchSize = None,
    slice_: SliceOption = "",
    processes: Processes = None,
    hang_after: HangAfter = DEFAULT_HANG_AFTER,
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
    **drawing: Any,
) -> None:
    """Score samples of a run against real images, such as by FID.

    The scores are FID, KID, precision, recall, density, coverage, MIND, inception score and bits per dimension. The
    command samples like `ddpm sample`, on all GPUs, but saves no image. The same command resumes an interrupted one.
    With --slice several machines share the work.

    Beside each score the command prints the score of real images against other real images, and the protocol: crop,
    filter, count and network change a score more than most methods do. The features of the real images are kept with
    the dataset, for all runs on it.

    The first line says how long all of it takes. Without --count a CPU scores as many samples, up to 5,000, as take ten
    minutes.

    `make setup EXTRAS=evaluate` installs what scores need. Jobs read the weights of the networks from the folder
    extractors/ of the bucket.

    Examples:

        ddpm evaluate --run celeba --checkpoints 30,80,490

        ddpm evaluate --run celeba --count 50000 --sampler ddpm --steps 1000

        ddpm evaluate --run mine --count 1000 --extractor mobilenet --repeats 3
    """
    from job.commands import evaluate_command
    from job.jobs.command_line import request_of
    from job.requests import EvaluateRequest

    evaluate_command(request_of(EvaluateRequest, context.params), processes, hang_after, stop_after)
