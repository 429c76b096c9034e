"""What of this machine a container depends on: the engine, the user, the GPUs, and the files with credentials."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from job.exits import MissingInputError, NoPermissionError
from job.store import is_remote

Engine = Literal["podman", "docker"]

CREDENTIALS = "/credentials"
"""Folder of the container where files with credentials are mounted."""
_GPU_DEVICES = Path("/dev")
_AWS_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
_AWS_SETTINGS = ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_GOOGLE_SETTINGS = ("GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST")


@dataclass(frozen=True)
class Credentials:
    """Files with secrets, mounted read-only; and variables without any, which say where these files are.

    Attributes:
        mounts: path on this machine by path in the container.
        variables: for the container.
    """

    mounts: Mapping[str, Path] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """This machine, as a container sees it.

    Attributes:
        engine: `podman` or `docker`.
        uid: user of whoever submits.
        gid: their group.
        gpus: NVIDIA GPUs.
        google: what reads gs:// buckets.
        aws: what reads s3:// buckets.
    """

    engine: Engine
    uid: int
    gid: int
    gpus: int = 0
    google: Credentials = Credentials()
    aws: Credentials = Credentials()

    @classmethod
    def look(cls, engine: str = "") -> Host:
        """This machine now; with no engine on it the one that is named, or podman, for a command to look at."""
        found = engine or installed_engine() or "podman"
        return cls(
            engine="docker" if found == "docker" else "podman",
            uid=os.geteuid(),
            gid=os.getegid(),
            gpus=len([path for path in _GPU_DEVICES.glob("nvidia[0-9]*") if path.name[6:].isdecimal()]),
            google=_google(),
            aws=_aws(),
        )

    def credentials_for(self, uri: str) -> Credentials:
        """What a container needs for the bucket at `uri`; nothing for a folder."""
        return {"gs": self.google, "s3": self.aws}.get(uri.partition("://")[0].lower(), Credentials())


def installed_engine() -> str:
    """The first of podman and docker that is installed; empty if neither is."""
    return next((name for name in ("podman", "docker") if shutil.which(name)), "")


def check_engine(engine: str) -> str:
    """Returns the engine that is to be used.

    Raises:
        MissingInputError: it, or any, is not installed; the message says how to install one.
    """
    found = installed_engine() if not engine else engine if shutil.which(engine) else ""
    if not found:
        wanted = engine or "neither podman nor docker"
        raise MissingInputError(
            f"{wanted} is{' not' if engine else ''} installed: `apt-get install podman`, `dnf install podman` or "
            "`brew install podman` brings one"
        )
    return found


def check_credentials(uri: str) -> None:
    """Refuses secrets that only variables hold, which every list of containers would show.

    Raises:
        NoPermissionError: there are such, and no file that could be mounted in their stead.
    """
    if is_remote(uri) and uri.startswith("s3://") and "AWS_SECRET_ACCESS_KEY" in os.environ and not _aws().mounts:
        raise NoPermissionError(
            "the credentials for s3:// are in AWS_SECRET_ACCESS_KEY, which is not handed to a container since every "
            "list of containers would show it: write them into ~/.aws/credentials (`aws configure`)"
        )


def _google() -> Credentials:
    settings = {name: os.environ[name] for name in _GOOGLE_SETTINGS if os.environ.get(name)}
    # As google.auth looks for them.
    folder = os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud"
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or f"{folder}/application_default_credentials.json"
    path = _file(named)
    if path is None:
        return Credentials({}, settings)
    inside = f"{CREDENTIALS}/google.json"
    return Credentials({inside: path}, {**settings, "GOOGLE_APPLICATION_CREDENTIALS": inside})


def _aws() -> Credentials:
    variables = {name: os.environ[name] for name in _AWS_SETTINGS if os.environ.get(name)}
    mounts = {}
    for name, usual in _AWS_FILES.items():
        if (path := _file(os.environ.get(name) or usual)) is not None:
            inside = f"{CREDENTIALS}/{name.lower()}"
            mounts[inside], variables[name] = path, inside
    return Credentials(mounts, variables)


def _file(named: str) -> Path | None:
    try:
        path = Path(named).expanduser().absolute()
        return path if path.is_file() else None
    except (OSError, RuntimeError):
        # A user without a home folder has no credentials in it either.
        return None
