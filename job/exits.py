"""The exit-code table: the only one. Every backend's retry policy and every error message is derived from it."""

from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """What a finished process says about itself; the values follow sysexits.h where it has one."""

    FINISHED = 0
    USAGE = 2
    BAD_REQUEST = 64
    BAD_DATA = 65
    MISSING_INPUT = 66
    BUCKET_AWAY = 69
    NOT_A_NUMBER = 70
    HUNG = 71
    DISK_FULL = 74
    STOPPED = 75
    LOST_RUN = 76
    NO_PERMISSION = 77
    BAD_CONFIG = 78


@dataclass(frozen=True, slots=True)
class Meaning:
    """One row of the table."""

    text: str
    retried: str
    """`never`, `bounded` (counted against a limit) or `always` (not counted where the engine allows that)."""


TABLE: dict[Exit, Meaning] = {
    Exit.FINISHED: Meaning("finished", "never"),
    Exit.USAGE: Meaning("wrong usage of the command line", "never"),
    Exit.BAD_REQUEST: Meaning("a request that cannot be met, such as an unknown name", "never"),
    Exit.BAD_DATA: Meaning("bad data: unreadable, truncated, rotten or unsafe", "never"),
    Exit.MISSING_INPUT: Meaning("missing input: a bucket, dataset, run or checkpoint that is not there", "never"),
    Exit.BUCKET_AWAY: Meaning("the bucket was away beyond the limit", "bounded"),
    Exit.NOT_A_NUMBER: Meaning("the loss or a gradient was not a number; it would be again", "never"),
    Exit.HUNG: Meaning("the job hung, or its machine lost a GPU", "bounded"),
    Exit.DISK_FULL: Meaning("the local disk is full", "never"),
    Exit.STOPPED: Meaning("stopped by preemption, a signal or a deadline, with the state saved", "always"),
    Exit.LOST_RUN: Meaning("another attempt holds the run", "never"),
    Exit.NO_PERMISSION: Meaning("permission denied", "never"),
    Exit.BAD_CONFIG: Meaning("the configuration is not valid, or not the one the run was started with", "never"),
}
"""Codes that are not listed (crash, out of memory, signal) are retried a bounded number of times."""


def retried(code: int) -> str:
    """Whether a program that ended with `code` is started again: `never`, `bounded` or `always`."""
    return TABLE[Exit(code)].retried if code in TABLE else "bounded"


class JobError(Exception):
    """An error a person can act on: its message says what happened, where, and what to do.

    The command line prints it as one line and ends with `exit_code`; it never becomes a traceback.
    """

    exit_code: Exit = Exit.BAD_REQUEST

    def __init__(self, message: str, exit_code: Exit | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class BadRequestError(JobError):
    """A request that cannot be met: an unknown sampler, a name with a slash."""

    exit_code = Exit.BAD_REQUEST


class BadDataError(JobError):
    """Data that is unreadable, truncated, rotten or unsafe."""

    exit_code = Exit.BAD_DATA


class MissingInputError(JobError):
    """A bucket, dataset, run, checkpoint or file that is not there."""

    exit_code = Exit.MISSING_INPUT


class BucketAwayError(JobError):
    """The bucket did not answer, or answered with server errors, beyond the limit of retries."""

    exit_code = Exit.BUCKET_AWAY


class NotANumberError(JobError):
    """The loss or a gradient stopped being a finite number."""

    exit_code = Exit.NOT_A_NUMBER


class DiskFullError(JobError):
    """No space left on a local disk."""

    exit_code = Exit.DISK_FULL


class StoppedError(JobError):
    """Stopped by a signal, a preemption notice or a deadline, with all state saved."""

    exit_code = Exit.STOPPED


class LostRunError(JobError):
    """Another attempt holds the run: it was there first, or took it over."""

    exit_code = Exit.LOST_RUN


class NoPermissionError(JobError):
    """The credentials do not allow the operation."""

    exit_code = Exit.NO_PERMISSION


class BadConfigError(JobError):
    """A configuration that is not valid, or that differs from the run's where it matters."""

    exit_code = Exit.BAD_CONFIG
