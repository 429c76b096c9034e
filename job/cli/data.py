"""`ddpm data`: pack, index, list, show, verify, delete."""

from pathlib import Path
from typing import Annotated

import typer

from job import DEFAULT_BUCKET
from job.cli import completion
from job.cli.options import AsJson, BucketUri, Certain, Size, SliceOption, StopAfter, Targets

app = typer.Typer(
    help="Datasets: pack images into shards, or index what there is; look, verify.\n\n"
    "Example: ddpm data pack ~/photos mine --size 64",
    no_args_is_help=True,
)

DatasetName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of the dataset, such as celeba.", autocompletion=completion.datasets),
]
Crop = Annotated[str, typer.Option("--crop", metavar="CROP", help="center[:PIXELS], squash or LEFT,TOP,WIDTH,HEIGHT.")]
Filter = Annotated[str, typer.Option("--filter", metavar="NAME", help="lanczos, bicubic, bilinear or box.")]
Channels = Annotated[int | None, typer.Option("--channels", metavar="N", help="3 for colour, 1 for grey.")]
Classes = Annotated[
    bool | None, typer.Option("--classes/--no-classes", help="Whether folders, or .cls files in tars, are classes.")
]
Licence = Annotated[str, typer.Option("--licence", metavar="TEXT", help="A note to keep with the dataset.")]
MaxBad = Annotated[int, typer.Option("--max-bad", metavar="N", min=0, help="Unreadable images to put up with.")]
MinSide = Annotated[
    int | None, typer.Option("--min-side", metavar="PIXELS", min=1, help="Reject shorter images. Default: size/2.")
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder, .zip, .tar[.gz], MNIST idx files, or a URL of any.")
]
Split = Annotated[str, typer.Option("--split", metavar="NAME", help="Only the folder train, test, val … of SOURCE.")]
HoldOut = Annotated[str, typer.Option("--hold-out", metavar="SHARE", help="Keep such a share apart, such as 5%.")]
Tars = Annotated[
    list[str], typer.Argument(metavar="URI", help="Tars, folders of tars, or patterns; local, or any URL.")
]


@app.command("pack")
def data_pack(
    source: SourceArgument,
    name: DatasetName,
    size: Size = None,
    crop: Crop = "",
    resize_filter: Filter = "",
    channels: Channels = None,
    classes: Classes = None,
    licence: Licence = "",
    max_bad: MaxBad = 100,
    min_side: MinSide = None,
    split: Split = "",
    hold_out: HoldOut = "",
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Pack images into a dataset in the bucket. A NAME with a preset takes size and crop from it.

    The SOURCE landscape-sample comes with the program. With --hold-out a share of the images, chosen by their names,
    becomes the dataset NAME-held-out: no run of NAME learns from it, and each logs its loss on it as val_loss.

    Examples:

        ddpm data pack img_align_celeba.zip celeba --bucket gs://my-bucket

        ddpm data pack ~/photos mine --size 64 --hold-out 5%
    """
    from job.commands import pack_command
    from job.data.pack import PackRequest

    options = (size, crop, resize_filter, channels, classes, licence, max_bad, min_side, split, hold_out)
    request = PackRequest(source, name, *options, slice=slice_)
    pack_command(request, bucket, stop_after)


@app.command("index")
def data_index(
    tars: Tars,
    name: DatasetName,
    size: Size = None,
    crop: Crop = "",
    resize_filter: Filter = "",
    channels: Channels = None,
    classes: Classes = None,
    licence: Licence = "",
    max_bad: MaxBad = 100,
    min_side: MinSide = None,
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Make WebDataset tars a dataset where they lie, without copying them.

    Such tars are what img2dataset writes. They must stay as they are: every one is hashed.

    Examples:

        ddpm data index gs://theirs/laion/{00000..00099}.tar laion --size 64 --bucket gs://my-bucket

        ddpm data index ~/laion laion --size 64 --crop center
    """
    from job.commands import pack_command
    from job.data.pack import PackRequest

    options = (size, crop, resize_filter, channels, classes, licence, max_bad, min_side)
    pack_command(PackRequest("", name, *options, tars=tuple(tars), slice=slice_), bucket, stop_after)


@app.command("encode")
def data_encode(
    name: DatasetName,
    autoencoder: Annotated[
        str, typer.Option(metavar="DIR|URI", help="Folder of an AutoencoderKL of diffusers, or of its pipeline.")
    ],
    size: Size = None,
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="Default: the dataset's name with -latents.")] = "",
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Encode a dataset by an autoencoder, for networks that learn latents.

    They work on far fewer numbers. Of each image mean and log-variance are kept, and the autoencoder with them: runs on
    the new dataset decode by themselves what they draw. On a GPU if there is one. A command that was stopped goes on
    when it is given again.

    Example: ddpm data encode celebahq-256 --autoencoder sd-vae-ft-mse --to celebahq-latents
    """
    from job.commands import encode_command
    from job.requests import EncodeRequest

    encode_command(EncodeRequest(name, bucket, autoencoder, size=size, to=to, slice=slice_), stop_after)


@app.command("ensure")
def data_ensure(
    name: DatasetName,
    source: Annotated[str, typer.Option("--source", metavar="SOURCE", help="What to pack if it is not there.")] = "",
    size: Size = None,
    on: Annotated[str, typer.Option("--on", metavar="TARGET", help="Use this target's bucket, if it has one.")] = "",
    targets: Targets = None,
    bucket: Annotated[str, typer.Option("--bucket", metavar="URI", help="Default: as for submit.")] = "",
) -> None:
    """Pack a dataset unless it is there. The work is done on this machine, wherever the bucket is.

    landscape-sample comes with the program and needs no source.

    Example: ddpm data ensure celeba --source img_align_celeba.zip
    """
    from job.commands import ensure_command
    from job.jobs.targets import bucket_on

    ensure_command(name, bucket or bucket_on(on or "local", targets), size=size, source=source, on=on)


@app.command("list")
def data_list(as_json: AsJson = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """List the datasets in the bucket.

    Example: ddpm data list --bucket gs://my-bucket
    """
    from job.report.datasets import list_datasets

    list_datasets(bucket, as_json=as_json)


@app.command("show")
def data_show(
    name: DatasetName,
    size: Size = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG", help="Contact sheet. Default: in the bucket.")
    ] = None,
    as_json: AsJson = False,
    bucket: BucketUri = DEFAULT_BUCKET,
) -> None:
    """Show what a dataset holds, and make a contact sheet of it.

    Example: ddpm data show landscape-sample -o sheet.png
    """
    from job.report.datasets import show_dataset

    show_dataset(bucket, name, size, output, as_json=as_json)


@app.command("verify")
def data_verify(
    name: DatasetName, size: Size = None, as_json: AsJson = False, bucket: BucketUri = DEFAULT_BUCKET
) -> None:
    """Check every hash and image of a dataset; names each bad object.

    Example: ddpm data verify celeba --bucket gs://my-bucket
    """
    from job.report.datasets import verify_named

    verify_named(bucket, name, size, as_json=as_json)


@app.command("delete")
def data_delete(name: DatasetName, size: Size = None, yes: Certain = False, bucket: BucketUri = DEFAULT_BUCKET) -> None:
    """Delete a dataset, or what is left of one that was never finished.

    Example: ddpm data delete mine --size 64 --yes
    """
    from job.report.datasets import delete_dataset

    delete_dataset(bucket, name, size, yes)
