"""One thing that was looked at before a job needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.exits import Exit, JobError


@dataclass(frozen=True)
class Check:
    """What was found, and what to do about it.

    Attributes:
        name: what was looked at, in a word or two, such as `bucket write`.
        passed: whether a job can rely on it.
        message: what was found, in a line.
        remedy: what to do if it did not pass.
        exit_code: what a job would end with for want of it.
    """

    name: str
    passed: bool
    message: str
    remedy: str = ""
    exit_code: Exit = Exit.MISSING_INPUT

    @classmethod
    def of_error(cls, name: str, error: JobError) -> Check:
        """A check that failed with `error`, whose message says what to do after its last colon."""
        message, separator, remedy = str(error).rpartition(": ")
        return cls(name, False, message if separator else remedy, remedy if separator else "", error.exit_code)


def looked_at(name: str, look: Callable[[], str]) -> Check:
    """A check that passes, with what `look` says, unless that raises a `JobError`."""
    try:
        return Check(name, True, look())
    except JobError as error:
        return Check.of_error(name, error)


def local_gpus() -> int:
    """How many NVIDIA GPUs this machine has."""
    return sum(path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*"))


def unchecked_image(image: str) -> Check:
    """About the image of a target elsewhere: only the machines there can see whether its registry has it."""
    if not image:
        return Check("image", False, "the target names none", "set its `image:`")
    if image.startswith("localhost/"):
        return Check("image", False, f"{image} is on this machine alone", "`make push-image`, and set `image:`")
    return Check("image", True, f"{image}: not checked here; a job whose image is not there says so")
