"""A clock for `--watch` that costs no time: whenever the watch waits, the next thing happens."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

PATIENCE = 30
"""How often the watch may wait once nothing happens any more, before it is told to stop."""


class Story:
    """Things that happen, one for each time that the watch waits."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.events, self.seconds, self.left = list(events), 0.0, PATIENCE

    def now(self) -> float:
        return self.seconds

    def utc(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.seconds)

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        if self.events:
            self.events.pop(0)()
        else:
            self.left -= 1
        return self.left == 0


def nothing() -> None:
    """The watch waits."""
