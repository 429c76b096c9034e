"""The time between a preemption notice and the end of the machine: how much is left, and whether a save fits in."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from job.exits import BadRequestError
from job.store import Store
from job.store.files import os_errors
from job.store.scratch import scratch_folder

VARIABLE = "DDPM_GRACE_SECONDS"
GRACE_SECONDS = 30.0
"""What a spot VM is given. A GKE spot node gives 15 unless its pool is told otherwise, which the variable says."""
MARGIN_SECONDS = 3.0
"""For noticing the signal and for ending the process."""
PROBE = "probe"
"""Folder of the object that measures how long a save takes."""
PROBE_BYTES = 16 << 20
SAVES_PER_CADENCE = 10
"""Where a preemption costs the work since the last save, saving may take up to a tenth of the time."""
SHORTEST_CADENCE_MINUTES = 1.0


def grace_seconds() -> float:
    """Seconds from the notice to the end: `DDPM_GRACE_SECONDS`, or those of a spot VM.

    Raises:
        BadRequestError: the variable holds no such number.
    """
    text = os.environ.get(VARIABLE, "")
    with suppress(ValueError):
        if not text or 0 < float(text) < float("inf"):
            return float(text or GRACE_SECONDS)
    raise BadRequestError(f"{VARIABLE}={text!r}: give the seconds between a preemption notice and the end, such as 30")


class Notice:
    """A stop flag that remembers when it was first seen set: calling it says whether, `seconds_left` for how long."""

    def __init__(self, stop: Callable[[], bool], grace: float) -> None:
        """`grace` is the time from `stop` being set to the end, in seconds."""
        self._stop, self._grace = stop, grace
        self._since = float("inf")

    def __call__(self) -> bool:
        """Whether this process is to stop."""
        if self._stop():
            self.begin()
        # Also if another process was asked: what this one waits for would hold all of them up.
        return self._since < float("inf")

    @property
    def reason(self) -> str:
        """Why; empty if this process was not asked itself."""
        return str(getattr(self._stop, "reason", ""))

    def begin(self) -> None:
        """The time runs from now, if it does not yet: another process of the run was asked to stop."""
        self._since = min(self._since, time.monotonic())

    def seconds_left(self) -> float:
        """Seconds until the end; infinite before the notice."""
        return max(0.0, self._since + self._grace - time.monotonic())

    def seconds_left_to_save(self) -> float:
        """As `seconds_left`, less what is needed for ending the process in order."""
        return max(0.0, self.seconds_left() - min(MARGIN_SECONDS, self._grace / 2))


def measure_save_seconds(run: Store, checkpoint_bytes: int) -> float:
    """Estimates how long a checkpoint of this size takes to commit, from an object of the same kind that is deleted.

    Raises:
        JobError: the bucket or the local disk refuse, as they would refuse a checkpoint.
    """
    size_bytes = min(PROBE_BYTES, checkpoint_bytes)
    key = f"{PROBE}/{uuid.uuid4().hex}"
    with scratch_folder("probe") as folder:
        path = folder / "probe"
        started = time.monotonic()
        with os_errors(path):
            path.write_bytes(os.urandom(size_bytes))
        run.upload(path, key)
        seconds = time.monotonic() - started
    run.delete(key)
    # The deletion is one round trip more, as is a manifest.
    round_trip = time.monotonic() - started - seconds
    return max(seconds - round_trip, 0.0) * checkpoint_bytes / size_bytes + 3 * round_trip


def check_writable(run: Store) -> None:
    """Writes and deletes a few bytes: what a lease and every save need is known before anything that takes time.

    Raises:
        NoPermissionError: the credentials do not allow one of the two; the message names the object.
        JobError: the bucket is not there, or is away.
    """
    key, content = f"{PROBE}/{uuid.uuid4().hex}", uuid.uuid4().bytes
    run.create(key, content)
    run.delete(key)


def fits(save_seconds: float, grace: float) -> bool:
    """Whether a save begun at the notice ends in time."""
    return save_seconds + MARGIN_SECONDS <= grace


def cadence_minutes(every_minutes: float, save_seconds: float, grace: float) -> float:
    """How often to save: as configured, or more often where a preemption leaves no time for a last save."""
    if fits(save_seconds, grace):
        return every_minutes
    return min(every_minutes, max(SHORTEST_CADENCE_MINUTES, save_seconds * SAVES_PER_CADENCE / 60))
