"""The minutes between two saves: as configured, or fewer where a preemption leaves no time for a last save."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable

from job.exits import JobError
from job.runs.layout import ObjectKind
from job.stop import MARGIN_SECONDS
from job.store import Store

PROBE_BYTES = 16 << 20
SAVES_PER_CADENCE = 10
"""Where a preemption loses the work since the last save, saving may take up to a tenth of the time."""
SHORTEST_CADENCE_MINUTES = 1.0


class Cadence:
    """The minutes between two saves, which a thread shortens if a save takes longer than a preemption allows."""

    def __init__(
        self, run: Store, size_bytes: int, every_minutes: float, grace_seconds: float, note: Callable[[str], None]
    ) -> None:
        """Begins an interval, and measures the bucket in a thread.

        Args:
            run: the run's folder, which the measurement writes to.
            size_bytes: of a checkpoint.
            every_minutes: as configured.
            grace_seconds: between a preemption notice and the end.
            note: receives messages for people.
        """
        self._run, self._size_bytes, self._note = run, size_bytes, note
        self._every_minutes, self._grace_seconds = every_minutes, grace_seconds
        self.begin()
        threading.Thread(target=self._measure, name="measure-save", daemon=True).start()

    def begin(self) -> None:
        """Begins the next interval."""
        self._began = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Returns whether a save is due."""
        return (time.monotonic() - self._began) / 60 >= self._every_minutes

    def _measure(self) -> None:
        """Shortens the interval if a save does not fit into the grace period of a preemption."""
        data = os.urandom(min(PROBE_BYTES, self._size_bytes))
        key, began = ObjectKind.PROBE.key(unique=uuid.uuid4().hex), time.monotonic()
        try:
            self._run.create(key, data)
            seconds = (time.monotonic() - began) * self._size_bytes / len(data)
            self._run.delete(key)
        except JobError as error:
            self._note(f"could not measure the duration of a save: {error}")
            return
        configured = self._every_minutes
        if seconds + MARGIN_SECONDS > self._grace_seconds:
            often = max(SHORTEST_CADENCE_MINUTES, seconds * SAVES_PER_CADENCE / 60)
            self._every_minutes = min(configured, often)
            self._note(
                f"a save takes about {seconds:.1f} s, which does not fit into the {self._grace_seconds:g} s between a "
                f"preemption notice and the end: saving every {self._every_minutes:.1f} instead of {configured:g} "
                "minutes"
            )
