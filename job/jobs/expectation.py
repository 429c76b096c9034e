"""How long a training job is expected to take on a target, for how many dollars, and whether it can ever end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

from job.config import CheckpointConfig
from job.exits import BadRequestError, State
from job.jobs.backends.target import Target
from job.jobs.spec import JobSpec
from job.runs.cadence import interval_seconds, is_saved_in
from job.runs.goodput import Interruptions, best_interval_seconds, expected
from job.runs.outlook import AttemptSpan, duration, killed_every_seconds
from job.runs.records import Status

SPOT_HOURS = 3.0
"""Between two preemptions of a spot machine: 47 in 145 hours on AWS machines with a V100, in the first two days of four
zones of April 2023. Other machines and places differ by a factor of ten: the target's `preempted_every_hours` wins.
github.com/skypilot-org/spot-traces, of Z. Wu et al., Can't Be Late, NSDI 2024."""
SPOT_QUEUE_SECONDS = 1200.0
"""Until there is a spot machine again: the mean in the same traces, in two of the zones."""
GPU_HOURS = 50_000.0
"""Between two failures of one GPU: 419 interruptions of 16,384 GPUs in 54 days.
A. Dubey et al., The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4."""
START_SECONDS, SAVE_SECONDS, EPOCH_SECONDS = 60.0, 10.0, 600.0
"""The durations of a run that has not measured them: guesses, without a source."""
ENOUGH = 3
"""The number of interruptions of a run from which their rate and the queue are known better than by a prior."""
LEAST_SHARE = 0.1
"""The share of the time on machines below which a job is refused."""


@dataclass(frozen=True)
class Prospects:
    """The interruptions that a job on a target has to expect, and what they rest on.

    Attributes:
        course: its interruptions.
        usual_seconds: between two interruptions, by the target or by a prior.
        interval_seconds: between two saves.
        best_seconds: the interval without `checkpoint.every_minutes`.
        measured: the facts that its run has measured, for people.
        prior: the assumptions, for people.
    """

    course: Interruptions
    usual_seconds: float
    interval_seconds: float
    best_seconds: float
    measured: list[str]
    prior: list[str]

    def lines(self, productive_seconds: float | None, dollars_per_hour: float | None) -> list[str]:
        """Returns the expectation for people; without the time that the run needs, the share of it that is lost."""
        better = f" (better: every {_words(self.best_seconds)})" * (self.best_seconds != self.interval_seconds)
        saving = f"saving every {_words(self.interval_seconds)}{better}"
        if productive_seconds is None:
            share = _share(self.interval_seconds, self.course)
            text = (
                f"{share:.0%} of the time on machines trains, {saving}; the first minutes tell the speed and so the end"
            )
        else:
            wall, machine = expected(productive_seconds, self.interval_seconds, self.course)
            price = ""
            if dollars_per_hour is not None:
                low, high = (seconds / 3600 * dollars_per_hour for seconds in (machine.low, machine.high))
                price = f" and ${low:,.2f} to ${high:,.2f}"
            hours = " to ".join(dict.fromkeys(duration(seconds / 3600) for seconds in (wall.low, wall.high)))
            text = f"{hours}{price} to the end for 8 of 10 such jobs, {saving}"
        kinds = (("measured", self.measured), ("assumed", self.prior))
        return [text, "; ".join(f"{kind}: {', '.join(facts)}" for kind, facts in kinds if facts)]

    def check(self, max_hours: float) -> None:
        """Raises BadRequestError if interruptions leave almost none of the job's work."""
        # At its limit of hours a job saves. The cause of earlier interruptions may be mended, such as lack of memory.
        interval = min(self.interval_seconds, max_hours * 3600)
        course = replace(self.course, every_seconds=self.usual_seconds)
        if _share(interval, course) >= LEAST_SHARE:
            return
        works = best_interval_seconds(course.save_seconds, course.every_seconds)
        if _share(works, course) < LEAST_SHARE:
            took = map(_words, (course.restart_seconds, course.save_seconds))
            why = "begins to train {} after its start and needs {} for a save".format(*took)
            do = "use other machines"
        else:
            why = f"would save every {_words(interval)} (checkpoint.every_minutes, checkpoint.every_epochs)"
            do = f"add --set checkpoint.every_minutes={works / 60:.2g}"
        raise BadRequestError(
            f"the job {why}, but is interrupted every {_words(course.every_seconds)}, so it would lose almost all of "
            f"its work: {do}, or tell how rare interruptions are (`preempted_every_hours` of the target)"
        )


def _share(interval: float, course: Interruptions) -> float:
    """Returns the share of the time on machines that a long run trains with this interval."""
    long = 100 * max(interval, course.every_seconds)
    return long / expected(long, interval, course).machine.mean


def prospects(
    spec: JobSpec,
    target: Target,
    checkpoint: CheckpointConfig,
    spans: Sequence[AttemptSpan] = (),
    status: Status | None = None,
) -> Prospects:
    """Returns what a training job has to expect, by what its run has measured and by priors.

    Args:
        spec: the job.
        target: where it will run.
        checkpoint: the run's settings.
        spans: the run's attempts.
        status: of the run.
    """
    measured, prior = list[str](), list[str]()

    def known(what: str, seconds: float | None, otherwise: float) -> float:
        """Returns a duration that was measured, or a prior, and notes which."""
        value = otherwise if seconds is None else seconds
        (prior if seconds is None else measured).append(f"{what} {_words(value)}")
        return value

    is_spot, told, past = spec.spot and target.selects_machines, target.preempted_every_hours, _past(spans)
    usual = (told or (SPOT_HOURS if is_spot else GPU_HOURS / max(1, spec.gpus))) * 3600 / spec.machines
    often, comes_with_notice = None, is_spot or told is not None
    if past and told is None:
        often, comes_with_notice = past.every_seconds, past.comes_with_notice
    every = known(f"an interruption{' (told by the target)' * bool(told)} every", often, usual)
    queue = known("a queue of", past and past.queue_seconds, SPOT_QUEUE_SECONDS if is_spot else 0.0)
    start_seconds, save_seconds, stall = (None, None, None)
    if status is not None:
        start_seconds, save_seconds, stall = status.start_seconds, status.save_seconds, status.stall_seconds
    start = known("a start of", start_seconds, START_SECONDS)
    save = known("a save of", save_seconds, SAVE_SECONDS)
    killed_every = killed_every_seconds(list(spans))
    epoch = _epoch_seconds(status)
    interval, best = (
        interval_seconds(minutes, target.notice_seconds, (save, stall or 0.0), killed_every)
        for minutes in (checkpoint.every_minutes, None)
    )
    if epoch is not None or interval > EPOCH_SECONDS:
        at_epochs = checkpoint.every_epochs * known("an epoch of", epoch, EPOCH_SECONDS)
        interval, best = min(interval, at_epochs), min(best, at_epochs)
    has_notice = comes_with_notice and is_saved_in(target.notice_seconds, save)
    if has_notice and save_seconds is None:
        # The first save shows whether it fits into a notice, so a job must not make it only at its end.
        has_notice = interval < spec.max_hours * 3600
        prior += ["a notice that leaves time for a save"] * has_notice
    # The measured speed includes the stalls.
    course = Interruptions(max(1.0, every), queue, restart_seconds=start, save_seconds=save, has_notice=has_notice)
    return Prospects(course, max(1.0, usual), interval, best, measured=measured, prior=prior)


class _Past(NamedTuple):
    """The interruptions of a run's jobs so far."""

    every_seconds: float
    queue_seconds: float
    comes_with_notice: bool
    """Whether most of them did."""


def _past(spans: Sequence[AttemptSpan]) -> _Past | None:
    """Returns the interruptions that attempts tell of; None if these are too few."""
    # Attempts on the user's own machine tell nothing about those of a job.
    jobs = [span for span in spans if span.attempt.dollars_per_hour is not None]
    # An attempt that did not get further ended for a reason of its own, such as lack of memory.
    most_before = accumulate((span.images_seen or 0 for span in spans), max, initial=0)
    further = [span for span, most in zip(spans, most_before, strict=False) if (span.images_seen or 0) > most]
    trained = [span for span in jobs if span in further]
    ends = [
        (span.state, (after.began - span.last_seen).total_seconds())
        for span, after in pairwise(jobs)
        if span in trained and span.state in (State.CUT_OFF, State.STOPPED)
    ]
    if len(ends) < ENOUGH:
        return None
    return _Past(
        every_seconds=sum(span.hours for span in trained) * 3600 / len(ends),
        queue_seconds=max(0.0, median(seconds for _, seconds in ends)),
        comes_with_notice=2 * sum(state == State.STOPPED for state, _ in ends) > len(ends),
    )


def _epoch_seconds(status: Status | None) -> float | None:
    # A forged status may have any number.
    with suppress(OverflowError):
        if status is not None and status.epoch > 0 and 0 < (status.images_per_second or 0) < math.inf:
            return status.images_seen / status.epoch / float(status.images_per_second or 1)
    return None


def _words(seconds: float) -> str:
    return duration(seconds / 3600).removesuffix(" 0 min") if seconds >= 60 else f"{seconds:.2g} s"
