"""An engine whose answers are written down beforehand, and a clock that only they move; for `--watch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from job.exits import JobError
from job.jobs.backends.base import Backend, Cause, JobStatus, Manifest, NoCapacityError, State
from job.jobs.spec import JobSpec
from job.jobs.targets import parse_targets
from job.jobs.watch import Watch
from job.outcome import Outcome

VM = parse_targets("vm: {backend: vm, project: my-project, zones: [us-east1-b], image: i}", "f")["vm"]
SPEC = JobSpec("train-a", "train", ("train", "--dataset", "a"), "i", "gs://bucket", run="a", max_hours=2.0)

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
"""When the clock begins."""
W, R, F, C, G = State.WAITING, State.RUNNING, State.FINISHED, State.CANCELLED, State.GONE
TAKEN = Cause.TAKEN_AWAY


@dataclass
class Engine:
    """What several places share: the answers to `status`, in order, and what was asked of them."""

    answers: list
    """A state, an exit code or a cause of a failed job, a pair of state and seconds that pass first, a status, or an
    error; a machine that was taken away is gone."""
    full: dict[str, int] = field(default_factory=dict)
    """How often each place has no machine."""
    now: float = 0.0
    told: list[str] = field(default_factory=list)
    submitted: list[tuple[str, float]] = field(default_factory=list)
    """Where, and for how many hours."""
    submitted_at: list[float] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    # The clock.
    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > 30 * 86400

    def clock(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return NOON + timedelta(seconds=self.now)


class Place(Backend):
    """One of the places of an engine."""

    def __init__(self, engine: Engine, places: tuple[str, ...]) -> None:
        super().__init__(VM)
        self.engine, self.name, self.rest = engine, places[0], places[1:]

    def elsewhere(self) -> Backend | None:
        return Place(self.engine, self.rest) if self.rest else None

    def render(self, spec: JobSpec) -> list[Manifest]:
        return [{}]

    def submit(self, spec: JobSpec) -> None:
        if self.engine.full.get(self.name, 0) > 0:
            self.engine.full[self.name] -= 1
            raise NoCapacityError(f"{self.name} has no machine")
        self.engine.submitted.append((self.name, spec.max_hours))
        self.engine.submitted_at.append(self.engine.now)

    def status(self, name: str) -> JobStatus:
        answer = self.engine.answers.pop(0)
        if isinstance(answer, tuple):
            answer, seconds = answer
            self.engine.now += seconds
        if isinstance(answer, JobError):
            raise answer
        if isinstance(answer, JobStatus):
            return answer
        if isinstance(answer, Cause):
            state = State.GONE if answer is TAKEN else State.FAILED
            return JobStatus(name, state, "because", cause=answer)
        if isinstance(answer, State):
            return JobStatus(name, answer, place=self.name if answer is R else "")
        return JobStatus(name, State.FAILED, "because", answer)

    def jobs(self) -> list[JobStatus]:
        return []

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        yield from ()

    def cancel(self, name: str) -> str:
        self.engine.cancelled.append(self.name)
        return "was told to stop"

    def describe(self, name: str) -> Manifest:
        return {}


class EnginesClock:
    def __init__(self, engine: Engine) -> None:
        self.now, self.utc, self.wait = engine.clock, engine.utc, engine.wait


def watching(engine: Engine, *places: str, spec: JobSpec = SPEC, outcome: Callable[[], Outcome | None] = lambda: None):
    return Watch(Place(engine, places or ("a",)), spec, EnginesClock(engine), engine.told.append, outcome)


class Keeping(Place):
    """Of an engine that forgets no job for a day."""

    keeps_seconds = 86_400.0
