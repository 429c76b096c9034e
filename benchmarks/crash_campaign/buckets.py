"""The bucket of a campaign: a given one, or one of a real server that starts for it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = {
    "file": "a folder",
    "gs": "a new fake-gcs-server",
    "s3": "a new SeaweedFS",
    "s3-moto": "a new moto server",
    "az": "a new Azurite",
}


@contextmanager
def bucket(wanted: str, folder: Path) -> Iterator[str]:
    """Yields the URI of a bucket, whose server runs while the context lasts.

    Args:
        wanted: one of `KINDS`, or the URI of a bucket.
        folder: the folder for the data and logs of a server.
    """
    kind = wanted.removesuffix("://")
    if kind not in KINDS:
        yield wanted
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        yield f"file://{folder.resolve()}"
    elif kind == "gs":
        yield from _gs(folder)
    elif kind == "az":
        yield from _az(folder)
    else:
        yield from _s3(folder, with_moto=kind == "s3-moto")


def _gs(folder: Path) -> Iterator[str]:
    from google.cloud import storage

    from tests.servers import fake_gcs_server

    name = f"campaign-{secrets.token_hex(4)}"
    with fake_gcs_server(folder) as url, _variables(STORAGE_EMULATOR_HOST=url):
        storage.Client(project="campaign").create_bucket(name)
        yield f"gs://{name}"


def _s3(folder: Path, with_moto: bool) -> Iterator[str]:
    import boto3

    from tests.servers import SECRET, moto, seaweedfs

    name = f"campaign-{secrets.token_hex(4)}"
    with (moto if with_moto else seaweedfs)(folder) as url:
        nothing, keys = os.devnull, {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": SECRET}
        files = {"AWS_CONFIG_FILE": nothing, "AWS_SHARED_CREDENTIALS_FILE": nothing}
        with _variables(AWS_ENDPOINT_URL=url, AWS_EC2_METADATA_DISABLED="true", **keys, **files):
            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"


def _az(folder: Path) -> Iterator[str]:
    from tests.servers import azurite, azurite_account, new_container

    with azurite(folder) as url, _variables(AZURE_STORAGE_CONNECTION_STRING=azurite_account(url)):
        yield f"az://{new_container(url)}"


@contextmanager
def _variables(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
