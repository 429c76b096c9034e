"""For how long a job may run, and so cost: engines bound that each in their own way. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget, KubernetesTarget, Target


@dataclass(frozen=True)
class Limit:
    """What `max_hours` of a job means where it runs."""

    attempts: int | None
    """How often its hours may pass; None where nothing bounds that."""
    text: str
    """For a person, beginning with the hours."""


def limit_of(spec: JobSpec, target: Target, *, is_watched: bool = False) -> Limit:
    """The limit of `spec` on `target`; with `is_watched` that of all that `--watch` submits, together."""
    hours = f"{spec.max_hours:g} hours"
    again = "; what --watch submits again has what is left of them" if is_watched else ""
    if not target.is_remote:
        return Limit(None, f"{hours} if --max-hours says so, and then the job ends itself: there is no engine to do it")
    if isinstance(target, BatchTarget):
        attempts = 1 + MAX_RETRIES
        how = f"for each attempt of a task, of which there may be {attempts}, then Batch ends it"
        return Limit(attempts, f"{hours} {how}{again}")
    if isinstance(target, KubernetesTarget):
        what = "waiting for nodes included" if spec.machines > 1 else "waiting for a node included"
        if target.queue:
            return Limit(1, f"{hours} for all attempts together, {what}, then its queue stops it for good{again}")
        if spec.nodes > 1:
            how = f"from each start of the group, {what}, then Kubernetes ends it; preemptions start it without bound"
            return Limit(None, f"{hours} {how}{again}")
        return Limit(1, f"{hours} for all attempts together, {what}, then Kubernetes ends it{again}")
    return Limit(1, f"{hours} for all attempts together, then the engine ends it{again}")
