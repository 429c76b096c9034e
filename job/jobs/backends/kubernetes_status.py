"""The status of a job from the objects of Kubernetes about it and its pods, in words a person can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from job.exits import Exit, Restart, State, meaning, restart_after
from job.jobs.backends.base import BEFORE, Cause, JobStatus, JsonObject, failed_slices, joined
from job.jobs.backends.kubernetes_manifests import CONTAINER, INDEX_ANNOTATION, QUEUE_LABEL
from job.jobs.spec import RETRIES

NO_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
"""The reasons of a container that waits until a person corrects its image or the right to pull it."""
_OUT_OF_TIME, _QUEUE_HOURS_OVER = "DeadlineExceeded", "maximum execution time"
"""The words of a Job, and of Kueue, about hours that are over."""
_HOURS_OVER = "its --max-hours are over, including the wait for a node; the same command goes on"
_STUCK_AFTER = timedelta(seconds=30)
"""The time after its grace period in which a node that lives removes a pod that was deleted."""
_LONGEST_REASON = 200
"""In characters, of a queue's message: it lists every flavor, and the cause is at its end."""


def observed_status(
    job: JsonObject,
    pods: Sequence[JsonObject],
    events: Sequence[JsonObject] = (),
    others: Sequence[JsonObject] = (),
) -> JobStatus:
    """Returns the status of a Job or a JobSet.

    Args:
        job: the object, as the API returns it.
        pods: its pods, oldest first.
        events: about it, oldest first; needed only while it has no pods, or is suspended.
        others: the Jobs of a JobSet that is over; the Workload of a job that a queue holds, if it may be read.
    """
    state, message, cause = _state_and_cause(job, pods, events, others)
    if state not in (State.FINISHED, State.CANCELLED) and (numbers := job.get("status", {}).get("failedIndexes")):
        message = joined(failed_slices(numbers), message)
    placed = [pod for pod in pods if _node_of(pod) and not has_ended(pod)]
    running = [pod for pod in placed if is_running(pod)]
    ended = _decisive_end(pods) if state is State.FAILED else next(reversed(_failures(pods)), None)
    status = JobStatus(
        name=job["metadata"]["name"],
        state=state,
        message=message,
        exit_code=int(Exit.FINISHED) if state is State.FINISHED else int(ended["exitCode"]) if ended else None,
        attempts=_attempts(job, pods),
        created=job["metadata"].get("creationTimestamp", ""),
        place=_node_of(running[-1]) if running else "",
        cause=cause,
        has_machine=state is State.WAITING and bool(placed),
    )
    gave_up = state is State.FAILED and status.restart is Restart.BOUNDED
    spec = {**job.get("spec", {}), **job.get("spec", {}).get("failurePolicy", {})}
    limit = spec.get("maxRestarts", spec.get("backoffLimitPerIndex", spec.get("backoffLimit", RETRIES)))
    return replace(status, failures=limit + 1 if gave_up else _counted(job, pods))


def is_over(job: JsonObject) -> bool:
    """Returns whether it has ended for good."""
    return bool(_condition(job, "Complete", "Completed", "Failed"))


def is_suspended(job: JsonObject) -> bool:
    """Returns whether it waits until a queue or a person lets it begin or go on."""
    return bool(_condition(job, "Suspended") or job["spec"].get("suspend"))


def is_being_deleted(job: JsonObject) -> bool:
    """Returns whether it only waits for its pods to end."""
    return bool(job["metadata"].get("deletionTimestamp"))


def is_running(pod: JsonObject) -> bool:
    """Returns whether the program runs in it."""
    return _container_state(pod, "running") is not None


def has_ended(pod: JsonObject) -> bool:
    """Returns whether its output is complete."""
    return _end_of(pod) is not None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def index_of(pod: JsonObject) -> int:
    """Returns the number of the node or the slice that a pod is."""
    return int(pod["metadata"].get("annotations", {}).get(INDEX_ANNOTATION) or 0)


def _state_and_cause(
    job: JsonObject, pods: Sequence[JsonObject], events: Sequence[JsonObject], others: Sequence[JsonObject]
) -> tuple[State, str, Cause | None]:
    """Returns state, message and cause."""
    living = [pod for pod in pods if not has_ended(pod)]
    stuck = next(filter(None, map(_dead_node, living)), "")
    if is_being_deleted(job):
        return State.CANCELLED, stuck or "is being deleted: its pods may save first", Cause.STUCK if stuck else None
    if _condition(job, "Complete", "Completed"):
        return State.FINISHED, "", None
    if failed := _condition(job, "Failed"):
        # A JobSet shows only that one of its Jobs failed.
        if any(_condition(one, "Failed").get("reason") == _OUT_OF_TIME for one in (job, *others)):
            return State.FAILED, f"{_OUT_OF_TIME}: {_HOURS_OVER}", Cause.OUT_OF_TIME
        return State.FAILED, _why_failed(failed, pods), None
    if is_suspended(job):
        return _why_suspended(job, events, next(iter(others), {}))
    # Slices do not wait for each other.
    others = [pod for pod in living if not _dead_node(pod)] if job["spec"].get("completions", 1) > 1 else []
    if stuck and not any(map(is_running, others)):
        return State.WAITING, stuck, Cause.STUCK
    if any(map(is_running, living)):
        return State.RUNNING, joined(stuck, _how_running(living, pods)), None
    if living:
        without_image = [pod for pod in living if _waiting_reason(pod) in NO_IMAGE_REASONS]
        why = _why_waiting((without_image or living[-1:])[0])
        return State.WAITING, why, Cause.NO_IMAGE if without_image else None
    if pods:
        ended = _end_of(pods[-1])
        lost = pods[-1].get("status", {}).get("reason") or "its node is gone"
        how = f"{BEFORE}ended with {_end_in_words(ended)}" if ended else f"the last one: {lost}"
        return State.WAITING, f"the next attempt follows; {how}", None
    warnings = [f"{event.get('reason')}: {event.get('message')}" for event in events if event.get("type") == "Warning"]
    return State.WAITING, warnings[-1] if warnings else "waits for a pod", None


def _why_suspended(
    job: JsonObject, events: Sequence[JsonObject], workload: JsonObject
) -> tuple[State, str, Cause | None]:
    """Returns state, message and cause of a job that a queue or a person holds."""
    queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    is_deactivated = workload.get("spec", {}).get("active") is False
    eviction = _condition(workload, "Evicted")
    evicted = _tail_of(eviction.get("message"))
    if _queue_ended_it(events) or (is_deactivated and _QUEUE_HOURS_OVER in evicted):
        return State.FAILED, _HOURS_OVER, Cause.OUT_OF_TIME
    if is_deactivated:
        why = f"its queue {queue!r} lets it run no more: {evicted or 'a person deactivated it'}"
        return State.CANCELLED, f"{why}; the same command submits it again", None
    pending = _condition(workload, "QuotaReserved", status="False")
    reason = ": ".join(filter(None, (pending.get("reason"), _tail_of(pending.get("message")))))
    if _exceeds_quota(pending.get("message", "")):
        reason += "; it can never run so: ask for less, or for more quota"
    reason = reason or _condition(job, "Suspended").get("message", "")
    why = f"waits in the queue {queue!r}" if queue else "is suspended"
    if eviction.get("reason") == "Preempted":
        why = f"was preempted ({evicted}), and {why} again"
    return State.WAITING, f"{why}: {reason}" if reason else why, None


def _exceeds_quota(reasons: str) -> bool:
    """Returns whether a job fits into no flavor of its queue, even into an empty one.

    See pkg/scheduler/flavorassigner of Kueue, which names the first resource of each flavor that does not fit.
    """
    flavors = re.findall(r"insufficient (unused )?quota for \S+ in flavor ([^\s,]+)", reasons)
    never = {flavor for is_short, flavor in flavors if not is_short}
    return "> maximum capacity" in reasons and {flavor for _, flavor in flavors} == never and "topology" not in reasons


def _dead_node(pod: JsonObject) -> str:
    """Returns what to do about a pod that was deleted and does not go; empty if it may still end, or was not.

    A Job replaces pods that failed (`podReplacementPolicy`), as PodGC reports those of a node that is gone. A pod whose
    deletion is forced does not fail.
    """
    gone_at, node = pod["metadata"].get("deletionTimestamp"), _node_of(pod)
    if not gone_at or datetime.fromisoformat(gone_at) + _STUCK_AFTER > datetime.now(UTC):
        return ""
    late = f"pod {pod['metadata']['name']} should have ended by {gone_at}, and no other follows before"
    return f"node {node} does not answer: {late}; if the machine is dead, `kubectl delete node {node}`"


def _condition(thing: JsonObject, *types: str, status: str = "True") -> JsonObject:
    """Returns the condition of one of these types that has this status; empty if it is missing."""
    conditions = thing.get("status", {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") in types and one.get("status") == status), {})


def _container_state(pod: JsonObject, kind: str) -> Any:
    """Returns the state `waiting`, `running` or `terminated` of the program in a pod; None if it has another one."""
    containers = pod.get("status", {}).get("containerStatuses") or []
    return next((one.get("state") or {} for one in containers if one.get("name") == CONTAINER), {}).get(kind)


def _waiting_reason(pod: JsonObject) -> str:
    return str((_container_state(pod, "waiting") or {}).get("reason", ""))


def _end_of(pod: JsonObject) -> Any:
    """Returns the end of the program (`exitCode`, `reason`, `message`, `finishedAt`); None before it."""
    return _container_state(pod, "terminated")


def _node_of(pod: JsonObject) -> str:
    return str(pod["spec"].get("nodeName", ""))


def _attempts(job: JsonObject, pods: Sequence[JsonObject]) -> int:
    status = job.get("status", {})
    if job.get("kind") == "JobSet":
        # A pod that stopped by itself is replaced without a restart.
        indexes = [index_of(pod) for pod in pods]
        return int(status.get("restarts") or 0) + max(map(indexes.count, indexes), default=0)
    # The counts include pods that are gone; one pod for each slice may wait for a node.
    ended = sum(int(status.get(field) or 0) for field in ("succeeded", "failed"))
    placed = [pod for pod in pods if _node_of(pod)]
    started = max(ended + sum(not has_ended(pod) for pod in placed), len(placed))
    return started + (len(placed) < len(pods))


def _counted(job: JsonObject, pods: Sequence[JsonObject]) -> int:
    """Returns the number of a job's failures that count: the restarts of a group, or those of the worst slice."""
    ends = [(index_of(pod), _end_of(pod)) for pod in pods]
    counted = [
        index for index, end in ends if end is not None and restart_after(int(end["exitCode"])) is Restart.BOUNDED
    ]
    restarts = int(job.get("status", {}).get("restartsCountTowardsMax") or 0)
    return max([restarts, *map(counted.count, counted)])


def _queue_ended_it(events: Sequence[JsonObject]) -> bool:
    """Returns whether Kueue stopped it for `max-exec-time-seconds`; the Job itself shows only that it is suspended.

    See pkg/controller/jobframework/reconciler.go of Kueue, which copies the workload's reason into an event.
    """
    stops = [event.get("message", "") for event in events if event.get("reason") in ("Stopped", "Started")]
    return bool(stops) and _QUEUE_HOURS_OVER in stops[-1]


def _failures(pods: Sequence[JsonObject]) -> list[JsonObject]:
    """Returns the ends of the programs that did not finish, oldest first."""
    ends = [end for pod in pods if (end := _end_of(pod)) is not None and end.get("exitCode") != Exit.FINISHED]
    return sorted(ends, key=lambda end: end.get("finishedAt") or "")


def _decisive_end(pods: Sequence[JsonObject]) -> JsonObject | None:
    """Returns the end that made a job fail: after a fatal one the others of a group are stopped, and end with 75."""
    return max(reversed(_failures(pods)), key=lambda end: restart_after(int(end["exitCode"])), default=None)


def _why_failed(condition: JsonObject, pods: Sequence[JsonObject]) -> str:
    reason, ended = condition.get("reason", ""), _decisive_end(pods)
    why = reason if ended and reason == "PodFailurePolicy" else f"{reason}: {condition.get('message', '')}"
    return f"{_end_in_words(ended)} ({why})" if ended else why


def _end_in_words(ended: JsonObject) -> str:
    """Returns `exit code 78 (an invalid configuration …): its last line`."""
    code, is_memory = int(ended["exitCode"]), ended.get("reason") == "OOMKilled"
    how = "OOMKilled: `memory:` of the target is too little" if is_memory else meaning(code)
    lines = [line for line in str(ended.get("message") or "").splitlines() if line.strip()]
    return f"exit code {code} ({how})" + (f": {lines[-1].strip()}" if lines else "")


def _how_running(living: Sequence[JsonObject], pods: Sequence[JsonObject]) -> str:
    waiting, parts = [pod for pod in living if not is_running(pod)], []
    if waiting:
        # One pod of several that waits holds all of them up.
        parts = [f"{len(living) - len(waiting)} of {len(living)} pods run", _why_waiting(waiting[0])]
    if failures := _failures(pods):
        parts.append(f"an attempt before: {_end_in_words(failures[-1])}")
    return "; ".join(parts)


def _why_waiting(pod: JsonObject) -> str:
    reason, message = _waiting_reason(pod), (_container_state(pod, "waiting") or {}).get("message")
    if reason in NO_IMAGE_REASONS:
        image = pod["spec"]["containers"][0]["image"]
        return f"{reason}: {message or image}; is the image {image} there, and may the cluster's nodes pull it?"
    if reason in ("ContainerCreating", "PodInitializing"):
        return f"{reason} on {_node_of(pod) or 'a node'}: its image is fetched"
    if reason:
        return f"{reason}: {message}" if message else reason
    unscheduled = _condition(pod, "PodScheduled", status="False")
    return f"FailedScheduling: {unscheduled.get('message', '')}" if unscheduled else "waits for a node"


def _tail_of(text: object) -> str:
    """Returns a text in a line, without its beginning if it is long."""
    line = " ".join(str(text or "").split())
    return line if len(line) <= _LONGEST_REASON else f"… {line[-_LONGEST_REASON:].partition(' ')[2]}"
