"""What a schema does not say about a Job or a JobSet, and the API server, a controller or a bill would say later.

Schemas know fields and their types. These rules know the values of enumerations, what fields have to do with one
another, and what this program asks of every job of its own: a user without rights, and an end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from job.jobs.backends.kubernetes_jobset_rules import jobset_problems
from job.jobs.spec import sounds_secret

Rule = Callable[["_Job"], Iterator[str]]
RULES: dict[str, Rule] = {}
"""Each rule by its name; it yields a sentence for each thing that is wrong."""

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_POWERS = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000)}
_POWERS |= {unit: Decimal(1000) ** (n + 2) for n, unit in enumerate(("M", "G", "T", "P", "E"))}
_POWERS |= {unit: Decimal(1024) ** (n + 1) for n, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
GPU = "nvidia.com/gpu"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# A pod is called JOB-INDEX-XXXXX, and a label has 63 characters.
_LONGEST, _SUFFIX = 63, "-abcde"


def quantity(text: Any) -> Decimal | None:
    """`"1.5Gi"` in bytes, `"500m"` as 0.5; None for what is no positive quantity of Kubernetes."""
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    return Decimal(match[1]) * _POWERS[match[2] or ""] if match else None


@dataclass(frozen=True)
class _Job:
    """A Job, or the job of a JobSet, which may be incomplete or wrong in any way."""

    name: str
    labels: dict[str, Any]
    spec: dict[str, Any]

    @property
    def template(self) -> dict[str, Any]:
        return self.spec.get("template", {})

    @property
    def pod(self) -> dict[str, Any]:
        return self.template.get("spec", {})

    @property
    def containers(self) -> list[dict[str, Any]]:
        return self.pod.get("containers", [])

    @property
    def policy(self) -> list[dict[str, Any]]:
        return self.spec.get("podFailurePolicy", {}).get("rules", [])


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, a sentence each that begins with the name of its rule; empty if nothing is."""
    metadata = manifest.get("metadata", {})
    name, labels, spec = metadata.get("name", ""), metadata.get("labels", {}), manifest.get("spec", {})
    if (manifest.get("apiVersion"), manifest.get("kind")) == ("batch/v1", "Job"):
        jobs, found = [_Job(name, labels, spec)], []
    elif (manifest.get("apiVersion"), manifest.get("kind")) == ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        found = jobset_problems(name, spec)
        jobs = [
            _Job(f"{name}-{part.get('name', '')}-0", labels, part.get("template", {}).get("spec", {}))
            for part in spec.get("replicatedJobs", [])
        ]
    else:
        return [f"kind: {manifest.get('apiVersion')} {manifest.get('kind')} is neither a Job nor a JobSet"]
    if spec.get("ttlSecondsAfterFinished") is None:
        found.append("end: without ttlSecondsAfterFinished the job stays for ever")
    if labels.get(QUEUE_LABEL) and spec.get("suspend") is not True:
        found.append("queue: a job with a queue begins suspended, or it would not wait for it")
    if not metadata.get("namespace"):
        found.append("names: without a namespace it goes wherever the caller's context points")
    return found + [f"{rule}: {text}" for job in jobs for rule, check in RULES.items() for text in check(job)]


def _rule(name: str) -> Callable[[Rule], Rule]:
    def enter(check: Rule) -> Rule:
        RULES[name] = check
        return check

    return enter


def _one_of(what: str, value: Any, allowed: tuple[Any, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{what} is {value!r}, not one of {', '.join(map(str, allowed))}"


@_rule("restart")
def _restart(job: _Job) -> Iterator[str]:
    yield from _one_of("restartPolicy of a Job", job.pod.get("restartPolicy"), ("Never", "OnFailure"))
    if job.policy and job.pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"


@_rule("indexes")
def _indexes(job: _Job) -> Iterator[str]:
    spec = job.spec
    yield from _one_of("completionMode", spec.get("completionMode", "NonIndexed"), ("Indexed", "NonIndexed"))
    indexed, completions = spec.get("completionMode") == "Indexed", spec.get("completions")
    if indexed and (completions is None or spec.get("parallelism") is None):
        yield "completionMode Indexed needs completions and parallelism"
    if not indexed:
        yield "only with completionMode Indexed does a pod know which node or slice it is"
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "maxFailedIndexes needs backoffLimitPerIndex"
    if "backoffLimitPerIndex" in spec and "maxFailedIndexes" not in spec:
        yield "without maxFailedIndexes every index fails on its own account"
    if spec.get("maxFailedIndexes", 0) > (completions or 0):
        yield f"maxFailedIndexes {spec['maxFailedIndexes']} is more than completions {completions}"
    for name in ("completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes"):
        if spec.get(name, 0) < 0:
            yield f"{name} is negative"


@_rule("failure policy")
def _failure_policy(job: _Job) -> Iterator[str]:
    if not job.policy:
        yield "without a podFailurePolicy every exit code is retried"
    for rule in job.policy:
        yield from _one_of("action", rule.get("action"), ("Ignore", "FailJob", "FailIndex", "Count"))
        if rule.get("action") == "FailIndex" and "backoffLimitPerIndex" not in job.spec:
            yield "FailIndex needs backoffLimitPerIndex"
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule has either onExitCodes or onPodConditions"
        for condition in rule.get("onPodConditions", []):
            if not condition.get("type"):
                yield "a condition has a type"
            yield from _one_of("status of a condition", condition.get("status"), ("True", "False", "Unknown"))
    if job.policy and job.spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podFailurePolicy needs podReplacementPolicy Failed"


@_rule("exit codes")
def _exit_codes(job: _Job) -> Iterator[str]:
    for on in (rule["onExitCodes"] for rule in job.policy if "onExitCodes" in rule):
        values = on.get("values", [])
        yield from _one_of("operator", on.get("operator"), ("In", "NotIn"))
        if on.get("operator") == "In" and 0 in values:
            yield "exit code 0 is no failure"
        if not 1 <= len(values) <= 255 or sorted(set(values)) != values:
            yield "values are 1 to 255 different codes in order"
        name = on.get("containerName")
        if name is None:
            yield "without containerName the codes of every container count"
        elif name not in [container.get("name") for container in job.containers]:
            yield f"containerName {name!r} is no container of the pod"


@_rule("resources")
def _resources(job: _Job) -> Iterator[str]:
    for container in job.containers:
        limits = container.get("resources", {}).get("limits", {})
        requests = container.get("resources", {}).get("requests", {})
        for kind, amounts in (("limits", limits), ("requests", requests)):
            for name, amount in amounts.items():
                if quantity(amount) is None:
                    yield f"{kind} of {name} are {amount!r}, which is no quantity: use one like 4, 500m or 16Gi"
        for name in ("cpu", "memory", "ephemeral-storage"):
            if name not in limits or name not in requests:
                yield f"{name} has no limit or no request: other pods could take the node from under it"
        for name, amount in requests.items():
            if (quantity(amount) or 0) > (quantity(limits.get(name, amount)) or 0):
                yield f"more {name} is requested than the limit allows"
        for name in {*limits, *requests}:
            if "/" not in name:
                continue
            if name != GPU:
                yield f"{name!r} is no resource that this program uses: GPUs are {GPU}"
            if name not in limits or requests.get(name, limits[name]) != limits[name]:
                yield f"the request and the limit of {name} differ, which Kubernetes cannot do"
            elif not str(limits[name]).isdecimal():
                yield f"{limits[name]!r} of {name} is no whole number"


@_rule("memory")
def _memory(job: _Job) -> Iterator[str]:
    sizes: dict[str, Decimal] = {"Memory": Decimal(0), "": Decimal(0)}
    for volume in job.pod.get("volumes", []):
        directory = volume.get("emptyDir", {})
        medium = directory.get("medium", "")
        yield from _one_of("medium of an emptyDir", medium, ("", "Memory"))
        if "emptyDir" not in volume:
            yield f"volume {volume.get('name')} has no emptyDir"
        elif quantity(directory.get("sizeLimit")) is None:
            yield f"volume {volume.get('name')} has no sizeLimit like 50Gi: it could fill the node"
        elif medium in sizes:
            sizes[medium] += quantity(directory.get("sizeLimit")) or 0
    for container in job.containers:
        limits = container.get("resources", {}).get("limits", {})
        for medium, name in (("Memory", "memory"), ("", "ephemeral-storage")):
            if sizes[medium] >= (quantity(limits.get(name)) or sizes[medium] + 1):
                yield f"volumes count against {name}, and are as large as its limit {limits[name]}"


@_rule("names")
def _names(job: _Job) -> Iterator[str]:
    last = max(job.spec.get("completions", 1) - 1, 0)
    longest = f"{job.name}-{last}{_SUFFIX}"
    if not _LABEL.fullmatch(job.name):
        yield f"{job.name!r} is no DNS label"
    elif len(longest) > _LONGEST:
        yield f"the pods of {job.name!r} would have names of {len(longest)} characters, and {_LONGEST} is the most"
    for labels in (job.labels, job.template.get("metadata", {}).get("labels", {}), job.pod.get("nodeSelector", {})):
        for key, value in labels.items():
            if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
                yield f"{key}={value!r} is no label: values have at most 63 letters, digits, '-', '_' and '.'"
    for volume in (*job.containers, *job.pod.get("volumes", [])):
        if not _LABEL.fullmatch(volume.get("name", "")):
            yield f"{volume.get('name')!r} cannot name a container or a volume"


@_rule("labels")
def _labels(job: _Job) -> Iterator[str]:
    on_pods = job.template.get("metadata", {}).get("labels", {})
    for label in ("app", "ddpm-job", "ddpm-verb"):
        if not job.labels.get(label) or on_pods.get(label) != job.labels[label]:
            yield f"the label {label}, by which jobs and their pods are found, is not on both"


@_rule("containers")
def _containers(job: _Job) -> Iterator[str]:
    if not job.containers:
        yield "there is no container"
    names = [container.get("name") for container in job.containers]
    if len(set(names)) < len(names):
        yield "two containers have one name"
    for container in job.containers:
        if not container.get("image") or re.search(r"\s", container["image"]):
            yield f"{container.get('image')!r} is no image"
        if not container.get("args"):
            yield "there are no words for the program"
        yield from _one_of("imagePullPolicy", container.get("imagePullPolicy"), ("Always", "IfNotPresent", "Never"))
        yield from _one_of(
            "terminationMessagePolicy", container.get("terminationMessagePolicy"), ("File", "FallbackToLogsOnError")
        )


@_rule("volumes")
def _volumes(job: _Job) -> Iterator[str]:
    names = [volume.get("name") for volume in job.pod.get("volumes", [])]
    if len(set(names)) < len(names):
        yield "two volumes have one name"
    mounted: set[Any] = set()
    for container in job.containers:
        mounts = container.get("volumeMounts", [])
        paths = [mount.get("mountPath", "") for mount in mounts]
        if len(set(paths)) < len(paths) or not all(path.startswith("/") for path in paths):
            yield "volumes are mounted at different absolute paths"
        mounted |= {mount.get("name") for mount in mounts}
    for name in mounted - set(names):
        yield f"what is mounted as {name!r} is no volume"
    for name in set(names) - mounted:
        yield f"the volume {name!r} is mounted nowhere"
    for path in ("/dev/shm", "/scratch", "/tmp"):  # noqa: S108 -- the container's own
        if not any(m.get("mountPath") == path for c in job.containers for m in c.get("volumeMounts", [])):
            yield f"nothing is mounted at {path}, where the program writes"


@_rule("environment")
def _environment(job: _Job) -> Iterator[str]:
    for container in job.containers:
        declared: set[str] = set()
        for variable in container.get("env", []):
            name = variable.get("name", "")
            if not _VARIABLE.fullmatch(name):
                yield f"{name!r} cannot be a variable"
            if name in declared:
                yield f"{name} is there twice"
            if ("value" in variable) == ("valueFrom" in variable):
                yield f"{name} has either a value or a source"
            if "valueFrom" in variable and not variable["valueFrom"].get("fieldRef", {}).get("fieldPath"):
                yield f"the source of {name} is no field of the pod"
            if sounds_secret(name) and variable.get("value"):
                yield f"{name} looks like a secret, and everybody who sees the job sees it: use the service account"
            yield from _undeclared(variable.get("value", ""), declared)
            declared.add(name)
        for word in container.get("args", []):
            yield from _undeclared(word, declared)


def _undeclared(text: Any, declared: set[str]) -> Iterator[str]:
    for match in _REFERENCE.finditer(text if isinstance(text, str) else ""):
        if match[1] and match[1] not in declared:
            yield f"{match[0]} names no variable that stands before it"


@_rule("place")
def _place(job: _Job) -> Iterator[str]:
    for toleration in job.pod.get("tolerations", []):
        operator = toleration.get("operator", "Equal")
        yield from _one_of("operator of a toleration", operator, ("Equal", "Exists"))
        yield from _one_of(
            "effect of a toleration", toleration.get("effect", ""), ("", "NoSchedule", "PreferNoSchedule", "NoExecute")
        )
        seconds = toleration.get("tolerationSeconds")
        if seconds is not None and (not isinstance(seconds, int) or toleration.get("effect") != "NoExecute"):
            yield f"tolerationSeconds {seconds!r} is a whole number, and goes with effect NoExecute"
        for name, value in toleration.items():
            if name not in ("key", "operator", "value", "effect", "tolerationSeconds"):
                yield f"{name!r} is no field of a toleration"
            elif name != "tolerationSeconds" and not isinstance(value, str):
                yield f"{name} of a toleration is {value!r}, which is no text: put it in quotes"
        if operator == "Exists" and toleration.get("value"):
            yield "a toleration with operator Exists has no value"
        if operator == "Equal" and not toleration.get("key"):
            yield "a toleration with operator Equal has a key"


@_rule("rights")
def _rights(job: _Job) -> Iterator[str]:
    pod = job.pod.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser") or not pod.get("runAsGroup"):
        yield "the pod may run as root"
    if not pod.get("fsGroup"):
        yield "without fsGroup the user cannot write to the volumes"
    if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "the pod has no seccomp profile"
    if not job.pod.get("serviceAccountName"):
        yield "without serviceAccountName it has the default account's rights"
    if job.pod.get("automountServiceAccountToken") is not False:
        yield "the pod gets a token for the cluster's own API"
    for container in job.containers:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield "the container may gain rights"
        if context.get("readOnlyRootFilesystem") is not True:
            yield "the container may write to its image"
        if context.get("capabilities", {}).get("drop") != ["ALL"]:
            yield "the container keeps capabilities"


@_rule("end")
def _end(job: _Job) -> Iterator[str]:
    if not (job.spec.get("activeDeadlineSeconds") or 0) > 0:
        yield "without activeDeadlineSeconds a job that hangs costs money for ever"
    if "backoffLimit" not in job.spec and "backoffLimitPerIndex" not in job.spec:
        yield "without backoffLimit it is not said how often a crash is retried"
    if not (job.pod.get("terminationGracePeriodSeconds") or 0) > 0:
        yield "without terminationGracePeriodSeconds there is no time to save"
    for container in job.containers:
        told = [v.get("value") for v in container.get("env", []) if v.get("name") == "DDPM_GRACE_SECONDS"]
        if told != [str(job.pod.get("terminationGracePeriodSeconds"))]:
            yield "the program is told another DDPM_GRACE_SECONDS than terminationGracePeriodSeconds"
