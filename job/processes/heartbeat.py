"""The launcher's side of the heartbeat: each rank writes the time into memory that both share, see `job.stop.beat`."""

from __future__ import annotations

import mmap
import os
import time

_LONGEST_LOOK_SECONDS = 3.0


class Heartbeats:
    """When each rank last beat. Silence counts from the start: a process that never gets going is found, too."""

    def __init__(self, processes: int) -> None:
        # Memory without a file system: a page of a full disk would be SIGBUS.
        self.descriptor = os.memfd_create("ddpm-heartbeats")
        os.ftruncate(self.descriptor, 8 * processes)
        self._times = memoryview(mmap.mmap(self.descriptor, 0)).cast("d")
        self._counts_from = self._looked = time.monotonic()

    def place(self, rank: int) -> str:
        """What `HEARTBEATS` is to be for a rank, which inherits `descriptor`."""
        return f"{self.descriptor}:{rank}"

    def silent_seconds(self) -> list[float]:
        """For how long each rank has been silent, to the microsecond; to be called every second or so.

        It counts anew when the launcher did not run itself: a suspended laptop, a migrated VM or Ctrl-Z stops all
        processes alike, and none of them hangs for that.
        """
        now = time.monotonic()
        if now - self._looked > _LONGEST_LOOK_SECONDS:
            self._counts_from = now
        self._looked = now
        return [now - max(beaten, self._counts_from) for beaten in self._times]
