"""podman with settings and a store of the tests' own, and a base image that is made on the spot."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("DDPM_TEST_CONTAINERS") or Path(tempfile.gettempdir()) / "ddpm-test-containers")
"""Kept between runs, so that an image whose sources did not change is built in seconds."""
BASE_IMAGE = "localhost/ddpm-test-base:trixie"
IMAGE = "localhost/ddpm-test:latest"
_LIBRARIES = ("ca-certificates", "libffi8", "libssl3t64", "libsqlite3-0", "liblzma5", "libbz2-1.0", "zlib1g")
"""What Debian's own Python would bring along, for one that is copied."""


def settings() -> dict[str, str]:
    """Variables with which podman works as root, in a container or not."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    (FOLDER / "containers.conf").write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=65536:65536"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
    )
    (FOLDER / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{FOLDER}/store"\nrunroot = "{FOLDER}/run"\n'
    )
    return {
        "CONTAINERS_CONF": str(FOLDER / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(FOLDER / "storage.conf"),
        "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
    }


def podman(*words: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `podman WORDS` to its end."""
    streams = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
    done = subprocess.run(
        ["podman", *map(str, words)], capture_output=True, text=True, check=False, timeout=300, **streams, **options
    )
    assert not check or done.returncode == 0, f"podman {words}: {done.stdout}{done.stderr}"
    return done


def inspected(name: str) -> dict[str, Any]:
    """The `State` of a container."""
    state: dict[str, Any] = json.loads(podman("container", "inspect", name).stdout)[0]["State"]
    return state


def build_image() -> None:
    """Builds the real Dockerfile by `make image`, on the base image, with PyTorch for CPUs."""
    if podman("image", "exists", BASE_IMAGE, check=False).returncode:
        _make_base()
    wheels = torch_wheels()
    words = [f"IMAGE={IMAGE}", f"BASE_IMAGE={BASE_IMAGE}", "ENGINE=podman", "TORCH=cpu"]
    words += [f"TORCH_WHEELS={wheels}"] if wheels else []
    done = subprocess.run(["make", "image", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _make_base() -> None:
    """Debian with this Python, whose wheels are those of the tests, in /usr/local; CAs of this machine count, too."""
    prefix, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = prefix != Path("/usr")
    packages = ",".join(_LIBRARIES if own else (*_LIBRARIES, "python3", "python3-venv", "python3-dev"))
    certificates = "usr/local/share/ca-certificates"
    hook = (
        f'mkdir -p "$1/{certificates}" && {{ cp /{certificates}/*.crt "$1/{certificates}/" || true; }} '
        '&& chroot "$1" update-ca-certificates'
    )
    root = FOLDER / "base"
    subprocess.run(["rm", "-rf", str(root)], check=True)
    bootstrap = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", f"--customize-hook={hook}"]
    subprocess.run([*bootstrap, "trixie", str(root)], check=True)
    if own:
        left_out = [f"lib/{version}/test", f"lib/{version}/config-*", f"lib/{version}/site-packages/*"]
        pack = ["tar", "-C", str(prefix), "-c", *(f"--exclude={name}" for name in left_out)]
        pack += [f"bin/{version}", "bin/python3", "bin/python", "lib", "include"]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            subprocess.run(["tar", "-C", str(root / "usr/local"), "-x"], stdin=packing.stdout, check=True)
        assert packing.returncode == 0
        subprocess.run(["chroot", str(root), "ldconfig"], check=True)
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    (root / "etc/pip.conf").write_text(f"[global]\ncert = {bundle}\n")
    archive = FOLDER / "base.tar"
    subprocess.run(["tar", "-C", str(root), "-c", "-f", str(archive), "."], check=True)
    paths = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    changes = ["-c", f"ENV {paths}", "-c", f"ENV SSL_CERT_FILE={bundle}"]
    podman("import", "--quiet", *changes, archive, BASE_IMAGE)
    archive.unlink()
    subprocess.run(["rm", "-rf", str(root)], check=True)


def torch_wheels() -> str:
    """The folder from which pip takes PyTorch on this machine, if its settings name one; else its own index has it."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    folders = re.findall(r"find-links='(/[^']*)'", listed.stdout)
    return next((folder for folder in folders if any(Path(folder).glob("torch-*+cpu-*.whl"))), "")
