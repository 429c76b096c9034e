"""Buckets for tests: real object servers, a folder, and a disk that is soon full."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests import servers

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
    # The tests compare bits of CPUs, also on a Mac.
    os.environ["ACCELERATE_USE_CPU"] = "true"

# Under nohup, or behind a script's `&`, children would inherit that these are ignored. Those that are caught are theirs
# again, and still end nothing here.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

SMALL_DISK_BYTES = 2 << 20
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc or makes a namespace")


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts a server of `SERVERS`, once in this test process; gives its URL."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(servers.SERVERS[kind].start(tmp_path_factory.mktemp(kind))))


@pytest.fixture(scope="session")
def gcs_server(started: Callable[[str], str]) -> Iterator[str]:
    """URL of a fake-gcs-server, which child processes find in `STORAGE_EMULATOR_HOST`."""
    yield from _found_by_all("gs", started)


@pytest.fixture(scope="session")
def moto_server(started: Callable[[str], str]) -> str:
    """URL of a moto server."""
    return started("s3-moto")


@pytest.fixture(scope="session")
def azurite_server(started: Callable[[str], str]) -> Iterator[str]:
    """URL of an Azurite, which child processes find in `AZURE_STORAGE_CONNECTION_STRING`."""
    yield from _found_by_all("az", started)


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the S3 servers' owner."""
    for name, value in servers.s3_account("").items():
        if value:
            monkeypatch.setenv(name, value)


@pytest.fixture
def seaweedfs_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`s3://NAME` of a fresh, empty bucket."""
    return new_bucket("s3", request, monkeypatch, tmp_path)


@pytest.fixture
def gcs_bucket(gcs_server: str) -> str:
    """`gs://NAME` of a fresh, empty bucket."""
    return servers.new_bucket("gs", gcs_server)


@pytest.fixture
def azure_container(azurite_server: str) -> str:
    """`az://NAME` of a fresh, empty container."""
    return servers.new_bucket("az", azurite_server)


@pytest.fixture(params=["local", *servers.KINDS])
def bucket_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh, empty bucket of each kind: the test runs once per kind."""
    return new_bucket(request.param, request, monkeypatch, tmp_path)


def new_bucket(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh, empty bucket: `local`, or of a server of `SERVERS`, which clients find from now on."""
    if which == "local":
        folder = tmp_path / "bucket"
        folder.mkdir()
        return str(folder)
    url = request.getfixturevalue("started")(which)
    for name, value in servers.SERVERS[which].variables(url).items():
        monkeypatch.setenv(name, value)
    return servers.new_bucket(which, url)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB: a tmpfs, which an ordinary user gets from a namespace of their own."""
    if sys.platform != "linux":
        pytest.skip("only Linux mounts a tmpfs")
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


def _found_by_all(kind: str, started: Callable[[str], str]) -> Iterator[str]:
    """Starts a server that every client finds from now on."""
    url = started(kind)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in servers.SERVERS[kind].variables(url).items():
            patch.setenv(name, value)
        yield url
