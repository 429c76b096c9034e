"""`ddpm data`: pack, index, list, show, verify, delete."""

from pathlib import Path
from typing import Annotated

import typer

from job.cli import completion
from job.cli.options import AsJson, BucketUri, Certain, Size, SliceOption, StopAfter, Targets

app = typer.Typer(
    help="Datasets: pack images, index tars, list, show, verify, delete.\n\n"
    "Example: ddpm data pack ~/photos mine --size 64",
    no_args_is_help=True,
)

DatasetName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the dataset, such as celeba.", autocompletion=completion.datasets)
]
Crop = Annotated[
    str, typer.Option("--crop", metavar="CROP", help="center[:PIXELS], squash or LEFT,TOP,WIDTH,HEIGHT in pixels.")
]
Filter = Annotated[
    str, typer.Option("--filter", metavar="NAME", help="Filter for resizing: lanczos, bicubic, bilinear or box.")
]
Channels = Annotated[
    int | None,
    typer.Option(
        "--channels", metavar="N", help="3 for colour, 1 for grey. Default: 1 if the first 64 images are grey, else 3."
    ),
]
PixelRange = Annotated[
    str,
    typer.Option(
        "--range",
        metavar="LOW,HIGH",
        help="The values of black and white in images of more than 8 bits, such as 0,4095. Default: those of the file.",
    ),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Delete a dataset of this name before, unless a run trains on it.")
]
Classes = Annotated[
    bool | None,
    typer.Option(
        "--classes/--no-classes",
        help="Default: the labels of the source, else folders, unless they are splits or numbers such as 007.",
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        "--labels",
        metavar="FILE[:COLUMN]",
        help="Table of labels by file name (.csv, .jsonl, .json, .txt); :COLUMN alone: a label of SOURCE.",
    ),
]
LabelKey = Annotated[
    str,
    typer.Option("--labels", metavar=":KEY", help="Key of the label in .json files. Default: label, cls or class."),
]
Licence = Annotated[str, typer.Option("--licence", metavar="TEXT", help="Licence of the images, kept as a note.")]
MaxBad = Annotated[int, typer.Option("--max-bad", metavar="N", min=0, help="Give up after N unreadable images.")]
MinSide = Annotated[
    int | None,
    typer.Option("--min-side", metavar="PIXELS", min=1, help="Reject images with a shorter side. Default: size/2."),
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Folder, archive or file of images; a path, a URL or a pattern.")
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Pack one split of SOURCE, train, test or val, or all of them. Default: train, if there are several.",
    ),
]
Unlabelled = Annotated[
    str,
    typer.Option(
        "--unlabelled",
        metavar="drop|refuse",
        help="If some images have a label and others have none, leave these out, or exit with 65.",
    ),
]
HoldOut = Annotated[
    str, typer.Option("--hold-out", metavar="SHARE", help="Share of the images to hold out, such as 5%.")
]
Tars = Annotated[list[str], typer.Argument(metavar="URI", help="Tars, folders of tars or patterns; paths or URLs.")]


@app.command("pack")
def data_pack(
    context: typer.Context,
    source: SourceArgument,
    name: DatasetName,
    size: Size = None,
    crop: Crop = "",
    resize_filter: Filter = "",
    channels: Channels = None,
    pixel_range: PixelRange = "",
    classes: Classes = None,
    labels: Labels = "",
    licence: Licence = "",
    max_bad: MaxBad = 100,
    min_side: MinSide = None,
    split: Split = "",
    unlabelled: Unlabelled = "refuse",
    hold_out: HoldOut = "",
    replaces: Replace = False,
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
) -> None:
    """Pack images into a dataset in the bucket.

    SOURCE is a folder, a .zip, a .tar[.gz] or a folder of those; or files of WebDataset, EDM and StyleGAN, Parquet
    and Arrow (Hugging Face), NumPy, TFRecord, LMDB, MNIST or CIFAR, with their labels. The SOURCE landscape-sample
    comes with the program. A NAME with a preset, such as celeba, takes size and crop from it. The same command resumes
    an interrupted one.

    With --hold-out a share of the images, chosen by their names, becomes the dataset NAME-held-out. Runs on NAME never
    learn from it; they log their loss on it as val_loss.

    With --slice several machines pack one dataset: I/N is 0/4, 1/4, 2/4 and 3/4 on four machines.

    Examples:

        ddpm data pack img_align_celeba.zip celeba --bucket gs://my-bucket

        ddpm data pack ~/photos mine --size 64 --hold-out 5%

        ddpm data pack train.zip dogs --size 64 --labels labels.csv:breed
    """
    _pack(context, bucket, stop_after)


@app.command("index")
def data_index(
    context: typer.Context,
    tars: Tars,
    name: DatasetName,
    size: Size = None,
    crop: Crop = "",
    resize_filter: Filter = "",
    channels: Channels = None,
    pixel_range: PixelRange = "",
    classes: Classes = None,
    labels: LabelKey = "",
    unlabelled: Unlabelled = "refuse",
    licence: Licence = "",
    max_bad: MaxBad = 100,
    min_side: MinSide = None,
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
) -> None:
    """Index WebDataset tars as a dataset, without copying them.

    img2dataset writes such tars. They must not change afterwards: the index holds a hash of each. With --slice several
    machines index one dataset.

    Examples:

        ddpm data index gs://theirs/laion/{00000..00099}.tar laion --size 64 --bucket gs://my-bucket

        ddpm data index ~/laion laion --size 64 --crop center
    """
    _pack(context, bucket, stop_after)


def _pack(context: typer.Context, bucket: str, stop_after: str) -> None:
    from job.commands import pack_command
    from job.data.pack_request import PackRequest
    from job.jobs.command_line import request_of

    pack_command(request_of(PackRequest, context.params), bucket, stop_after)


@app.command("encode")
def data_encode(
    name: DatasetName,
    autoencoder: Annotated[
        str, typer.Option(metavar="DIR|URI", help="Folder of an AutoencoderKL or of a pipeline of diffusers.")
    ],
    size: Size = None,
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="Name of the new dataset. Default: NAME-latents.")
    ] = "",
    slice_: SliceOption = "",
    stop_after: StopAfter = "",
    bucket: BucketUri = "",
) -> None:
    """Encode a dataset into latents of an autoencoder.

    The new dataset keeps the mean and log-variance of each image, and the autoencoder. Runs on it decode their samples.
    Encoding uses the GPU if there is one. The same command resumes an interrupted one. With --slice several machines
    share the work.

    Example: ddpm data encode celebahq-256 --autoencoder sd-vae-ft-mse --to celebahq-latents
    """
    from job.commands import encode_command
    from job.requests import EncodeRequest

    encode_command(EncodeRequest(name, bucket, autoencoder, size=size, to=to, slice=slice_), stop_after)


@app.command("ensure")
def data_ensure(
    context: typer.Context,
    name: DatasetName,
    source: Annotated[
        str, typer.Option("--source", metavar="SOURCE", help="Images to pack if the dataset is missing, or to compare.")
    ] = "",
    size: Size = None,
    channels: Channels = None,
    pixel_range: PixelRange = "",
    classes: Classes = None,
    labels: Labels = "",
    split: Split = "",
    unlabelled: Unlabelled = "refuse",
    replaces: Replace = False,
    on: Annotated[str, typer.Option("--on", metavar="TARGET", help="Target whose bucket to use.")] = "",
    targets: Targets = None,
    bucket: BucketUri = "",
) -> None:
    """Pack a dataset if the bucket lacks it.

    This machine does the work, wherever the bucket is. The dataset landscape-sample needs no --source. If the dataset
    is there and SOURCE has other images, labels or classes, the command ends with 64. It cannot compare a SOURCE that
    is gone or on a web server, and says so.

    Example: ddpm data ensure celeba --source img_align_celeba.zip
    """
    from job.commands import ensure_command
    from job.data.pack_request import PackRequest
    from job.jobs.command_line import request_of

    ensure_command(request_of(PackRequest, context.params), bucket, on)


@app.command("list")
def data_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the datasets in the bucket.

    Example: ddpm data list --bucket gs://my-bucket
    """
    from job.verbs.datasets import list_datasets

    list_datasets(bucket, as_json=as_json)


@app.command("show")
def data_show(
    name: DatasetName,
    size: Size = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PNG", help="File of the preview. Default: in the bucket."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the preview in the browser.")] = False,
    as_json: AsJson = False,
    bucket: BucketUri = "",
) -> None:
    """Show the facts of a dataset, and a preview.

    Example: ddpm data show landscape-sample --open
    """
    from job.verbs.datasets import show_dataset

    show_dataset(bucket, name, size, output, open_it=open_it, as_json=as_json)


@app.command("verify")
def data_verify(name: DatasetName, size: Size = None, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every hash and image of a dataset.

    It names each damaged object.

    Example: ddpm data verify celeba --bucket gs://my-bucket
    """
    from job.verbs.datasets import verify_named

    verify_named(bucket, name, size, as_json=as_json)


@app.command("delete")
def data_delete(name: DatasetName, size: Size = None, yes: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a dataset, or the remains of an unfinished one.

    Example: ddpm data delete mine --size 64 --yes
    """
    from job.verbs.removal import delete_dataset

    delete_dataset(bucket, name, size, yes)
