"""Work that several machines share, of which one is killed and comes back."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.crash_campaign.points import Point
from benchmarks.crash_campaign.processes import Invocation
from benchmarks.crash_campaign.records import BrokenError

Start = Callable[[list[str], Point | None], Invocation]


def share_out(start: Start, words: list[str], point: Point) -> Invocation:
    """Kills the first machine at the point, then runs a slice of the work on each of `point.machines` at once.

    Returns:
        The invocation that was killed.

    Raises:
        BrokenError: the point was not reached, or a machine ended with another code than 0.
    """
    slices = [[*words, "--slice", f"{number}/{point.machines}"] for number in range(point.machines)]
    killed = start(slices[0], point)
    killed.wait()
    if killed.find("fault") is None:
        raise BrokenError(f"point {point.name} was not reached")
    for machine in [start(each, None) for each in slices]:
        if code := machine.wait():
            line = (machine.output.strip().splitlines() or ["(it printed nothing)"])[-1]
            raise BrokenError(f"after {point.name} a machine ended with {code}: {line}")
    return killed
