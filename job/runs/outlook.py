"""The time and cost of a run, so far and to its end; and the interval between its saves, which loses least of both."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from job.exits import JobError, State
from job.progress import note
from job.runs.records import STATUS_KEY, Attempt, Status, attempt_fences, read_status, readable_attempt
from job.stop import MARGIN_SECONDS
from job.store import Store

STALE = timedelta(seconds=120)
"""A run counts as cut off if its status is `running` but older than this."""
SAVES_PER_CADENCE = 10
"""Saving may take up to a tenth of the time: it takes processors and network from training."""
LONGEST_WITHOUT_NOTICE_SECONDS = 60.0
"""Where no save fits into a notice, so that a preemption loses the work since the last one."""
SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 600.0
"""The limits of the interval if none is configured; the shortest only while the run was not killed. The longest is the
most work that an end without a notice loses, if saving may be so frequent."""
FREE_SAVES_PER_CADENCE = 100
"""Then saving may take a hundredth of the time."""
LEAST_STALL_SECONDS = 0.01
RECENT_ATTEMPTS = 10
"""The attempts that tell how often this run is killed; each takes a request."""


@dataclass(frozen=True)
class AttemptSpan:
    """The time span of one attempt, as its run's records tell it."""

    attempt: Attempt
    began: datetime
    last_seen: datetime
    """The time of its last status."""
    state: str
    """See `State`; empty if unknown."""
    images_seen: int | None

    @property
    def hours(self) -> float:
        """Returns the length in hours."""
        return (self.last_seen - self.began).total_seconds() / 3600


@dataclass(frozen=True)
class Outlook:
    """The hours and dollars of a run; None where unknown."""

    hours_so_far: float
    dollars_so_far: float | None
    hours_left: float | None
    """At the speed of the last row of the metrics."""
    dollars_left: float | None
    ends: datetime | None
    """The end of a run that is running."""

    @property
    def words(self) -> dict[str, str]:
        """Returns texts for people, by title."""
        texts = {}
        if self.dollars_so_far is not None:
            texts["cost so far"] = f"about ${self.dollars_so_far:,.2f} ({self.hours_so_far:,.1f} hours)"
        if self.hours_left is not None:
            to_end = f", for about ${self.dollars_left:,.2f} more" if self.dollars_left is not None else ""
            when = f", at {self.ends:%Y-%m-%d %H:%M} UTC" if self.ends else " when it goes on"
            texts["to the end"] = f"{duration(self.hours_left)}{when}{to_end}"
        return texts


def duration(hours: float) -> str:
    """Returns a duration for people, such as `3 h 20 min`."""
    minutes = round(hours * 60)
    if minutes < 1:
        return "less than a minute"
    days, rest = divmod(minutes, 24 * 60)
    return (f"{days} d " * bool(days)) + (f"{rest // 60} h " * (rest >= 60)) + f"{rest % 60} min"


def attempts_of(run: Store, newest: int = 0) -> list[Attempt]:
    """Returns all attempts with readable records, or so many of the newest, in order."""
    return list(filter(None, (readable_attempt(run, fence) for fence in attempt_fences(run)[-newest:])))


def spans_of(attempts: Iterable[Attempt], status: Status | None) -> list[AttemptSpan]:
    """Returns the span of each attempt; its last status is in the record of its successor, or is the run's status."""
    spans: list[AttemptSpan] = []
    ordered = list(attempts)
    for attempt, after in zip(ordered, [*ordered[1:], None], strict=False):
        began = datetime.fromisoformat(attempt.started)
        last_seen, state, images_seen = began, "", None
        if after is not None and after.previous == attempt.fence and (last := after.previous_seen):
            last_seen, images_seen = datetime.fromisoformat(last.updated), last.images_seen
            state = State.CUT_OFF if last.state == State.RUNNING else last.state
        elif after is None and status is not None and status.fence == attempt.fence:
            last_seen, images_seen = datetime.fromisoformat(status.updated), status.images_seen
            state = state_of(status)
        spans.append(AttemptSpan(attempt, began, max(began, last_seen), state, images_seen))
    return spans


def state_of(status: Status) -> str:
    """Returns the state for people: `cut off` if the status is `running` but stale."""
    silent = datetime.now(UTC) - datetime.fromisoformat(status.updated)
    return State.CUT_OFF if status.state == State.RUNNING and silent >= STALE else status.state


def state_in(run: Store, status: Status | None) -> str:
    """Returns the state of a run for people, also if its status is missing or cannot be read."""
    return state_of(status) if status else State.UNREADABLE if run.exists(STATUS_KEY) else State.NOT_STARTED


def outlook_of(spans: list[AttemptSpan], status: Status | None, dollars_per_hour: float | None = None) -> Outlook:
    """Adds up the hours and dollars of a run's attempts, and estimates the rest.

    Args:
        spans: the run's attempts.
        status: of the run.
        dollars_per_hour: the price of the machines from now on; None: that of the last attempt.
    """
    hours = sum(span.hours for span in spans)
    prices = [span.attempt.dollars_per_hour for span in spans]
    costs = [span.hours * price for span, price in zip(spans, prices, strict=True) if price is not None]
    if dollars_per_hour is None and prices:
        dollars_per_hour = prices[-1]
    left = ends = None
    if status is not None and status.images_per_second and status.images_seen < status.target_images:
        # Fails for an end after the year 9999 and for a speed of NaN.
        with suppress(OverflowError, ValueError):
            hours_left = (status.target_images - status.images_seen) / status.images_per_second / 3600
            to_end, left = timedelta(hours=hours_left), hours_left
            if state_of(status) == State.RUNNING:
                ends = datetime.fromisoformat(status.updated) + to_end
    # If the price of an attempt is unknown, a sum of the others would pass for the cost of all.
    so_far = sum(costs) if costs and len(costs) == len(prices) else None
    dollars_left = left * dollars_per_hour if left is not None and dollars_per_hour is not None else None
    return Outlook(hours, so_far, left, dollars_left, ends)


def interval_seconds(
    every_minutes: float | None, grace_seconds: float, save: tuple[float, float], killed_every: float | None
) -> float:
    """Returns the interval between two saves.

    Args:
        every_minutes: as configured; None: as loses least time.
        grace_seconds: between a preemption notice and the end.
        save: the seconds of a commit, and those for which a save delays training.
        killed_every: the mean seconds between two ends without a notice; None: too rare to count.
    """
    save_seconds, stall_seconds = save
    least = SAVES_PER_CADENCE * save_seconds
    if every_minutes is not None:
        seconds = every_minutes * 60
    else:
        best = max(FREE_SAVES_PER_CADENCE * save_seconds, SHORTEST_SECONDS)
        if killed_every is not None:
            best = best_interval_seconds(max(stall_seconds, LEAST_STALL_SECONDS), killed_every)
        seconds = max(min(best, LONGEST_SECONDS), least)
    if not is_saved_in(grace_seconds, save_seconds):
        seconds = min(seconds, max(LONGEST_WITHOUT_NOTICE_SECONDS, least))
    return seconds


def best_interval_seconds(stall_seconds: float, every_seconds: float) -> float:
    """Returns the interval between saves that loses the least time, of which a save takes `stall_seconds`.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006), eq. 37;
    its first term is that of J. W. Young, CACM 17 (1974).
    """
    ratio = stall_seconds / (2 * every_seconds)
    if ratio >= 1:
        return every_seconds
    young = math.sqrt(2 * stall_seconds * every_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_seconds


def is_saved_in(grace_seconds: float, save_seconds: float) -> bool:
    """Returns whether a save fits between a preemption notice and the end."""
    return save_seconds + MARGIN_SECONDS <= grace_seconds


class Cadence:
    """The interval between two saves, which follows the durations of the last one.

    Attributes:
        save_seconds: of the last commit without an outage; None before the first.
    """

    def __init__(self, run: Store, every_minutes: float | None, grace_seconds: float) -> None:
        """Begins an interval, and reads in a thread how often the run is killed.

        Args:
            run: the run's folder.
            every_minutes: as configured; see `interval_seconds`.
            grace_seconds: between a preemption notice and the end.
        """
        self._run, self._every_minutes, self._grace_seconds = run, every_minutes, grace_seconds
        self.save_seconds: float | None = None
        self._copy_seconds, self._is_too_long = 0.0, False
        self._started, self._spans = time.monotonic(), list[AttemptSpan]()
        self._adapt(0.0)
        self.begin()
        threading.Thread(target=self._look_back, name="kills", daemon=True).start()

    def begin(self) -> None:
        """Begins the next interval, at the beginning of a save."""
        self._began = time.monotonic()

    def copied(self) -> None:
        """Takes the time for which training waited for the copy."""
        self._copy_seconds = time.monotonic() - self._began

    def committed(self, save_seconds: float, processor_seconds: float) -> None:
        """Takes the duration of a commit and its processor time, which decide about the next interval.

        It delayed training by the copy, and by the processor time of the writer's thread.
        """
        self.save_seconds = save_seconds
        self._adapt(self._copy_seconds + processor_seconds)
        was_too_long, self._is_too_long = self._is_too_long, not is_saved_in(self._grace_seconds, save_seconds)
        if self._is_too_long and not was_too_long:
            instead = "" if self._every_minutes is None else f" instead of {self._every_minutes:g}"
            note(
                f"a save takes about {save_seconds:.1f} s, which does not fit into the {self._grace_seconds:g} s "
                f"between a preemption notice and the end: saving every {self._seconds / 60:.1f}{instead} minutes"
            )

    @property
    def is_over(self) -> bool:
        """Returns whether a save is due."""
        return time.monotonic() - self._began >= self._seconds

    def _adapt(self, stall_seconds: float) -> None:
        kills = sum(span.state == State.CUT_OFF for span in self._spans)
        seconds = sum(span.hours for span in self._spans) * 3600 + time.monotonic() - self._started
        killed_every, save = max(seconds / kills, 1.0) if kills else None, (self.save_seconds or 0.0, stall_seconds)
        self._seconds = interval_seconds(self._every_minutes, self._grace_seconds, save, killed_every)
        if self.save_seconds is None:
            # Whether one fits into a notice is not known before the first one.
            self._seconds = min(self._seconds, LONGEST_WITHOUT_NOTICE_SECONDS)

    def _look_back(self) -> None:
        # Whatever goes wrong here, the saves report it, and the next interval follows the last one.
        with suppress(JobError):
            self._spans = spans_of(attempts_of(self._run, RECENT_ATTEMPTS), read_status(self._run))
        if self.save_seconds is None:
            self._adapt(0.0)
