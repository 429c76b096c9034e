"""Jobs on a Kubernetes cluster: `kubernetes_manifests` renders them, and the official client sends them.

`observed` tells from the objects about a job whether it lives, in the cluster's own words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import dropwhile
from typing import Any

from job.exits import (
    BadRequestError,
    BucketAwayError,
    Exit,
    MissingInputError,
    NoPermissionError,
    Restart,
    State,
    restart_after,
)
from job.jobs.backends import kubernetes_api
from job.jobs.backends.base import Backend, Cause, Check, JobStatus, JsonObject, Target, failed_slices, joined
from job.jobs.backends.kubernetes_manifests import CONTAINER, INDEX_ANNOTATION, QUEUE_LABEL, KubernetesTarget, manifest
from job.jobs.spec import LABEL_PREFIX, RETRIES, JobSpec

GONE_MARGIN_SECONDS = 45.0
"""The time that a deleted job may take to go, beyond the grace period of its pods."""
GONE_POLL_SECONDS = 0.5
PODS_POLL_SECONDS = 1.0
"""Between two requests for new lines of a job that is followed."""
LOG_OVERLAP_SECONDS = 60
"""Requested again, because older lines may arrive late."""
JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the Jobs that a JobSet makes."""
_RELEASE = "https://github.com/kubernetes-sigs/{}/releases/latest/download/manifests.yaml"
_INSTALL = f"kubectl apply --server-side -f {_RELEASE}"
_VERBS = ("create", "get", "list", "delete")
_CHECKED_RIGHTS = (*((verb, "batch", "jobs") for verb in _VERBS), ("list", "", "pods"), ("get", "", "pods", "log"))
NO_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
"""The reasons of a container that waits until a person corrects its image or the right to pull it."""
_OUT_OF_TIME, _QUEUE_HOURS_OVER = "DeadlineExceeded", "maximum execution time"
"""The words of a Job, and of Kueue, about hours that are over."""
_HOURS_OVER = "its --max-hours are over, including the wait for a node; the same command goes on"
_STUCK_AFTER = timedelta(seconds=30)
"""The time after its grace period in which a node that lives removes a pod that was deleted."""
_Found = list[tuple[kubernetes_api.Kind, JsonObject]]


class KubernetesBackend(Backend):
    """One namespace of a cluster. A job of one machine is a Job, one of several nodes a JobSet; a name is one job."""

    extra = "kubernetes"
    keeps_ended = True
    target: KubernetesTarget

    def __init__(self, target: Target) -> None:
        """Sends no request yet."""
        super().__init__(target)
        self._api = kubernetes_api.ClusterApi(self.target)
        self._where = f"in namespace {self.target.namespace!r}"

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns a Job, or a JobSet for several nodes, which `kubectl apply -f` takes as well."""
        return [manifest(spec, self.target)]

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`; a job of that name that is over makes room."""
        (made,) = self.render(spec)
        kind = kubernetes_api.KINDS[made["kind"]]
        if spec.nodes > 1 and not self._api.knows(kind):
            raise MissingInputError(f"--nodes {spec.nodes} needs JobSets in the cluster: {_INSTALL.format('jobset')}")
        with suppress(NoPermissionError):
            # Credentials for jobs need not read queues.
            self._look_for_queue()
        for there, old in self.find(spec.name):
            if not self._observed(old, self._api.pods(f"ddpm-job={spec.name}")).state.is_over:
                raise self.runs_already(spec.name, self._where)
            self._api.delete(there, spec.name, old["metadata"]["uid"])
            self._wait_until_gone(there, spec.name)
        try:
            self._api.create(kind, made)
        except kubernetes_api.ObjectConflictError:
            # Another person was faster, or the first answer of several was lost.
            raise self.runs_already(spec.name, self._where) from None

    def find(self, name: str) -> _Found:
        """Returns the objects of this name, with their kinds."""
        found = [(kind, self._api.get(kind, name)) for kind in kubernetes_api.KINDS.values()]
        return [(kind, job) for kind, job in found if job is not None]

    def alive(self, name: str) -> JobStatus:
        """See `Backend.alive`; a job is gone when it was deleted, or a day after its end."""
        return self._look(name)[0]

    def jobs(self) -> list[JobStatus]:
        """Returns all jobs with this program's label."""
        selector = f"app={LABEL_PREFIX}"
        pods: dict[str, list[JsonObject]] = {}
        for pod in self._api.pods(selector):
            pods.setdefault(pod["metadata"]["labels"].get("ddpm-job", ""), []).append(pod)
        jobs = [job for kind in kubernetes_api.KINDS.values() for job in self._api.all_with(kind, selector)]
        return [self._observed(job, pods.get(job["metadata"]["name"], [])) for job in jobs]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: two contexts may be one cluster."""
        return ("kubernetes", self._api.host, self.target.namespace, status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """Yields the lines of all its pods, also of replaced ones, with the index before each if there are several.

        Raises:
            MissingInputError: it has no output, or its image cannot be pulled, so that none will come.
        """
        spec = self.known(name)[0][1]["spec"]
        for part in spec.get("replicatedJobs", []):
            spec = part["template"]["spec"]
        # By pod, the time of the last line that was read.
        last: dict[str, str] = {}
        while True:
            status, pods = self._look(name)
            # The pods of a cancelled job still save.
            is_last = not follow or (status.state.is_over and all(map(has_ended, pods)))
            for pod in pods:
                uid = pod["metadata"]["uid"]
                number = f"[{index_of(pod)}] " if spec["completions"] > 1 else ""
                for line in self._new_lines(pod, last.get(uid, "")):
                    last[uid], _, text = line.partition(" ")
                    yield number + text
            if is_last and last:
                return
            if is_last:
                raise MissingInputError(f"{name} has no output, or it is gone with its node: see its run's folder")
            if status.cause in (Cause.NO_IMAGE, Cause.STUCK):
                raise MissingInputError(f"{name} prints nothing: {status.message}")
            time.sleep(PODS_POLL_SECONDS)

    def _new_lines(self, pod: JsonObject, last: str) -> Iterator[str]:
        """Yields a pod's lines after the time `last`, or all if that is empty."""
        since = {}
        if last:
            # The reader may have paused for long.
            age_seconds = time.time() - datetime.fromisoformat(last).timestamp()
            since = {"since_seconds": max(int(age_seconds), 0) + LOG_OVERLAP_SECONDS}
        # One pod has not begun, or its output is gone with its node; the others' is not.
        with suppress(kubernetes_api.NoSuchObjectError, BadRequestError, BucketAwayError):
            # A time may have lost the zeros at its end.
            lines = self._api.log(pod["metadata"]["name"], **since)
            return dropwhile(lambda line: line.partition(" ")[0].rstrip("Z") <= last.rstrip("Z"), lines)
        return iter(())

    def cancel(self, name: str) -> str:
        """Deletes it: its pods get SIGTERM and their grace period, in which they save."""
        status, found = self.alive(name), self.known(name)
        for kind, there in found:
            self._api.delete(kind, name, there["metadata"]["uid"])
        if is_being_deleted(found[0][1]):
            return status.message
        return self.effect_of_cancelling(status.state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Backend.checks`: rights, account, queue and image, or the cluster alone if it does not answer."""
        self._api.is_hurried = True
        yield (cluster := Check.of("cluster", self._look_at_rights))
        if cluster.passed:
            yield Check.unless_hidden("service account", self._look_for_account)
            yield Check.unless_hidden("queue", self._look_for_queue)
            yield Check.unless_hidden("JobSets", self._look_for_job_sets)
            yield Check.of_image(self.target.image)

    def _look(self, name: str) -> tuple[JobStatus, list[JsonObject]]:
        """Returns the status of a job, and its pods."""
        if not (found := self.find(name)):
            return JobStatus(name, State.GONE, f"no job {name!r} {self._where}"), []
        pods = self._api.pods(f"ddpm-job={name}")
        return self._observed(found[0][1], pods), pods

    def _observed(self, job: JsonObject, pods: list[JsonObject]) -> JobStatus:
        """Returns the status of a job, from other objects as well if its own does not show enough."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        events, others = [], []
        if is_over(job):
            if job.get("kind") == "JobSet":
                others = self._api.all_with(kubernetes_api.KINDS["Job"], f"{JOB_SET_LABEL}={name}")
        elif not pods or is_suspended(job):
            # A quota or a missing service account keeps the controller from making pods, and only events show it.
            events = [event for event in self._api.events(name) if event["involvedObject"].get("uid") == uid]
            of_job = f"{kubernetes_api.JOB_UID_LABEL}={uid}"
            others = next(filter(None, (self._api.all_with(kind, of_job) for kind in kubernetes_api.WORKLOADS)), [])
        return observed(job, pods, events, others)

    def _wait_until_gone(self, kind: kubernetes_api.Kind, name: str) -> None:
        until = time.monotonic() + self.target.grace_seconds + GONE_MARGIN_SECONDS
        while self._api.get(kind, name) is not None:
            if time.monotonic() > until:
                why = self.alive(name).message
                raise BadRequestError(f"the old job {name!r} {self._where} does not end: {why}")
            time.sleep(GONE_POLL_SECONDS)

    def _look_for_queue(self) -> str:
        """Returns that the target's queue exists: a missing one would hold a job for ever."""
        if not (queue := self.target.queue):
            return "none is set"
        if any(self._api.get(kind, queue) for kind in kubernetes_api.LOCAL_QUEUES):
            return f"{queue} is there"
        raise MissingInputError(
            f"no LocalQueue {queue!r} {self._where}: create it in Kueue ({_INSTALL.format('kueue')})"
        )

    def _look_at_rights(self) -> str:
        for verb, group, *resource in _CHECKED_RIGHTS:
            if not self._api.may(verb, group, *resource):
                what = f"{verb} {'/'.join(resource)} {self._where}"
                raise NoPermissionError(f"{self._api.host}: you may not {what}: ask for the role `edit` there")
        return f"{self._api.host} lets you create, follow and delete jobs {self._where}"

    def _look_for_job_sets(self) -> str:
        """Returns whether `--nodes` works, which no other job needs."""
        group, _, plural = kind = kubernetes_api.KINDS["JobSet"]
        if not self._api.knows(kind):
            return f"not installed, which --nodes needs: {_INSTALL.format('jobset')}"
        missing = [verb for verb in _VERBS if not self._api.may(verb, group, plural)]
        return f"you may not {', '.join(missing)} them, which --nodes needs" if missing else "--nodes works"

    def _look_for_account(self) -> str:
        name = self.target.service_account
        try:
            self._api.read("read_namespaced_service_account", name)
        except kubernetes_api.NoSuchObjectError:
            make = f"`kubectl -n {self.target.namespace} create serviceaccount {name}`"
            raise MissingInputError(f"no service account {name!r} {self._where}: {make}") from None
        return f"{name} is there"


def observed(
    job: JsonObject, pods: Sequence[JsonObject], events: Sequence[JsonObject] = (), others: Sequence[JsonObject] = ()
) -> JobStatus:
    """Returns whether a Job or a JobSet lives.

    Args:
        job: the object, as the API returns it.
        pods: its pods, oldest first.
        events: about it, oldest first; needed only while it has no pods, or is suspended.
        others: the Jobs of a JobSet that is over; the Workload of a job that a queue holds, if it may be read.
    """
    state, message, cause = _state_and_cause(job, pods, events, others)
    ends = sorted((end for pod in pods if (end := _end_of(pod)) and end["exitCode"]), key=_ended_at)
    # After a fatal end the other pods of a group are stopped, and end with 75.
    decisive = max(reversed(ends), key=_restart_of, default=None) if state is State.FAILED else [None, *ends][-1]
    if state not in (State.FINISHED, State.CANCELLED):
        failed = failed_slices(filter(None, [job.get("status", {}).get("failedIndexes")]))
        message = joined(failed, *_last_words(decisive, state is State.FAILED and cause is None), message)
    placed = [pod for pod in pods if _node_of(pod) and not has_ended(pod)]
    running = [pod for pod in placed if is_running(pod)]
    code = int(Exit.FINISHED) if state is State.FINISHED else int(decisive["exitCode"]) if decisive else None
    spec = {**job.get("spec", {}), **job.get("spec", {}).get("failurePolicy", {})}
    limit = spec.get("maxRestarts", spec.get("backoffLimitPerIndex", spec.get("backoffLimit", RETRIES)))
    gave_up = state is State.FAILED and cause is None and restart_after(code) is Restart.BOUNDED
    return JobStatus(
        name=job["metadata"]["name"],
        state=state,
        message=message,
        exit_code=code,
        failures=limit + 1 if gave_up else _counted(job, pods),
        created=job["metadata"].get("creationTimestamp", ""),
        place=_node_of(running[-1]) if running else "",
        cause=cause,
        has_machine=state is State.WAITING and bool(placed),
    )


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
        return State.FAILED, ": ".join(filter(None, (failed.get("reason"), failed.get("message")))), None
    if is_suspended(job):
        return _why_suspended(job, next(iter(others), {}))
    # Slices do not wait for each other.
    others = [pod for pod in living if not _dead_node(pod)] if job["spec"].get("completions", 1) > 1 else []
    if stuck and not any(map(is_running, others)):
        return State.WAITING, stuck, Cause.STUCK
    if any(map(is_running, living)):
        waiting = [pod for pod in living if not is_running(pod)]
        # One pod of several that waits holds all of them up.
        some = f"{len(living) - len(waiting)} of {len(living)} pods run" * bool(waiting)
        return State.RUNNING, joined(stuck, some, *map(_why_waiting, waiting[:1])), None
    if living:
        without_image = [pod for pod in living if _waiting_reason(pod) in NO_IMAGE_REASONS]
        why = _why_waiting((without_image or living[-1:])[0])
        return State.WAITING, why, Cause.NO_IMAGE if without_image else None
    if pods:
        lost = "" if _end_of(pods[-1]) else pods[-1].get("status", {}).get("reason") or "its node is gone"
        return State.WAITING, joined("the next attempt follows", lost), None
    warnings = [f"{event.get('reason')}: {event.get('message')}" for event in events if event.get("type") == "Warning"]
    return State.WAITING, warnings[-1] if warnings else "waits for a pod", None


def _why_suspended(job: JsonObject, workload: JsonObject) -> tuple[State, str, Cause | None]:
    """Returns state, message and cause of a job that a queue or a person holds."""
    queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    is_deactivated = workload.get("spec", {}).get("active") is False
    eviction = _condition(workload, "Evicted")
    evicted = str(eviction.get("message") or "")
    if is_deactivated and _QUEUE_HOURS_OVER in evicted:
        return State.FAILED, _HOURS_OVER, Cause.OUT_OF_TIME
    if is_deactivated:
        why = f"its queue {queue!r} lets it run no more: {evicted or 'a person deactivated it'}"
        return State.CANCELLED, f"{why}; the same command submits it again", None
    pending = _condition(workload, "QuotaReserved", status="False")
    reason = ": ".join(filter(None, (pending.get("reason"), pending.get("message"))))
    reason = reason or _condition(job, "Suspended").get("message", "")
    why = f"waits in the queue {queue!r}" if queue else "is suspended"
    if eviction.get("reason") == "Preempted":
        why = f"was preempted ({evicted}), and {why} again"
    return State.WAITING, f"{why}: {reason}" if reason else why, None


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


def _counted(job: JsonObject, pods: Sequence[JsonObject]) -> int:
    """Returns the number of a job's failures that count: the restarts of a group, or those of the worst slice."""
    ends = [(index_of(pod), _end_of(pod)) for pod in pods]
    counted = [index for index, end in ends if end and _restart_of(end) is Restart.BOUNDED]
    restarts = int(job.get("status", {}).get("restartsCountTowardsMax") or 0)
    return max([restarts, *map(counted.count, counted)])


def _ended_at(end: JsonObject) -> str:
    return end.get("finishedAt") or ""


def _restart_of(end: JsonObject) -> Restart:
    return restart_after(int(end["exitCode"]))


def _last_words(end: JsonObject | None, is_last: bool) -> list[str]:
    """Returns the last line of the program, which the status of its pod has; of an earlier attempt a lack of memory."""
    if end and end.get("reason") == "OOMKilled":
        return ["OOMKilled: `memory:` of the target is too little"]
    said = str(end.get("message") or "") if end and is_last else ""
    return [line.strip() for line in said.splitlines() if line.strip()][-1:]


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
