"""Telling people how a run is going: `status.json`, rewritten every half minute by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from job.exits import JobError
from job.runs import Status, write_status
from job.store import Store

EVERY_SECONDS = 30.0


class StatusReporter:
    """Writes what `current()` returns, now and then and at the end. A bucket that is away is no reason to stop."""

    def __init__(self, run: Store, current: Callable[[str], Status], warn: Callable[[str], None]) -> None:
        self._run, self._current, self._warn = run, current, warn
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            self._write("running")
            if self._ended.wait(EVERY_SECONDS):
                return

    def close(self, state: str) -> None:
        """Ends the thread and writes the last state: `finished`, `stopped` or `failed`."""
        self._ended.set()
        self._thread.join()
        self._write(state)

    def _write(self, state: str) -> None:
        try:
            write_status(self._run, self._current(state))
        except JobError as error:
            self._warn(f"could not write the run's status: {error}")
