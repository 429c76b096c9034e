"""What a control plane checks beyond its schemas.

The rules are those of JobSet's webhook (`pkg/webhooks/jobset_webhook.go` and `api/jobset/v1alpha2`, up to v0.12), of
Kueue's (`pkg/controller/jobframework/validation.go`, v0.19) and of Kubernetes' own validation of Jobs and their pods
(`pkg/apis/batch/validation`, `pkg/apis/core/validation`), as far as they are about fields that manifests here have.
Nothing of the program under test is used.
"""

from __future__ import annotations

import re
from typing import Any

Object = dict[str, Any]

KNOWN_REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}
UNGATED_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
QUEUE, QUEUE_SECONDS = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/max-exec-time-seconds"
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


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


def is_value(text: str) -> bool:
    """The value of a label."""
    return len(text) <= 63 and bool(re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", text))


def is_key(text: str) -> bool:
    """The key of a label or an annotation."""
    prefix, slash, name = text.rpartition("/")
    return bool(name) and is_value(name) and (is_subdomain(prefix) if slash else True)


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
        rules, spec = _of_job_set(made["spec"], part, pods_name), part["template"]["spec"]
    rules |= {
        "Kueue: name of the queue": is_subdomain(labels.get(QUEUE, "none")),
        "Kueue: seconds in the queue": re.fullmatch(r"[1-9][0-9]*", labels.get(QUEUE_SECONDS, "1")),
        "Kubernetes: name of the object": is_subdomain(name),
        "Kubernetes: host names of the pods": is_label(f"{pods_name}-{spec['completions'] - 1}"),
        "Kubernetes: labels": all(
            is_key(key) and is_value(value)
            for key, value in (*labels.items(), *spec["template"]["metadata"]["labels"].items())
        ),
        **_of_job(spec),
        **_of_pod(spec["template"]["spec"]),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _of_job_set(spec: Object, part: Object, longest: str) -> dict[str, Any]:
    failure_rules = spec["failurePolicy"]["rules"]
    names = [rule["name"] for rule in failure_rules]
    last = part["template"]["spec"]["completions"] - 1
    return {
        "JobSet: names of failure rules": all(
            len(name) <= 128 and re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names
        ),
        "JobSet: failure rules' names differ": len({*names}) == len(names),
        "JobSet: reasons of failure rules are known": all(
            KNOWN_REASONS.issuperset(rule.get("onJobFailureReasons", ())) for rule in failure_rules
        ),
        "JobSet: actions need no feature gate": UNGATED_ACTIONS.issuperset(rule["action"] for rule in failure_rules),
        "JobSet: names of the longest Jobs": is_service(longest),
        "JobSet: names of the longest pods": is_service(f"{longest}-{last}-abcde"),
        "JobSet: the subdomain is the name of a service": is_service(spec["network"]["subdomain"]),
        "Kueue: names of the Workload's pod sets": is_label(part["name"]),
    }


def _of_job(spec: Object) -> dict[str, Any]:
    rules = spec["podFailurePolicy"]["rules"]
    codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    containers = {None, *(one["name"] for one in spec["template"]["spec"]["containers"])}
    has_limit_per_index = "backoffLimitPerIndex" in spec
    limits = ("activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes")
    return {
        "Kubernetes: a pod failure policy needs pods that never restart": (
            spec["template"]["spec"]["restartPolicy"] == "Never"
        ),
        "Kubernetes: a pod failure policy replaces failed pods alone": (
            spec.get("podReplacementPolicy", "Failed") == "Failed"
        ),
        "Kubernetes: a rule about pods is about codes or about conditions": all(
            bool(rule.get("onExitCodes")) != bool(rule.get("onPodConditions")) for rule in rules
        ),
        "Kubernetes: exit codes are in order, and not too many": all(
            one["values"] == sorted({*one["values"]}) and 1 <= len(one["values"]) <= 255 for one in codes
        ),
        "Kubernetes: success is no failure": all(one["operator"] != "In" or 0 not in one["values"] for one in codes),
        "Kubernetes: exit codes are those of a container that exists": all(
            one.get("containerName") in containers for one in codes
        ),
        "Kubernetes: FailIndex needs a limit for each index": (
            has_limit_per_index or all(rule["action"] != "FailIndex" for rule in rules)
        ),
        "Kubernetes: a limit for each index needs indexes": (
            spec["completionMode"] == "Indexed" or not has_limit_per_index
        ),
        "Kubernetes: a limit of failed indexes needs one for each": has_limit_per_index
        or "maxFailedIndexes" not in spec,
        "Kubernetes: no more failed indexes than there are": spec.get("maxFailedIndexes", 0) <= spec["completions"],
        "Kubernetes: limits are not negative": all(spec.get(field, 0) >= 0 for field in limits),
    }


def _of_pod(pod: Object) -> dict[str, Any]:
    (container,) = pod["containers"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    return {
        "Kubernetes: what is mounted exists": (
            {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        ),
        "Kubernetes: requests are within limits": all(
            amount(value) <= amount(limits[name]) for name, value in requests.items() if name in limits
        ),
        "Kubernetes: GPUs are limits, and requests alike": all(
            limits.get(name) == value for name, value in requests.items() if "/" in name
        ),
        "Kubernetes: tolerations": all(map(_is_toleration, pod.get("tolerations", ()))),
        "Kubernetes: names of variables": all(
            re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", one["name"]) for one in container["env"]
        ),
    }


def _is_toleration(one: Object) -> bool:
    is_for_a_time = "tolerationSeconds" in one
    return not (one.get("operator") == "Exists" and one.get("value")) and (
        one.get("effect") == "NoExecute" or not is_for_a_time
    )
