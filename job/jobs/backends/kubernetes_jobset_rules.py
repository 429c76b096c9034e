"""What the schema of a JobSet does not say: names that refer to one another, enumerations, patterns that compile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)
_STRATEGIES = ("Recreate", "BlockingRecreate", "InPlaceRestart")
_REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_SUBDOMAIN = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def jobset_problems(name: str, spec: dict[str, Any]) -> list[str]:
    """What is wrong with the parts of a JobSet that its jobs do not have; see `kubernetes_rules.problems`."""
    found = [f"jobset: {text}" for check in (_parts, _meeting, _failure_policy) for text in check(spec)]
    if not _SUBDOMAIN.fullmatch(name):
        found.append(f"jobset: {name!r} cannot name a JobSet: it is a DNS label that begins with a letter")
    return found


def _parts(spec: dict[str, Any]) -> Iterator[str]:
    parts = spec.get("replicatedJobs", [])
    names = [part.get("name") for part in parts]
    if not parts or not all(names) or len(set(names)) < len(names):
        yield "its jobs have different names, and there is at least one"
    for part in parts:
        if part.get("replicas") != 1:
            yield f"replicas of {part.get('name')!r} is {part.get('replicas')}: one job has an index for each node"
        if part.get("template", {}).get("spec", {}).get("backoffLimit") != 0:
            yield "a job with retries of its own would replace one pod, and its peers would wait for it in vain"


def _meeting(spec: dict[str, Any]) -> Iterator[str]:
    network, coordinator = spec.get("network", {}), spec.get("coordinator", {})
    if network.get("enableDNSHostnames") is not True or network.get("publishNotReadyAddresses") is not True:
        yield "nodes find each other by names, before any of them is ready"
    if not _SUBDOMAIN.fullmatch(network.get("subdomain", "")):
        yield f"subdomain {network.get('subdomain')!r} is no DNS label"
    parts = {part.get("name"): part for part in spec.get("replicatedJobs", [])}
    if coordinator.get("replicatedJob") not in parts:
        yield f"the coordinator is in {coordinator.get('replicatedJob')!r}, which is none of its jobs"
    for field in ("jobIndex", "podIndex"):
        if coordinator.get(field) != 0:
            yield f"{field} of the coordinator is {coordinator.get(field)}, and rank 0 is where both are 0"
    for part in parts.values():
        for container in _containers(part):
            variables = {entry.get("name"): entry.get("value") for entry in container.get("env", [])}
            yield from _rendezvous(variables, network.get("subdomain"), part)


def _rendezvous(variables: dict[str, Any], subdomain: Any, part: dict[str, Any]) -> Iterator[str]:
    nodes = part.get("template", {}).get("spec", {}).get("completions")
    for prefix in ("", "PET_"):
        if variables.get(f"{prefix}NNODES") != str(nodes):
            yield f"{prefix}NNODES is {variables.get(f'{prefix}NNODES')!r}, and there are {nodes} pods"
        if variables.get(f"{prefix}NODE_RANK") != "$(JOB_COMPLETION_INDEX)":
            yield f"{prefix}NODE_RANK is not the pod's index"
        if not str(variables.get(f"{prefix}MASTER_PORT")).isdecimal():
            yield f"{prefix}MASTER_PORT is no port"
        address = str(variables.get(f"{prefix}MASTER_ADDR"))
        if not address.endswith(f"-{part.get('name')}-0-0.{subdomain}"):
            yield f"{prefix}MASTER_ADDR {address!r} is not where the coordinator is"


def _failure_policy(spec: dict[str, Any]) -> Iterator[str]:
    policy = spec.get("failurePolicy", {})
    if not isinstance(policy.get("maxRestarts"), int) or policy["maxRestarts"] < 0:
        yield "without maxRestarts it is not said how often a crash is retried"
    if policy.get("restartStrategy") not in _STRATEGIES:
        yield f"restartStrategy is {policy.get('restartStrategy')!r}, not one of {', '.join(_STRATEGIES)}"
    names = [rule.get("name") for rule in policy.get("rules", [])]
    if not names or len(set(names)) < len(names) or not all(_RULE_NAME.fullmatch(name or "") for name in names):
        yield "the rules of the failurePolicy have different names of letters, digits and '_'"
    for rule in policy.get("rules", []):
        if rule.get("action") not in _ACTIONS:
            yield f"action is {rule.get('action')!r}, not one of {', '.join(_ACTIONS)}"
        for reason in rule.get("onJobFailureReasons", []) or [None]:
            if reason not in _REASONS:
                yield f"{reason!r} is no reason for which a Job fails"
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"the pattern {pattern!r} does not compile: {error}"


def _containers(part: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        part.get("template", {}).get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])
    )
    return found
