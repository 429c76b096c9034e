"""The cloud-init configuration of a job's VM: files, and one systemd unit that runs the container.

No value of a user ever is part of a script or a unit. The script is a constant, `vm_supervise.sh`; what differs between
jobs are files with one word a line, which it hands to `docker run` as they are.

On Container-Optimized OS /etc is empty at each start, and cloud-init fills it again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from job.jobs.backends import google_container as container
from job.jobs.spec import JobSpec

FOLDER = "/etc/ddpm"
UNIT = "ddpm-job.service"
SCRIPT = Path(__file__).with_name("vm_supervise.sh")
FAILURES = 4
"""Crashes and other counted codes that end a job: Kubernetes' backoffLimit, on one machine."""
_DRIVER = "/var/lib/nvidia"
_REGISTRY = re.compile(r"(.+\.)?(pkg\.dev|gcr\.io)")

_UNIT = f"""\
[Unit]
Description=A ddpm job
Wants=network-online.target gcr-online.target docker.socket
# The other way round at the end: network and docker stay until the job has saved.
After=network-online.target gcr-online.target docker.socket docker.service

[Service]
Type=exec
EnvironmentFile={FOLDER}/settings
# Where docker-credential-gcr leaves its settings: root's home cannot be written.
Environment=HOME=/run/ddpm
RuntimeDirectory=ddpm
ExecStart=/bin/bash {FOLDER}/supervise.sh
# The script passes SIGTERM on to the container.
KillMode=mixed
TimeoutStopSec={container.GRACE_SECONDS + 15}
StandardOutput=journal+console
StandardError=journal+console
"""


def cloud_init(spec: JobSpec, machine: str, gpus: int, index: int) -> str:
    """The `user-data` of a VM. Pure.

    Args:
        spec: a checked job.
        machine: the VM's name.
        gpus: that the container gets.
        index: of the slice; 0 if there are none.
    """
    host = spec.image.split("/")[0]
    settings = {
        "DDPM_JOB": spec.name,
        "DDPM_SLICE": str(index),
        "DDPM_SLICES": str(spec.slices),
        "DDPM_GPUS": str(gpus),
        "DDPM_REGISTRY": host if _REGISTRY.fullmatch(host) else "",
        "DDPM_NEVER": " ".join(map(str, container.NEVER_RETRIED)),
        "DDPM_ALWAYS": " ".join(map(str, container.ALWAYS_RETRIED)),
        "DDPM_FAILURES": str(FAILURES),
        "DDPM_GRACE_SECONDS": str(container.GRACE_SECONDS),
    }
    words = [*_options(spec, machine, gpus, index), spec.image, *spec.argv_of_slice(index)]
    files = {
        f"{FOLDER}/supervise.sh": SCRIPT.read_text(),
        f"{FOLDER}/settings": _lines(f'{name}="{value}"' for name, value in settings.items()),
        f"{FOLDER}/environment": _lines(f"{name}={value}" for name, value in container.variables(spec).items()),
        f"{FOLDER}/image": _lines([spec.image]),
        f"{FOLDER}/words": _lines(words),
        f"/etc/systemd/system/{UNIT}": _UNIT,
    }
    config = {
        "write_files": [
            {"path": path, "permissions": "0644", "owner": "root", "content": content}
            for path, content in files.items()
        ],
        "runcmd": [["systemctl", "daemon-reload"], ["systemctl", "--no-block", "start", UNIT]],
    }
    return "#cloud-config\n" + yaml.dump(config, Dumper=_Readable, sort_keys=False, width=1000)


def _options(spec: JobSpec, machine: str, gpus: int, index: int) -> list[str]:
    return [
        f"--hostname={machine}",
        f"--label=ddpm-job={spec.name}",
        f"--label=ddpm-slice={index}",
        f"--env-file={FOLDER}/environment",
        *container.confinement(),
        f"--mount=type=bind,source=/var/lib/ddpm/scratch,target={container.SCRATCH}",
        *(_gpu_options(gpus) if gpus else []),
    ]


def _gpu_options(gpus: int) -> list[str]:
    """What `--gpus all` does elsewhere: here docker has no NVIDIA runtime.

    See cloud.google.com/container-optimized-os/docs/how-to/run-gpus.
    """
    return [
        f"--volume={_DRIVER}/lib64:/usr/local/nvidia/lib64:ro",
        f"--volume={_DRIVER}/bin:/usr/local/nvidia/bin:ro",
        *(f"--device=/dev/nvidia{number}" for number in range(gpus)),
        "--device=/dev/nvidiactl",
        "--device=/dev/nvidia-uvm",
    ]


def _lines(words: Any) -> str:
    return "".join(f"{word}\n" for word in words)


class _Readable(yaml.SafeDumper):
    """Files as blocks, as somebody would write them by hand."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)
