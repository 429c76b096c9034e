"""What is sent to Kubernetes, by pure functions: a Job for one machine, a JobSet for several, an index for each slice.

The fields are those of batch/v1 (kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1) and of
jobset.x-k8s.io/v1alpha2 (jobset.sigs.k8s.io); what is retried follows `job.exits.TABLE`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Any

from job.exits import TABLE, BadRequestError, Exit
from job.jobs.backends.base import Manifest
from job.jobs.backends.kubernetes_resources import TMP, requests, shared_memory
from job.jobs.backends.kubernetes_rules import GPU, QUEUE_LABEL, problems
from job.jobs.backends.machines import GKE_GPU_TYPES
from job.jobs.building import wait_seconds
from job.jobs.spec import JobSpec
from job.jobs.targets import KubernetesTarget
from job.stop import GRACE_VARIABLE

CONTAINER = "ddpm"
USER = 10001
"""User and group of the image, which own what is mounted."""
RETRIES = 4
"""How many failures that may pass, such as crashes, are followed by another attempt."""
SHOWN_SECONDS = 86_400
"""How long a job that is over stays, for its status and its output."""
REPLICATED_JOB = "node"
MASTER_PORT = 29500
CAPACITY = "ddpm-capacity"
"""Label of the nodes that `infra/terraform` makes, and the taint of those without GPUs that stay."""
MANIFEST_ANNOTATION = "ddpm-manifest"
"""Hash of the rest: after an answer that got lost it tells our own job from another of that name."""
BUCKET_ANNOTATION = "ddpm-bucket"
QUEUE_SECONDS_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"
INDEX = "JOB_COMPLETION_INDEX"
_INDEX_ANNOTATION = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(spec: JobSpec, target: KubernetesTarget) -> Manifest:
    """The one object that `spec` is on a cluster; equal arguments give equal manifests.

    Raises:
        BadRequestError: Kubernetes cannot run it; the message names the option or the target's field.
    """
    if not spec.image:
        raise BadRequestError(f"the target {target.name!r} has no image: set its image, such as REGISTRY/ddpm@sha256:…")
    if spec.slices and not any(word.split("=")[0] == "--count" for word in spec.argv):
        raise BadRequestError("--slices is about many images: say how many with --count, such as --count 50000")
    if any(word.split("=")[0] == "--slice" for word in spec.argv) and spec.slices:
        raise BadRequestError("--slices gives each machine its --slice: leave --slice out")
    made = _job_set(spec, target) if spec.nodes > 1 else _job(spec, target)
    if found := problems(made):
        raise BadRequestError(f"the job {spec.name!r} for the target {target.name!r}: {'; '.join(found)}")
    written = json.dumps(made, sort_keys=True).encode()
    made["metadata"]["annotations"][MANIFEST_ANNOTATION] = hashlib.sha256(written).hexdigest()[:16]
    return made


def codes(retried: str) -> list[int]:
    """Exit codes that are retried `never`, `bounded` or `always`, in order; not 0, which is no failure."""
    return sorted(int(code) for code, meaning in TABLE.items() if meaning.retried == retried and code != Exit.FINISHED)


def _job(spec: JobSpec, target: KubernetesTarget) -> Manifest:
    count = spec.slices or 1
    limits: dict[str, Any] = {"backoffLimit": RETRIES}
    if spec.slices:
        # More than half of the slices failing for good is no accident: the rest need not cost money.
        limits = {"backoffLimitPerIndex": RETRIES, "maxFailedIndexes": count // 2}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(spec, target),
        "spec": {
            **_job_spec(spec, target, count),
            **limits,
            "ttlSecondsAfterFinished": SHOWN_SECONDS,
            **({"suspend": True} if target.queue else {}),
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    _on_codes("Ignore", codes("always")),
                    _on_codes("FailJob", codes("never")),
                ]
            },
        },
    }


def _job_set(spec: JobSpec, target: KubernetesTarget) -> Manifest:
    """A group that is restarted as a whole: when one rank is gone, the others can only wait for it."""
    child = {
        **_job_spec(spec, target, spec.nodes),
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _on_codes("FailJob", codes("always")),
                _on_codes("FailJob", codes("never")),
            ]
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(spec, target),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": spec.name, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": REPLICATED_JOB, "jobIndex": 0, "podIndex": 0},
            "ttlSecondsAfterFinished": SHOWN_SECONDS,
            **({"suspend": True} if target.queue else {}),
            "failurePolicy": {
                "maxRestarts": RETRIES,
                # The old pods are gone before new ones come, and with them their lease and their GPUs.
                "restartStrategy": "BlockingRecreate",
                "rules": _restart_rules(),
            },
            "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": child}}],
        },
    }


def _restart_rules() -> list[dict[str, Any]]:
    """A Job says in its message which rule made it fail; what no rule here matches is restarted, and counted."""
    stopped, fatal = ("|".join(map(str, codes(retried))) for retried in ("always", "never"))
    return [
        {
            "name": "stopped",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [
                ".* has condition DisruptionTarget .*",
                f".* failed with exit code ({stopped}) .*",
            ],
        },
        {
            "name": "fatal",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f".* failed with exit code ({fatal}) .*"],
        },
        {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
    ]


def _metadata(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    labels = spec.all_labels
    if target.queue:
        # A Job's own deadline begins anew when a queue stops and starts it; the queue's limit does not.
        labels |= {QUEUE_LABEL: target.queue, QUEUE_SECONDS_LABEL: str(spec.max_seconds)}
    return {
        "name": spec.name,
        "namespace": target.namespace,
        "labels": labels,
        "annotations": {BUCKET_ANNOTATION: spec.bucket},
    }


def _job_spec(spec: JobSpec, target: KubernetesTarget, pods: int) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "activeDeadlineSeconds": spec.max_seconds,
        # Two pods of one index would fight for the lease.
        "podReplacementPolicy": "Failed",
        "template": {"metadata": {"labels": spec.all_labels}, "spec": _pod(spec, target)},
    }


def _on_codes(action: str, values: list[int]) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}


def _pod(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    selector, tolerations = _place(spec, target)
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": target.grace_seconds,
        "serviceAccountName": target.service_account,
        # The program has no business with the cluster's own API.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"nodeSelector": selector} if selector else {}),
        **_away_from_spot(spec, target),
        **({"tolerations": tolerations} if tolerations else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, target)],
        "volumes": [
            # torch hands tensors from process to process there; the engine's own 64 MB are soon full.
            {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory(spec, target)}},
            {"name": "scratch", "emptyDir": {"sizeLimit": target.scratch}},
            # torch.compile puts libraries there and runs them: a plain emptyDir is not mounted noexec.
            {"name": "tmp", "emptyDir": {"sizeLimit": TMP}},
        ],
    }


def _place(spec: JobSpec, target: KubernetesTarget) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Node selector and tolerations: the target's own, else as GKE labels and taints its nodes, else none."""
    selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    if target.cluster == "gke":
        gpu_type = spec.gpu_type or target.gpu_type
        if spec.gpus and gpu_type:
            selector["cloud.google.com/gke-accelerator"] = _known(gpu_type, target)
        if spec.spot:
            selector["cloud.google.com/gke-spot"] = "true"
            tolerations.append(
                {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
            )
        if spec.gpus:
            tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
        elif not spec.spot:
            tolerations.append({"key": CAPACITY, "operator": "Equal", "value": "on-demand", "effect": "NoSchedule"})
    if target.node_selector is not None:
        selector = dict(target.node_selector)
    if target.tolerations is not None:
        tolerations = [dict(toleration) for toleration in target.tolerations]
    return selector, tolerations


def _known(gpu_type: str, target: KubernetesTarget) -> str:
    """Returns a GPU type that GKE labels nodes with: for another one a job would wait for ever."""
    if target.selects_as_gke and gpu_type not in GKE_GPU_TYPES:
        close = difflib.get_close_matches(gpu_type, GKE_GPU_TYPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadRequestError(
            f"--gpu-type {gpu_type}: GKE has no GPUs of this name{hint} (there are: {', '.join(GKE_GPU_TYPES)}); for "
            f"nodes with another label set node_selector of target {target.name!r}"
        )
    return gpu_type


def _away_from_spot(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    """On demand is not on nodes that may go, which Kueue would take first and which not every pool taints."""
    if spec.spot or not target.selects_as_gke:
        return {}
    no_spot = {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
    required = {"nodeSelectorTerms": [{"matchExpressions": [no_spot]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _container(spec: JobSpec, target: KubernetesTarget) -> dict[str, Any]:
    asked = requests(spec, target)
    limits = asked | ({GPU: str(spec.gpus)} if spec.gpus else {})
    is_fixed = "@sha256:" in spec.image or spec.image.startswith("localhost/")
    return {
        "name": CONTAINER,
        "image": spec.image,
        # A node that ran an earlier image of the same tag would go on with that one.
        "imagePullPolicy": "IfNotPresent" if is_fixed else "Always",
        "args": _words(spec, target),
        "env": _environment(spec, target),
        "resources": {"requests": asked, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # The last lines of the program are in the status then, also when its output is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108 -- the container's own
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }


def _words(spec: JobSpec, target: KubernetesTarget) -> list[str]:
    words = [_literally(word) for word in spec.argv]
    if spec.slices:
        words += ["--slice", f"$({INDEX})/{spec.slices}"]
    # A replacement must outlive its predecessor's lease, or the job would end for good with 76.
    if spec.verb == "train" and not any(word.split("=")[0] == "--wait" for word in spec.argv):
        words += ["--wait", f"{wait_seconds(target):g}"]
    return words


def _literally(text: str) -> str:
    """What Kubernetes, which replaces `$(NAME)` in words and values, makes into `text` again."""
    return text.replace("$", "$$")


def _environment(spec: JobSpec, target: KubernetesTarget) -> list[dict[str, Any]]:
    given = {**target.env, **spec.env}
    own = {
        "HOME": "/tmp",  # noqa: S108
        "TMPDIR": "/scratch",
        "XDG_CACHE_HOME": "/scratch/cache",
        "DDPM_CACHE": "/scratch/ddpm",
        "MPLCONFIGDIR": "/tmp/matplotlib",  # noqa: S108
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",  # noqa: S108
        "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
        "PYTHONUNBUFFERED": "1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    values = {name: _literally(value) for name, value in (own | given).items()}
    values[GRACE_VARIABLE] = str(target.grace_seconds)
    fields = {"POD_NAME": "metadata.name"}
    if spec.slices or spec.nodes > 1:
        fields[INDEX] = _INDEX_ANNOTATION
    if spec.nodes > 1:
        values |= _rendezvous(spec)
    # A value may name only what stands before it.
    references = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    plain = [{"name": name, "value": value} for name, value in sorted(values.items()) if name not in fields]
    return references + plain


def _rendezvous(spec: JobSpec) -> dict[str, str]:
    """Where the nodes meet: under the names of our launcher, and with PET_ before them under torchrun's."""
    values = {
        "NNODES": str(spec.nodes),
        "NODE_RANK": f"$({INDEX})",
        # JobSet: JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
        "MASTER_ADDR": f"{spec.name}-{REPLICATED_JOB}-0-0.{spec.name}",
        "MASTER_PORT": str(MASTER_PORT),
    }
    return values | {f"PET_{name}": value for name, value in values.items()}
