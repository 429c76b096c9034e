"""Signs of life: each rank writes the time into memory that it shares with its launcher, which looks there at times."""

from __future__ import annotations

import mmap
import os
import time

_LONGEST_LOOK_SECONDS = 5.0


class Heartbeats:
    """The launcher's side. Silence counts from the start, so that a process that never gets going is found too."""

    def __init__(self, processes: int) -> None:
        # Memory without a file system: a page of a full disk would be SIGBUS.
        self.descriptor = os.memfd_create("ddpm-heartbeats")
        os.ftruncate(self.descriptor, 8 * processes)
        self._times = memoryview(mmap.mmap(self.descriptor, 0)).cast("d")
        self._looked = time.monotonic()
        for place in range(processes):
            self._times[place] = self._looked
        self._seen = self._times.tolist()
        self._silent_seconds = [0.0] * processes

    def place(self, rank: int) -> str:
        """What `HEARTBEATS` is to be for a rank, which inherits `descriptor`."""
        return f"{self.descriptor}:{rank}"

    def look(self) -> list[float]:
        """For how many seconds each rank has been silent, at this look; to be called every second or so.

        Time in which the launcher did not run itself does not count: a suspended laptop, a migrated VM or Ctrl-Z stops
        all processes alike, and none of them hangs for that.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK_SECONDS), now
        before, self._seen = self._seen, self._times.tolist()
        self._silent_seconds = [
            seconds + passed if beaten == seen else 0.0
            for seconds, beaten, seen in zip(self._silent_seconds, self._seen, before, strict=True)
        ]
        return self._silent_seconds

    def last_beat(self, rank: int) -> float:
        """When a rank last beat, on `time.monotonic`'s clock: tells who fell silent first, to the microsecond."""
        return self._times[rank]
