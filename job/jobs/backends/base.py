"""What is asked of an engine that runs jobs, said once for all of them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, NoReturn

from job.exits import BadRequestError, Exit, JobError, MissingInputError, meaning, retried
from job.jobs.spec import JobSpec
from job.jobs.targets import Target
from job.outcome import Outcome, read_outcome
from job.progress import note, printable

JsonObject = dict[str, Any]
"""What is sent to an engine, as JSON types."""
FOLLOW_POLL_SECONDS = 0.2
"""Between two looks at a job of this machine whose output somebody follows."""


class State(StrEnum):
    """How a job is going; the words of all engines are translated into these."""

    WAITING = "waiting"
    """For a machine, a queue or an image."""
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GONE = "gone"
    """The engine does not know it, though it was submitted: its machine was taken away, or somebody deleted it."""

    @classmethod
    def of_code(cls, code: int) -> State:
        """How a job of this machine ended, where nobody but a person or its own deadline stops one."""
        return {Exit.FINISHED.value: State.FINISHED, Exit.STOPPED.value: State.CANCELLED}.get(code, State.FAILED)

    @property
    def is_over(self) -> bool:
        """Whether it stays like that unless somebody submits the job again."""
        return self not in (State.WAITING, State.RUNNING)

    @property
    def when_cancelled(self) -> str:
        """What cancelling does to a job in this state, in words that go on after its name."""
        if self is State.RUNNING:
            return "was told to stop: it saves first, and the same command goes on from there"
        if self is State.WAITING:
            return "was waiting, and is no more: the same command submits it again"
        return f"was {self} already: what its engine still had of it is removed"


class Cause(StrEnum):
    """Why a job is as it is, where its engine knows what an exit code does not tell."""

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
    """What an engine says about a job."""

    name: str
    state: State
    message: str = ""
    """Why, in a line: the engine's reason, or the last line of the program."""
    exit_code: int | None = None
    """Of the program, where the engine tells it."""
    attempts: int = 0
    """How often the program was started, where the engine tells it."""
    failures: int = 0
    """How many attempts ended in a failure that counts, where the engine makes several attempts by itself."""
    created: str = ""
    """ISO 8601, UTC."""
    place: str = ""
    """Zone or node it runs on."""
    cause: Cause | None = None
    has_machine: bool = False
    """Whether a job that waits has one already, such as one that fetches its image: it costs as if the job ran."""
    bucket: str = ""
    """As the job was told, where its engine remembers that."""

    def __post_init__(self) -> None:
        # The last line of a program may hold escape sequences, which a terminal obeys.
        object.__setattr__(self, "message", printable(" ".join(self.message.split())))

    @classmethod
    def of_code(cls, name: str, code: int) -> JobStatus:
        """How a job, or a part of one, is whose program ended with `code` on a machine of its own."""
        if code == Exit.FINISHED:
            return cls(name, State.FINISHED, exit_code=code)
        return cls(name, State.FAILED, f"ended with code {code}: {meaning(code)}", code)

    @property
    def costs(self) -> bool:
        """Whether it has a machine, as far as its engine knows."""
        return self.state is State.RUNNING or self.has_machine

    @property
    def retried(self) -> str:
        """Whether it is tried again: `never`, `bounded` or `always`, as the table of exit codes has it."""
        if self.cause is not None:
            return "always" if self.cause is Cause.TAKEN_AWAY else "never"
        return "bounded" if self.exit_code is None else retried(self.exit_code)

    def informed(self, bucket_uri: str, earlier: Outcome | None = None) -> JobStatus:
        """Returns this status with what the job's bucket adds: starts, and how the job or its last attempt ended.

        The engine's own answer wins where it has one.

        Args:
            bucket_uri: the job's bucket.
            earlier: what the bucket said before the job was submitted, which is about another one of this name.
        """
        outcome = read_outcome(self.name, bucket_uri)
        # What is older than the job is an earlier one's as well.
        if outcome is None or outcome == earlier or outcome.updated < self.created:
            return self
        starts = sum(start >= self.created for start in outcome.starts)
        status, code = replace(self, attempts=max(self.attempts, starts)), outcome.exit_code
        # Of slices some may have ended, while others have not begun.
        is_whole = outcome.machines == 1 or not self.name.startswith("sample-")
        if self.exit_code is None and self.state is State.WAITING and starts and is_whole:
            ended = "without a word" if code is None else f"with exit code {code}: {outcome.message or meaning(code)}"
            return replace(status, message=f"{self.message}; the attempt before ended {ended}".removeprefix("; "))
        if code is None or self.exit_code is not None or self.state not in (State.FAILED, State.GONE):
            return status
        is_finished = code == Exit.FINISHED
        return replace(
            status,
            state=State.FINISHED if is_finished else self.state,
            exit_code=code,
            failures=self.failures * (retried(code) == "bounded"),
            # The engine would call a finished process killed.
            message=outcome.message or self.message * (not is_finished),
            # With a code that would come again a new machine is of no use, whatever became of this one.
            cause=None if self.cause is Cause.TAKEN_AWAY else self.cause,
        )


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before a job needs it, and what to do about it.

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

    @classmethod
    def of(cls, name: str, look: Callable[[], str]) -> Check:
        """A check that passes, with what `look` says, unless that raises a `JobError`."""
        try:
            return cls(name, True, look())
        except JobError as error:
            return cls.of_error(name, error)

    @classmethod
    def unless_hidden(cls, name: str, look: Callable[[], str]) -> Check:
        """As `of`; it passes where these credentials may not look, which who may submit jobs need not be allowed to."""
        check = cls.of(name, look)
        is_hidden = not check.passed and check.exit_code is Exit.NO_PERMISSION
        return cls(name, True, f"not looked at: {check.message}: {check.remedy}") if is_hidden else check

    @classmethod
    def of_image(cls, image: str) -> Check:
        """About the image of a target elsewhere: only the machines there can see whether its registry has it."""
        if not image:
            return cls("image", False, "the target names none", "set its `image:`")
        return cls("image", True, f"{image}: not checked here; a job whose image is not there says so")


class NoCapacityError(JobError):
    """The engine has no machine of the kind that was asked for: another zone, or later, may have one."""

    exit_code = Exit.BUCKET_AWAY


class Backend(abc.ABC):
    """One engine, as a target describes it.

    Rendering needs neither credentials nor network. Everything else raises errors that a person can act on:
    `NoPermissionError` (77), `MissingInputError` (66) for a job, project or namespace that is not there,
    `BadRequestError` (64) for what the engine refuses, `BucketAwayError` (69) when the engine's API is away after
    bounded retries, and `NoCapacityError` when it has no machine of that kind now.
    """

    keeps_ended: ClassVar[bool] = False
    """Whether the engine knows a job that is over for a day at least: one that is gone was deleted by somebody."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abc.abstractmethod
    def render(self, spec: JobSpec) -> list[JsonObject]:
        """All that `submit` sends, in order. Pure: equal specs give equal manifests.

        Raises:
            BadRequestError: this backend cannot run such a job; the message names the option.
        """

    @abc.abstractmethod
    def submit(self, spec: JobSpec) -> None:
        """Sends what `render` gives, or nothing: what was made before an error is removed again.

        Raises:
            BadRequestError: a job of this name is there and not over.
            NoCapacityError: there is no such machine now.
        """

    def submit_where_possible(self, spec: JobSpec) -> Backend:
        """Submits to the first place, from this one on, that has a machine, and returns that.

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
        """Turns this process into the job, where that runs on this machine: its terminal, signals and exit code."""
        raise NotImplementedError

    def elsewhere(self) -> Backend | None:
        """The same engine in the target's next zone or region, where there may be a machine; None after the last."""
        return None

    def runs_already(self, name: str, where: str) -> BadRequestError:
        """The error about a job that is to be submitted, and is there."""
        about = f"`ddpm jobs status {name}` tells how it is going, `ddpm jobs cancel {name}` stops it"
        return BadRequestError(f"{name} runs {where} already: {about}")

    def unknown(self, name: str) -> MissingInputError:
        """The error about a job that the engine does not know."""
        said = f"target {self.target.name!r} knows no job {name!r}"
        return MissingInputError(f"{said}: `ddpm jobs list` shows those there are")

    @abc.abstractmethod
    def status(self, name: str) -> JobStatus:
        """How a job is going; `State.GONE` if the engine does not know it."""

    @abc.abstractmethod
    def jobs(self) -> list[JobStatus]:
        """All jobs that this program submitted to this target, in any order."""

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """What tells a job of this engine from all others, whichever of several targets shows it."""
        return (self.target.backend, self.target.name, status.name)

    @abc.abstractmethod
    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """What the job printed, line by line; with `follow` until it is over, across restarts of its machine.

        Who asks ends that earlier by an exception.

        Raises:
            MissingInputError: there is no such job, or its output is gone.
        """

    @abc.abstractmethod
    def cancel(self, name: str) -> str:
        """Ends the job as a preemption would (it saves first), and removes what it had made for it.

        Returns: what that was for this job; see `State.when_cancelled`.

        Raises:
            MissingInputError: there is no such job.
        """

    def checks(self) -> Iterable[Check]:
        """For `ddpm doctor`: looks at what a job would need of the engine. Says what is wrong instead of raising it."""
        return ()
