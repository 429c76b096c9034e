"""What jobs on Compute Engine and on Batch have in common: the words of the program, its variables, labels, checks."""

from __future__ import annotations

import re

from job.exits import BadRequestError, Exit, retried
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget

USER = "10001:10001"
"""Whom the program runs as: nobody that a machine knows."""
GRACE_SECONDS = 25
"""From SIGTERM to SIGKILL: Compute Engine gives a spot machine 30 s in all."""
SCRATCH = "/scratch"
SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
"""What the account may do is decided by its roles alone."""
NEVER_RETRIED = tuple(code for code in range(1, 256) if retried(code) == "never")
ALWAYS_RETRIED = tuple(code for code in range(1, 256) if retried(code) == "always")

_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{1,400}")
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_NETWORK = re.compile(r"[a-z0-9.:/_-]*", re.IGNORECASE)
_ACCOUNT = re.compile(r"[a-z0-9.-]+@[a-z0-9.-]+")


def check(spec: JobSpec, target: GoogleTarget) -> None:
    """Refuses what neither of the two can run.

    Raises:
        BadRequestError: naming the option, or the field of the target.
    """
    if spec.nodes > 1:
        raise BadRequestError(
            f"--nodes {spec.nodes}: a {target.backend} target has no machines that train together; use a kubernetes "
            "target, or one machine with more GPUs (--gpus 8)"
        )
    if not _IMAGE.fullmatch(spec.image):
        raise BadRequestError(
            f"image {spec.image!r}: set image in the target to one that machines can pull, such as "
            "us-central1-docker.pkg.dev/PROJECT/ddpm/ddpm:latest"
        )
    if spec.image.startswith("localhost/"):
        raise BadRequestError(f"image {spec.image}: it is on this machine alone; push it (`make push-image`)")
    if "://" not in spec.bucket or spec.bucket.startswith("file:"):
        raise BadRequestError(f"bucket {spec.bucket!r}: a machine elsewhere does not see it; use gs://NAME")
    for what, word in (*(("an argument", word) for word in spec.argv), *spec.env.items()):
        if any(ord(character) < 32 or ord(character) == 127 for character in word):
            raise BadRequestError(f"{what} ({word!r}) has a control character, such as a line break")
    if target.service_account and not _ACCOUNT.fullmatch(target.service_account):
        raise BadRequestError(f"service_account {target.service_account!r}: use its e-mail address")
    for field, value in (("network", target.network), ("subnetwork", target.subnetwork)):
        if not _NETWORK.fullmatch(value):
            raise BadRequestError(f"{field} {value!r}: use a name, or projects/PROJECT/global/networks/NAME")


def labels(spec: JobSpec) -> dict[str, str]:
    """The labels that Google takes.

    Raises:
        BadRequestError: one that it does not take.
    """
    for key, value in spec.all_labels.items():
        if not _LABEL_KEY.fullmatch(key) or key.startswith("goog") or not _LABEL_VALUE.fullmatch(value):
            raise BadRequestError(
                f"label {key}={value!r}: use lower-case letters, digits, '-' and '_', at most 63 of them"
            )
    return dict(sorted(spec.all_labels.items()))


def variables(spec: JobSpec) -> dict[str, str]:
    """The variables of the container, in the order of their names."""
    own = {
        # On these machines /tmp is memory.
        "TMPDIR": SCRATCH,
        "XDG_CACHE_HOME": f"{SCRATCH}/cache",
        "DDPM_CACHE": f"{SCRATCH}/ddpm",
        "DDPM_GRACE_SECONDS": str(GRACE_SECONDS),
    }
    return dict(sorted({**own, **spec.env}.items()))


def confinement() -> list[str]:
    """Options of `docker run` that hold on both: nothing to write but scratch and /tmp, no rights, no root."""
    return [
        "--ipc=host",
        f"--stop-timeout={GRACE_SECONDS}",
        "--read-only",
        # Compiled kernels are loaded from there.
        "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
        f"--user={USER}",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--ulimit=memlock=-1",
    ]


def meaning(code: int) -> str:
    """What an exit code of the program says, in a few words."""
    from job.exits import TABLE

    if code in TABLE:
        return TABLE[Exit(code)].text
    return f"killed by signal {code - 128}" if 128 < code < 160 else "crashed"
