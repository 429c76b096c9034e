"""Telling people how a run is going: `status.json`, rewritten every half minute by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from job.exits import JobError
from job.runs.records import Status, write_status
from job.store import Store

EVERY_SECONDS = 30.0
CLOSE_SECONDS = 5.0


class StatusReporter:
    """Writes what `current()` returns, now and then and at the end. A bucket that is away is no reason to stop."""

    def __init__(self, run: Store, current: Callable[[str], Status], warn: Callable[[str], None]) -> None:
        self._run, self._current, self._warn = run, current, warn
        self._state, self._ended = "running", threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.is_set():
            self._write("running")
            self._ended.wait(EVERY_SECONDS)
        self._write(self._state)

    def close(self, state: str, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Has the last state written, `finished`, `stopped` or `failed`, if the bucket takes it in time."""
        self._state = state
        self._ended.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._warn(f"the run's status does not say that it {state}: the bucket did not answer in time")

    def _write(self, state: str) -> None:
        try:
            write_status(self._run, self._current(state))
            self._failing = False
        except JobError as error:
            # Once per outage is enough.
            if not self._failing:
                self._warn(f"could not write the run's status: {error}")
            self._failing = True
