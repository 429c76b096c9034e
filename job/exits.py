"""The one table of exit codes and states: retry policies, records and error messages follow from it."""

import difflib
import errno
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Self


class Restart(IntEnum):
    """Whether an ended program is started again. Among several parts of a job the largest value decides."""

    ALWAYS = 0
    """Starts it again, as after a preemption; not counted where the engine allows that."""
    BOUNDED = 1
    """Starts it again, and counts a failure against a limit."""
    NEVER = 2


class State(StrEnum):
    """The state of a run, a job or a process: one table for the four vocabularies.

    | state       | run (`Status`)       | job (`Outcome`)   | engine (`JobStatus`)            | rank (launcher)       |
    |-------------|----------------------|-------------------|---------------------------------|-----------------------|
    | FINISHED    | finished             | exit code 0       | exit code 0                     | exit code 0           |
    | GONE        |                      |                   | unknown to the engine           |                       |
    | CANCELLED   |                      |                   | by a person                     |                       |
    | STOPPED     | stopped              | exit code 75      | exit code 75                    | exit code 75          |
    | FAILED      | failed               | another exit code | another exit code, or none      | another exit code     |
    | WAITING     |                      |                   | for a machine, queue or image   |                       |
    | RUNNING     | running              | no exit code yet  | running                         | no exit code yet      |
    | IMPORTED    | made by `ddpm import`|                   |                                 |                       |
    | CUT_OFF     | running, but silent  |                   |                                 |                       |
    | NOT_STARTED | has no status        |                   |                                 |                       |
    | UNREADABLE  | has a corrupt status |                   |                                 |                       |
    | NEVER_BEGAN |                      |                   |                                 | killed by the signal  |
    | LOST_PEER   |                      |                   |                                 | exit code 68          |

    Of several parts of a job the state that is listed last decides about the job.
    """

    FINISHED = "finished"
    GONE = "gone"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"
    WAITING = "waiting"
    RUNNING = "running"
    IMPORTED = "imported"
    CUT_OFF = "cut off"
    NOT_STARTED = "not started"
    UNREADABLE = "cannot be read"
    NEVER_BEGAN = "never began"
    LOST_PEER = "lost its peer"

    @property
    def order(self) -> int:
        """The position in the table."""
        return [*State].index(self)

    @property
    def is_over(self) -> bool:
        """Returns whether a job stays in this state until it is submitted again."""
        return self not in (State.WAITING, State.RUNNING)


class Exit(IntEnum):
    """The exit codes of this program; the values follow sysexits.h where it has one.

    Attributes:
        text: the meaning.
        restart: whether the program is started again.
        state: of a job that ended so.
    """

    text: str
    restart: Restart
    state: State

    def __new__(cls, code: int, text: str = "", restart: Restart = Restart.NEVER, state: State = State.FAILED) -> Self:
        """Makes a row of the table."""
        row = int.__new__(cls, code)
        row._value_, row.text, row.restart, row.state = code, text, restart, state
        return row

    FINISHED = 0, "finished", Restart.NEVER, State.FINISHED
    USAGE = 2, "wrong usage of the command line"
    BAD_REQUEST = 64, "an impossible request, such as an unknown name"
    BAD_DATA = 65, "bad data: unreadable, truncated, corrupt or unsafe"
    MISSING_INPUT = 66, "missing input: no such bucket, dataset, run or checkpoint"
    LOST_PEER = (
        68,
        "another process of the job went away; one process ends so, and never the job",
        Restart.BOUNDED,
        State.LOST_PEER,
    )
    BUCKET_AWAY = 69, "the bucket did not answer within the limit", Restart.BOUNDED
    NOT_A_NUMBER = 70, "the loss or a gradient was not a number; a retry would repeat it"
    HUNG = 71, "the job hung, or its machine lost a GPU", Restart.BOUNDED
    NO_MEMORY = 72, "memory ran out, even for the smallest part of the work", Restart.BOUNDED
    DISK_FULL = 74, "the local disk is full"
    STOPPED = 75, "stopped by preemption, a signal or a deadline, with the state saved", Restart.ALWAYS, State.STOPPED
    LOST_RUN = 76, "another attempt holds the run"
    NO_PERMISSION = 77, "permission denied"
    BAD_CONFIG = 78, "an invalid configuration, or another one than the run's"


CRASHED = 1
"""The exit code of a program that ended by an unforeseen error."""
TABLE: dict[int, Exit] = {int(code): code for code in Exit}
"""The rows by number: a program that crashes or is killed ends with a code of no row."""


def state_after(code: int | None) -> State:
    """Returns the state of a program by its exit code, a code of no row included; without one the program runs."""
    return State.RUNNING if code is None else TABLE[code].state if code in TABLE else State.FAILED


def restart_after(code: int | None) -> Restart:
    """Returns whether a program that ended with `code` is started again; an unknown or lost code is `BOUNDED`."""
    return TABLE[code].restart if code in TABLE else Restart.BOUNDED


def failures(restart: Restart) -> list[int]:
    """Returns the exit codes with this rule, in order and without 0, for an engine's own policy."""
    return [int(code) for code in Exit if code.restart is restart and code is not Exit.FINISHED]


def meaning(code: int) -> str:
    """Returns the meaning of an exit code, for people."""
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
    """An impossible request: an unknown sampler, a name with a slash."""

    exit_code = Exit.BAD_REQUEST


class BadDataError(JobError):
    """Data that is unreadable, truncated, corrupt or unsafe."""

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
    """Another attempt holds the run: it came first, or took the run over."""

    exit_code = Exit.LOST_RUN


class NoPermissionError(JobError):
    """The credentials do not allow the operation."""

    exit_code = Exit.NO_PERMISSION


class BadConfigError(JobError):
    """A configuration that is not valid, or that differs from the run's where it matters."""

    exit_code = Exit.BAD_CONFIG


class JobEndedError(JobError):
    """A job that `--watch` saw end badly. This program ends with the job's code, also after a crash."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message, CRASHED if code is None else code)  # type: ignore[arg-type]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: the known word that begins so or is most like it, if any."""
    # The names of samplers are `DPM++ 2M` and `Euler a` elsewhere.
    plain = str.maketrans({"+": "p", "-": "_", " ": "_"})
    names, typed = {name.lower().translate(plain): name for name in known}, word.lower().translate(plain)
    longer = sorted((name for name in names if len(typed) > 2 and name.startswith(typed)), key=len)
    close = longer or difflib.get_close_matches(typed, names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def ending_of(error: BaseException) -> tuple[int, str]:
    """Returns the exit code of a program that ends with `error`, and its message, empty for a crash or `SystemExit`."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else CRASHED if error.code else 0, ""
        case JobError():
            # A terminal would execute control characters in names from outside.
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
        case RuntimeError() | MemoryError() | ImportError() | OSError() if said := _out_of_memory(error):
            return int(Exit.NO_MEMORY), said
    return CRASHED, ""


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _out_of_memory(error: Exception) -> str:
    """Returns the message of an error that memory ran out, here or on the GPU; empty for any other error."""
    torch, text = sys.modules.get("torch"), " ".join(str(error).split())
    # Lack of memory has many messages: a bare RuntimeError of PyTorch, an unspecific one of oneDNN, and those of the
    # kernel and the loader where a limit such as `ulimit -v` leaves no room for the program itself.
    words = (
        r"can(no|')t allocate memory|could not create a primitive|(\S+\.so\S* )?failed to map segment|start new thread"
        "|MPS backend out of memory|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    )
    said = re.search(words, text, re.IGNORECASE)
    is_gpu = torch is not None and (isinstance(error, torch.OutOfMemoryError) or bool(said and said[0][:2] == "CU"))
    if not (is_gpu or isinstance(error, MemoryError) or said):
        return ""
    text = said[0] if said and isinstance(error, ImportError) else text.removeprefix("CUDA out of memory. ")
    what = f" ({text.split('. ')[0 if is_gpu else -1]})" if text else ""
    place, allow = ("GPU", "") if is_gpu else ("machine", "allow more (`ulimit -a`), or ")
    return (
        f"memory ran out on the {place}{what}: {allow}train with a smaller train.micro_batch_size, which changes "
        "the rounding and the masks of dropout, or with model.gradient_checkpointing=true or ema.device=cpu; a new run "
        "may have another train.precision, train.optimizer=adamw8bit or a smaller size; what was saved is there, and "
        "the same command goes on from it"
    )


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Reports that `what` needs an extra of this package, if a module is missing; also as a decorator.

    Raises:
        BadRequestError: a module is missing; the message has the remedy.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadRequestError(f"{what} needs more than is installed ({error}): {how_to_install(extra)}") from None


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra of this package from where the package came: no index has it."""
    root = Path(__file__).parents[1]
    is_checkout = (root / "pyproject.toml").exists()
    what = ["--editable", f"{root}[{extra}]"] if is_checkout else [f"ddpm-job[{extra}] @ file:///PATH/TO/ITS/WHEEL.whl"]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])
