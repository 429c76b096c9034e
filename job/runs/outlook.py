"""The time and cost of a run: so far, and to its end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from job.exits import BadDataError, State
from job.runs.records import STATUS_KEY, Attempt, Status, attempt_fences, load_attempt
from job.store import ObjectMissingError, Store

STALE = timedelta(seconds=120)
"""A run counts as cut off if its status is `running` but older than this."""


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
    attempts = []
    for fence in attempt_fences(run)[-newest:]:
        # The run may be deleted meanwhile.
        with suppress(BadDataError, ObjectMissingError):
            attempts.append(load_attempt(run, fence))
    return attempts


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


def killed_every_seconds(spans: list[AttemptSpan], present_seconds: float = 0.0) -> float | None:
    """Returns the mean time between two ends without a notice; None if there was none.

    Args:
        spans: of the attempts.
        present_seconds: for which the present attempt, the last of them, has lasted.
    """
    kills = sum(span.state == State.CUT_OFF for span in spans)
    seconds = sum(span.hours for span in spans) * 3600 + present_seconds
    return max(seconds / kills, 1.0) if kills else None


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
