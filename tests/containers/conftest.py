"""podman with settings and a store of the tests' own, and the image, built once for all tests of this folder."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.job.command_line import ddpm, succeeded

CHECKOUT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("DDPM_TEST_CONTAINERS") or Path(tempfile.gettempdir()) / "ddpm-test-containers")
"""Kept between runs, so that an image whose sources did not change is built in seconds."""
BASE_IMAGE = "localhost/ddpm-test-base:trixie"
IMAGE = "localhost/ddpm-test:latest"


def podman(*words: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `podman WORDS` to its end."""
    how = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
    how |= {"capture_output": True, "text": True, "check": False, "timeout": 600, **options}
    done = subprocess.run(["podman", *map(str, words)], **how)
    assert not check or done.returncode == 0, f"podman {words}: {done.stdout}{done.stderr}"
    return done


def inspected(name: str, kind: str = "container") -> dict[str, Any]:
    """All about a container or an image."""
    return dict(json.loads(podman(kind, "inspect", name).stdout)[0])


def in_image(script: str, *options: str) -> str:
    """What a shell in the image prints."""
    return podman("run", "--rm", *options, "--entrypoint", "sh", IMAGE, "-c", script).stdout


def _settings() -> dict[str, str]:
    """Variables with which podman works as root, in a container or not."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    (FOLDER / "containers.conf").write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=65536:65536"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
    )
    storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{FOLDER}/store"\nrunroot = "{FOLDER}/run"\n'
    (FOLDER / "storage.conf").write_text(storage)
    files = {"CONTAINERS_CONF": f"{FOLDER}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{FOLDER}/storage.conf"}
    return {**files, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}


def _build_image() -> None:
    """Builds the real Dockerfile by `make image`, on a base image made on the spot, with PyTorch for CPUs."""
    if podman("image", "exists", BASE_IMAGE, check=False).returncode:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run([CHECKOUT / "tests/containers/base.sh", FOLDER, sys.base_prefix, version], check=True)
        variables = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
        variables += ("SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",)
        changes = [word for variable in variables for word in ("-c", f"ENV {variable}")]
        podman("import", "--quiet", *changes, FOLDER / "base.tar", BASE_IMAGE)
        (FOLDER / "base.tar").unlink()
    words = [f"IMAGE={IMAGE}", f"BASE_IMAGE={BASE_IMAGE}", "ENGINE=podman", "TORCH=cpu"]
    words += [f"{name}={value}" for name, value in torch_wheels().items()]
    done = subprocess.run(["make", "image", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def torch_wheels() -> dict[str, str]:
    """The folder from which pip takes PyTorch on this machine, if its settings name one; else its own index has it."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    folders = re.findall(r"find-links='(/[^']*)'", listed.stdout)
    having = [folder for folder in folders if any(Path(folder).glob("torch-*+cpu-*.whl"))]
    return {"TORCH_WHEELS": having[0]} if having else {}


@pytest.fixture(scope="session", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The real Dockerfile's image; podman finds its settings in the environment of all that the tests start."""
    base = tmp_path_factory.getbasetemp()
    built = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "image-is-built"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _settings().items():
            patch.setenv(name, value)
        for name in ("DDPM_BUCKET", "DDPM_TARGETS", "TORCH"):
            patch.delenv(name, raising=False)
        # By the first of the test processes.
        with FileLock(f"{built}.lock"):
            if not built.exists():
                # What failed tests left behind.
                for words in ("pod rm --time 0", "rm --time 0", "volume rm"):
                    podman(*words.split(), "--all", "--force", check=False)
                _build_image()
                built.touch()
        yield


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with the embedded images at 16 pixels."""
    bucket = tmp_path_factory.mktemp("packed") / "bucket"
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", bucket))
    return bucket


@pytest.fixture
def place(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that bucket, in a working folder whose targets run the image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets.yaml").write_text(f"container:\n  image: {IMAGE}\n  env: {{OMP_NUM_THREADS: '1'}}\n")
    return Path(shutil.copytree(packed, tmp_path / "bucket"))
