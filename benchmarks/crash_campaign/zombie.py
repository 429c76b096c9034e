"""An attempt that is suspended until another has replaced it, and then wakes."""

from __future__ import annotations

import signal
from collections.abc import Callable

from benchmarks.crash_campaign.attempts import Attempts
from benchmarks.crash_campaign.points import Point
from benchmarks.crash_campaign.processes import BrokenError, Invocation
from benchmarks.crash_campaign.records import Run
from job.exits import Exit


def replace_stopped(
    attempts: Attempts, run: Run, point: Point, begin: Callable[[Point | None], Invocation]
) -> Invocation:
    """Suspends an attempt at the point, lets another finish the run, and returns the other.

    Raises:
        BrokenError: the point was not reached, the other failed, or the first one still wrote after it woke.
    """
    zombie = begin(point)
    zombie.wait_until(lambda: zombie.find("fault") or zombie.code is not None, f"did not reach {point.name}")
    if (fault := zombie.find("fault")) is None:
        raise BrokenError(f"point {point.name} was not reached: {zombie.last_line}")
    run.zombies.add(fault["fence"])
    attempts.count(zombie, "SIGSTOP group beyond expiry, then SIGCONT", point.name)
    other = begin(None)
    try:
        other.wait_until(lambda: other.find("commit") or other.code is not None, "did not replace a stopped holder")
    finally:
        zombie.send(signal.SIGCONT, "group")
    code, other_code = zombie.wait(), other.wait()
    if other_code:
        raise BrokenError(f"the attempt that replaced a stopped one ended with {other_code}: {other.last_line}")
    if code != Exit.LOST_RUN:
        late = [event["ref"] for event in zombie.events if event["event"] == "commit"]
        raise BrokenError(
            f"two attempts wrote to one run: the fence of attempt {fault['fence']} was ignored, which woke after "
            f"it was replaced and ended with {code} instead of {int(Exit.LOST_RUN)}, with {len(late)} commits"
        )
    return other
