"""What jobs on Google's machines printed, from Cloud Logging: it outlives the machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from job.jobs.backends.google import GoogleApis

POLL_SECONDS = 5.0
"""Cloud Logging answers sixty requests a minute and project."""
SETTLE_SECONDS = 15.0
"""So long after its end a job's last lines may still be on their way."""
OVERLAP_SECONDS = 30.0
"""Entries of several machines do not arrive in the order of their times."""
_PAGE = 1000
_STEP_SECONDS = 0.2


@dataclass(frozen=True)
class Entry:
    """One entry of a log.

    Attributes:
        key: what no other entry has.
        at: when it was written, with a time zone.
        payload: a text, or fields.
        labels: of the entry.
    """

    key: str
    at: datetime
    payload: Any
    labels: dict[str, str]

    @property
    def text(self) -> str:
        """The line itself."""
        text = self.payload.get("message", "") if isinstance(self.payload, dict) else self.payload
        return str(text or "").rstrip("\r\n")


def quoted(value: str) -> str:
    """A value as filters have it (cloud.google.com/logging/docs/view/logging-query-language)."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def entries(
    apis: GoogleApis, filter_: str, since: datetime, *, newest_first: bool = False, limit: int | None = None
) -> list[Entry]:
    """The entries that match `filter_` from `since` on, in the order of their times.

    Raises:
        JobError: the API's refusal, or that it is away.
    """
    # Without a time the client asks for the last day alone.
    whole = f"{filter_} AND timestamp>={quoted(since.astimezone(UTC).isoformat().replace('+00:00', 'Z'))}"
    order = "timestamp desc" if newest_first else "timestamp asc"

    def ask() -> list[Entry]:
        found = apis.logging.list_entries(filter_=whole, order_by=order, page_size=_PAGE, max_results=limit)
        return [_entry(one) for one in found]

    return apis.insist(f"the log of project {apis.project}", ask)


def follow(
    apis: GoogleApis,
    filter_: str,
    since: datetime,
    is_over: Callable[[], bool],
    should_stop: Callable[[], bool],
) -> Iterator[Entry]:
    """All entries from `since` on, each once, until the job is over and its last ones have had time to arrive."""
    seen: dict[str, datetime] = {}
    over_at: float | None = None
    while not should_stop():
        if over_at is None and is_over():
            over_at = time.monotonic()
        # Asked before the entries: what was written before the end is among them, or comes soon.
        may_end = over_at is not None and time.monotonic() - over_at >= SETTLE_SECONDS
        for entry in entries(apis, filter_, since):
            if entry.key not in seen:
                seen[entry.key] = entry.at
                yield entry
        if may_end:
            return
        if seen:
            since = max(since, max(seen.values()) - timedelta(seconds=OVERLAP_SECONDS))
            seen = {key: at for key, at in seen.items() if at >= since}
        until = time.monotonic() + POLL_SECONDS
        while time.monotonic() < until and not should_stop():
            time.sleep(min(_STEP_SECONDS, POLL_SECONDS))


def _entry(found: Any) -> Entry:
    at = found.timestamp or found.received_timestamp or datetime.now(UTC)
    return Entry(str(found.insert_id), at.astimezone(UTC), found.payload, dict(found.labels or {}))
