"""Buckets for tests: real object servers, a folder, and a disk that is soon full."""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import SECRET, azurite, azurite_account, fake_gcs_server, moto, new_container, seaweedfs

# Nothing of whoever runs the tests reaches them or their children: no variable, target, credential, cluster or cache.
# Of a make that runs them, its level among others would reach the makes that tests start.
_THEIRS = re.compile(
    r"(DDPM(?!_TEST)|SLURM|SBATCH|SQUEUE|AWS|AZURE|FSSPEC|GOOGLE|CLOUDSDK|GCE|STORAGE|XDG|PMI|OMPI|MV2|MASTER|BATCH|ACCELERATE|M(AKE)?FLAGS|MAKE\w+)_?.*"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|NNODES|NODE_RANK|KUBECONFIG|ARGS|TORCH|COLUMNS|FORCE_COLOR|TTY_\w+|\w+_proxy",
    re.IGNORECASE,
)
# Once: children that import this, such as spawned ones, are to see what a test gives them.
if "DDPM_TESTS" not in os.environ:
    os.environ["DDPM_TESTS"] = "see nothing of whoever runs them"
    for name in filter(_THEIRS.fullmatch, list(os.environ)):
        del os.environ[name]
    # What takes seconds to make and says nothing of anybody stays: the list of fonts.
    os.environ.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))
    os.environ["HOME"] = tempfile.mkdtemp(prefix="ddpm-tests-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    no_targets = Path(os.environ["HOME"], "no-targets.yaml")
    no_targets.touch()
    # A targets.yaml in the checkout, where tests begin, is not theirs.
    os.environ["DDPM_TARGETS"] = str(no_targets)
    # Test processes beside each other would spin for each other's cores. It must stand before torch is first imported.
    os.environ["OMP_NUM_THREADS"] = "1"

# Under nohup, or behind a script's `&`, children would inherit that these are ignored. Those that are caught are theirs
# again, and still end nothing here.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

SMALL_DISK_BYTES = 2 << 20


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a fake-gcs-server of this test process's own, which child processes find in `STORAGE_EMULATOR_HOST`."""
    with fake_gcs_server(tmp_path_factory.mktemp("gcs")) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a moto server of this test process's own."""
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a SeaweedFS of this test process's own."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as url:
        yield url


@pytest.fixture(scope="session")
def azurite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an Azurite of this test process's own, which child processes find in `AZURE_STORAGE_CONNECTION_STRING`."""
    with azurite(tmp_path_factory.mktemp("azurite")) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite_account(url))
        yield url


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the S3 servers' owner."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def seaweedfs_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://NAME` of a fresh, empty bucket."""
    return _s3_bucket("seaweedfs", request, monkeypatch)


@pytest.fixture
def gcs_bucket(gcs_server: str) -> str:
    """`gs://NAME` of a fresh, empty bucket."""
    from google.cloud import storage

    name = f"test-{secrets.token_hex(6)}"
    storage.Client(project="test").create_bucket(name)
    return f"gs://{name}"


@pytest.fixture
def azure_container(azurite_server: str) -> str:
    """`az://NAME` of a fresh, empty container."""
    return f"az://{new_container(azurite_server)}"


@pytest.fixture(params=["local", "gs", "s3-seaweedfs", "az"])
def bucket_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh, empty bucket of each kind: the test runs once per kind."""
    return new_bucket(request.param, request, monkeypatch, tmp_path)


def new_bucket(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh, empty bucket: `local`, `gs`, `s3-seaweedfs`, `s3-moto` or `az`."""
    kind, _, server = which.partition("-")
    if kind == "gs":
        return str(request.getfixturevalue("gcs_bucket"))
    if kind == "az":
        return str(request.getfixturevalue("azure_container"))
    if kind == "s3":
        return _s3_bucket(server, request, monkeypatch)
    folder = tmp_path / "bucket"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB: a tmpfs, which an ordinary user gets from a namespace of their own."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES},mode=777", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    script = '"$@" && echo ready && exec sleep 600'
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "-", *mount],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "ready\n", "this machine lets nobody mount a tmpfs"
    yield Path(f"/proc/{holder.pid}/root{folder}")
    holder.kill()
    holder.wait()


def _s3_bucket(server: str, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> str:
    """A new one, on a server that clients find from now on."""
    import boto3

    request.getfixturevalue("aws_credentials")
    name, url = f"test-{secrets.token_hex(6)}", str(request.getfixturevalue(f"{server}_server"))
    patch.setenv("AWS_ENDPOINT_URL", url)
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=name)
    return f"s3://{name}"
