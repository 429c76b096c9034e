"""The parts that all engines share: keys and operations of a target, the status of a job, and checks."""

from __future__ import annotations

import abc
import json
import os
import re
import select
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from job.coordination.outcome import Outcome, read_outcome
from job.coordination.sealed import utc_now
from job.exits import (
    BadRequestError,
    Exit,
    JobError,
    MissingInputError,
    Restart,
    State,
    meaning,
    restart_after,
    state_after,
)
from job.jobs.machines import Hourly
from job.jobs.spec import JobSpec
from job.progress import note, printable
from job.stop import SPOT_GRACE_SECONDS
from job.store import KINDS, check_uri

JsonObject = dict[str, Any]
"""A request to an engine, or its answer, as JSON types."""
FOLLOW_SECONDS = 0.2
"""Between two looks at the output of a job of this machine."""


class Cause(StrEnum):
    """The cause of a state, where the engine knows what an exit code does not show."""

    TAKEN_AWAY = "taken away"
    """Its machine was."""
    OUT_OF_TIME = "out of time"
    """It ran for its `max_hours`."""
    NO_IMAGE = "no image"
    """It has a machine, which costs, and its image cannot be pulled."""
    STUCK = "stuck"
    """It could not be ended, and may still hold its run."""


@dataclass(frozen=True)
class JobStatus:
    """A job by its engine, which knows whether it lives; `with_outcome` adds how it ended, by its bucket."""

    name: str
    state: State
    message: str = ""
    """The engine's own reason, or the program's last line, in a line."""
    exit_code: int | None = None
    """The program's, or that of its last attempt, if the engine reports it."""
    attempts: int = 0
    """The number of the program's starts, by its bucket."""
    failures: int = 0
    """The number of attempts that ended in a failure that counts, if the engine makes several by itself."""
    created: str = ""
    """ISO 8601, UTC."""
    place: str = ""
    """Zone or node it runs on."""
    cause: Cause | None = None
    has_machine: bool = False
    """Whether a waiting job has a machine, for example to pull its image: it costs as much as a running one."""
    bucket: str = ""
    """The job's bucket, if its engine stores it."""

    def __post_init__(self) -> None:
        # The last line of a program may hold escape sequences, which a terminal obeys.
        object.__setattr__(self, "message", printable(" ".join(self.message.split())))

    @classmethod
    def of_slices(cls, slices: Sequence[JobStatus]) -> JobStatus:
        """Returns the status of a job from those of its slices, of which the worst decides."""
        if len(slices) == 1:
            return slices[0]
        worst = max(range(len(slices)), key=lambda one: (slices[one].state.order, slices[one].restart, -one))
        finished = f"{sum(one.state is State.FINISHED for one in slices)} of {len(slices)} slices finished"
        failed = failed_slices(number for number, one in enumerate(slices) if one.state is State.FAILED)
        message = joined(finished, failed, f"slice {worst}: {slices[worst].why}" * bool(slices[worst].why))
        created = min((one.created for one in slices if one.created), default="")
        places = ",".join(sorted({one.place for one in slices if one.place}))
        return replace(slices[worst], message=message, created=created, place=places)

    @property
    def why(self) -> str:
        """Returns the reason of an end: the message, else the meaning of a bad exit code."""
        return self.message or (meaning(self.exit_code) if self.state.is_over and self.exit_code else "")

    @property
    def occupies_machine(self) -> bool:
        """Returns whether it runs, or waits on a machine that costs as much, if its engine reports that."""
        return self.state is State.RUNNING or self.has_machine

    @property
    def restart(self) -> Restart:
        """Returns whether it is tried again, by its cause and else by its exit code."""
        if self.cause is not None:
            return Restart.ALWAYS if self.cause is Cause.TAKEN_AWAY else Restart.NEVER
        return restart_after(self.exit_code)

    def with_outcome(self, bucket_uri: str, earlier: Outcome | None = None) -> JobStatus:
        """Returns this status with its starts, and with how it or its last attempt ended, by the job's bucket.

        A program that was killed writes no end: then the exit code of the engine counts, which also wins over the
        bucket's.

        Args:
            bucket_uri: the job's bucket.
            earlier: the outcome before the job was submitted, which belongs to an earlier job of this name.
        """
        outcome = read_outcome(self.name, bucket_uri)
        # One from before the job was made belongs to an earlier job as well.
        if outcome is None or outcome == earlier or outcome.updated < self.created:
            outcome = Outcome(state=State.RUNNING, exit_code=None, updated=utc_now())
        status = replace(self, attempts=sum(start >= self.created for start in outcome.starts))
        return status._after(outcome) if self.state.is_over else status._between(outcome)

    def _between(self, outcome: Outcome) -> JobStatus:
        """Returns the status of a job that lives, with the end of its last attempt."""
        code = self.exit_code
        # Slices that have ended say nothing about those that wait.
        if code is None and self.state is State.WAITING and self.attempts and not outcome.is_sliced:
            code = outcome.exit_code
        # One that is stuck has not ended.
        if not code or self.cause is Cause.STUCK:
            return self
        said = outcome.message * (outcome.exit_code == code) or meaning(code)
        return replace(self, message=joined(self.message, f"the attempt before ended with exit code {code}: {said}"))

    def _after(self, outcome: Outcome) -> JobStatus:
        """Returns the status of a job that is over, with its end."""
        code, is_known = outcome.exit_code, self.exit_code is not None
        if code is None or (self.exit_code != code if is_known else self.state not in (State.FAILED, State.GONE)):
            return self
        if is_known:
            # The engine counts the slices.
            return replace(self, message=joined(self.message * outcome.is_sliced, outcome.message) or self.message)
        failed = failed_slices(outcome.failed) * outcome.is_sliced
        return replace(
            self,
            state=self.state if self.state is State.GONE and code else state_after(code),
            exit_code=code,
            failures=self.failures * (restart_after(code) is Restart.BOUNDED),
            message=joined(failed, outcome.message) or self.message * (code != Exit.FINISHED),
            # A code that would come again counts more than the loss of the machine.
            cause=None if self.cause is Cause.TAKEN_AWAY else self.cause,
        )


def joined(*parts: str) -> str:
    """Returns a message of those parts that are not empty, nor in what is before them."""
    return reduce(lambda text, part: text if part in text else f"{text}; {part}".removeprefix("; "), parts, "")


def failed_slices(numbers: Iterable[object]) -> str:
    """Returns the part of a message that names the slices which failed for good; empty if none did."""
    return f"failed slices: {named}" if (named := ",".join(map(str, numbers))) else ""


def last_line(answer: subprocess.CompletedProcess[str]) -> str:
    """Returns the last line of an engine's client that failed, without its name."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: |fatal: )*", "", lines[-1]) if lines else f"it ended with {answer.returncode}"


def output_of(
    command: Sequence[str], poll_seconds: float, is_over: Callable[[], bool], stderr: int = subprocess.DEVNULL
) -> Iterator[str]:
    """Yields the lines that a command prints, until it ends, or prints no more after `is_over`."""
    was_over, part = False, b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            while True:
                ready = select.select([process.stdout], [], [], poll_seconds)[0]
                data = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
                is_end = not data and (ready or was_over)
                *lines, part = (part + data + b"\n" * (is_end and bool(part))).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
                if is_end:
                    return
                # Looked at before the next read, so that it has all output until the end.
                was_over = not data and is_over()
        finally:
            process.kill()


@dataclass(frozen=True)
class Check:
    """The result of looking at one thing that a job needs.

    Attributes:
        name: of the thing, such as `bucket write`.
        passed: whether a job can rely on it.
        message: the finding, in a line.
        remedy: what to do if it did not pass.
        exit_code: the code of a job that lacks it.
    """

    name: str
    passed: bool
    message: str
    remedy: str = ""
    exit_code: Exit = Exit.MISSING_INPUT

    @classmethod
    def of_error(cls, name: str, error: JobError) -> Check:
        """Returns a check that failed with `error`, whose message has the remedy after its last colon."""
        message, separator, remedy = str(error).rpartition(": ")
        return cls(name, False, message if separator else remedy, remedy if separator else "", error.exit_code)

    @classmethod
    def of(cls, name: str, look: Callable[[], str]) -> Check:
        """Returns a check that passes with the message that `look` returns, or fails with the `JobError` it raises."""
        try:
            return cls(name, True, look())
        except JobError as error:
            return cls.of_error(name, error)

    @classmethod
    def unless_hidden(cls, name: str, look: Callable[[], str]) -> Check:
        """As `of`, but passes if these credentials may not look: submitting a job does not need that right."""
        check = cls.of(name, look)
        is_hidden = not check.passed and check.exit_code is Exit.NO_PERMISSION
        return cls(name, True, f"not looked at: {check.message}: {check.remedy}") if is_hidden else check

    @classmethod
    def inside(cls, output: str, where: str) -> list[Check]:
        """Returns the checks that `ddpm doctor --json` printed, with `where` it ran; none if it did not."""
        found = next((json.loads(line) for line in output.splitlines() if line.startswith("[{")), ())
        return [cls(**one | {"name": f"{one['name']} ({where})", "exit_code": Exit(one["exit_code"])}) for one in found]


class NoCapacityError(JobError):
    """The engine lacks a machine of the requested kind now: another zone, or later, may have one."""

    exit_code = Exit.BUCKET_AWAY


_SECRET = re.compile(
    r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!IZ)|PWD|KEYS?(_|$)|SAS_|CONNECTION_STRING|FSSPEC_[A-Z0-9]+$|FSSPEC_\w*(KWARGS|HEADERS|PASS)"
)
_NO_SECRET = re.compile("|".join([r"\w+_(FILE|PATH|DIR)|(OLD)?PWD", *(name for kind in KINDS for name in kind.files)]))
"""The names that look like those of secrets, and hold a path."""


def _not_secret(variable: str) -> str:
    if _SECRET.search(variable) and not _NO_SECRET.fullmatch(variable):
        raise ValueError(f"{variable} looks like a secret, which lists would show: use the job's service account")
    return variable


def _uri(text: str) -> str:
    try:
        check_uri(text)
    except BadRequestError as error:
        raise ValueError(str(error)) from None
    return text


Text = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
"""Printable: part of a command, a label or a terminal's line."""
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Image = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,400})?$")]
Word = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@,=-]{0,400})?$")]
"""Part of a command or of a path: neither an option nor the path of another place."""
_Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$"), AfterValidator(_not_secret)]


class Terms(NamedTuple):
    """The facts about a job on a target that a person reads before it is sent.

    Attributes:
        machine: the type of its machines.
        place: where they are.
        limit: what `max_hours` count for, and who ends the job then.
        attempts: how often these hours may pass; None without bound.
        kind: whether its machines may be taken away, if `spot` does not tell.
    """

    machine: str
    place: tuple[str, ...]
    limit: str
    attempts: int | None = 1
    kind: str = ""


class Target(BaseModel):
    """A place for jobs, as `targets.yaml` describes it, and the operations of its engine, each of which has a subclass.

    Rendering needs neither credentials nor network. All other operations raise errors that a person can act on:
    `NoPermissionError`, `MissingInputError` for a job, project or namespace that does not exist, `BadRequestError` for
    a refusal, `BucketAwayError` if the engine's API is away after bounded retries, and `NoCapacityError`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    is_remote: ClassVar[bool] = True
    """Whether its jobs run on other machines."""
    is_in_place: ClassVar[bool] = False
    """Whether its jobs have the files, libraries and variables of this program."""
    has_groups: ClassVar[bool] = False
    """Whether several of its machines can train together."""
    limits_attempts: ClassVar[bool] = False
    """Whether `max_hours` end one attempt, after which the engine itself begins the next."""
    keeps_ended: ClassVar[bool] = False
    """Whether the engine knows a job for a day after its end: an unknown one was then deleted."""

    name: str = Field("", pattern=r"^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Its key in the file."""
    backend: str
    image: Image = ""
    """By tag, `REGISTRY/NAME:TAG`, or by digest, `REGISTRY/NAME@sha256:…`."""
    bucket: Annotated[Text, AfterValidator(_uri)] = ""
    """Where datasets and runs lie, unless `--bucket` or `DDPM_BUCKET` says otherwise."""
    gpus: int = Field(1, ge=0, le=64)
    """Per node, unless `--gpus` says otherwise."""
    gpu_type: LabelValue = ""
    spot: bool = True
    max_hours: float = Field(24.0, ge=0.017, le=720)
    price_per_hour: float | None = Field(None, ge=0)
    """In dollars, of one machine with all its GPUs, as the user pays it."""
    env: dict[_Variable, Text] = Field(default_factory=dict)
    """Variables of the job, without secrets, because lists and logs show them."""

    @property
    def software(self) -> str:
        """Returns where its machines find the program: the image, or what stands for one."""
        return self.image

    @property
    def has_files(self) -> bool:
        """Returns whether its machines have the files of this one, at the same paths."""
        return not self.is_remote

    @property
    def usual_bucket(self) -> str:
        """Returns the bucket of a command without `--bucket`: `DDPM_BUCKET`, else the target's, else ./bucket."""
        return os.environ.get("DDPM_BUCKET", "") or self.bucket or "./bucket"

    @property
    def notice_seconds(self) -> float:
        """Returns the time between the notice that a machine is taken away and its end."""
        return SPOT_GRACE_SECONDS

    @property
    def selects_machines(self) -> bool:
        """Returns whether the GPU type and `spot` decide about the machine."""
        return True

    def terms(self, spec: JobSpec) -> Terms:
        """Returns the facts about a job on a remote target."""
        raise NotImplementedError

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine by the table that comes with the program; None if it is unknown."""
        return None

    def hourly(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine: the target's own wins."""
        own = self.price_per_hour
        return self.list_price(spec) if own is None else Hourly(own, "as the target says")

    @abc.abstractmethod
    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns all that `submit` sends, in order. Pure: equal specs give equal manifests.

        Raises:
            BadRequestError: this engine cannot run the job; the message names the option.
        """

    @abc.abstractmethod
    def submit(self, spec: JobSpec) -> None:
        """Sends what `render` returns, or nothing: after an error it removes what it has made.

        Raises:
            BadRequestError: a job of this name is not over.
            NoCapacityError: the engine lacks such a machine now.
        """

    def submit_where_possible(self, spec: JobSpec) -> Target:
        """Submits to the first place, from this one on, that has a machine, and returns that place.

        Raises:
            NoCapacityError: none has.
        """
        try:
            self.submit(spec)
        except NoCapacityError as error:
            if (following := self.elsewhere()) is None:
                raise
            note(f"{error}; trying the next place")
            return following.submit_where_possible(spec)
        return self

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the job, if that runs on this machine: its terminal, signals and exit code."""
        raise NotImplementedError

    def elsewhere(self) -> Target | None:
        """Returns the same engine in the target's next zone or region; None after the last."""
        return None

    @abc.abstractmethod
    def find(self, name: str) -> Any:
        """Returns the engine's record of a job; falsy if the engine does not know the job."""

    def known(self, name: str) -> Any:
        """Returns what `find` does.

        Raises:
            MissingInputError: the engine does not know the job.
        """
        if found := self.find(name):
            return found
        raise self.unknown(name)

    def unknown(self, name: str) -> MissingInputError:
        """Returns the error about a job that the engine does not know."""
        return MissingInputError(f"target {self.name!r} knows no job {name!r}: see `ddpm jobs list`")

    def runs_already(self, name: str, where: str) -> BadRequestError:
        """Returns the error about a job that is submitted while it runs."""
        return BadRequestError(f"{name} runs {where} already: `ddpm jobs cancel {name}` stops it")

    @staticmethod
    def effect_of_cancelling(state: State) -> str:
        """Returns what cancelling does to a job in this state, in words that go on after its name."""
        if state is State.RUNNING:
            return "is stopping: it saves first, and the same command goes on from there"
        if state is State.WAITING:
            return "was waiting and is removed: the same command submits it again"
        return f"was {state} already: its engine's record of it is removed"

    @abc.abstractmethod
    def alive(self, name: str) -> JobStatus:
        """Returns whether a job lives, as far as the engine knows; `State.GONE` if it does not know the job."""

    @abc.abstractmethod
    def jobs(self) -> list[JobStatus]:
        """Returns all jobs that this program submitted to this target, in any order, as `alive` does."""

    @abc.abstractmethod
    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """Yields the job's output, line by line; with `follow` until its end, across restarts of its machine.

        Raises:
            MissingInputError: the job is unknown, or its output is gone.
        """

    @abc.abstractmethod
    def cancel(self, name: str) -> str:
        """Ends the job as a preemption would (it saves first), and returns `effect_of_cancelling`.

        Raises:
            MissingInputError: the engine does not know the job.
        """

    def checks(self, bucket: str) -> Iterable[Check]:
        """Yields the checks of `ddpm doctor` about the engine. A problem is a failed check, not an error.

        Args:
            bucket: to look at from a machine of the engine, where that takes seconds; empty for none.
        """
        return ()
