"""`--watch`: follows a job, and submits it again where its engine gives up, as the table of exit codes allows.

Engines retry as well, but Google Batch counts every retry, a VM that was taken away is gone, and none of them looks
for machines elsewhere. The watch is a process on somebody's machine: if it ends, the job goes on without it, and the
same command watches it again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, StoppedError
from job.jobs.backends.base import Backend, Cause, JobStatus, NoCapacityError, State
from job.jobs.spec import JobSpec

POLL_SECONDS = 15.0
UNSEEN_SECONDS = 4 * POLL_SECONDS
"""In less, no job gets a machine, has it for long and is over."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0
"""Before a job is submitted again; doubled each time, until one ran for `STEADY_SECONDS`."""
STEADY_SECONDS = 600.0
MOST_FAILURES = 4
"""Failures that count after which the watch gives up: crashes, and machines that are gone without a word, which may as
well have failed for good. Preemptions do not count."""
ELSEWHERE_SECONDS = 900.0
"""A job that has waited so long for a machine is moved to the target's next zone or region."""
NO_IMAGE_SECONDS = 300.0
"""A job whose image cannot be pulled for so long is ended: somebody must mend that, and its machine costs meanwhile."""
CRASHED = 1
"""The exit code of a job whose engine does not tell it."""
SHORTEST_HOURS = 1 / 60
"""What is left of `max_hours` when it is not worth submitting a job again."""
SLACK_HOURS = 0.1
"""What may be left of `max_hours`, as seen from here, of a job that its engine ended for having had them. More is left
where the engine counts the time without a machine as well."""


class JobEndedError(JobError):
    """A job that ended otherwise than well. This program ends with its code, also where that is a crash's."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.exit_code = CRASHED if code is None else code  # type: ignore[assignment]


class Clock(Protocol):
    """Time, which tests let pass faster."""

    def now(self) -> float:
        """In seconds."""

    def utc(self) -> datetime:
        """The time of day, which the times of engines are compared with."""

    def wait(self, seconds: float) -> bool:
        """Waits, and says whether to stop watching."""


@dataclass
class BootClock:
    """The clock that counts the sleep of a laptop: a job goes on, and costs, while its watcher sleeps."""

    stopping: Callable[[float], bool]
    """Waits for so many seconds, and says whether to stop."""

    def now(self) -> float:
        """See `Clock`."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def utc(self) -> datetime:
        """See `Clock`."""
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        """See `Clock`."""
        return self.stopping(seconds)


@dataclass
class Watch:
    """One job, until it is finished or nobody should try again.

    Attributes:
        home: the target's first place; `elsewhere` of it are the others.
        spec: the job. What is submitted again has what is left of its `max_hours`.
        clock: time.
        note: told what a person should know, a line each.
        is_finished: asked about a job that its engine does not know any more, such as on a VM that deletes itself.
        has_limit: whether `max_hours` bound the job; on this machine they do so only where somebody named them.
    """

    home: Backend
    spec: JobSpec
    clock: Clock
    note: Callable[[str], None]
    is_finished: Callable[[], bool] = lambda: False
    has_limit: bool = True
    _here: Backend = field(init=False)
    _seen_at: float = field(init=False, default=-math.inf)
    """When the engine knew the job last."""
    _failures: int = field(init=False, default=0)
    _pause_seconds: float = field(init=False, default=FIRST_PAUSE_SECONDS)
    _used_seconds: float = field(init=False, default=0.0)
    """How long the job had a machine, in all, as far as that was seen."""
    _assumed_seconds: float = field(init=False, default=0.0)
    """How long it may have had one before anybody watched: at most."""

    def __post_init__(self) -> None:
        self._here = self.home

    def run(self) -> None:
        """Submits the job unless it is there, and returns when it is finished.

        Raises:
            StoppedError: the watch was told to stop, or somebody cancelled the job, or its `max_hours` are used up.
            JobEndedError: what the job ended with is not tried again, or was too often.
            JobError: what the engine says to a request; see `Backend`.
        """
        if (status := self._ask()).state.is_over:
            self._submit()
        else:
            self.note(f"{self.spec.name} is {status.state.value} already: watching it")
            self._assumed_seconds = self._age_seconds(status)
        while True:
            status = self._follow()
            match status.state:
                case State.FINISHED:
                    self.note(f"{self.spec.name} is finished")
                    return
                case State.CANCELLED:
                    raise self._ended_by_somebody("was cancelled")
                case State.GONE if self.is_finished():
                    self.note(f"{self.spec.name} is finished, and its machine is gone")
                    return
            self._stop_if_deleted(status)
            self._judge(status)
            self._pause()
            if self._here.keeps_seconds:
                self._stop_if_deleted(self._ask())
            self._submit()

    def _stop_if_deleted(self, status: JobStatus) -> None:
        # Whoever looks after a day's sleep finds that the engine has forgotten a job that ended meanwhile.
        is_kept = self.clock.now() - self._seen_at < self._here.keeps_seconds
        if status.state is State.GONE and is_kept:
            raise self._ended_by_somebody("was deleted")

    def _ended_by_somebody(self, how: str) -> StoppedError:
        return StoppedError(f"{self.spec.name} {how}: what it saved stays, and the same command goes on")

    def _judge(self, status: JobStatus) -> None:
        """Returns if the job is to be submitted again.

        Raises:
            JobEndedError: it is not.
        """
        name, said = self.spec.name, f": {status.message}" if status.message else ""
        # A machine may come and go between two looks, and is paid for all the same.
        self._used_seconds += POLL_SECONDS
        if status.cause is Cause.OUT_OF_TIME:
            if self._hours_left() < SLACK_HOURS:
                raise self._out_of_time()
            self.note(f"{name} had a machine for less than its {self.spec.max_hours:g} hours; submitting it again")
            return
        code, rule = status.exit_code, status.retried
        how = "is gone" if status.state is State.GONE else "failed" if code is None else f"ended with {code}"
        if rule == "never":
            raise JobEndedError(f"{name} {how}, which would come again{said}", code)
        self._failures += rule == "bounded"
        if self._failures > MOST_FAILURES:
            raise JobEndedError(f"{name} {how}, the {self._failures}th failure: giving up{said}", code)
        if self._hours_left() < SHORTEST_HOURS:
            raise self._out_of_time()
        counted = f" (failure {self._failures} of {MOST_FAILURES})" if rule == "bounded" else ""
        self.note(f"{name} {how}{said}; submitting it again{counted}")

    def _out_of_time(self) -> StoppedError:
        name, hours = self.spec.name, f"{self.spec.max_hours:g} hours"
        return StoppedError(f"{name} has used its {hours}: the same command goes on, for as long again")

    def _age_seconds(self, status: JobStatus) -> float:
        """How long a job that is there may have run; nothing for one that still waits for its first machine."""
        if not _has_machine(status) and status.attempts < 2:
            return 0.0
        with suppress(ValueError):
            return max(0.0, (self.clock.utc() - datetime.fromisoformat(status.created)).total_seconds())
        return 0.0

    def _follow(self) -> JobStatus:
        """Looks at the job until it is over, moves it on if it waits for too long, and counts how long it runs."""
        since, waiting, told = self.clock.now(), 0.0, None
        before = JobStatus(self.spec.name, State.WAITING)
        ran_seconds = 0.0
        no_image_since: float | None = None
        while True:
            status, now = self._ask(), self.clock.now()
            passed, since = now - since, now
            # A poll that first sees a machine counts what passed since the last one: rather too much than too little.
            # So does one that finds a job over after a time in which nobody looked, such as this machine's sleep.
            has_ended = status.state.is_over or status.cause is Cause.OUT_OF_TIME
            was_unseen = has_ended and passed > UNSEEN_SECONDS
            if was_unseen or _has_machine(before) or _has_machine(status):
                self._used_seconds += passed
            if State.RUNNING in (before.state, status.state):
                ran_seconds += passed
            # One that only gets ready has what it would be moved for.
            waiting = waiting + passed if status.state is State.WAITING and not status.has_machine else 0.0
            before = status
            if ran_seconds > STEADY_SECONDS:
                self._pause_seconds = FIRST_PAUSE_SECONDS
            if status.state.is_over:
                return status
            if (said := (status.state, status.place, status.message)) != told:
                told = said
                where = f" in {status.place}" if status.place else ""
                self.note(
                    f"{self.spec.name} is {status.state.value}{where}{': ' * bool(status.message)}{status.message}"
                )
            if status.state is State.WAITING:
                # One that its queue has stopped for good, and keeps.
                if status.cause is Cause.OUT_OF_TIME and self._cancel():
                    return replace(status, state=State.FAILED)
                # One that would wait for a machine that it may not use; what was not seen is no reason to end it.
                if self._hours_left(assumed_seconds=0.0) < SHORTEST_HOURS and self._cancel():
                    raise self._out_of_time()
            if status.cause is not Cause.NO_IMAGE:
                no_image_since = None
            elif no_image_since is None:
                no_image_since = now
            elif now - no_image_since > NO_IMAGE_SECONDS:
                self._end_without_image(status)
            if waiting > ELSEWHERE_SECONDS and self.home.elsewhere() is not None:
                self._move()
                waiting, since = 0.0, self.clock.now()
            self._sleep(POLL_SECONDS)

    def _end_without_image(self, status: JobStatus) -> None:
        """Removes a job whose image cannot be pulled; returns if its engine does not answer.

        Raises:
            JobEndedError: it is removed.
        """
        try:
            with suppress(MissingInputError, BadRequestError):
                self._here.cancel(self.spec.name)
        except BucketAwayError as error:
            self.note(f"{error}; trying again to remove {self.spec.name}")
            return
        raise JobEndedError(f"{self.spec.name} cannot begin, and is removed: {status.message}", Exit.MISSING_INPUT)

    def _cancel(self) -> bool:
        """Ends the job, however long its engine does not answer; False if it had ended by itself."""
        tried = False
        while True:
            try:
                self._here.cancel(self.spec.name)
                was_ours = True
            except BucketAwayError as error:
                self.note(f"{error}; trying again to end {self.spec.name}")
                tried = True
                self._sleep(POLL_SECONDS)
                continue
            except (MissingInputError, BadRequestError):
                # Unless an earlier request arrived whose answer did not.
                was_ours = tried and self._ask().state in (State.CANCELLED, State.GONE)
            if was_ours:
                # That it is gone is nobody else's doing.
                self._seen_at = -math.inf
            return was_ours

    def _move(self) -> None:
        self.note(f"{self.spec.name} has waited for a machine for {ELSEWHERE_SECONDS / 60:g} minutes: trying elsewhere")
        if not self._cancel():
            return
        while not (status := self._ask()).state.is_over:
            self._sleep(POLL_SECONDS)
        if status.state is not State.FINISHED:
            self._here = self._here.elsewhere() or self.home
            self._submit()

    def _submit(self) -> None:
        """Submits the job where there is a machine, however long that takes to find."""
        while True:
            try:
                self._here.submit(self._rest())
                self._seen_at = self.clock.now()
                return
            except NoCapacityError as error:
                following = self._here.elsewhere()
                self._here = following or self.home
                self.note(f"{error}; trying {'the next place' if following else 'again from the first place'}")
                if following is None:
                    self._pause()
            except BucketAwayError as error:
                self.note(f"{error}; trying again")
                self._pause()
            except BadRequestError:
                # An answer that was lost on the way: the job is there all the same.
                if self._ask().state.is_over:
                    raise
                return

    def _ask(self) -> JobStatus:
        told = False
        while True:
            try:
                status = self._here.status(self.spec.name)
            except BucketAwayError as error:
                if not told:
                    self.note(f"{error}; the job goes on meanwhile")
                told = True
                self._sleep(POLL_SECONDS)
                continue
            if status.state is not State.GONE:
                self._seen_at = self.clock.now()
            return status

    def _rest(self) -> JobSpec:
        return self.spec.lasting(max(self._hours_left(), SHORTEST_HOURS)) if self.has_limit else self.spec

    def _hours_left(self, assumed_seconds: float | None = None) -> float:
        assumed_seconds = self._assumed_seconds if assumed_seconds is None else assumed_seconds
        if not self.has_limit:
            return math.inf
        # Rounded up, so that a job which is submitted for the first time is what the dry run shows.
        used_hours = int(self._used_seconds + assumed_seconds) / 3600
        return max(self.spec.max_hours - used_hours, 0.0) if used_hours else self.spec.max_hours

    def _pause(self) -> None:
        self._sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _sleep(self, seconds: float) -> None:
        if self.clock.wait(seconds):
            name = self.spec.name
            raise StoppedError(f"no longer watching {name}, which goes on: `ddpm jobs cancel {name}` would stop it")


def _has_machine(status: JobStatus) -> bool:
    return status.state is State.RUNNING or status.has_machine
