"""The interval between two saves: as configured, else as loses least time; shorter where a notice is too short."""

from __future__ import annotations

import math
import os
import threading
import time
import uuid
from collections.abc import Callable

from job.exits import JobError
from job.runs.layout import ObjectKind
from job.runs.outlook import attempts_of, killed_every_seconds, spans_of
from job.runs.records import read_status
from job.stop import MARGIN_SECONDS
from job.store import Store

PROBE_BYTES = 16 << 20
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
        stall_seconds: by which that save delayed training: the copy, and the processor time of the writer's thread.
    """

    def __init__(
        self,
        run: Store,
        size_bytes: int,
        every_minutes: float | None,
        grace_seconds: float,
        note: Callable[[str], None],
    ) -> None:
        """Begins an interval, and measures the bucket in a thread.

        Args:
            run: the run's folder, which the measurement writes to.
            size_bytes: of a checkpoint.
            every_minutes: as configured; see `interval_seconds`.
            grace_seconds: between a preemption notice and the end.
            note: receives messages for people.
        """
        self._run, self._size_bytes, self._note = run, size_bytes, note
        self._every_minutes, self._grace_seconds = every_minutes, grace_seconds
        self.save_seconds: float | None = None
        self.stall_seconds = self._copy_seconds = 0.0
        self._started = time.monotonic()
        self._seconds = interval_seconds(every_minutes, grace_seconds, (0.0, 0.0), None)
        self._spans = spans_of((), None)
        self.begin()
        threading.Thread(target=self._measure, name="measure-save", daemon=True).start()

    def begin(self) -> None:
        """Begins the next interval, at the beginning of a save."""
        self._began = time.monotonic()

    def copied(self) -> None:
        """Takes the time for which training waited for the copy."""
        self._copy_seconds = time.monotonic() - self._began

    def committed(self, save_seconds: float, processor_seconds: float) -> None:
        """Takes the duration of a commit and its processor time, which decide about the next interval."""
        self.save_seconds, self.stall_seconds = save_seconds, self._copy_seconds + processor_seconds
        self._adapt(save_seconds)

    @property
    def is_over(self) -> bool:
        """Returns whether a save is due."""
        return time.monotonic() - self._began >= self._seconds

    def _adapt(self, save_seconds: float) -> None:
        killed_every = killed_every_seconds(self._spans, time.monotonic() - self._started)
        save = save_seconds, self.stall_seconds
        self._seconds = interval_seconds(self._every_minutes, self._grace_seconds, save, killed_every)

    def _measure(self) -> None:
        """Adapts the interval before the first save, to how often the run is killed and to how long a save takes."""
        data = os.urandom(min(PROBE_BYTES, self._size_bytes))
        key, began = ObjectKind.PROBE.key(unique=uuid.uuid4().hex), time.monotonic()
        try:
            self._run.create(key, data)
            seconds = (time.monotonic() - began) * self._size_bytes / len(data)
            self._run.delete(key)
            self._spans = spans_of(attempts_of(self._run, RECENT_ATTEMPTS), read_status(self._run))
        except JobError as error:
            self._note(f"could not measure the duration of a save: {error}")
            return
        if self.save_seconds is None:
            self._adapt(seconds)
        if not is_saved_in(self._grace_seconds, seconds):
            instead = "" if self._every_minutes is None else f" instead of {self._every_minutes:g}"
            self._note(
                f"a save takes about {seconds:.1f} s, which does not fit into the {self._grace_seconds:g} s between a "
                f"preemption notice and the end: saving every {self._seconds / 60:.1f}{instead} minutes"
            )
