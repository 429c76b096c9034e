"""Something that asks a process of a test to stop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from job.stop import SPOT_GRACE_SECONDS, Stop


class StopWhen(Stop):
    """Stops as soon as `condition` is true, which is looked at whenever somebody asks."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        super().__init__(SPOT_GRACE_SECONDS)
        self._condition = condition

    def __call__(self) -> bool:
        if not self.reason and self._condition():
            self.request("a test")
        return super().__call__()


def stop_after(times: int) -> Stop:
    """Stops when somebody has asked so often in vain."""
    asked = count()
    return StopWhen(lambda: next(asked) >= times)
