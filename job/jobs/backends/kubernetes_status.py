"""From what Kubernetes holds about a job and its pods to how it is going, in words a person can act on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from job.exits import TABLE, Exit, retried
from job.jobs.backends.base import Cause, JobStatus, Manifest, State, severity
from job.jobs.backends.kubernetes_manifests import CONTAINER
from job.jobs.backends.kubernetes_rules import QUEUE_LABEL

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
"""Why a container waits that will not start before somebody mends its image or the right to pull it."""
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
_OUT_OF_TIME = "DeadlineExceeded"
_BEGINNING = ("ContainerCreating", "PodInitializing")


def status_of(
    job: Manifest, pods: Sequence[Manifest], events: Sequence[Manifest] = (), parts: Sequence[Manifest] = ()
) -> JobStatus:
    """How a Job or a JobSet is going.

    Args:
        job: the object, as the API gives it.
        pods: its pods, oldest first.
        events: what was said about it, oldest first; asked only while it has no pods, or is suspended.
        parts: the Jobs of a JobSet; asked only when that is over.
    """
    state, message = _state_and_message(job, pods, events)
    running = next((pod for pod in reversed(pods) if is_running(pod)), None)
    return JobStatus(
        name=job["metadata"]["name"],
        state=state,
        message=message,
        exit_code=_exit_code(state, pods),
        attempts=_attempts(job, pods),
        created=job["metadata"].get("creationTimestamp", ""),
        place=(running or {}).get("spec", {}).get("nodeName", ""),
        cause=_cause(state, job, pods, events, parts),
        has_machine=state is State.WAITING and any(not has_ended(pod) and "nodeName" in pod["spec"] for pod in pods),
    )


def is_over(job: Manifest) -> bool:
    """Whether it has ended for good."""
    return _condition(job, "Complete", "Completed", "Failed") is not None


def is_suspended(job: Manifest) -> bool:
    """Whether it waits for somebody, such as a queue, to let it begin or go on."""
    return _condition(job, "Suspended") is not None or bool(job["spec"].get("suspend"))


def is_being_deleted(job: Manifest) -> bool:
    """Whether it only waits for its pods to end."""
    return bool(job["metadata"].get("deletionTimestamp"))


def is_running(pod: Manifest) -> bool:
    """Whether the program runs in it."""
    return "running" in _container_state(pod)


def termination(pod: Manifest) -> dict[str, Any] | None:
    """How the program ended (`exitCode`, `reason`, `message`, `finishedAt`); None while it has not."""
    ended: dict[str, Any] | None = _container_state(pod).get("terminated")
    return ended


def has_ended(pod: Manifest) -> bool:
    """Whether nothing more comes from it."""
    return termination(pod) is not None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def index_of(pod: Manifest) -> int:
    """The node or slice that a pod is."""
    return int(pod["metadata"].get("annotations", {}).get(INDEX_ANNOTATION) or 0)


def _state_and_message(job: Manifest, pods: Sequence[Manifest], events: Sequence[Manifest]) -> tuple[State, str]:
    if is_being_deleted(job):
        return State.CANCELLED, "is being deleted: its pods may save first"
    if _condition(job, "Complete", "Completed") is not None:
        return State.FINISHED, ""
    if (failed := _condition(job, "Failed")) is not None:
        return State.FAILED, _why_failed(failed, pods)
    if is_suspended(job):
        if _queue_ended_it(events):
            name = job["metadata"]["name"]
            return State.WAITING, f"its --max-hours are over: after `ddpm jobs cancel {name}` the same command goes on"
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
        why = f"waits in the queue {queue!r}" if queue else "is suspended"
        said = (_condition(job, "Suspended") or {}).get("message", "")
        return State.WAITING, f"{why}: {said}" if said else why
    living = [pod for pod in pods if not has_ended(pod)]
    if any(is_running(pod) for pod in living):
        return State.RUNNING, _how_running(living, pods)
    if living:
        return State.WAITING, _why_waiting(next(filter(_lacks_image, living), living[-1]))
    warnings = [event for event in events if event.get("type") == "Warning"]
    if warnings and not pods:
        return State.WAITING, f"{warnings[-1].get('reason')}: {warnings[-1].get('message')}"
    if pods:
        return State.WAITING, f"the next attempt follows; the last one: {_how_ended(pods[-1])}"
    return State.WAITING, "has no pod yet"


def _condition(job: Manifest, *types: str) -> dict[str, Any] | None:
    for condition in job.get("status", {}).get("conditions") or []:
        if condition.get("type") in types and condition.get("status") == "True":
            found: dict[str, Any] = condition
            return found
    return None


def _container_state(pod: Manifest) -> dict[str, Any]:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if container.get("name") == CONTAINER:
            state: dict[str, Any] = container.get("state") or {}
            return state
    return {}


def _attempts(job: Manifest, pods: Sequence[Manifest]) -> int:
    status = job.get("status", {})
    if job.get("kind") == "JobSet":
        return int(status.get("restarts") or 0) + bool(pods)
    # Pods that are gone are in the counts; of those that wait for a node there may be one for each slice.
    ended = sum(int(status.get(field) or 0) for field in ("succeeded", "failed"))
    placed = [pod for pod in pods if "nodeName" in pod["spec"]]
    started = max(ended + sum(not has_ended(pod) for pod in placed), len(placed))
    return started + any("nodeName" not in pod["spec"] for pod in pods)


def _exit_code(state: State, pods: Sequence[Manifest]) -> int | None:
    if state is State.FINISHED:
        return int(Exit.FINISHED)
    ended = _decisive_end(pods) if state is State.FAILED else _last_ended(pods)
    return None if ended is None else int(ended["exitCode"])


def _cause(
    state: State, job: Manifest, pods: Sequence[Manifest], events: Sequence[Manifest], parts: Sequence[Manifest]
) -> Cause | None:
    # A JobSet says only that one of its Jobs failed.
    reasons = {(_condition(one, "Failed") or {}).get("reason") for one in (job, *parts)}
    if state is State.FAILED and _OUT_OF_TIME in reasons:
        return Cause.OUT_OF_TIME
    if state is State.WAITING and is_suspended(job) and _queue_ended_it(events):
        return Cause.OUT_OF_TIME
    if state is State.WAITING and any(_lacks_image(pod) for pod in pods if not has_ended(pod)):
        return Cause.NO_IMAGE
    return None


def _queue_ended_it(events: Sequence[Manifest]) -> bool:
    """Whether Kueue stopped it for good, for `max-exec-time-seconds`; the Job itself only says that it is suspended.

    See pkg/controller/jobframework/reconciler.go of Kueue, which passes the workload's reason on as an event.
    """
    stops = [event.get("message", "") for event in events if event.get("reason") in ("Stopped", "Started")]
    return bool(stops) and "maximum execution time" in stops[-1]


def _lacks_image(pod: Manifest) -> bool:
    return (_container_state(pod).get("waiting") or {}).get("reason") in IMAGE_REASONS


def _failures(pods: Sequence[Manifest]) -> list[dict[str, Any]]:
    """How the programs ended that did not finish, oldest first."""
    ends = [end for pod in pods if (end := termination(pod)) is not None and end.get("exitCode") != Exit.FINISHED]
    return sorted(ends, key=lambda end: end.get("finishedAt") or "")


def _last_ended(pods: Sequence[Manifest]) -> dict[str, Any] | None:
    return next(reversed(_failures(pods)), None)


def _decisive_end(pods: Sequence[Manifest]) -> dict[str, Any] | None:
    """What made a job fail: of a group, the others are stopped, and end with 75, after one ended for good."""
    return max(reversed(_failures(pods)), key=lambda end: severity(retried(int(end["exitCode"]))), default=None)


def _why_failed(condition: dict[str, Any], pods: Sequence[Manifest]) -> str:
    reason, said = condition.get("reason", ""), " ".join(str(condition.get("message", "")).split())
    if reason == _OUT_OF_TIME:
        return f"{_OUT_OF_TIME}: its --max-hours are over, what it waited for a node included; the same command goes on"
    ended = _decisive_end(pods)
    if ended is None:
        return f"{reason}: {said}"
    return f"{_told(ended)} ({reason}: {said})" if reason != "PodFailurePolicy" else f"{_told(ended)} ({reason})"


def _how_ended(pod: Manifest) -> str:
    ended = termination(pod)
    if ended is None:
        return str(pod.get("status", {}).get("reason") or "its node is gone")
    return _told(ended)


def _told(ended: dict[str, Any]) -> str:
    """`exit code 78 (the configuration is not valid …): its last line`."""
    code = int(ended["exitCode"])
    meaning = TABLE[Exit(code)].text if code in TABLE else "a signal" if code > 128 else "a crash"
    if ended.get("reason") == "OOMKilled":
        meaning = "OOMKilled: `memory:` of the target is too little"
    lines = [line for line in str(ended.get("message") or "").splitlines() if line.strip()]
    return f"exit code {code} ({meaning})" + (f": {lines[-1].strip()}" if lines else "")


def _how_running(living: Sequence[Manifest], pods: Sequence[Manifest]) -> str:
    ready = sum(is_running(pod) for pod in living)
    parts = [f"{ready} of {len(living)} pods run"] if ready < len(living) else []
    # What one pod of several waits for holds all of them up.
    parts += [_why_waiting(pod) for pod in living if not is_running(pod)][:1]
    before = [pod for pod in pods if has_ended(pod) and (end := termination(pod)) is not None and end["exitCode"]]
    if before:
        parts.append(f"an attempt before: {_how_ended(before[-1])}")
    return "; ".join(parts)


def _why_waiting(pod: Manifest) -> str:
    waiting = _container_state(pod).get("waiting") or {}
    reason, said = waiting.get("reason", ""), " ".join(str(waiting.get("message") or "").split())
    if reason in IMAGE_REASONS:
        image = next((c["image"] for c in pod["spec"]["containers"] if c.get("name") == CONTAINER), "")
        return f"{reason}: {said or image}; is the image {image} there, and may the cluster's nodes pull it?"
    if reason in _BEGINNING:
        return f"{reason} on {pod['spec'].get('nodeName', 'a node')}: its image is fetched"
    if reason:
        return f"{reason}: {said}" if said else str(reason)
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"FailedScheduling: {' '.join(str(condition.get('message', '')).split())}"
    return "waits for a node"
