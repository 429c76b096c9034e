"""The words that start a container, by a pure function."""

from __future__ import annotations

from pathlib import Path

from job.exits import BadRequestError
from job.jobs.backends.container_host import Credentials, Host
from job.jobs.spec import JobSpec
from job.jobs.targets import ContainerTarget
from job.stop import GRACE_VARIABLE
from job.store import is_remote, open_store

STOP_SECONDS = 120
"""From SIGTERM to SIGKILL; nobody takes this machine away."""
USER = 10001
"""The image's own user, for jobs that touch no file of this machine."""
SHARED_MEMORY = "2g"
BUCKET_LABEL = "ddpm-bucket"
_TAKEN = ("/", "/dev", "/proc", "/sys", "/tmp", "/scratch", "/credentials", "/etc", "/bin", "/lib", "/lib64", "/sbin")  # noqa: S108
_TAKEN_BELOW = ("/usr", "/opt/ddpm", "/dev", "/proc", "/sys")


def run_command(spec: JobSpec, target: ContainerTarget, host: Host) -> list[str]:
    """`podman run …` or `docker run …` for a job; equal arguments give equal words.

    Nothing is writable in the container but /tmp, /scratch and a bucket that is a folder of this machine. The container
    runs as the user who submits if it needs files of theirs, and as the image's own otherwise.

    Raises:
        BadRequestError: a container on this machine cannot be such a job; the message names the option.
    """
    if spec.nodes > 1 or spec.slices:
        option = f"--nodes {spec.nodes}" if spec.nodes > 1 else f"--slices {spec.slices}"
        raise BadRequestError(f"{option} needs several machines, and target {target.name!r} is this one: leave it out")
    if 0 < host.gpus < spec.gpus:
        raise BadRequestError(f"--gpus {spec.gpus}: this machine has {host.gpus}: ask for at most so many")
    words = [host.engine, "run", "--name", spec.name]
    for name, value in {**spec.all_labels, BUCKET_LABEL: spec.bucket}.items():
        words += ["--label", f"{name}={value}"]
    return [*words, *_confined(spec, target, host, spec.argv), spec.image, *spec.argv]


def look_command(words: tuple[str, ...], spec: JobSpec, target: ContainerTarget, host: Host) -> list[str]:
    """The same container for a short look with `ddpm WORDS`, which leaves nothing behind."""
    return [host.engine, "run", "--rm", *_confined(spec, target, host, words), spec.image, *words]


def bucket_folder(spec: JobSpec) -> Path | None:
    """The bucket, if it is a folder of this machine."""
    return None if is_remote(spec.bucket) else Path(open_store(spec.bucket).uri)


def _confined(spec: JobSpec, target: ContainerTarget, host: Host, argv: tuple[str, ...]) -> list[str]:
    credentials = host.credentials_for(spec.bucket)
    own_files = _own_files(spec, argv, credentials)
    uid, gid = (host.uid, host.gid) if own_files else (USER, USER)
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
    if own_files:
        # Else SELinux would want the user's folders labelled anew.
        words += ["--security-opt", "label=disable"]
        if host.engine == "podman" and host.uid:
            # Without root a user of the container is another one outside.
            words += ["--userns", "keep-id"]
    words += [*_gpus(spec, host)]
    words += ["--memory", target.memory] if target.memory else []
    words += ["--network", target.network] if target.network else []
    own = {GRACE_VARIABLE: str(STOP_SECONDS), "DDPM_CACHE": "/scratch/ddpm", "TMPDIR": "/scratch"}
    for name, value in sorted((own | dict(credentials.variables) | target.env | dict(spec.env)).items()):
        words += ["--env", f"{name}={value}"]
    for word in own_files:
        words += ["--mount", word]
    return words


def _own_files(spec: JobSpec, argv: tuple[str, ...], credentials: Credentials) -> list[str]:
    """What of this machine is mounted, as values of `--mount`."""
    mounts = []
    folder = bucket_folder(spec)
    if folder is not None:
        if str(folder) in _TAKEN or any(folder.is_relative_to(taken) for taken in _TAKEN_BELOW):
            raise BadRequestError(f"--bucket {folder}: the container has a folder of that name: choose another place")
        mounts.append(_mount(folder, str(folder)))
    if spec.verb == "pack" and (source := _source(argv)) is not None:
        mounts.append(_mount(source, str(source)) + ",readonly")
    return mounts + [_mount(path, inside) + ",readonly" for inside, path in credentials.mounts.items()]


def _mount(path: Path, inside: str) -> str:
    if set('",') & set(f"{path}{inside}"):
        raise BadRequestError(f"{str(path)!r} cannot be mounted in a container: use a path without commas and quotes")
    return f"type=bind,source={path},destination={inside}"


def _source(argv: tuple[str, ...]) -> Path | None:
    """What is packed, if it is a file or folder of this machine; the words of a job end with SOURCE NAME."""
    source = argv[-2].removeprefix("file://") if argv[-2].startswith("file:///") else argv[-2]
    return Path(source) if source.startswith("/") else None


def _gpus(spec: JobSpec, host: Host) -> list[str]:
    if not (spec.gpus and host.gpus):
        return []
    if host.engine == "docker":
        return ["--gpus", "all" if spec.gpus == host.gpus else str(spec.gpus)]
    # Names of the Container Device Interface, which `nvidia-ctk cdi generate` writes.
    if spec.gpus == host.gpus:
        return ["--device", "nvidia.com/gpu=all"]
    return [word for number in range(spec.gpus) for word in ("--device", f"nvidia.com/gpu={number}")]
