"""Work that several machines share, of which one is killed and comes back."""

from __future__ import annotations

from benchmarks.crash_campaign.attempts import Attempts
from benchmarks.crash_campaign.points import Point
from benchmarks.crash_campaign.processes import BrokenError
from job.store import Store


def share_out(attempts: Attempts, words: list[str], results: Store, point: Point) -> None:
    """Empties `results`, kills the first machine at the point, then runs a slice on each of `point.machines` at once.

    Raises:
        BrokenError: the point was not reached, or a machine ended with another code than 0.
    """
    for entry in list(results.list()):
        results.delete(entry.key)
    slices = [[*words, "--slice", f"{number}/{point.machines}"] for number in range(point.machines)]
    killed = attempts.start(slices[0], point)
    killed.wait()
    if killed.find("fault") is None:
        raise BrokenError(f"point {point.name} was not reached")
    for machine in [attempts.start(each) for each in slices]:
        machine.finish()
    attempts.count(killed, f"SIGKILL of one of {point.machines} machines at a point", point.name)
