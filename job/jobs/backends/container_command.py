"""The words that start a container, by a pure function of the job, its target and this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from job.exits import BadRequestError
from job.jobs.backends.base import check_one_machine
from job.jobs.spec import JobSpec
from job.jobs.targets import ContainerTarget
from job.stop import GRACE_VARIABLE

Engine = Literal["podman", "docker"]

STOP_SECONDS = 120
"""From SIGTERM to SIGKILL; nobody takes this machine away."""
USER = 10001
"""The image's own user, for jobs that touch no file of this machine."""
SHARED_MEMORY = "2g"
BUCKET_LABEL = "ddpm-bucket"
CREDENTIALS = "/credentials"
"""Folder of the container where files with credentials are mounted."""
_TAKEN = ("/", "/dev", "/proc", "/sys", "/tmp", "/scratch", CREDENTIALS, "/etc", "/bin", "/lib", "/lib64", "/sbin")  # noqa: S108
_TAKEN_BELOW = ("/usr", "/opt/ddpm", "/dev", "/proc", "/sys")
_FILES = {
    "gs": {"GOOGLE_APPLICATION_CREDENTIALS": "~/.config/gcloud/application_default_credentials.json"},
    "s3": {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"},
}
"""Files with credentials for each kind of bucket: the variable that says where one lies, and where it lies else."""
_SETTINGS = {
    "gs": ("GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST"),
    "s3": ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
}
"""Variables that hold nothing secret."""


@dataclass(frozen=True)
class Host:
    """This machine, as a container sees it.

    Attributes:
        engine: `podman` or `docker`.
        uid: user of whoever submits.
        gid: their group.
        gpus: NVIDIA GPUs.
        files: with credentials, which are mounted: for each kind of bucket, by the variable that says where one lies.
        settings: variables with nothing secret in them, for each kind of bucket.
    """

    engine: Engine
    uid: int
    gid: int
    gpus: int = 0
    files: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def look(cls, engine: Literal["", "podman", "docker"] = "") -> Host:
        """This machine now; with no engine on it the one that is named, or podman, for a command to look at."""
        installed: list[Engine] = [name for name in ("podman", "docker") if shutil.which(name)]
        return cls(
            engine=engine or (installed or ["podman"])[0],
            uid=os.geteuid(),
            gid=os.getegid(),
            gpus=len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()]),
            files={scheme: _existing(files) for scheme, files in _FILES.items()},
            settings={
                scheme: {name: os.environ[name] for name in names if os.environ.get(name)}
                for scheme, names in _SETTINGS.items()
            },
        )


def _existing(usual: Mapping[str, str]) -> dict[str, Path]:
    """The files that are there, of those that the variables name, or else lie where they usually do."""
    found = {}
    for variable, place in usual.items():
        # As google.auth looks for it.
        place = place.replace("~/.config/gcloud", os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud")
        path = os.path.expanduser(os.environ.get(variable) or place)  # noqa: PTH111 -- a user may have no home
        if os.path.isfile(path):  # noqa: PTH113 -- nor rights to look
            found[variable] = Path(path).absolute()
    return found


def run_command(spec: JobSpec, target: ContainerTarget, host: Host) -> list[str]:
    """`podman run …` or `docker run …` for a job; equal arguments give equal words.

    Raises:
        BadRequestError: a container on this machine cannot be such a job; the message names the option.
    """
    check_one_machine(spec, target)
    if 0 < host.gpus < spec.gpus:
        raise BadRequestError(f"--gpus {spec.gpus}: this machine has {host.gpus}: ask for at most so many")
    words = [host.engine, "run", "--name", spec.name]
    for name, value in {**spec.all_labels, BUCKET_LABEL: spec.bucket}.items():
        words += ["--label", f"{name}={value}"]
    return [*words, *confined(spec, target, host), spec.image, *spec.argv]


def confined(spec: JobSpec, target: ContainerTarget, host: Host) -> list[str]:
    """Options: what the container may write, use and see.

    Nothing is writable in it but /tmp, /scratch and a bucket that is a folder of this machine. It runs as the user who
    submits if it needs files of theirs, and as the image's own otherwise.
    """
    scheme = spec.bucket.partition("://")[0].lower()
    files = {
        variable: (path, f"{CREDENTIALS}/{variable.lower()}") for variable, path in host.files.get(scheme, {}).items()
    }
    mounts = [*_folders(spec), *(_mount(path, inside) + ",readonly" for path, inside in files.values())]
    uid, gid = (host.uid, host.gid) if mounts else (USER, USER)
    words = [
        *("--pull", "never"),
        *("--user", f"{uid}:{gid}"),
        "--read-only",
        # torch.compile puts libraries there and runs them.
        *("--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777"),  # noqa: S108 -- the container's own
        # Users would stumble over each other's files.
        *("--mount", f"type=volume,source=ddpm-scratch-{uid},destination=/scratch"),
        *("--shm-size", SHARED_MEMORY),
        *("--stop-timeout", str(STOP_SECONDS)),
        *("--cap-drop", "ALL"),
        *("--security-opt", "no-new-privileges"),
    ]
    if mounts:
        # Else SELinux would want the user's folders labelled anew.
        words += ["--security-opt", "label=disable"]
        if host.engine == "podman" and host.uid:
            # Without root a user of the container is another one outside.
            words += ["--userns", "keep-id"]
    words += _gpus(min(spec.gpus, host.gpus), host)
    words += ["--memory", target.memory] if target.memory else []
    words += ["--network", target.network] if target.network else []
    own = {GRACE_VARIABLE: str(STOP_SECONDS), "DDPM_CACHE": "/scratch/ddpm", "TMPDIR": "/scratch"}
    own |= {**host.settings.get(scheme, {}), **{variable: inside for variable, (_, inside) in files.items()}}
    for name, value in sorted({**own, **target.env, **spec.env}.items()):
        words += ["--env", f"{name}={value}"]
    for mount in mounts:
        words += ["--mount", mount]
    return words


def _folders(spec: JobSpec) -> list[str]:
    """What of this machine is mounted where it is, as values of `--mount`."""
    mounts = []
    if (folder := spec.bucket_folder) is not None:
        if str(folder) in _TAKEN or any(folder.is_relative_to(taken) for taken in _TAKEN_BELOW):
            raise BadRequestError(f"--bucket {folder}: the container has a folder of that name: choose another place")
        mounts.append(_mount(folder, str(folder)))
    if spec.verb == "pack":
        # `data pack SOURCE …`, or `data pack … -- SOURCE NAME`.
        source = spec.argv[spec.argv.index("--") + 1 if "--" in spec.argv else 2].removeprefix("file://")
        mounts += [_mount(Path(source), source) + ",readonly"] if source.startswith("/") else []
    return mounts


def _mount(path: Path, inside: str) -> str:
    if set('",') & set(f"{path}{inside}"):
        raise BadRequestError(f"{str(path)!r} cannot be mounted in a container: use a path without commas and quotes")
    return f"type=bind,source={path},destination={inside}"


def _gpus(count: int, host: Host) -> list[str]:
    is_all = count == host.gpus
    if not count:
        return []
    if host.engine == "docker":
        return ["--gpus", "all" if is_all else str(count)]
    # Names of the Container Device Interface, which `nvidia-ctk cdi generate` writes.
    return [word for name in (["all"] if is_all else range(count)) for word in ("--device", f"nvidia.com/gpu={name}")]
