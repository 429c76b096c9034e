"""The objects of a job on Kubernetes, by pure functions: what is sent, and what is read of it later.

A Job is for one machine or for slices, a JobSet for several nodes.

The fields are those of batch/v1 (kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1) and of
jobset.x-k8s.io/v1alpha2 (jobset.sigs.k8s.io); what is retried follows the table of `job.exits`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import Field

from job.exits import BadRequestError, Exit, Restart, State, failures, restart_after
from job.jobs.backends import Cause, JobStatus, JsonObject, LabelValue, Name, Target, Text, failed_slices, joined
from job.jobs.machines import GKE_GPU_TYPES, Machine, gpus_of
from job.jobs.spec import IMAGE_USER, RETRIES, SCRATCH, JobSpec, scratch_variables
from job.stop import GRACE_VARIABLE

CONTAINER = "ddpm"
SHOWN_SECONDS = 86_400
"""The time for which Kubernetes keeps a job that is over, for its status and its output."""
NODE_JOB = "node"
"""The name of the one job in a JobSet, which has a pod for each node."""
MASTER_PORT = 29500
CAPACITY = "ddpm-capacity"
"""The label of the nodes that `infra/terraform` makes, and the taint of those without GPUs that stay."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_SECONDS_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
GPU_RESOURCE = "nvidia.com/gpu"
GPU_TYPE_LABEL, SPOT_LABEL = "cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"
CPUS_PER_GPU, GIBIBYTES_PER_GPU, SHARED_GIBIBYTES_PER_GPU = 4, 16, 2
"""The request on a node of unknown size; a job without GPUs requests as much as one with a single GPU."""
MOUNTS = {"dshm": "/dev/shm", "scratch": SCRATCH, "tmp": "/tmp"}  # noqa: S108 -- the container's own
TMPSIZE, OUTPUTSIZE = "8Gi", "2Gi"
"""For /tmp, and for the program's output, which counts as the container's disk, too."""

NO_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
"""The reasons of a container that waits until a person corrects its image or the right to pull it."""
_OUT_OF_TIME, _QUEUE_HOURS_OVER = "DeadlineExceeded", "maximum execution time"
"""The words of a Job, and of Kueue, about hours that are over."""
_HOURS_OVER = "its --max-hours are over, including the wait for a node; the same command goes on"
_STUCK_AFTER = timedelta(seconds=30)
"""The time after its grace period in which a node that lives removes a pod that was deleted."""

SIZE = r"^([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[kMGTPE])$"


_Size = Annotated[str, Field(pattern=SIZE)]
"""As Kubernetes writes it, such as `50Gi` or `1.5T`."""
_Queue = Annotated[str, Field(pattern=r"^([a-z0-9](-*[a-z0-9])*(\.[a-z0-9](-*[a-z0-9])*)*)?$", max_length=63)]


class KubernetesKeys(Target):
    """The keys of a target on a cluster, of which a job's objects are rendered."""

    backend: Literal["kubernetes"]
    context: Text = ""
    namespace: Name = "default"
    service_account: Name = "default"
    queue: _Queue = ""
    """Kueue's local queue; empty for none."""
    cluster: Literal["gke", "plain"] = "gke"
    """`gke` selects nodes and tolerates taints as GKE labels and taints them; `plain` does neither."""
    node_selector: dict[Text, LabelValue] | None = None
    """Replaces what `cluster` and the GPU type give."""
    tolerations: list[dict[Text, Text | int]] | None = None
    """Replace what `cluster` and `spot` give; the cluster refuses fields that it does not know."""
    grace_seconds: int = Field(15, ge=5, le=600)
    """From the notice to the end: 15 on GKE spot nodes unless the node pool gives more."""
    machine_type: LabelValue = ""
    """The type of the nodes with GPUs, if Compute Engine makes them: a job requests its GPUs' share of such a node."""
    region: LabelValue = ""
    """The region of those nodes, which decides about their price alone."""
    cpus: str = Field("", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)?$")
    """Empty: its share, or 4 for each GPU if `machine_type` is not set or the GPUs are others."""
    memory: _Size = ""
    """Empty: its share, or 16Gi for each GPU."""
    scratch: _Size = "50Gi"
    """The local disk for the cache of images."""
    shared_memory: _Size = ""
    """Part of `memory`; empty: 2Gi for each GPU."""

    @property
    def notice_seconds(self) -> float:
        """See `Target.notice_seconds`."""
        return self.grace_seconds

    @property
    def selects_machines(self) -> bool:
        """Returns whether the GPU type and `spot` decide about the node, and not the target's own selector."""
        return self.cluster == "gke" and self.node_selector is None


def size_bytes(size: str) -> int:
    """Returns a valid size in bytes."""
    number, unit = re.findall(SIZE, size)[0]
    return math.ceil(float(number) * (1024 if unit.endswith("i") else 1000) ** ("KMGTPE".index(unit[0].upper()) + 1))


def manifest(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    """Returns the one object of a job; equal arguments give equal manifests.

    Raises:
        BadRequestError: Kubernetes cannot run the job; the message names the option or the target's key.
    """
    is_set = spec.nodes > 1
    labels, waits = spec.all_labels, {}
    if target.queue:
        # A Job's own deadline begins again when a queue stops and starts it; the queue's limit does not.
        labels |= {QUEUE_LABEL: target.queue, QUEUE_SECONDS_LABEL: str(spec.max_seconds)}
        waits = {"suspend": True}
    own = _job_set_spec(spec, target) if is_set else _job_spec(spec, target)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2" if is_set else "batch/v1",
        "kind": "JobSet" if is_set else "Job",
        "metadata": {"name": spec.name, "namespace": target.namespace, "labels": labels},
        "spec": {**own, "ttlSecondsAfterFinished": SHOWN_SECONDS, **waits},
    }


def _job_spec(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    limits = {"backoffLimit": spec.retries}
    if spec.slices:
        # If more than half of the slices fail for good, the rest need not cost money.
        limits = {"backoffLimitPerIndex": spec.retries, "maxFailedIndexes": spec.slices // 2}
    on_fatal = "FailIndex" if spec.slices else "FailJob"
    rules = [_on_codes("Ignore", "In", Restart.ALWAYS), _on_codes(on_fatal, "In", Restart.NEVER)]
    return {**_pods(spec, target, "Ignore", *rules), **limits}


def _job_set_spec(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    """Returns a group that is restarted as a whole: when one rank is gone, the others can only wait for it."""
    # A pod that is taken away or fails makes its Job fail, and the Job's message names the rule. A pod that stops by
    # itself is replaced by the Job, which pauses and counts: a JobSet does not pause. That includes pods that stop
    # together with one that is taken away: the condition of that one, which may come seconds later, still decides.
    rules = [_on_codes("FailJob", "NotIn", Restart.ALWAYS)]
    limits = {"backoffLimitPerIndex": spec.retries, "maxFailedIndexes": 0}
    node_job = {**_pods(spec, target, "FailJob", *rules), **limits}
    return {
        "network": {"enableDNSHostnames": True, "subdomain": spec.name, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": spec.retries,
            # The old pods are gone before new ones come, and with them their lease and their GPUs.
            "restartStrategy": "BlockingRecreate",
            "rules": _restart_rules(),
        },
        "replicatedJobs": [{"name": NODE_JOB, "replicas": 1, "template": {"spec": node_job}}],
    }


def _restart_rules() -> list[JsonObject]:
    """Returns the rules for a JobSet whose Job failed; without a match it is restarted, and that counts."""
    taken_away = ".* has condition DisruptionTarget .*"
    fatal = f".* failed with exit code ({'|'.join(map(str, failures(Restart.NEVER)))}) .*"
    uncounted = {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    final = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return [
        {"name": "taken_away", **uncounted, "onJobFailureMessagePatterns": [taken_away]},
        {"name": "fatal", **final, "onJobFailureMessagePatterns": [fatal]},
        {"name": "deadline", **final, "onJobFailureReasons": ["DeadlineExceeded"]},
    ]


def _pods(spec: JobSpec, target: KubernetesKeys, when_taken_away: str, *rules: JsonObject) -> JsonObject:
    """Returns the part of a Job about its pods, and about the rules by which a pod that ends is replaced."""
    taken_away = {"action": when_taken_away, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "completionMode": "Indexed",
        "completions": spec.machines,
        "parallelism": spec.machines,
        "activeDeadlineSeconds": spec.max_seconds,
        # Two pods of one index would fight for the lease.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [taken_away, *rules]},
        "template": {"metadata": {"labels": spec.all_labels}, "spec": _pod(spec, target)},
    }


def _on_codes(action: str, operator: str, restart: Restart) -> JsonObject:
    codes = {"containerName": CONTAINER, "operator": operator, "values": failures(restart)}
    return {"action": action, "onExitCodes": codes}


def _pod(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    shared_size = target.shared_memory or f"{SHARED_GIBIBYTES_PER_GPU * max(spec.gpus, 1)}Gi"
    user = {"runAsUser": IMAGE_USER, "runAsGroup": IMAGE_USER, "fsGroup": IMAGE_USER}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": target.grace_seconds,
        "serviceAccountName": target.service_account,
        # The program does not use the cluster's own API.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **_placement(spec, target),
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec, target)],
        "volumes": [
            # torch hands tensors from process to process there; the default of 64 MB is soon full.
            {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_size}},
            {"name": "scratch", "emptyDir": {"sizeLimit": target.scratch}},
            # torch.compile puts libraries there and runs them: a plain emptyDir is not mounted noexec.
            {"name": "tmp", "emptyDir": {"sizeLimit": TMPSIZE}},
        ],
    }


def _placement(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    """Returns the nodes for the pods: as the target selects them, else as GKE labels and taints them, else any."""
    is_gke, is_chosen = target.cluster == "gke", target.selects_machines
    gpu_type = (spec.gpu_type or target.gpu_type) if is_gke and spec.gpus else ""
    # A job would wait for such a node without end.
    if is_chosen and gpu_type not in ("", *GKE_GPU_TYPES):
        known = f"there are {', '.join(GKE_GPU_TYPES)}; nodes with another label need node_selector"
        raise BadRequestError(f"--gpu-type {gpu_type}: GKE has no GPUs of this name: {known}")
    labels = {GPU_TYPE_LABEL: gpu_type, SPOT_LABEL: "true" if is_gke and spec.spot else ""}
    taints = (
        (spec.spot, {"key": SPOT_LABEL, "operator": "Equal", "value": "true"}),
        (spec.gpus, {"key": GPU_RESOURCE, "operator": "Exists"}),
        (not spec.spot and not spec.gpus, {"key": CAPACITY, "operator": "Equal", "value": "on-demand"}),
    )
    tolerations = [{**taint, "effect": "NoSchedule"} for has_it, taint in taints if is_gke and has_it]
    # Kueue would use spot nodes, which not every pool taints.
    no_spot = {"matchExpressions": [{"key": SPOT_LABEL, "operator": "NotIn", "values": ["true"]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [no_spot]}}}
    selector, own = target.node_selector, target.tolerations
    parts = {
        "nodeSelector": {label: value for label, value in labels.items() if value} if selector is None else selector,
        "affinity": affinity if is_chosen and not spec.spot else {},
        "tolerations": tolerations if own is None else own,
    }
    return {field: value for field, value in parts.items() if value}


def _container(spec: JobSpec, target: KubernetesKeys) -> JsonObject:
    requests = _requests(spec, target)
    limits = requests | ({GPU_RESOURCE: str(spec.gpus)} if spec.gpus else {})
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    # The one argument that Kubernetes expands.
    index = f"$({INDEX_VARIABLE})"
    args = [word if word.startswith(f"{index}/") else _literally(word) for word in spec.argv_of_slice(index)]
    is_fixed = "@sha256:" in spec.image or spec.image.startswith("localhost/")
    return {
        "name": CONTAINER,
        "image": spec.image,
        # A node that ran an earlier image of the same tag would go on with that one.
        "imagePullPolicy": "IfNotPresent" if is_fixed else "Always",
        "args": args,
        "env": _env(spec, target),
        "resources": {"requests": requests, "limits": limits},
        "securityContext": rights,
        # The status then has the last lines of the program, also when its output is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in MOUNTS.items()],
    }


def _requests(spec: JobSpec, target: KubernetesKeys) -> dict[str, str]:
    """Returns processors, memory and disk: the target's, else the share of a node that belongs to the GPUs."""
    cpus, memory = target.cpus, target.memory
    if not (cpus and memory):
        share = _share_of_node(spec, target)
        cpus, memory = cpus or share[0], memory or share[1]
    disk_bytes = sum(map(size_bytes, (target.scratch, TMPSIZE, OUTPUTSIZE)))
    return {"cpu": cpus, "memory": memory, "ephemeral-storage": f"{math.ceil(disk_bytes / 2**30)}Gi"}


def _share_of_node(spec: JobSpec, target: KubernetesKeys) -> tuple[str, str]:
    """Returns the processors and the memory of one container."""
    if not (spec.gpus and target.machine_type and spec.gpu_type in ("", target.gpu_type)):
        count = max(spec.gpus, 1)
        return str(CPUS_PER_GPU * count), f"{GIBIBYTES_PER_GPU * count}Gi"
    bundled, shape = gpus_of(target.machine_type), Machine(target.machine_type).shape
    gpus = bundled[0] if bundled else max(target.gpus, 1)
    nodes = f"nodes of target {target.name!r} are {target.machine_type}"
    if spec.gpus > gpus:
        raise BadRequestError(f"--gpus {spec.gpus}: {nodes}, with {gpus}: use fewer, or more --nodes")
    if shape is None or shape[0] < 2:
        raise BadRequestError(f"{nodes}, whose room for jobs is not known here: set cpus and memory of the target")
    # GKE and its own pods need the rest (kubernetes-engine/docs/concepts/plan-node-sizes).
    millis, gibibytes = 1000 * (shape[0] - max(1, shape[0] // 32)), shape[1] * 3 // 4 // 1024
    return f"{millis * spec.gpus // gpus}m", f"{gibibytes * spec.gpus // gpus}Gi"


def _literally(text: str) -> str:
    """Escapes a text for Kubernetes, which replaces `$(NAME)` in arguments and values."""
    return text.replace("$", "$$")


def _env(spec: JobSpec, target: KubernetesKeys) -> list[JsonObject]:
    own = scratch_variables(target.grace_seconds)
    # The grace is a fact of the pod, which the target's own variables cannot change.
    given = {**own, **spec.env, GRACE_VARIABLE: own[GRACE_VARIABLE]}
    values = {name: _literally(value) for name, value in given.items()}
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}}
    if spec.nodes > 1:
        # Where the nodes meet; see `job.processes.group`.
        values |= {
            "NNODES": str(spec.nodes),
            "NODE_RANK": f"$({INDEX_VARIABLE})",
            # JobSet: JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
            "MASTER_ADDR": f"{spec.name}-{NODE_JOB}-0-0.{spec.name}",
            "MASTER_PORT": str(MASTER_PORT),
        }
    # A value may refer only to an earlier variable.
    named: list[JsonObject] = [{"name": name, "value": value} for name, value in sorted(values.items())]
    return [{"name": INDEX_VARIABLE, "valueFrom": index}, *named]


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
