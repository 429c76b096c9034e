"""Standing beside a job: its output as it comes, until a signal says that it is enough."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from job.jobs.backends.base import Backend
from job.stop import STOP_SIGNALS, handle_stop_signals


class StopSignals:
    """Takes over the signals that ask this process to stop (main thread only); a second one ends it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        handle_stop_signals(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for a signal, at most so long; whether one came."""
        return self._event.wait(seconds)


def print_logs(backend: Backend, name: str, *, follow: bool) -> None:
    """Prints what a job said; with `follow` until it is over or a signal comes, which leaves the job alone.

    Raises:
        MissingInputError: there is no such job, or its output is gone.
    """
    stop = StopSignals() if follow else lambda: False
    for line in backend.logs(name, follow, stop):
        print(line, flush=True)
