"""The operations of an engine that runs jobs, defined once for all engines."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from subprocess import CompletedProcess
from typing import Any, ClassVar, NoReturn

from job.exits import BadRequestError, Exit, JobError, MissingInputError, Restart, State, meaning, restart_after
from job.jobs.backends.target import Target
from job.jobs.spec import JobSpec
from job.outcome import Outcome, read_outcome
from job.progress import note, printable

JsonObject = dict[str, Any]
"""A request to an engine, or its answer, as JSON types."""
FOLLOW_SECONDS = 0.2
"""Between two looks at the output of a job of this machine."""
BEFORE = "the attempt before "
"""Begins the words about the last attempt of a job that waits for the next one; its bucket may know better ones."""


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
    """An engine's answer about a job."""

    name: str
    state: State
    message: str = ""
    """The reason, in a line: the engine's, or the last line of the program."""
    exit_code: int | None = None
    """The program's, if the engine reports it."""
    attempts: int = 0
    """The number of the program's starts, if the engine reports it."""
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
    def of_code(cls, name: str, code: int) -> JobStatus:
        """Returns the status of a job, or a part of one, whose program ended with `code` on its machine."""
        if code == Exit.FINISHED:
            return cls(name, State.FINISHED, exit_code=code)
        return cls(name, State.FAILED, f"ended with code {code}: {meaning(code)}", code)

    @classmethod
    def of_slices(cls, slices: Sequence[JobStatus]) -> JobStatus:
        """Returns the status of a job from those of its slices, of which the worst decides."""
        if len(slices) == 1:
            return slices[0]
        # The worst one is the last.
        order = sorted(range(len(slices)), key=lambda one: (slices[one].state.order, slices[one].restart, -one))
        failed = [number for number in order if slices[number].state is State.FAILED]
        # Slices that wait or run do not hide one that failed for good.
        shown = (f"slice {one}: {slices[one].message}" for one in (order[-1], *failed[-1:]) if slices[one].message)
        finished = f"{sum(one.state is State.FINISHED for one in slices)} of {len(slices)} slices finished"
        message = joined(finished, failed_slices(*sorted(failed)), *shown)
        created = min((one.created for one in slices if one.created), default="")
        places = ",".join(sorted({one.place for one in slices if one.place}))
        return replace(slices[order[-1]], message=message, created=created, place=places)

    @property
    def occupies_machine(self) -> bool:
        """Returns whether it runs, or waits on a machine that costs as much, if its engine reports that."""
        return self.state is State.RUNNING or self.has_machine

    @property
    def restart(self) -> Restart:
        """Returns whether it is tried again, by its cause and else by its exit code."""
        if self.cause is not None:
            return Restart.ALWAYS if self.cause is Cause.TAKEN_AWAY else Restart.NEVER
        return Restart.BOUNDED if self.exit_code is None else restart_after(self.exit_code)

    def with_outcome(self, bucket_uri: str, earlier: Outcome | None = None) -> JobStatus:
        """Returns this status with the facts in the job's bucket: its starts, and how it or its last attempt ended.

        The engine's own facts win.

        Args:
            bucket_uri: the job's bucket.
            earlier: the outcome before the job was submitted, which belongs to an earlier job of this name.
        """
        outcome = read_outcome(self.name, bucket_uri)
        # An outcome from before the job was made belongs to an earlier job as well.
        if outcome is None or outcome == earlier or outcome.updated < self.created:
            return self
        starts = sum(start >= self.created for start in outcome.starts)
        status, code = replace(self, attempts=max(self.attempts, starts)), outcome.exit_code
        # Some slices may have ended while others have not begun; the nodes of a training end together.
        is_whole = outcome.machines == 1 or self.name.startswith("train-")
        # A program that was killed leaves its code with the engine alone; one that is stuck has not ended.
        is_between = self.state is State.WAITING and self.cause is not Cause.STUCK and self.exit_code in (None, code)
        if is_between and starts and is_whole:
            end = "without a message" if code is None else f"with exit code {code}: {outcome.message or meaning(code)}"
            why = self.message.partition(BEFORE)[0].removesuffix("; ")
            return replace(status, message=joined(why, f"{BEFORE}ended {end}"))
        if code is not None and code == self.exit_code:
            return replace(status, message=joined(self.message * (not is_whole), outcome.message) or self.message)
        if code is None or self.exit_code is not None or self.state not in (State.FAILED, State.GONE):
            return status
        is_finished, told = code == Exit.FINISHED, failed_slices(*outcome.failed) * (not is_whole)
        return replace(
            status,
            state=State.FINISHED if is_finished else self.state,
            exit_code=code,
            failures=self.failures * (restart_after(code) is Restart.BOUNDED),
            # The engine would report a finished process as killed.
            message=joined(told, outcome.message) or self.message * (not is_finished),
            # A code that would come again counts more than the loss of the machine.
            cause=None if self.cause is Cause.TAKEN_AWAY else self.cause,
        )


def joined(*parts: str) -> str:
    """Returns a message of those parts that are not empty, nor in what is before them."""
    return reduce(lambda text, part: text if part in text else f"{text}; {part}".removeprefix("; "), parts, "")


def failed_slices(*numbers: object) -> str:
    """Returns the part of a message that names the slices which failed for good; empty if none did."""
    return f"failed slices: {','.join(map(str, numbers))}" * bool(numbers)


def last_line(answer: CompletedProcess[str]) -> str:
    """Returns the last line of an engine's client that failed, without its name."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: |fatal: )*", "", lines[-1]) if lines else f"it ended with {answer.returncode}"


def ended_here(code: int) -> State:
    """Returns the state of a job of this machine after an exit code: only a person or its deadline stops one."""
    state = State.of_code(code)
    return State.CANCELLED if state is State.STOPPED else state


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
    def of_image(cls, image: str) -> Check:
        """Returns the check of a remote target's image, which only the machines there can find in its registry."""
        if not image:
            return cls("image", False, "the target names none", "set its `image:`")
        return cls("image", True, f"{image}: not checked here; a job reports an image that is missing")


class NoCapacityError(JobError):
    """The engine lacks a machine of the requested kind now: another zone, or later, may have one."""

    exit_code = Exit.BUCKET_AWAY


class Backend(abc.ABC):
    """One engine, as a target describes it.

    Rendering needs neither credentials nor network. All other methods raise errors that a person can act on:
    `NoPermissionError`, `MissingInputError` for a job, project or namespace that does not exist, `BadRequestError` for
    a refusal, `BucketAwayError` if the engine's API is away after bounded retries, and `NoCapacityError`.
    """

    target: Target
    """The subclass has the type of its targets, which lists their keys."""
    extra: ClassVar[str] = ""
    """The extra of this program that installs its client library."""
    keeps_ended: ClassVar[bool] = False
    """Whether the engine knows a job for a day after its end: an unknown one was then deleted."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abc.abstractmethod
    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns all that `submit` sends, in order. Pure: equal specs give equal manifests.

        Raises:
            BadRequestError: this backend cannot run the job; the message names the option.
        """

    @abc.abstractmethod
    def submit(self, spec: JobSpec) -> None:
        """Sends what `render` returns, or nothing: after an error it removes what it has made.

        Raises:
            BadRequestError: a job of this name is not over.
            NoCapacityError: the engine lacks such a machine now.
        """

    def submit_where_possible(self, spec: JobSpec) -> Backend:
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

    def elsewhere(self) -> Backend | None:
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
        return MissingInputError(f"target {self.target.name!r} knows no job {name!r}: see `ddpm jobs list`")

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
    def status(self, name: str) -> JobStatus:
        """Returns the status of a job; `State.GONE` if the engine does not know it."""

    @abc.abstractmethod
    def jobs(self) -> list[JobStatus]:
        """Returns all jobs that this program submitted to this target, in any order."""

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """Returns what tells a job of this engine from all others: several targets may show the same one."""
        return (self.target.backend, self.target.name, status.name)

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
