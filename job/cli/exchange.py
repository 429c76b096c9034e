"""`ddpm import` and `ddpm export`."""

from typing import Annotated

import typer

from job import DEFAULT_BUCKET
from job.cli.options import BucketUri, RunOption, Size


def ddpm_import(
    source: Annotated[
        str, typer.Argument(metavar="PATH|URI", help="A folder of diffusers, or a .pt, .ckpt or .safetensors.")
    ],
    run: RunOption,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="A packed dataset to go on training with. Default: none.")
    ] = "",
    size: Size = None,
    epoch: Annotated[
        int, typer.Option(metavar="N", min=0, max=1_000_000, help="Of the dataset, at whose end it was saved.")
    ] = 0,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="For the settings that it does not say, such as erengurs.")
    ] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.batch_size=64.")
    ] = None,
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Make a run of somebody else's checkpoint.

    Read are folders of diffusers (a UNet2DModel, with or without its pipeline), the U-Nets of Ho et al. as
    pesser/pytorch_diffusion and the DDIM authors keep them, and those of dome272's and ErenGurs' ddpm. Averaged weights
    are taken where there are some. Nothing in a file is ever run: a pickle of more than tensors is refused.

    The run can be drawn from at once. With --dataset it can also be trained on, by `ddpm train`, from the epoch that
    was given; several checkpoints of one training may be imported into one run.

    Examples:

        ddpm import ddpm-celebahq-256 --run celebahq

        ddpm import ckpt_80.pt --run landscape --dataset landscape --preset erengurs --epoch 80
    """
    from job.exchange.importing import ImportRequest, import_run

    sets = tuple(set_ or ())
    import_run(ImportRequest(source, bucket, run, dataset=dataset, size=size, epoch=epoch, preset=preset, sets=sets))


def ddpm_export(
    run: RunOption,
    to: Annotated[str, typer.Option(metavar="DIR|URI", help="An empty folder, or one that is not there.")],
    checkpoint: Annotated[str, typer.Option(metavar="EPOCH", help="Such as 80, or latest.")] = "latest",
    weights: Annotated[
        str, typer.Option(metavar="NAME", help="ema, ema-STD or model. Default: those the run draws with.")
    ] = "",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Write a checkpoint as a folder that diffusers reads, with a card.

    Every checkpoint of a unet is such a folder where it lies; an export has other weights if you like, a README.md that
    says how to draw from it, and nothing else. Networks that diffusers does not have are refused, with the reason.

    Example: ddpm export --run celeba --checkpoint 490 --to celeba-490
    """
    from job.exchange.exporting import export_run

    export_run(bucket, run, to, checkpoint, weights)
