"""`--watch`: follows a job, and submits it again where its engine gives up, as the table of exit codes allows.

Engines retry as well, but Google Batch counts every retry, a VM that was taken away is gone, and none of them looks
for machines elsewhere. The watch is a process on somebody's machine: if it ends, the job goes on without it, and the
same command watches it again.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import TypeVar

from job.exits import CRASHED, BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, StoppedError
from job.jobs.backends.base import Backend, Cause, JobStatus, NoCapacityError, State
from job.jobs.outcome import informed
from job.jobs.spec import JobSpec
from job.outcome import Outcome
from job.processes.launcher import STOP_SIGNALS, handle_stop_signals

T = TypeVar("T")

POLL_SECONDS = 15.0
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


class Clock:
    """Time that counts the sleep of a laptop: a job goes on, and costs, while its watcher sleeps."""

    def __init__(self) -> None:
        """From now on signals end `wait` (main thread only); a second one ends the process at once."""
        self._asked_to_stop = threading.Event()
        handle_stop_signals(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop.set()
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def now(self) -> float:
        """In seconds."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def utc(self) -> datetime:
        """The time of day, which the times of engines are compared with."""
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        """Waits, and says whether to stop watching."""
        return self._asked_to_stop.wait(seconds)


@dataclass
class Watch:
    """One job, until it is finished or nobody should try again.

    Attributes:
        home: the target's first place; `elsewhere` of it are the others.
        spec: the job. What is submitted again has what is left of its `max_hours`.
        clock: time; tests let it pass faster.
        note: told what a person should know, a line each.
        read_outcome: what the job itself says in its bucket.
        has_limit: whether `max_hours` bound the job; on this machine they do so only where somebody named them.
    """

    home: Backend
    spec: JobSpec
    clock: Clock
    note: Callable[[str], None]
    read_outcome: Callable[[], Outcome | None] = lambda: None
    has_limit: bool = True
    _here: Backend = field(init=False)
    _seen_at: float = field(init=False, default=-math.inf)
    """When the engine knew the job last."""
    _outcome_before: Outcome | None = field(init=False, default=None)
    """What the bucket said when the job was submitted: not about this one."""
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
            if (outcome := self.read_outcome()) != self._outcome_before:
                status = informed(status, outcome)
            if status.state is State.FINISHED:
                self.note(f"{self.spec.name} is finished")
                return
            if status.state is State.CANCELLED:
                raise self._ended_by_somebody("was cancelled")
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
            StoppedError: its hours are used up.
        """
        name, said = self.spec.name, f": {status.message}" if status.message else ""
        if status.cause is Cause.OUT_OF_TIME:
            if self._hours_left() < SLACK_HOURS:
                raise self._out_of_time()
            self.note(f"{name} had a machine for less than its {self.spec.max_hours:g} hours; submitting it again")
            return
        code, rule = status.exit_code, status.retried
        how = f"ended with {code}" if code is not None else "is gone" if status.state is State.GONE else "failed"
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
        since, before = self.clock.now(), JobStatus(self.spec.name, State.WAITING)
        ran = waited = without_image = 0.0
        """In seconds, of which all but the first begin anew when that changes."""
        while True:
            status, now = self._ask(), self.clock.now()
            passed, since = now - since, now
            # Rather too much than too little: a machine may come, or come and go, between two looks.
            has_ended = status.state.is_over or status.cause is Cause.OUT_OF_TIME
            if has_ended or _has_machine(before) or _has_machine(status):
                self._used_seconds += max(passed, POLL_SECONDS)
            ran += passed if State.RUNNING in (before.state, status.state) else 0.0
            if ran > STEADY_SECONDS:
                self._pause_seconds = FIRST_PAUSE_SECONDS
            if status.state.is_over:
                return status
            if (status.state, status.place, status.message) != (before.state, before.place, before.message):
                self._tell(status)
            # One that only gets ready has what it would be moved for.
            waited = waited + passed if status.state is State.WAITING and not status.has_machine else 0.0
            was_without_image = before.cause is Cause.NO_IMAGE and status.cause is Cause.NO_IMAGE
            without_image = without_image + passed if was_without_image else 0.0
            before = status
            if without_image > NO_IMAGE_SECONDS and self._cancel():
                why = f"{self.spec.name} cannot begin, and is removed: {status.message}"
                raise JobEndedError(why, Exit.MISSING_INPUT)
            if status.state is State.WAITING:
                # One that its queue has stopped for good, and keeps.
                if status.cause is Cause.OUT_OF_TIME and self._cancel():
                    return replace(status, state=State.FAILED)
                # One that would wait for a machine that it may not use; what was not seen is no reason to end it.
                if self._hours_left(assumed_seconds=0.0) < SHORTEST_HOURS and self._cancel():
                    raise self._out_of_time()
            if waited > ELSEWHERE_SECONDS and self.home.elsewhere() is not None:
                self._move()
                waited, since = 0.0, self.clock.now()
            self._sleep(POLL_SECONDS)

    def _tell(self, status: JobStatus) -> None:
        place, message = (f" in {status.place}" * bool(status.place)), f": {status.message}" * bool(status.message)
        self.note(f"{self.spec.name} is {status.state.value}{place}{message}")

    def _cancel(self) -> bool:
        """Ends the job; False if it had ended by itself."""
        name = self.spec.name
        try:
            self._retry(lambda: self._here.cancel(name), f"trying again to end {name}")
        except (MissingInputError, BadRequestError):
            # Ended by an earlier request, whose answer was lost, or by itself.
            if self._ask().state not in (State.CANCELLED, State.GONE):
                return False
        # That it is gone is nobody else's doing.
        self._seen_at = -math.inf
        return True

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
        self._outcome_before = self.read_outcome()
        spec = self.spec
        if self.has_limit:
            spec = spec.lasting(max(self._hours_left(), SHORTEST_HOURS))
        while True:
            try:
                self._retry(partial(self._here.submit, spec), "trying again")
                self._seen_at = self.clock.now()
                return
            except NoCapacityError as error:
                following = self._here.elsewhere()
                self._here = following or self.home
                self.note(f"{error}; trying {'the next place' if following else 'again from the first place'}")
                if following is None:
                    self._pause()
            except BadRequestError:
                # An answer that was lost on the way: the job is there all the same.
                if self._ask().state.is_over:
                    raise
                return

    def _ask(self) -> JobStatus:
        status = self._retry(lambda: self._here.status(self.spec.name), "the job goes on meanwhile")
        if status.state is not State.GONE:
            self._seen_at = self.clock.now()
        return status

    def _retry(self, request: Callable[[], T], meanwhile: str) -> T:
        """What an engine answers, however long it is away."""
        told = False
        while True:
            try:
                return request()
            except BucketAwayError as error:
                if not told:
                    self.note(f"{error}; {meanwhile}")
                told = True
                self._sleep(POLL_SECONDS)

    def _hours_left(self, assumed_seconds: float | None = None) -> float:
        if not self.has_limit:
            return math.inf
        assumed_seconds = self._assumed_seconds if assumed_seconds is None else assumed_seconds
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
