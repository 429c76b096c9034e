"""What Kubernetes' Job controller and the JobSet controller do with a pod that ended, as their documents say it.

kubernetes.io/docs/concepts/workloads/controllers/job (pod failure policy, backoff limit per index) and
jobset.sigs.k8s.io/docs/concepts (failure policy). It is an interpretation of documents, not those controllers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True)
class End:
    """How a pod ended."""

    code: int
    """Of the program."""
    disrupted: bool = False
    """Whether the pod has the condition DisruptionTarget."""
    index: int = 0


@dataclass
class JobController:
    """A Job between the ends of its pods: fed with one after the other, it says what comes of each."""

    job: Manifest
    counted: int = 0
    counted_of: dict[int, int] = field(default_factory=dict)
    failed_indexes: set[int] = field(default_factory=set)
    reason: str = ""
    """Why it failed; empty while it has not."""
    message: str = ""

    def after(self, end: End) -> str:
        """`finished`, `retried` (not counted), `counted` (and retried), `index failed` or `failed`."""
        spec = self.job["spec"]
        if end.code == 0:
            return "finished"
        action, message = _first_match(spec.get("podFailurePolicy", {}).get("rules", []), end)
        if action == "Ignore":
            return "retried"
        if action == "FailJob":
            self.reason, self.message = "PodFailurePolicy", message
            return "failed"
        if "backoffLimitPerIndex" in spec:
            return self._count_index(end.index, spec)
        self.counted += 1
        if self.counted > spec.get("backoffLimit", 6):
            self.reason, self.message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
            return "failed"
        return "counted"

    def _count_index(self, index: int, spec: Manifest) -> str:
        self.counted_of[index] = self.counted_of.get(index, 0) + 1
        if self.counted_of[index] <= spec["backoffLimitPerIndex"]:
            return "counted"
        self.failed_indexes.add(index)
        if len(self.failed_indexes) > spec.get("maxFailedIndexes", spec["completions"]):
            self.reason, self.message = "MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number"
            return "failed"
        return "index failed"


@dataclass
class JobSetController:
    """A JobSet between the ends of its pods: a job of it that fails is judged by the failure policy."""

    job_set: Manifest
    counted: int = 0

    def after(self, end: End) -> str:
        """`finished`, `retried` (all pods, not counted), `counted` (and retried) or `failed`."""
        part = self.job_set["spec"]["replicatedJobs"][0]
        # Each restart makes the jobs anew, and with them their counts.
        job = JobController(part["template"])
        outcome = job.after(end)
        if outcome != "failed":
            return outcome
        return self.after_job(job.reason, job.message)

    def after_job(self, reason: str, message: str) -> str:
        """What comes of a job that failed for this reason."""
        policy = self.job_set["spec"]["failurePolicy"]
        action = "RestartJobSet"
        for rule in policy["rules"]:
            reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
            is_reason = not reasons or reason in reasons
            if is_reason and (not patterns or any(re.search(pattern, message) for pattern in patterns)):
                action = rule["action"]
                break
        if action == "FailJobSet":
            return "failed"
        if action == "RestartJobSetAndIgnoreMaxRestarts":
            return "retried"
        self.counted += 1
        return "failed" if self.counted > policy["maxRestarts"] else "counted"


def _first_match(rules: list[Manifest], end: End) -> tuple[str, str]:
    """Action and message of the first rule that matches; `Count` if none does."""
    pod = "default/train-celeba-0-abcde"
    for number, rule in enumerate(rules):
        action = rule["action"]
        if (on := rule.get("onExitCodes")) is not None:
            is_in = end.code in on["values"]
            if is_in == (on["operator"] == "In"):
                name = on["containerName"]
                what = f"Container {name} for pod {pod} failed with exit code {end.code} matching {action} rule"
                return action, f"{what} at index {number}"
        for condition in rule.get("onPodConditions", []):
            if end.disrupted and (condition["type"], condition["status"]) == ("DisruptionTarget", "True"):
                return action, f"Pod {pod} has condition DisruptionTarget matching {action} rule at index {number}"
    return "Count", ""
