"""`--watch` follows a job, and submits it again where its engine gives up, as the table of exit codes allows.

Engines retry as well, but Google Batch counts every retry, a VM that was taken away is gone, and none of them looks for
machines elsewhere. The watch is a process on a person's machine: if it ends, the job goes on without it, and the same
command watches it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from job.coordination.outcome import Outcome, read_outcome
from job.exits import BadRequestError, BucketAwayError, JobEndedError, MissingInputError, Restart, State, StoppedError
from job.jobs.backends import Cause, JobStatus, NoCapacityError, Target
from job.jobs.spec import RETRIES, JobSpec
from job.progress import note

WATCH_POLL_SECONDS = 15.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0
"""Before a job is submitted again; doubled each time, until one had a machine for `STEADY_SECONDS`."""
STEADY_SECONDS = 600.0
ELSEWHERE_SECONDS = 900.0
"""The wait for a machine after which a job is moved to the target's next zone or region."""
NO_IMAGE_SECONDS = 300.0
"""The time after which a job is ended whose image cannot be pulled: its machine costs meanwhile."""
SHORTEST_HOURS = 1 / 60
"""The rest of `max_hours` for which a job is not submitted again."""
SLACK_HOURS = 0.1
"""The rest of `max_hours`, as the watch counts them, of a job that its engine ended for having used them. A larger rest
means that the engine counts the time without a machine as well."""
_GONE = "is gone, deleted by a person or over for longer than its engine remembers, and its bucket has no other end"


@dataclass
class Watch:
    """The watch of one job, until it is finished or must not be tried again.

    Attributes:
        home: the target's first place; `elsewhere` of it are the others.
        spec: the job. Each submission has the rest of its `max_hours`.
        sleep: waits for a time, and returns whether to stop watching, as `Stop.sleep` does.
        now: the time of day, which goes on while a laptop sleeps, as jobs and their costs do.
    """

    home: Target
    spec: JobSpec
    sleep: Callable[[float], bool]
    now: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._here = self.home
        self._outcome_before: Outcome | None = None
        """The outcome in the bucket before the job was submitted, which belongs to an earlier one."""
        self._failures, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        """Failures that count, over all submissions: crashes, and machines that vanished, which may as well have failed
        for good. Preemptions do not count. After more than `RETRIES` the watch gives up."""
        self._waited_for: str | None = ""
        """Why the job had no machine at the last look; None once it had one."""
        self._seen_seconds = self._unseen_seconds = 0.0
        """The time for which the watch saw the job have a machine, and the most it may have had one before."""

    def run(self) -> None:
        """Submits the job unless it is there, and returns when it is finished.

        Raises:
            StoppedError: the watch has to stop, or a person cancelled the job, or its `max_hours` are used up.
            JobEndedError: the job's end is not tried again, or was too often.
            JobError: the engine's answer to a request; see `Target`.
        """
        status = self._ask()
        if status.state.is_over:
            self._submit()
        else:
            note(f"{self.spec.name} is {status.state} already: watching it")
            # A job that still waits for its first machine has not run; only the bucket knows of an evicted attempt.
            outcome = read_outcome(self.spec.name, self.spec.bucket)
            if status.occupies_machine or (outcome and outcome.updated >= status.created):
                with suppress(ValueError):
                    self._unseen_seconds = self.now() - datetime.fromisoformat(status.created).timestamp()
        while (status := self._follow()).state is not State.FINISHED:
            self._judge(status)
            self._pause()
            # A person may have removed what failed.
            is_kept = status.state is not State.GONE and self._here.keeps_ended
            if is_kept and self._ask().state is State.GONE:
                raise self._ended_by_person(_GONE)
            self._submit()
        note(f"{self.spec.name} is finished")

    def _follow(self) -> JobStatus:
        """Looks at the job until it is over, counts how long it has a machine, and removes a job that waits in vain."""
        looked_at, before = self.now(), JobStatus(self.spec.name, State.GONE)
        seen_before, waited, without_image = self._seen_seconds, 0.0, 0.0
        while True:
            status = self._ask()
            passed, looked_at = self.now() - looked_at, self.now()
            # A machine may have come, or come and gone, between two looks.
            if status.state.is_over or status.occupies_machine or before.occupies_machine:
                self._seen_seconds += passed
            if self._seen_seconds - seen_before > STEADY_SECONDS:
                self._pause_seconds = FIRST_PAUSE_SECONDS
            if status.state.is_over:
                return status.with_outcome(self.spec.bucket, self._outcome_before)
            self._waited_for = None if status.occupies_machine or self._waited_for is None else status.message
            if (status.state, status.place, status.message) != (before.state, before.place, before.message):
                place, why = f" in {status.place}" * bool(status.place), f": {status.message}" * bool(status.message)
                note(f"{self.spec.name} is {status.state}{place}{why}")
            waited = 0.0 if status.occupies_machine else waited + passed
            without_image = without_image + passed if before.cause is status.cause is Cause.NO_IMAGE else 0.0
            before = status
            hopeless = self._why_hopeless(status, without_image)
            if hopeless or (waited > ELSEWHERE_SECONDS and self.home.elsewhere() is not None):
                if self._remove().state not in (State.CANCELLED, State.GONE):
                    # It had ended by itself.
                    continue
                if hopeless:
                    return replace(status, state=State.GONE, cause=hopeless)
                note(f"{self.spec.name} has waited for {ELSEWHERE_SECONDS / 60:g} minutes: trying elsewhere")
                self._here = self._here.elsewhere() or self.home
                self._submit()
                waited, looked_at = 0.0, self.now()
            self._sleep(WATCH_POLL_SECONDS)

    def _why_hopeless(self, status: JobStatus, without_image_seconds: float) -> Cause | None:
        """Returns why a job is to be removed that waits for what will not come, or for what it may not use."""
        if without_image_seconds > NO_IMAGE_SECONDS:
            return Cause.NO_IMAGE
        # Only hours that were seen may end a job.
        is_out_of_time = self._hours_left(self._seen_seconds) < SHORTEST_HOURS
        return Cause.OUT_OF_TIME if is_out_of_time and not status.occupies_machine else None

    def _judge(self, status: JobStatus) -> None:
        """Checks that the job may be submitted again.

        Raises:
            JobEndedError: it may not.
            StoppedError: a person stopped it, or its hours are used up.
        """
        name, code, rule, hours = self.spec.name, status.exit_code, status.restart, f"{self.spec.max_hours:g} hours"
        # On this machine only a person or its own deadline stops a job.
        is_stopped_here = status.state is State.STOPPED and not self.home.is_remote
        if (status.state is State.CANCELLED or is_stopped_here) and self._hours_left() >= SHORTEST_HOURS:
            raise self._ended_by_person(f"was cancelled ({status.message})" if status.message else "was cancelled")
        # A deleted job is stopped, and ends with 75.
        is_deleted = status.state is State.GONE and status.cause is None and code in (None, StoppedError.exit_code)
        if is_deleted and self._here.keeps_ended:
            raise self._ended_by_person(_GONE)
        how = f"ended with {code}" if code is not None else "is gone" if status.state is State.GONE else State.FAILED
        why = f": {status.why}" if status.why else ""
        if status.cause is Cause.NO_IMAGE:
            raise JobEndedError(f"{name} cannot begin, and is removed{why}", MissingInputError.exit_code)
        if status.cause is Cause.OUT_OF_TIME:
            # It may have used them without a machine, while it waited for one.
            rule, how, why = Restart.ALWAYS, f"had a machine for less than its {hours}", ""
        if rule is Restart.NEVER:
            raise JobEndedError(f"{name} {how}, which would come again{why}", code)
        # Otherwise the failures of the engine's own attempts would multiply with those seen here.
        self._failures += max(status.failures, rule is Restart.BOUNDED)
        if self._failures > RETRIES:
            raise JobEndedError(f"{name} {how}, the {self._failures}th failure: giving up{why}", code)
        if self._hours_left() < (SLACK_HOURS if status.cause is Cause.OUT_OF_TIME else SHORTEST_HOURS):
            never_ran = self._waited_for and self._hours_left() > self.spec.max_hours / 2
            used = f"never started within its {hours} ({self._waited_for})" if never_ran else f"has used its {hours}"
            raise StoppedError(f"{name} {used}: the same command goes on, for as long again")
        counted = f" (failure {self._failures} of {RETRIES})" if rule is Restart.BOUNDED else ""
        note(f"{name} {how}{why}; submitting it again{counted}")

    def _submit(self) -> None:
        """Submits the job where there is a machine, however long that takes to find."""
        self._outcome_before = read_outcome(self.spec.name, self.spec.bucket)
        hours = max(self._hours_left(), SHORTEST_HOURS)
        spec = replace(self.spec, max_hours=hours, retries=RETRIES - self._failures)
        while True:
            try:
                self._here = self._retry(lambda: self._here.submit_where_possible(spec), "trying again")
                return
            except NoCapacityError as error:
                note(f"{error}; trying again from the first place")
                self._here = self.home
                self._pause()
            except BadRequestError:
                # After a lost answer the job is there all the same.
                if self._ask().state.is_over:
                    raise
                return

    def _remove(self) -> JobStatus:
        """Ends the job, and returns its last status: it may have ended by itself."""
        name = self.spec.name
        with suppress(MissingInputError, BadRequestError):
            self._retry(lambda: self._here.cancel(name), f"trying again to remove {name}")
        while not (status := self._ask()).state.is_over:
            self._sleep(WATCH_POLL_SECONDS)
        return status

    def _ask(self) -> JobStatus:
        return self._retry(lambda: self._here.alive(self.spec.name), "the job goes on meanwhile")

    def _retry(self, request: Callable[[], Any], meanwhile: str) -> Any:
        """Returns an engine's answer, however long the engine is away."""
        is_noted = False
        while True:
            try:
                return request()
            except BucketAwayError as error:
                if not is_noted:
                    note(f"{error}; {meanwhile}")
                is_noted = True
                self._sleep(WATCH_POLL_SECONDS)

    def _hours_left(self, used_seconds: float | None = None) -> float:
        if self.home.limits_attempts:
            return self.spec.max_hours
        used_seconds = self._seen_seconds + self._unseen_seconds if used_seconds is None else used_seconds
        # Rounded up, so that the first submission is the one that a dry run shows.
        return max(self.spec.max_hours - int(used_seconds) / 3600, 0.0)

    def _pause(self) -> None:
        self._sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _sleep(self, seconds: float) -> None:
        if self.sleep(seconds):
            name = self.spec.name
            raise StoppedError(f"no longer watching {name}, which goes on: `ddpm jobs cancel {name}` would stop it")

    def _ended_by_person(self, how: str) -> StoppedError:
        return StoppedError(f"{self.spec.name} {how}: its saved state stays, and the same command goes on")
