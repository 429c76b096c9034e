"""How long training takes that is interrupted at random, with a band, and how often saving pays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

_FINE = 1e6
"""The number of saves between two interruptions that stands for a notice with time for a save."""


@dataclass(frozen=True)
class Interruptions:
    """The interruptions of a run, and the cost of each.

    Attributes:
        every_seconds: the mean time on a machine between two interruptions, which come independently of each other.
        queue_seconds: the mean time until a machine begins the first or the next attempt; it varies as much.
        restart_seconds: from the beginning of an attempt to its first step.
        save_seconds: from the moment of a checkpoint until it is in the bucket, while training goes on.
        stall_seconds: by which a save delays training.
        has_notice: whether a notice comes early enough for a save. Otherwise the work since the last checkpoint in the
            bucket is lost.
    """

    every_seconds: float
    queue_seconds: float = 0.0
    restart_seconds: float = 0.0
    save_seconds: float = 0.0
    stall_seconds: float = 0.0
    has_notice: bool = False


class Band(NamedTuple):
    """A duration in seconds: its mean, and its 10th and 90th percentiles."""

    low: float
    mean: float
    high: float


class Expected(NamedTuple):
    """The durations of a run from its submission to its end."""

    wall: Band
    machine: Band
    """Without the time in queues."""


class _Moments(NamedTuple):
    mean: float
    variance: float


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


def expected(productive_seconds: float, interval_seconds: float, course: Interruptions) -> Expected:
    """Returns the durations of a run that trains for `productive_seconds`, with this interval between two saves.

    The state is the same whenever a checkpoint has reached the bucket, since interruptions have no memory. So the run
    is a sum of independent times, as in Daly (2006), eq. 20, with the time to reach the bucket as part of the restart.
    The percentiles are those of a mixture: the shortest duration, with the probability of no interruption, and above
    it a gamma distribution with the sum's mean and variance. Infinite if the run would never end.
    """
    period = interval_seconds + course.stall_seconds
    total = productive_seconds * period / interval_seconds
    if course.has_notice:
        period, course = min(period, course.every_seconds / _FINE), replace(course, save_seconds=0.0)
    first = min(period, total)
    whole, rest = divmod(total - first, period)
    restart = course.restart_seconds + course.save_seconds
    shortest = restart + total
    bands = []
    for queue in (course.queue_seconds, 0.0):
        begun = _uninterrupted(restart + first, course.every_seconds, queue)
        between = _next_save(period, restart, course.every_seconds, queue)
        last = _next_save(rest, restart, course.every_seconds, queue)
        mean = begun.mean + whole * between.mean + last.mean
        variance = begun.variance + whole * between.variance + last.variance
        none = math.exp(-shortest / course.every_seconds)
        low, high = (
            # The first queue has an exponential distribution.
            shortest - queue * math.log(1 - share)
            if share <= none or mean <= shortest
            else shortest + queue + _above((share - none) / (1 - none), mean - shortest, variance, 1 - none)
            for share in (0.1, 0.9)
        )
        bands.append(Band(low, queue + mean, high))
    return Expected(*bands)


def _above(share: float, mean: float, variance: float, probability: float) -> float:
    """Returns a quantile of what interruptions cost, given the moments of that cost, and that there are any.

    By the cube of a normal variable: E. B. Wilson and M. M. Hilferty, PNAS 17 (1931).
    """
    if not (math.isfinite(mean) and math.isfinite(variance)):
        return math.inf
    given = mean / probability
    ninth = max(0.0, (variance + mean**2) / probability / given**2 - 1) / 9
    return given * max(0.0, 1 - ninth + NormalDist().inv_cdf(share) * math.sqrt(ninth)) ** 3


def _cut(seconds: float, every: float) -> tuple[float, _Moments]:
    """Returns the probability of an interruption within `seconds`, and the moments of its time."""
    ends = -math.expm1(-seconds / every)
    # For a short time the exact formulas are differences of equal numbers.
    if seconds < 1e-4 * every:
        return ends, _Moments(seconds / 2, seconds**2 / 12)
    odds = math.exp(-seconds / every) / ends
    return ends, _Moments(every - seconds * odds, every**2 - seconds**2 * odds / ends)


def _uninterrupted(seconds: float, every: float, queue: float) -> _Moments:
    """Returns the moments of the time until an attempt first lasts `seconds`; `queue` passes between two."""
    if seconds > 300 * every:
        return _Moments(math.inf, math.inf)
    ends, cut = _cut(seconds, every)
    # `1 - ends` is 0 from 37 times `every` on.
    survives = math.exp(-seconds / every)
    tries = ends / survives
    each = cut.mean + queue
    return _Moments(seconds + tries * each, tries * (cut.variance + queue**2) + tries / survives * each**2)


def _next_save(period: float, restart: float, every: float, queue: float) -> _Moments:
    """Returns the moments of the time from one checkpoint in the bucket to the next."""
    if not period:
        return _Moments(0.0, 0.0)
    (ends, cut), again = _cut(period, every), _uninterrupted(restart + period, every, queue)
    each = cut.mean + queue + again.mean
    mean = (1 - ends) * period + ends * each
    square = (1 - ends) * period**2 + ends * (cut.variance + queue**2 + again.variance + each**2)
    return _Moments(mean, max(0.0, square - mean**2))
