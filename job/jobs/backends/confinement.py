"""The confinement of a job's container on every engine: the folders it may write, and its rights."""

from job.stop import GRACE_VARIABLE

IMAGE_USER = 10001
"""User and group of the image, for jobs that touch no file of the machine they run on."""
SCRATCH = "/scratch"
"""The local disk that the program may write; elsewhere /tmp may be memory."""


def scratch_variables(grace_seconds: int) -> dict[str, str]:
    """Returns the container's variables for the folders it may write, and for the time it has to save."""
    folders = {"TMPDIR": SCRATCH, "XDG_CACHE_HOME": f"{SCRATCH}/cache", "DDPM_CACHE": f"{SCRATCH}/ddpm"}
    return {**folders, GRACE_VARIABLE: str(grace_seconds)}


def docker_options(user: int, group: int, stop_seconds: int) -> list[str]:
    """Returns options of `docker run`: no rights, only scratch and /tmp to write, and the time until SIGKILL."""
    return [
        f"--stop-timeout={stop_seconds}",
        "--read-only",
        # torch.compile puts libraries there and runs them.
        "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
        f"--user={user}:{group}",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
    ]
