"""The exit-code table: the only one. Every backend's retry policy and every error message is derived from it."""

import difflib
import errno
import re
import shlex
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Self

CRASHED = 1
"""The code of a program that ended by an error which nobody foresaw, or by the lack of memory."""


class Exit(IntEnum):
    """What a finished process says about itself; the values follow sysexits.h where it has one.

    Attributes:
        text: what it means.
        retried: `never`, `bounded` (counted against a limit) or `always` (not counted where the engine allows that).
    """

    text: str
    retried: str

    def __new__(cls, code: int, text: str = "", retried: str = "") -> Self:
        """A row of the table."""
        row = int.__new__(cls, code)
        row._value_, row.text, row.retried = code, text, retried
        return row

    FINISHED = 0, "finished", "never"
    USAGE = 2, "wrong usage of the command line", "never"
    BAD_REQUEST = 64, "a request that cannot be met, such as an unknown name", "never"
    BAD_DATA = 65, "bad data: unreadable, truncated, rotten or unsafe", "never"
    MISSING_INPUT = 66, "missing input: a bucket, dataset, run or checkpoint that is not there", "never"
    BUCKET_AWAY = 69, "the bucket was away beyond the limit", "bounded"
    NOT_A_NUMBER = 70, "the loss or a gradient was not a number; it would be again", "never"
    HUNG = 71, "the job hung, or its machine lost a GPU", "bounded"
    DISK_FULL = 74, "the local disk is full", "never"
    STOPPED = 75, "stopped by preemption, a signal or a deadline, with the state saved", "always"
    LOST_RUN = 76, "another attempt holds the run", "never"
    NO_PERMISSION = 77, "permission denied", "never"
    BAD_CONFIG = 78, "the configuration is not valid, or not the one the run was started with", "never"


TABLE: dict[int, Exit] = {int(code): code for code in Exit}
"""By number: programs end with others, too, when they crash, run out of memory or are killed."""


def retried(code: int) -> str:
    """Whether a program that ended with `code` is started again; see `Exit`. What is not in the table is `bounded`."""
    return TABLE[code].retried if code in TABLE else "bounded"


def severity(rule: str) -> int:
    """How bad a failure is that is retried by `rule`: of several parts of a job the worst decides about the whole."""
    return ("always", "bounded", "never").index(rule)


def meaning(code: int) -> str:
    """What it means that a program ended with `code`, in words."""
    if code in TABLE:
        return TABLE[code].text
    return f"killed by signal {code - 128}" if code > 128 else "crashed"


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: the known word that is most like it, if any is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def ending_of(error: BaseException) -> tuple[int, str]:
    """The exit code of a program that ends with `error`, and what to say; nothing for a crash, and for `SystemExit`."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else CRASHED if error.code else 0, ""
        case JobError():
            # A terminal would take some of what came from outside for commands.
            said = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in str(error))
            return int(error.exit_code), said
        case OSError() if "No usable temporary directory" in str(error):
            said = "no folder for temporary files can be written: free some space, or set TMPDIR"
            return int(Exit.DISK_FULL), said
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            said = f"no space left on the disk{_at(error)}: free some, or set TMPDIR to a larger one"
            return int(Exit.DISK_FULL), said
        case PermissionError():
            said = f"permission denied{_at(error)}: give this user access, or choose another place"
            return int(Exit.NO_PERMISSION), said
        case OSError(errno=errno.ENAMETOOLONG | errno.ENOTDIR | errno.EISDIR | errno.ELOOP):
            return int(Exit.BAD_REQUEST), f"{error.strerror}{_at(error)}: choose another path"
        case RuntimeError() | MemoryError() | ImportError() | OSError():
            return CRASHED, _out_of_memory(error)
    return CRASHED, ""


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _out_of_memory(error: Exception) -> str:
    """What to say if memory ran out, here or on the GPU; empty for any other error."""
    torch, text = sys.modules.get("torch"), " ".join(str(error).split())
    is_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # PyTorch says it of the host's memory in a bare RuntimeError, oneDNN in words that say nothing of memory, and the
    # kernel and the loader where a limit such as `ulimit -v` leaves no room for the program itself.
    words = (
        r"can(no|')t allocate memory|could not create a primitive|(\S+\.so\S* )?failed to map segment|start new thread"
    )
    said = re.search(words, text, re.IGNORECASE)
    if not (is_gpu or isinstance(error, MemoryError) or said):
        return ""
    text = said[0] if said and isinstance(error, ImportError) else text.removeprefix("CUDA out of memory. ")
    what = f" ({text.split('. ')[0 if is_gpu else -1]})" if text else ""
    place, allow = ("GPU", "") if is_gpu else ("machine", "allow more (`ulimit -a`), or ")
    return (
        f"memory ran out on the {place}{what}: {allow}train with a smaller train.micro_batch_size, which changes "
        "rounding and nothing else; what was saved is there, and the same command goes on from it"
    )


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra of this package from where the package came: no index has it."""
    root = Path(__file__).parents[1]
    is_checkout = (root / "pyproject.toml").exists()
    what = ["--editable", f"{root}[{extra}]"] if is_checkout else [f"ddpm-job[{extra}] @ file:///PATH/TO/ITS/WHEEL.whl"]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])
