"""Whether a save fits into the time between a preemption notice and the end of the machine, and what follows if not."""

from __future__ import annotations

import os
import time
import uuid

from job.stop import MARGIN_SECONDS
from job.store import Store
from job.store.files import os_errors
from job.store.scratch import scratch_folder

PROBE = "probe"
"""Folder of the object that measures how long a save takes."""
PROBE_BYTES = 16 << 20
SAVES_PER_CADENCE = 10
"""Where a preemption costs the work since the last save, saving may take up to a tenth of the time."""
SHORTEST_CADENCE_MINUTES = 1.0


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
