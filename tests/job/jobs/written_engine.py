"""An engine whose answers are written down beforehand, and a clock that only they move; for `--watch`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from job.exits import JobError, State
from job.jobs import backends, watch
from job.jobs.backends import Cause, JobStatus, NoCapacityError, Target
from job.jobs.spec import JobSpec
from job.jobs.watch import Watch

SPEC = JobSpec("train-a", "train", ("train", "--dataset", "a"), "i", "gs://bucket", run="a", max_hours=2.0)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
"""When the clock begins."""
WAITING, RUNNING, FINISHED = State.WAITING, State.RUNNING, State.FINISHED
CANCELLED, GONE = State.CANCELLED, State.GONE
TAKEN = Cause.TAKEN_AWAY


@dataclass
class Engine:
    """What several places share, and the clock.

    Attributes:
        answers: to `status`, in order; the last one stays. Each is a state, an exit code or a cause of a failed job, a
            status, an error, or a pair of one of these and the seconds that pass before it.
        full: how often each place has no machine.
        cancelling: what `cancel` raises, in order, before it works.
        refusal: what `submit` raises.
        keeps_ended: see `Target`.
    """

    answers: list
    full: dict[str, int] = field(default_factory=dict)
    cancelling: list[JobError] = field(default_factory=list)
    refusal: JobError | None = None
    keeps_ended: bool = False
    is_remote: bool = True
    limits_attempts: bool = False
    seconds: float = NOON.timestamp()
    told: list[str] = field(default_factory=list)
    submitted: list[tuple[str, float]] = field(default_factory=list)
    """Where, and for how many hours."""
    retries: list[int] = field(default_factory=list)
    """Failures that the engine may follow by itself, of each that was submitted."""
    submitted_at: list[float] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    at_submission: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        return self.seconds > NOON.timestamp() + 30 * 86400

    def watch(self, *places: str, spec: JobSpec = SPEC) -> Engine:
        """Watches a job on it to the end. Its bucket is nowhere, unless it is a folder here."""
        bucket = "/nowhere" if "://" in spec.bucket else spec.bucket
        with pytest.MonkeyPatch.context() as patch:
            for module in (watch, backends):
                patch.setattr(module, "note", self.told.append)
            Watch(Place(self, places or ("a",)), replace(spec, bucket=bucket), self.wait, self.now).run()
        return self


class Place:
    """One of the places of an engine: what the watch asks of a `Target`."""

    submit_where_possible = Target.submit_where_possible

    def __init__(self, engine: Engine, places: tuple[str, ...]) -> None:
        self.engine, self.name, self.rest = engine, places[0], places[1:]
        self.keeps_ended = engine.keeps_ended
        self.is_remote, self.limits_attempts = engine.is_remote, engine.limits_attempts

    def elsewhere(self) -> Place | None:
        return Place(self.engine, self.rest) if self.rest else None

    def submit(self, spec: JobSpec) -> None:
        if self.engine.refusal:
            raise self.engine.refusal
        if self.engine.full.get(self.name, 0) > 0:
            self.engine.full[self.name] -= 1
            raise NoCapacityError(f"{self.name} has no machine")
        self.engine.at_submission()
        self.engine.submitted.append((self.name, spec.max_hours))
        self.engine.retries.append(spec.retries)
        self.engine.submitted_at.append(self.engine.seconds - NOON.timestamp())

    def alive(self, name: str) -> JobStatus:
        answer = self.engine.answers.pop(0) if len(self.engine.answers) > 1 else self.engine.answers[0]
        if isinstance(answer, tuple):
            answer, seconds = answer
            self.engine.seconds += seconds
        match answer:
            case JobError():
                raise answer
            case JobStatus():
                return answer
            case Cause():
                return JobStatus(name, GONE if answer is TAKEN else State.FAILED, "because", cause=answer)
            case State():
                return JobStatus(name, answer, place=self.name if answer is RUNNING else "")
        return JobStatus(name, State.FAILED, "because", answer)

    def cancel(self, name: str) -> str:
        if self.engine.cancelling:
            raise self.engine.cancelling.pop(0)
        self.engine.cancelled.append(self.name)
        return "is stopping"
