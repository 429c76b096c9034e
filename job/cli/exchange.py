"""`ddpm import` and `ddpm export`."""

from typing import Annotated

import typer

from job.cli.options import BucketUri, RunOption, Size


def ddpm_import(
    source: Annotated[
        str, typer.Argument(metavar="PATH|URI", help="Folder of diffusers, or a .pt, .ckpt or .safetensors file.")
    ],
    run: RunOption,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="Packed dataset for further training. Default: no training.")
    ] = "",
    size: Size = None,
    epoch: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=1_000_000, help="Epoch of the dataset after which the file was saved."),
    ] = 0,
    preset: Annotated[
        str,
        typer.Option(metavar="NAME", help="Settings that the file lacks, or that replace its own, such as erengurs."),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as train.batch_size=64; may be repeated."),
    ] = None,
    bucket: BucketUri = "",
) -> None:
    """Make a run from a checkpoint of another program or of this one.

    The command reads folders of diffusers (a UNet2DModel, alone or in a pipeline), the U-Nets of Ho et al. as
    pesser/pytorch_diffusion and the DDIM authors save them, and those of the ddpm of dome272 and ErenGurs. It prefers
    averaged weights. It executes nothing in a file, and refuses a pickle that holds more than tensors.

    Checkpoints and exports of this program bring all settings of their run, and the names of its classes.

    `ddpm sample` works at once. With --dataset, `ddpm train` also continues the training from --epoch. Several
    checkpoints of one training fit into one run.

    Examples:

        ddpm import ddpm-celebahq-256 --run celebahq

        ddpm import gs://bucket/exports/celeba-490 --run fork --dataset celeba

        ddpm import ckpt_80.pt --run landscape --dataset landscape --preset erengurs --epoch 80
    """
    from job.exchange.importing import ImportRequest, import_run

    sets = tuple(set_ or ())
    import_run(ImportRequest(source, bucket, run, dataset=dataset, size=size, epoch=epoch, preset=preset, sets=sets))


def ddpm_export(
    run: RunOption,
    to: Annotated[str, typer.Option(metavar="DIR|URI", help="New or empty folder; a path or a URI.")] = "",
    push: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="In place of --to: a model repository of the hub, new or pushed to.")
    ] = "",
    checkpoint: Annotated[str, typer.Option(metavar="EPOCH", help="Epoch, such as 80, or latest.")] = "latest",
    weights: Annotated[
        str, typer.Option(metavar="NAME", help="ema, ema-STD or model. Default: the run's sample.weights.")
    ] = "",
    bucket: BucketUri = "",
) -> None:
    """Write a checkpoint for diffusers, or push it to the hub.

    Every checkpoint of a unet is a folder for diffusers already, with the settings of its run and the names of its
    classes. An export adds a README.md with sample code, leaves out the state of the training, and can hold other
    weights. The command refuses a network that diffusers lacks.

    --push makes one commit with all files, and a new repository is private. The token is that of `hf auth login`, or of
    the variable HF_TOKEN.

    Examples:

        ddpm export --run celeba --checkpoint 490 --to celeba-490

        ddpm export --run celeba --checkpoint 490 --push my-name/celeba
    """
    from job.exchange.exporting import ExportRequest, export_run

    export_run(ExportRequest(bucket, run, to=to, push=push, checkpoint=checkpoint, weights=weights))
