"""How long a training job is expected to be on machines that are taken away, and whether it can ever end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from job.config import CheckpointConfig
from job.exits import BadRequestError
from job.jobs.backends.target import Target
from job.jobs.spec import JobSpec
from job.runs.outlook import (
    AttemptSpan,
    best_interval_seconds,
    duration,
    interval_seconds,
    is_saved_in,
    killed_every_seconds,
)
from job.runs.records import Status

SPOT_HOURS = 3.0
"""Between two preemptions of a spot machine: 47 in 145 hours on AWS machines with a V100, in the first two days of four
zones of April 2023. Other machines and places differ by a factor of ten: the target's `preempted_every_hours` wins.
github.com/skypilot-org/spot-traces, of Z. Wu et al., Can't Be Late, NSDI 2024."""
GPU_HOURS = 50_000.0
"""Between two failures of one GPU: 419 interruptions of 16,384 GPUs in 54 days.
A. Dubey et al., The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4."""
START_SECONDS, SAVE_SECONDS, EPOCH_SECONDS = 60.0, 10.0, 600.0
"""The durations of a run that has not measured them: guesses, without a source."""
LEAST_SHARE = 0.1
"""The share of the time on machines below which a job is refused."""


@dataclass(frozen=True)
class Expectation:
    """The interruptions that a job has to expect, at random and independent of each other, and the cost of each.

    Attributes:
        every_seconds: the mean time on machines between two interruptions.
        start_seconds: from the beginning of an attempt to its first step.
        save_seconds: from the moment of a checkpoint until it is in the bucket, while training goes on.
        interval_seconds: between two saves, by time.
        epochs_seconds: between two saves, by epochs.
        has_notice: whether a notice comes early enough for a save. Otherwise the work since the last checkpoint in the
            bucket is lost.
    """

    every_seconds: float
    start_seconds: float
    save_seconds: float
    interval_seconds: float
    epochs_seconds: float = math.inf
    has_notice: bool = False

    @property
    def _lost_seconds(self) -> float:
        """Returns the time of an attempt that is lost in any case."""
        return self.start_seconds + self.save_seconds * (not self.has_notice)

    @property
    def _period_seconds(self) -> float:
        return min(self.interval_seconds, self.epochs_seconds)

    @property
    def share(self) -> float:
        """Returns the share of the time on machines that trains: τ / (M e^{R/M} (e^{τ/M} - 1)).

        J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006),
        eq. 20, with the time to reach the bucket as part of the restart R. A dump takes nothing, because the measured
        speed includes it. With a notice τ goes to 0.
        """
        restart, period = self._lost_seconds / self.every_seconds, self._period_seconds / self.every_seconds
        if self.has_notice:
            return math.exp(-restart)
        # The same without an overflow.
        return period * math.exp(-restart - period) / -math.expm1(-period)

    def machine_seconds(self, productive_seconds: float) -> float:
        """Returns the time on machines, without the waits for them, that so much training is expected to take."""
        first = self.every_seconds * math.expm1(self._lost_seconds / self.every_seconds)
        return first + productive_seconds / self.share

    def text(self, productive_seconds: float | None, dollars_per_hour: float | None) -> str:
        """Returns the expectation for people; without the time that the run needs, the share of it that trains."""
        why = (
            f"{self.share:.0%} of the time on machines trains: an interruption every {_words(self.every_seconds)}, "
            f"a start of {_words(self.start_seconds)}, saving at least every {_words(self.interval_seconds)}"
        )
        if productive_seconds is None:
            return f"{why}; the first minutes tell the speed and so the end"
        hours = self.machine_seconds(productive_seconds) / 3600
        price = "" if dollars_per_hour is None else f" and ${hours * dollars_per_hour:,.2f}"
        return f"{duration(hours)} on machines{price} to the end; {why}"

    def check(self) -> None:
        """Raises BadRequestError if interruptions leave almost none of the job's work."""
        if self.share >= LEAST_SHARE:
            return
        works = best_interval_seconds(self.save_seconds, self.every_seconds)
        why = f"would save every {_words(self._period_seconds)} (checkpoint.every_minutes, checkpoint.every_epochs)"
        do = f"add --set checkpoint.every_minutes={works / 60:.2g}"
        if replace(self, interval_seconds=works).share < LEAST_SHARE:
            took = map(_words, (self.start_seconds, self.save_seconds))
            why, do = "begins to train {} after its start and needs {} for a save".format(*took), "use other machines"
        raise BadRequestError(
            f"the job {why}, but is interrupted every {_words(self.every_seconds)}, so it would lose almost all of "
            f"its work: {do}, or tell how rare interruptions are (`preempted_every_hours` of the target)"
        )


def expectation_of(
    spec: JobSpec,
    target: Target,
    checkpoint: CheckpointConfig,
    spans: Sequence[AttemptSpan] = (),
    status: Status | None = None,
) -> Expectation:
    """Returns what a training job has to expect, by the rate of its target or a prior, and by what its run measured.

    Args:
        spec: the job.
        target: where it will run.
        checkpoint: the run's settings.
        spans: the run's attempts.
        status: of the run.
    """
    start = save = stall = None
    if status is not None:
        start, save, stall = status.start_seconds, status.save_seconds, status.stall_seconds
    is_spot, told = spec.spot and target.selects_machines, target.preempted_every_hours
    hours = told or (SPOT_HOURS if is_spot else GPU_HOURS / max(1, spec.gpus))
    save_seconds = SAVE_SECONDS if save is None else save
    interval = interval_seconds(
        checkpoint.every_minutes, target.notice_seconds, (save_seconds, stall or 0.0), killed_every_seconds(list(spans))
    )
    epochs = checkpoint.every_epochs * EPOCH_SECONDS
    # The first save shows whether it fits into a notice, so a job must not make it only at its end.
    is_known = save is not None or min(interval, epochs) < spec.max_hours * 3600
    return Expectation(
        every_seconds=max(1.0, hours * 3600 / spec.machines),
        start_seconds=START_SECONDS if start is None else start,
        save_seconds=save_seconds,
        # At its limit of hours a job saves.
        interval_seconds=min(interval, spec.max_hours * 3600),
        epochs_seconds=epochs,
        has_notice=(is_spot or told is not None) and is_saved_in(target.notice_seconds, save_seconds) and is_known,
    )


def _words(seconds: float) -> str:
    return duration(seconds / 3600).removesuffix(" 0 min") if seconds >= 60 else f"{seconds:.2g} s"
