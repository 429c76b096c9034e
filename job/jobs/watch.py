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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from job.exits import CRASHED, BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, StoppedError
from job.jobs.backends.base import Backend, Cause, JobStatus, NoCapacityError, State
from job.jobs.outcome import informed
from job.jobs.spec import JobSpec
from job.outcome import Outcome
from job.stop import Stop

T = TypeVar("T")

WATCH_POLL_SECONDS = 15.0
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
        """From now on signals end `wait` (main thread only)."""
        self._stop = Stop().install()

    def now(self) -> float:
        """In seconds."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def utc(self) -> datetime:
        """The time of day, which the times of engines are compared with."""
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        """Waits, and says whether to stop watching."""
        return self._stop.sleep(seconds)


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

    def __post_init__(self) -> None:
        self._here = self.home
        self._known_at = -math.inf
        """When the engine knew the job last."""
        self._outcome_before: Outcome | None = None
        """What the bucket said when the job was submitted: not about this one."""
        self._failures, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        self._seen_seconds = self._unseen_seconds = 0.0
        """How long the job had a machine, in all, as was seen; and may have had one before anybody watched, at most."""

    def run(self) -> None:
        """Submits the job unless it is there, and returns when it is finished.

        Raises:
            StoppedError: the watch was told to stop, or somebody cancelled the job, or its `max_hours` are used up.
            JobEndedError: what the job ended with is not tried again, or was too often.
            JobError: what the engine says to a request; see `Backend`.
        """
        name, status = self.spec.name, self._ask()
        if status.state.is_over:
            self._submit()
        else:
            self.note(f"{name} is {status.state.value} already: watching it")
            # Who still waits for a first machine has not run.
            if _has_machine(status) or status.attempts > 1:
                self._unseen_seconds = self._age_seconds(status)
        while True:
            status = self._follow()
            if (outcome := self.read_outcome()) != self._outcome_before:
                status = informed(status, outcome)
            if status.state is State.FINISHED:
                self.note(f"{name} is finished")
                return
            if status.state is State.CANCELLED:
                raise StoppedError(f"{name} was cancelled: what it saved stays, and the same command goes on")
            self._stop_if_deleted(status)
            self._judge(status)
            self._pause()
            if self._here.keeps_seconds:
                self._stop_if_deleted(self._ask())
            self._submit()

    def _age_seconds(self, status: JobStatus) -> float:
        with suppress(ValueError):
            return max(0.0, (self.clock.utc() - datetime.fromisoformat(status.created)).total_seconds())
        return 0.0

    def _stop_if_deleted(self, status: JobStatus) -> None:
        # Whoever looks after a day's sleep finds that the engine has forgotten a job that ended meanwhile.
        is_kept = self.clock.now() - self._known_at < self._here.keeps_seconds
        if status.state is State.GONE and is_kept:
            raise StoppedError(f"{self.spec.name} was deleted: what it saved stays, and the same command goes on")

    def _judge(self, status: JobStatus) -> None:
        """Returns if the job is to be submitted again.

        Raises:
            JobEndedError: it is not.
            StoppedError: its hours are used up.
        """
        name, code, rule = self.spec.name, status.exit_code, status.retried
        how = f"ended with {code}" if code is not None else "is gone" if status.state is State.GONE else "failed"
        said, counted = f": {status.message}" if status.message else "", ""
        if status.cause is Cause.OUT_OF_TIME:
            # It may have had them without a machine, for which it only waited.
            rule, how, said = "always", f"had a machine for less than its {self.spec.max_hours:g} hours", ""
            self._stop_if_out_of_time(SLACK_HOURS)
        if rule == "never":
            raise JobEndedError(f"{name} {how}, which would come again{said}", code)
        if rule == "bounded":
            self._failures += 1
            counted = f" (failure {self._failures} of {MOST_FAILURES})"
        if self._failures > MOST_FAILURES:
            raise JobEndedError(f"{name} {how}, the {self._failures}th failure: giving up{said}", code)
        self._stop_if_out_of_time()
        self.note(f"{name} {how}{said}; submitting it again{counted}")

    def _stop_if_out_of_time(self, hours: float = SHORTEST_HOURS) -> None:
        if self._hours_left() < hours:
            used = f"{self.spec.name} has used its {self.spec.max_hours:g} hours"
            raise StoppedError(f"{used}: the same command goes on, for as long again")

    def _follow(self) -> JobStatus:
        """Looks at the job until it is over, moves it on if it waits for too long, and counts how long it runs."""
        looked_at, before = self.clock.now(), JobStatus(self.spec.name, State.GONE)
        ran = waited = without_image = 0.0
        while True:
            status = self._ask()
            passed, looked_at = self.clock.now() - looked_at, self.clock.now()
            is_over, is_waiting = status.state.is_over, status.state is State.WAITING
            is_out_of_time = status.cause is Cause.OUT_OF_TIME
            # Rather too much than too little: a machine may come, or come and go, between two looks.
            if is_over or is_out_of_time or _has_machine(before) or _has_machine(status):
                self._seen_seconds += max(passed, WATCH_POLL_SECONDS)
            ran += passed if State.RUNNING in (before.state, status.state) else 0.0
            if ran > STEADY_SECONDS:
                self._pause_seconds = FIRST_PAUSE_SECONDS
            if is_over:
                return status
            if (status.state, status.place, status.message) != (before.state, before.place, before.message):
                place, said = f" in {status.place}" * bool(status.place), f": {status.message}" * bool(status.message)
                self.note(f"{self.spec.name} is {status.state.value}{place}{said}")
            # One that only gets ready has what it would be moved for.
            waited = waited + passed if is_waiting and not status.has_machine else 0.0
            without_image = without_image + passed if before.cause is status.cause is Cause.NO_IMAGE else 0.0
            before = status
            if without_image > NO_IMAGE_SECONDS and self._cancel():
                why = f"{self.spec.name} cannot begin, and is removed: {status.message}"
                raise JobEndedError(why, Exit.MISSING_INPUT)
            # One that its queue has stopped for good, and keeps.
            if is_waiting and is_out_of_time and self._cancel():
                return replace(status, state=State.FAILED)
            # One that would wait for a machine that it may not use; what was not seen is no reason to end it.
            if is_waiting and self._hours_left(self._seen_seconds) < SHORTEST_HOURS and self._cancel():
                self._unseen_seconds = 0.0
                self._stop_if_out_of_time()
            if waited > ELSEWHERE_SECONDS and self.home.elsewhere() is not None:
                self._move()
                waited, looked_at = 0.0, self.clock.now()
            self._sleep(WATCH_POLL_SECONDS)

    def _cancel(self) -> bool:
        """Ends the job; False if it had ended by itself."""
        name = self.spec.name
        try:
            self._retry(lambda: self._here.cancel(name), f"trying again to remove {name}")
        except (MissingInputError, BadRequestError):
            # Ended by an earlier request, whose answer was lost, or by itself.
            if self._ask().state not in (State.CANCELLED, State.GONE):
                return False
        # That it is gone is nobody else's doing.
        self._known_at = -math.inf
        return True

    def _move(self) -> None:
        self.note(f"{self.spec.name} has waited for a machine for {ELSEWHERE_SECONDS / 60:g} minutes: trying elsewhere")
        if not self._cancel():
            return
        while not (status := self._ask()).state.is_over:
            self._sleep(WATCH_POLL_SECONDS)
        if status.state is not State.FINISHED:
            self._here = self._here.elsewhere() or self.home
            self._submit()

    def _submit(self) -> None:
        """Submits the job where there is a machine, however long that takes to find."""
        self._outcome_before = self.read_outcome()
        spec = self.spec.lasting(max(self._hours_left(), SHORTEST_HOURS)) if self.has_limit else self.spec
        while True:
            try:
                self._retry(lambda: self._here.submit(spec), "trying again")
                self._known_at = self.clock.now()
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
            self._known_at = self.clock.now()
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
                self._sleep(WATCH_POLL_SECONDS)

    def _hours_left(self, used_seconds: float | None = None) -> float:
        used_seconds = self._seen_seconds + self._unseen_seconds if used_seconds is None else used_seconds
        # Rounded up, so that a job which is submitted for the first time is what the dry run shows.
        return max(self.spec.max_hours - int(used_seconds) / 3600, 0.0) if self.has_limit else math.inf

    def _pause(self) -> None:
        self._sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _sleep(self, seconds: float) -> None:
        if self.clock.wait(seconds):
            name = self.spec.name
            raise StoppedError(f"no longer watching {name}, which goes on: `ddpm jobs cancel {name}` would stop it")


def _has_machine(status: JobStatus) -> bool:
    return status.state is State.RUNNING or status.has_machine
