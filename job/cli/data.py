"""`ddpm data`: pack, index, encode, ensure, list, show, verify, delete."""

from pathlib import Path
from typing import Annotated

import typer

from job.cli import command
from job.data.pack_request import EncodeRequest, EnsureRequest, IndexRequest, PackRequest
from job.options import AsJson, BucketUri, Certain, DatasetName, Option, Size

app = typer.Typer(
    help="Datasets: pack images, index tars, list, show, verify, delete.\n\n"
    "Example: ddpm data pack ~/photos mine --size 64",
    no_args_is_help=True,
)


@command(app, "index", IndexRequest)
@command(app, "pack", PackRequest)
def data_pack(request: PackRequest) -> None:
    """Packs images, or indexes tars."""
    from job.commands import pack_command

    pack_command(request)


@command(app, "encode", EncodeRequest)
def data_encode(request: EncodeRequest) -> None:
    """Encodes a dataset into latents."""
    from job.commands import encode_command

    encode_command(request)


@command(app, "ensure", EnsureRequest)
def data_ensure(request: EnsureRequest) -> None:
    """Packs a dataset that is missing."""
    from job.commands import ensure_command

    ensure_command(request)


@command(app, "list")
def data_list(as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """List the datasets in the bucket.

    Example: ddpm data list --bucket gs://my-bucket
    """
    from job.verbs.datasets import list_datasets

    list_datasets(bucket, as_json=as_json)


@command(app, "show")
def data_show(
    name: DatasetName,
    size: Size = None,
    output: Annotated[Path | None, Option("--output -o PNG", "File of the preview. Default: in the bucket.")] = None,
    open_it: Annotated[bool, Option("--open", "Open the preview in the browser.")] = False,
    as_json: AsJson = False,
    bucket: BucketUri = "",
) -> None:
    """Show the facts of a dataset, and a preview.

    Example: ddpm data show landscape-sample --open
    """
    from job.verbs.datasets import show_dataset

    show_dataset(bucket, name, size, output, open_it=open_it, as_json=as_json)


@command(app, "verify")
def data_verify(name: DatasetName, size: Size = None, as_json: AsJson = False, bucket: BucketUri = "") -> None:
    """Check every hash and image of a dataset.

    It names each damaged object.

    Example: ddpm data verify celeba --bucket gs://my-bucket
    """
    from job.verbs.datasets import verify_named

    verify_named(bucket, name, size, as_json=as_json)


@command(app, "delete")
def data_delete(name: DatasetName, size: Size = None, yes: Certain = False, bucket: BucketUri = "") -> None:
    """Delete a dataset, or the remains of an unfinished one.

    Example: ddpm data delete mine --size 64 --yes
    """
    from job.verbs.upkeep import delete_dataset

    delete_dataset(bucket, name, size, yes)
