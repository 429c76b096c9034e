"""What is sent to Kubernetes, by pure functions: a Job for one machine, a JobSet for several, an index for each slice.

The fields are those of batch/v1 (kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1) and of
jobset.x-k8s.io/v1alpha2 (jobset.sigs.k8s.io); what is retried follows `job.exits.TABLE`.
"""

from __future__ import annotations

import math
from typing import Any

from job.exits import TABLE, BadRequestError, Exit
from job.jobs.backends.base import JsonObject
from job.jobs.backends.confinement import IMAGE_USER, SCRATCH, scratch_variables
from job.jobs.backends.machines import GKE_GPU_TYPES, Machine, gpus_of
from job.jobs.spec import JobSpec
from job.jobs.targets import KubernetesTarget, size_bytes
from job.stop import GRACE_VARIABLE

CONTAINER = "ddpm"
SHOWN_SECONDS = 86_400
"""How long a job that is over stays, for its status and its output."""
NODE_JOB = "node"
"""Of a JobSet, the one job in it that has a pod for each node."""
MASTER_PORT = 29500
CAPACITY = "ddpm-capacity"
"""Label of the nodes that `infra/terraform` makes, and the taint of those without GPUs that stay."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_SECONDS_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
GPU_RESOURCE = "nvidia.com/gpu"
GPU_TYPE_LABEL, SPOT_LABEL = "cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"
CPUS_PER_GPU, GIBIBYTES_PER_GPU, SHARED_GIBIBYTES_PER_GPU = 4, 16, 2
"""Of a node whose size is not known; a job without GPUs asks for as much as one with a single one."""
MOUNTS = {"dshm": "/dev/shm", "scratch": SCRATCH, "tmp": "/tmp"}  # noqa: S108 -- the container's own
TMP_SIZE, OUTPUT_SIZE = "8Gi", "2Gi"
"""For /tmp, and for what the program prints, which counts as the container's disk, too."""
LONGEST_POD_NAME = 63


def manifest(spec: JobSpec, target: KubernetesTarget) -> JsonObject:
    """The one object that `spec` is on a cluster; equal arguments give equal manifests.

    Raises:
        BadRequestError: Kubernetes cannot run it; the message names the option or the target's field.
    """
    is_set = spec.nodes > 1
    pod_name = f"{spec.name}{f'-{NODE_JOB}-0' * is_set}-{spec.machines - 1}-abcde"
    if len(pod_name) > LONGEST_POD_NAME:
        long = f"names of {len(pod_name)} characters, and {LONGEST_POD_NAME} is the most"
        raise BadRequestError(f"the pods of {spec.name!r} would have {long}: choose a shorter --run")
    labels, waits = spec.all_labels, {}
    if target.queue:
        # A Job's own deadline begins anew when a queue stops and starts it; the queue's limit does not.
        labels |= {QUEUE_LABEL: target.queue, QUEUE_SECONDS_LABEL: str(spec.max_seconds)}
        waits = {"suspend": True}
    own = _job_set_spec(spec, target) if is_set else _job_spec(spec, target)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2" if is_set else "batch/v1",
        "kind": "JobSet" if is_set else "Job",
        "metadata": {"name": spec.name, "namespace": target.namespace, "labels": labels},
        "spec": {**own, "ttlSecondsAfterFinished": SHOWN_SECONDS, **waits},
    }


def _job_spec(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    limits, on_fatal = {"backoffLimit": spec.retries}, "FailJob"
    if spec.slices:
        # More than half of the slices failing for good is no accident: the rest need not cost money.
        limits = {"backoffLimitPerIndex": spec.retries, "maxFailedIndexes": spec.slices // 2}
        on_fatal = "FailIndex"
    rules = [_on_codes("Ignore", "In", "always"), _on_codes(on_fatal, "In", "never")]
    return {**_pods(spec, target, "Ignore", *rules), **limits}


def _job_set_spec(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    """A group that is restarted as a whole: when one rank is gone, the others can only wait for it."""
    # A pod that is taken away or fails makes its Job fail, and the Job's message says by which rule. One that stops by
    # itself is made anew by the Job, which pauses and counts: a JobSet does not pause. So it is with those that stop
    # together with one that is taken away: that one's word, which may come seconds later, still decides.
    rules = [_on_codes("FailJob", "NotIn", "always")]
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


def _restart_rules() -> list[dict[str, Any]]:
    """What becomes of a JobSet whose Job failed; what no rule here matches is restarted, and counted."""
    taken_away = ".* has condition DisruptionTarget .*"
    fatal = f".* failed with exit code ({'|'.join(map(str, _codes('never')))}) .*"
    uncounted = {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    final = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return [
        {"name": "taken_away", **uncounted, "onJobFailureMessagePatterns": [taken_away]},
        {"name": "fatal", **final, "onJobFailureMessagePatterns": [fatal]},
        {"name": "deadline", **final, "onJobFailureReasons": ["DeadlineExceeded"]},
    ]


def _pods(spec: JobSpec, target: KubernetesTarget, when_taken_away: str, *rules: JsonObject) -> dict[str, Any]:
    """The part of a Job that says which pods it has, and by which rules one that ends is followed by another."""
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


def _on_codes(action: str, operator: str, retried: str) -> dict[str, Any]:
    codes = {"containerName": CONTAINER, "operator": operator, "values": _codes(retried)}
    return {"action": action, "onExitCodes": codes}


def _codes(retried: str) -> list[int]:
    """Exit codes that are retried `never`, `bounded` or `always`, in order; not 0, which is no failure."""
    return sorted(int(code) for code, meaning in TABLE.items() if meaning.retried == retried and code != Exit.FINISHED)


def _pod(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    shared_size = target.shared_memory or f"{SHARED_GIBIBYTES_PER_GPU * max(spec.gpus, 1)}Gi"
    user = {"runAsUser": IMAGE_USER, "runAsGroup": IMAGE_USER, "fsGroup": IMAGE_USER}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": target.grace_seconds,
        "serviceAccountName": target.service_account,
        # The program has no business with the cluster's own API.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **_placement(spec, target),
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec, target)],
        "volumes": [
            # torch hands tensors from process to process there; the engine's own 64 MB are soon full.
            {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_size}},
            {"name": "scratch", "emptyDir": {"sizeLimit": target.scratch}},
            # torch.compile puts libraries there and runs them: a plain emptyDir is not mounted noexec.
            {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}},
        ],
    }


def _placement(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    """On which nodes the pods may be: what the target says, else as GKE labels and taints its nodes, else any."""
    selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    if target.cluster == "gke":
        gpu_type = spec.gpu_type or target.gpu_type
        if spec.gpus and gpu_type:
            selector[GPU_TYPE_LABEL] = gpu_type
            # A job would wait for one without end.
            if target.selects_as_gke and gpu_type not in GKE_GPU_TYPES:
                there_are = f"there are {', '.join(GKE_GPU_TYPES)}; nodes with another label need node_selector"
                raise BadRequestError(f"--gpu-type {gpu_type}: GKE has no GPUs of this name: {there_are}")
        if spec.spot:
            selector[SPOT_LABEL] = "true"
            tolerations.append({"key": SPOT_LABEL, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
        if spec.gpus:
            tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
        elif not spec.spot:
            tolerations.append({"key": CAPACITY, "operator": "Equal", "value": "on-demand", "effect": "NoSchedule"})
    if target.selects_as_gke and not spec.spot:
        # Kueue would take nodes that may go first, and not every pool taints them.
        no_spot = {"key": SPOT_LABEL, "operator": "NotIn", "values": ["true"]}
        required = {"nodeSelectorTerms": [{"matchExpressions": [no_spot]}]}
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    if target.node_selector is not None:
        selector = dict(target.node_selector)
    if target.tolerations is not None:
        tolerations = list(target.tolerations)
    parts = {"nodeSelector": selector, "affinity": affinity, "tolerations": tolerations}
    return {field: value for field, value in parts.items() if value}


def _container(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    requests = _requests(spec, target)
    limits = requests | ({GPU_RESOURCE: str(spec.gpus)} if spec.gpus else {})
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    # The one word that Kubernetes expands.
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
        # The last lines of the program are in the status then, also when its output is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in MOUNTS.items()],
    }


def _requests(spec: JobSpec, target: KubernetesTarget) -> dict[str, str]:
    """Processors, memory and disk: what the target says, else what belongs to so many GPUs of a node."""
    cpus, memory = target.cpus, target.memory
    if not (cpus and memory):
        share = _share_of_node(spec, target)
        cpus, memory = cpus or share[0], memory or share[1]
    disk_bytes = sum(map(size_bytes, (target.scratch, TMP_SIZE, OUTPUT_SIZE)))
    return {"cpu": cpus, "memory": memory, "ephemeral-storage": f"{math.ceil(disk_bytes / 2**30)}Gi"}


def _share_of_node(spec: JobSpec, target: KubernetesTarget) -> tuple[str, str]:
    """Processors and memory of one container."""
    if not (spec.gpus and target.machine_type and spec.gpu_type in ("", target.gpu_type)):
        count = max(spec.gpus, 1)
        return str(CPUS_PER_GPU * count), f"{GIBIBYTES_PER_GPU * count}Gi"
    bundled, shape = gpus_of(target.machine_type), Machine(target.machine_type).shape
    gpus = bundled[0] if bundled else max(target.gpus, 1)
    about = f"nodes of target {target.name!r} are {target.machine_type}"
    if spec.gpus > gpus:
        raise BadRequestError(f"--gpus {spec.gpus}: {about}, with {gpus}: ask for at most so many, or more --nodes")
    if shape is None or shape[0] < 2:
        raise BadRequestError(f"{about}, whose room for jobs is not known here: set cpus and memory of the target")
    # GKE and its own pods need the rest (kubernetes-engine/docs/concepts/plan-node-sizes).
    millis, gibibytes = 1000 * (shape[0] - max(1, shape[0] // 32)), shape[1] * 3 // 4 // 1024
    millis = millis * spec.gpus // gpus
    return f"{millis}m" if millis % 1000 else str(millis // 1000), f"{gibibytes * spec.gpus // gpus}Gi"


def _literally(text: str) -> str:
    """What Kubernetes, which replaces `$(NAME)` in words and values, makes into `text` again."""
    return text.replace("$", "$$")


def _env(spec: JobSpec, target: KubernetesTarget) -> list[dict[str, Any]]:
    own = scratch_variables(target.grace_seconds)
    # The grace is what the pod has, whatever somebody says.
    values = {name: _literally(value) for name, value in (own | dict(spec.env)).items()}
    values[GRACE_VARIABLE] = own[GRACE_VARIABLE]
    references = []
    if spec.machines > 1 or spec.slices:
        path = f"metadata.annotations['{INDEX_ANNOTATION}']"
        references = [{"name": INDEX_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": path}}}]
    if spec.nodes > 1:
        # Where the nodes meet; see `job.processes.group`.
        values |= {
            "NNODES": str(spec.nodes),
            "NODE_RANK": f"$({INDEX_VARIABLE})",
            # JobSet: JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
            "MASTER_ADDR": f"{spec.name}-{NODE_JOB}-0-0.{spec.name}",
            "MASTER_PORT": str(MASTER_PORT),
        }
    # A value may name only what stands before it.
    return references + [{"name": name, "value": value} for name, value in sorted(values.items())]
