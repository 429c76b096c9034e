"""What a control plane checks: Kubernetes' schemas and JobSet's models, which are not ours, and rules beyond them.

The rules are those of JobSet's webhook (`pkg/webhooks/jobset_webhook.go` and `api/jobset/v1alpha2`, up to v0.12), of
Kueue's (`pkg/controller/jobframework/validation.go`, v0.19) and of Kubernetes' own validation of Jobs and their pods
(`pkg/apis/batch/validation`, `pkg/apis/core/validation`), as far as they are about fields that manifests here have.
Nothing of the program under test is used.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils

Object = dict[str, Any]
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
UNGATED_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
QUEUE, QUEUE_SECONDS = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/max-exec-time-seconds"
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
RULE_NAME = r"[A-Za-z]([A-Za-z0-9_,:]{,126}[A-Za-z0-9_])?"
# It reads its schemas, of megabytes, for each manifest.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def schema_problems(made: Object, version: str = "1.34") -> list[str]:
    """What the schemas of a version of Kubernetes say against a Job or a JobSet; empty if it is right."""
    found = []
    if made["kind"] == "JobSet":
        from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

        try:
            model = JobsetV1alpha2JobSet.from_dict(made)
            # These models leave out what they do not know instead of refusing it.
            if model is None or model.to_dict() != made:
                found.append("there are fields that a JobSet does not have")
        except ValueError as error:
            found.append(str(error))
        (part,) = made["spec"]["replicatedJobs"]
        made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part["template"]}
    try:
        kubernetes_validate.validate(made, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(f"{'.'.join(map(str, error.path))}: {error.message}")
    return found


def is_label(text: str) -> bool:
    """A DNS label, RFC 1123."""
    return len(text) <= 63 and bool(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", text))


def is_service(text: str) -> bool:
    """A DNS label, RFC 1035, as services have: it begins with a letter."""
    return is_label(text) and text[0].isalpha()


def is_subdomain(text: str) -> bool:
    """A DNS subdomain, RFC 1123."""
    parts = (re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", part) for part in text.split("."))
    return len(text) <= 253 and all(parts)


def is_pair(key: str, value: str) -> bool:
    """A label, or an annotation that could be one: its key and its value."""
    prefix, slash, name = key.rpartition("/")
    texts = all(len(one) <= 63 and re.fullmatch(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?", one) for one in (name, value))
    return texts and bool(name) and (not slash or is_subdomain(prefix))


def amount(text: object) -> float:
    """A quantity, such as `500m` or `16Gi`, as a number."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match, text
    return float(match[1]) * UNITS[match[2]]


def refusals(made: Object) -> list[str]:
    """The rules that a manifest does not keep, each as `WHO: RULE`."""
    name, labels = made["metadata"]["name"], made["metadata"].get("labels", {})
    spec, pods_name, rules = made["spec"], name, {}
    if made["kind"] == "JobSet":
        (part,) = spec["replicatedJobs"]
        pods_name = f"{name}-{part['name']}-{part['replicas'] - 1}"
        rules, spec = _of_job_set(spec, part, pods_name), part["template"]["spec"]
    pairs = (*labels.items(), *spec["template"]["metadata"]["labels"].items())
    rules |= {
        "Kueue: name of the queue": is_subdomain(labels.get(QUEUE, "none")),
        "Kueue: seconds in the queue": re.fullmatch(r"[1-9][0-9]*", labels.get(QUEUE_SECONDS, "1")),
        "Kubernetes: name of the object": is_subdomain(name),
        "Kubernetes: host names of the pods": is_label(f"{pods_name}-{spec['completions'] - 1}"),
        "Kubernetes: labels": all(is_pair(*pair) for pair in pairs),
        **_of_job(spec, spec["podFailurePolicy"]["rules"]),
        **_of_pod(spec["template"]["spec"]),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _of_job_set(spec: Object, part: Object, longest: str) -> dict[str, Any]:
    rules, last = spec["failurePolicy"]["rules"], part["template"]["spec"]["completions"] - 1
    names, reasons = [rule["name"] for rule in rules], [rule.get("onJobFailureReasons", ()) for rule in rules]
    return {
        "JobSet: names of failure rules": all(re.fullmatch(RULE_NAME, name) for name in names),
        "JobSet: failure rules' names differ": len({*names}) == len(names),
        "JobSet: reasons of failure rules are known": all(REASONS.issuperset(each) for each in reasons),
        "JobSet: actions need no feature gate": UNGATED_ACTIONS.issuperset(rule["action"] for rule in rules),
        "JobSet: names of the longest Jobs": is_service(longest),
        "JobSet: names of the longest pods": is_service(f"{longest}-{last}-abcde"),
        "JobSet: the subdomain is the name of a service": is_service(spec["network"]["subdomain"]),
        "Kueue: names of the Workload's pod sets": is_label(part["name"]),
    }


def _of_job(spec: Object, rules: list[Object]) -> dict[str, Any]:
    pod, per_index = spec["template"]["spec"], "backoffLimitPerIndex" in spec
    containers = {None, *(one["name"] for one in pod["containers"])}
    by_codes = [rule["onExitCodes"] for rule in rules if rule.get("onExitCodes")]
    kinds = [bool(rule.get("onExitCodes")) + bool(rule.get("onPodConditions")) for rule in rules]
    lists = [one["values"] for one in by_codes]
    limits = ("activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes")
    return {
        "Kubernetes: pods with a failure policy never restart": pod["restartPolicy"] == "Never",
        "Kubernetes: only failed pods are replaced": spec.get("podReplacementPolicy", "Failed") == "Failed",
        "Kubernetes: a rule about pods is about codes or about conditions": {*kinds} <= {1},
        "Kubernetes: exit codes are in order": all(each == sorted({*each}) for each in lists),
        "Kubernetes: exit codes are some, and not too many": all(1 <= len(each) <= 255 for each in lists),
        "Kubernetes: success is no failure": all(one["operator"] != "In" or 0 not in one["values"] for one in by_codes),
        "Kubernetes: exit codes are a container's": containers.issuperset(one.get("containerName") for one in by_codes),
        "Kubernetes: FailIndex needs limits of indexes": per_index
        or all(one["action"] != "FailIndex" for one in rules),
        "Kubernetes: limits of indexes need indexes": spec["completionMode"] == "Indexed" or not per_index,
        "Kubernetes: a limit of failed indexes needs one for each": per_index or "maxFailedIndexes" not in spec,
        "Kubernetes: no more failed indexes than there are": spec.get("maxFailedIndexes", 0) <= spec["completions"],
        "Kubernetes: limits are not negative": all(spec.get(field, 0) >= 0 for field in limits),
    }


def _of_pod(pod: Object) -> dict[str, Any]:
    (container,) = pod["containers"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    mounted, volumes = ({one["name"] for one in each} for each in (container["volumeMounts"], pod["volumes"]))
    variables = [re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", one["name"]) for one in container["env"]]
    both, extra = limits.keys() & requests, [name for name in requests if "/" in name]
    return {
        "Kubernetes: what is mounted exists": mounted <= volumes,
        "Kubernetes: requests are within limits": all(amount(requests[name]) <= amount(limits[name]) for name in both),
        "Kubernetes: GPUs are limits, and requests alike": all(limits.get(name) == requests[name] for name in extra),
        "Kubernetes: tolerations": all(map(_is_toleration, pod.get("tolerations", ()))),
        "Kubernetes: names of variables": all(variables),
    }


def _is_toleration(one: Object) -> bool:
    has_sense = one.get("effect") == "NoExecute" or "tolerationSeconds" not in one
    return has_sense and not (one.get("operator") == "Exists" and one.get("value"))
