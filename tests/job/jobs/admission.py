"""What a control plane checks beyond its schemas, as one table: each rule with a change that breaks it.

The rules are those of JobSet's webhook (`pkg/webhooks/jobset_webhook.go` and `api/jobset/v1alpha2`, up to v0.12), of
Kueue's (`pkg/controller/jobframework/validation.go`, v0.19) and of Kubernetes' own validation of Jobs and their pods
(`pkg/apis/batch/validation`, `pkg/apis/core/validation`), as far as they are about fields that manifests here have, or
could come to have. Nothing of the program under test is used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

MOST_INT32 = 2**31 - 1
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


# Parts of a manifest.


def sets(made: Object) -> list[Object]:
    """The specs of a JobSet; none of a Job."""
    return [made["spec"]] if made["kind"] == "JobSet" else []


def parts(made: Object) -> list[Object]:
    """The replicated jobs of a JobSet."""
    return [part for spec in sets(made) for part in spec["replicatedJobs"]]


def failure_rules(made: Object) -> list[Object]:
    """Those of a JobSet's failure policy."""
    return [rule for spec in sets(made) for rule in spec.get("failurePolicy", {}).get("rules", ())]


def jobs(made: Object) -> list[tuple[str, Object]]:
    """Name and spec of the Jobs that come of it; of several alike the one with the longest name."""
    if made["kind"] == "Job":
        return [(made["metadata"]["name"], made["spec"])]
    named = ((f"{made['metadata']['name']}-{part['name']}-{part['replicas'] - 1}", part) for part in parts(made))
    return [(name, part["template"]["spec"]) for name, part in named]


def job(made: Object) -> Object:
    """The spec of the one Job."""
    return jobs(made)[0][1]


def pods(made: Object) -> list[Object]:
    """The specs of pods."""
    return [spec["template"]["spec"] for _, spec in jobs(made)]


def container(made: Object) -> Object:
    """The one container."""
    return pods(made)[0]["containers"][0]


def labels(made: Object) -> dict[str, str]:
    """Those of the object itself."""
    return made["metadata"].get("labels", {})


def pod_rules(made: Object) -> list[Object]:
    """Those of the Jobs' pod failure policies."""
    return [rule for _, spec in jobs(made) for rule in spec.get("podFailurePolicy", {}).get("rules", ())]


def exit_codes(made: Object) -> list[Object]:
    """The parts of pod failure policies about exit codes."""
    return [rule["onExitCodes"] for rule in pod_rules(made) if "onExitCodes" in rule]


def coordinators(made: Object) -> Iterator[tuple[Object, Object | None]]:
    """A JobSet's coordinator, and the replicated job that it names, if there is one."""
    for spec in sets(made):
        if there := spec.get("coordinator"):
            yield there, next((part for part in parts(made) if part["name"] == there["replicatedJob"]), None)


def named(coordinator: Object) -> Callable[[Object], None]:
    """A change that gives a JobSet a coordinator."""
    return lambda made: made["spec"].update(
        coordinator={"replicatedJob": "node", "jobIndex": 0, "podIndex": 0, **coordinator}
    )


def host(made: Object, there: Object) -> str:
    """The address of a coordinator, which is the value of a label as well."""
    where = f"{there['replicatedJob']}-{there.get('jobIndex', 0)}-{there.get('podIndex', 0)}"
    name = made["metadata"]["name"]
    return f"{name}-{where}.{made['spec'].get('network', {}).get('subdomain') or name}"


def both(*changes: Callable[[Object], None]) -> Callable[[Object], None]:
    """One change after another."""

    def change(made: Object) -> None:
        for each in changes:
            each(made)

    return change


def longer(made: Object) -> None:
    """Gives a manifest a name of 63 characters, which is valid by itself."""
    made["metadata"]["name"] = "t" * 63


def with_rule(**changes: Any) -> Callable[[Object], None]:
    """A change of the first rule of a JobSet's failure policy."""
    return lambda made: failure_rules(made)[0].update(changes)


def with_codes(**changes: Any) -> Callable[[Object], None]:
    """A change of the first exit codes of a pod failure policy."""
    return lambda made: exit_codes(made)[0].update(changes)


@dataclass(frozen=True)
class Rule:
    """One check.

    Attributes:
        by: who refuses what does not keep it.
        name: what it is about.
        holds: whether a manifest keeps it.
        breaks: changes a manifest of `kind`, which kept all rules, so that it does not keep this one.
        kind: of which manifests it can be broken.
    """

    by: str
    name: str
    holds: Callable[[Object], bool]
    breaks: Callable[[Object], None]
    kind: str = "JobSet"


def _every(values: Callable[[Object], Any], check: Callable[[Any], object]) -> Callable[[Object], bool]:
    return lambda made: all(map(check, values(made)))


def _indexed(part: Object | None) -> bool:
    spec = part["template"]["spec"] if part else {}
    return spec.get("completionMode") == "Indexed" and bool(spec.get("completions"))


def _requests_fit(made: Object) -> bool:
    for pod in pods(made):
        for one in pod["containers"]:
            limits, requests = one["resources"].get("limits", {}), one["resources"].get("requests", {})
            if any(amount(value) > amount(limits[name]) for name, value in requests.items() if name in limits):
                return False
    return True


def _gpus_are_limits(made: Object) -> bool:
    resources = [one["resources"] for pod in pods(made) for one in pod["containers"]]
    names = {name for one in resources for name in one.get("requests", {}) if "/" in name}
    return all(one.get("limits", {}).get(name) == one["requests"][name] for one in resources for name in names)


def _on_taint(toleration: Object) -> bool:
    exists, effect = toleration.get("operator") == "Exists", toleration.get("effect", "")
    for_a_time = "tolerationSeconds" in toleration
    return not (exists and toleration.get("value")) and (effect == "NoExecute" or not for_a_time)


JOBSET, KUEUE, KUBERNETES = "JobSet", "Kueue", "Kubernetes"
RULES = [
    Rule(
        JOBSET,
        "names of failure rules",
        _every(failure_rules, lambda rule: re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])),
        with_rule(name="taken-away"),
    ),
    Rule(
        JOBSET,
        "length of failure rules' names",
        _every(failure_rules, lambda rule: 1 <= len(rule["name"]) <= 128),
        with_rule(name="r" * 129),
    ),
    Rule(
        JOBSET,
        "failure rules' names differ",
        lambda made: len({rule["name"] for rule in failure_rules(made)}) == len(failure_rules(made)),
        lambda made: failure_rules(made)[1].update(name=failure_rules(made)[0]["name"]),
    ),
    Rule(
        JOBSET,
        "failure rules are about replicated jobs that exist",
        lambda made: all(
            {part["name"] for part in parts(made)} >= {*rule.get("targetReplicatedJobs", ())}
            for rule in failure_rules(made)
        ),
        with_rule(targetReplicatedJobs=["other"]),
    ),
    Rule(
        JOBSET,
        "reasons of failure rules are known",
        _every(failure_rules, lambda rule: KNOWN_REASONS.issuperset(rule.get("onJobFailureReasons", ()))),
        with_rule(onJobFailureReasons=["Evicted"]),
    ),
    Rule(
        JOBSET,
        "actions need no feature gate",
        _every(failure_rules, lambda rule: rule["action"] in UNGATED_ACTIONS),
        with_rule(action="RestartJob"),
    ),
    Rule(
        JOBSET,
        "the success policy is about replicated jobs that exist",
        lambda made: all(
            {part["name"] for part in parts(made)} >= {*spec.get("successPolicy", {}).get("targetReplicatedJobs", ())}
            for spec in sets(made)
        ),
        lambda made: made["spec"].update(successPolicy={"operator": "All", "targetReplicatedJobs": ["other"]}),
    ),
    Rule(
        JOBSET,
        "names of the longest Jobs",
        lambda made: not sets(made) or all(is_service(name) for name, _ in jobs(made)),
        longer,
    ),
    Rule(
        JOBSET,
        "names of the longest pods",
        lambda made: (
            not sets(made) or all(is_service(f"{name}-{spec['completions'] - 1}-abcde") for name, spec in jobs(made))
        ),
        lambda made: made["metadata"].update(name="t" * 49),
    ),
    Rule(
        JOBSET,
        "names of groups",
        _every(parts, lambda part: is_service(part.get("groupName", "default"))),
        lambda made: parts(made)[0].update(groupName="1st"),
    ),
    Rule(
        JOBSET,
        "the subdomain is the name of a service",
        _every(sets, lambda spec: is_service(spec.get("network", {}).get("subdomain") or "default")),
        lambda made: made["spec"]["network"].update(subdomain="train.celeba"),
    ),
    Rule(
        JOBSET,
        "pods can be counted",
        _every(parts, lambda part: part["replicas"] * part["template"]["spec"].get("parallelism", 1) <= MOST_INT32),
        lambda made: parts(made)[0].update(replicas=2**30 + 1),
    ),
    Rule(
        JOBSET,
        "the coordinator is in a replicated job that exists",
        _every(coordinators, lambda pair: pair[1] is not None),
        named({"replicatedJob": "other"}),
    ),
    Rule(
        JOBSET,
        "the coordinator's Job is indexed",
        _every(coordinators, lambda pair: pair[1] is None or _indexed(pair[1])),
        both(named({}), lambda made: job(made).update(completionMode="NonIndexed")),
    ),
    Rule(
        JOBSET,
        "the coordinator's Job exists",
        _every(coordinators, lambda pair: pair[1] is None or 0 <= pair[0].get("jobIndex", 0) < pair[1]["replicas"]),
        named({"jobIndex": 1}),
    ),
    Rule(
        JOBSET,
        "the coordinator's pod exists",
        _every(
            coordinators,
            lambda both: (
                not _indexed(both[1]) or 0 <= both[0].get("podIndex", 0) < both[1]["template"]["spec"]["completions"]
            ),
        ),
        named({"podIndex": 2}),
    ),
    Rule(
        JOBSET,
        "the coordinator's address is a label's value",
        lambda made: all(is_value(host(made, there)) for there, _ in coordinators(made)),
        both(named({}), lambda made: made["metadata"].update(name="t" * 48)),
    ),
    Rule(
        KUEUE,
        "name of the queue",
        lambda made: is_subdomain(labels(made).get(QUEUE, "none")),
        lambda made: labels(made).update({QUEUE: "My_Queue"}),
    ),
    Rule(
        KUEUE,
        "seconds in the queue",
        lambda made: bool(re.fullmatch(r"[1-9][0-9]*", labels(made).get(QUEUE_SECONDS, "1"))),
        lambda made: labels(made).update({QUEUE_SECONDS: "0"}),
    ),
    Rule(
        KUEUE,
        "names of the Workload's pod sets",
        _every(parts, lambda part: is_label(part["name"])),
        lambda made: parts(made)[0].update(name="Node"),
    ),
    Rule(
        KUBERNETES,
        "name of the object",
        lambda made: is_subdomain(made["metadata"]["name"]),
        lambda made: made["metadata"].update(name="Train"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "host names of the pods",
        lambda made: all(
            is_label(f"{name}-{spec['completions'] - 1}")
            for name, spec in jobs(made)
            if spec["completionMode"] == "Indexed"
        ),
        longer,
        "Job",
    ),
    Rule(
        KUBERNETES,
        "labels",
        lambda made: all(
            is_key(key) and is_value(value)
            for there in (labels(made), *(spec["template"]["metadata"]["labels"] for _, spec in jobs(made)))
            for key, value in there.items()
        ),
        lambda made: labels(made).update({"ddpm-run": "a b"}),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "a pod failure policy needs pods that never restart",
        lambda made: all(spec["template"]["spec"]["restartPolicy"] == "Never" for _, spec in jobs(made)),
        lambda made: pods(made)[0].update(restartPolicy="OnFailure"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "a pod failure policy replaces failed pods alone",
        lambda made: all(spec.get("podReplacementPolicy", "Failed") == "Failed" for _, spec in jobs(made)),
        lambda made: job(made).update(podReplacementPolicy="TerminatingOrFailed"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "at most twenty rules about pods",
        lambda made: all(len(spec.get("podFailurePolicy", {}).get("rules", ())) <= 20 for _, spec in jobs(made)),
        lambda made: job(made)["podFailurePolicy"].update(rules=pod_rules(made)[:1] * 21),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "a rule about pods is about codes or about conditions",
        _every(pod_rules, lambda rule: bool(rule.get("onExitCodes")) != bool(rule.get("onPodConditions"))),
        lambda made: pod_rules(made)[0].update(onPodConditions=[]),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "exit codes are in order, and not too many",
        _every(exit_codes, lambda one: one["values"] == sorted({*one["values"]}) and 1 <= len(one["values"]) <= 255),
        with_codes(values=[75, 2]),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "success is no failure",
        _every(exit_codes, lambda one: one["operator"] != "In" or 0 not in one["values"]),
        with_codes(operator="In", values=[0, 75]),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "exit codes are those of a container that exists",
        lambda made: all(
            one.get("containerName") in (None, *(each["name"] for each in pod["containers"]))
            for pod in pods(made)
            for one in exit_codes(made)
        ),
        with_codes(containerName="train"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "FailIndex needs a limit for each index",
        lambda made: all(
            rule["action"] != "FailIndex" or "backoffLimitPerIndex" in spec
            for _, spec in jobs(made)
            for rule in spec.get("podFailurePolicy", {}).get("rules", ())
        ),
        lambda made: pod_rules(made)[-1].update(action="FailIndex"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "a limit for each index needs indexes",
        lambda made: all(
            spec["completionMode"] == "Indexed" or "backoffLimitPerIndex" not in spec for _, spec in jobs(made)
        ),
        lambda made: job(made).update(completionMode="NonIndexed"),
    ),
    Rule(
        KUBERNETES,
        "a limit of failed indexes needs one for each",
        lambda made: all("maxFailedIndexes" not in spec or "backoffLimitPerIndex" in spec for _, spec in jobs(made)),
        lambda made: job(made).pop("backoffLimitPerIndex"),
    ),
    Rule(
        KUBERNETES,
        "no more failed indexes than there are",
        lambda made: all(spec.get("maxFailedIndexes", 0) <= spec["completions"] for _, spec in jobs(made)),
        lambda made: job(made).update(maxFailedIndexes=3),
    ),
    Rule(
        KUBERNETES,
        "limits are not negative",
        lambda made: all(
            spec.get(field, 0) >= 0
            for _, spec in jobs(made)
            for field in ("activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes")
        ),
        lambda made: job(made).update(backoffLimit=-1),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "what is mounted exists",
        lambda made: all(
            {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", ())}
            <= {volume["name"] for volume in pod.get("volumes", ())}
            for pod in pods(made)
        ),
        lambda made: pods(made)[0]["volumes"].pop(),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "requests are within limits",
        _requests_fit,
        lambda made: container(made)["resources"]["requests"].update(cpu="4000"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "GPUs are limits, and requests alike",
        _gpus_are_limits,
        lambda made: container(made)["resources"]["requests"].update({"nvidia.com/gpu": "0"}),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "tolerations",
        lambda made: all(_on_taint(one) for pod in pods(made) for one in pod.get("tolerations", ())),
        lambda made: pods(made)[0]["tolerations"][-1].update(operator="Exists", value="x"),
        "Job",
    ),
    Rule(
        KUBERNETES,
        "names of variables",
        lambda made: all(
            re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", one["name"]) for one in container(made).get("env", ())
        ),
        lambda made: container(made)["env"].append({"name": "A B", "value": ""}),
        "Job",
    ),
]


def refusals(made: Object) -> list[str]:
    """The rules that a manifest does not keep, each as `WHO: RULE`."""
    return [f"{rule.by}: {rule.name}" for rule in RULES if not rule.holds(made)]


def broken(rule: Rule, made: Object) -> Object:
    """A copy of a manifest that does not keep one rule."""
    changed = copy.deepcopy(made)
    rule.breaks(changed)
    return changed
