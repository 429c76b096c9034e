"""What Kubernetes' Job controller does with a Job, over `podman kube play`: an emulation, not Kubernetes itself.

podman runs one pod of a Job and knows nothing of indexes, retries and failure policies. So each attempt at an index is
a pod of its own here, and its end is judged by the Job's own rules (kubernetes.io/docs/concepts/workloads/controllers/
job). Left out are the pauses between attempts, and all that concerns nodes: selectors, tolerations, GPUs.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.containers.podman import inspected, podman

INDEX = "JOB_COMPLETION_INDEX"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
LOOK_SECONDS = 0.2
SANDBOXES = 3
"""How often a pod is made before it counts as one that cannot be."""


@dataclass
class Attempt:
    """One pod of an index, and how it ended."""

    index: int
    number: int
    pod: str
    container: str
    conditions: list[str] = field(default_factory=list)
    """Types of conditions that are true of the pod, such as `DisruptionTarget`."""
    exit_code: int | None = None
    action: str = ""
    """What the failure policy did about it: Ignore, FailJob, FailIndex or Count; empty for a pod that succeeded."""
    output: str = ""

    def terminate(self) -> None:
        """As the kubelet does: SIGTERM to process 1, and SIGKILL after the pod's grace period."""
        podman("kill", "--signal", "TERM", self.container)

    def disrupt(self) -> None:
        """As a node that is taken away does: the pod is marked, then terminated."""
        self.conditions.append("DisruptionTarget")
        self.terminate()


class JobRunner:
    """Runs a rendered `batch/v1` Job to its end; `attempts` are all its pods, in the order in which they ended."""

    def __init__(self, job: dict[str, Any], running: Callable[[Attempt], None] = lambda attempt: None) -> None:
        """`running` is called again and again about each pod that runs, and may terminate or disrupt it."""
        assert job["kind"] == "Job"
        self.job, self.spec, self.running = job, job["spec"], running
        self.attempts: list[Attempt] = []
        self._living: dict[int, Attempt] = {}

    def run(self) -> str:
        """`Complete`, or the reason of the Job's failure: PodFailurePolicy, BackoffLimitExceeded, FailedIndexes …"""
        completions = int(self.spec["completions"])
        deadline = time.monotonic() + float(self.spec["activeDeadlineSeconds"])
        pending, succeeded, failed = list(range(completions)), set[int](), set[int]()
        counted = dict.fromkeys(pending, 0)
        while len(succeeded) + len(failed) < completions:
            while pending and len(self._living) < int(self.spec["parallelism"]):
                self._start(pending.pop(0))
            time.sleep(LOOK_SECONDS)
            for attempt in self._ended():
                if attempt.exit_code == 0:
                    succeeded.add(attempt.index)
                    continue
                attempt.action = self._action(attempt)
                if attempt.action == "FailJob":
                    return self._end("PodFailurePolicy")
                counted[attempt.index] += attempt.action == "Count"
                limit = self.spec.get("backoffLimitPerIndex")
                if limit is None and sum(counted.values()) > int(self.spec["backoffLimit"]):
                    return self._end("BackoffLimitExceeded")
                if attempt.action == "FailIndex" or (limit is not None and counted[attempt.index] > int(limit)):
                    failed.add(attempt.index)
                    if len(failed) > int(self.spec.get("maxFailedIndexes", completions)):
                        return self._end("MaxFailedIndexesExceeded")
                    continue
                pending.append(attempt.index)
            if time.monotonic() > deadline:
                return self._end("DeadlineExceeded")
        return "FailedIndexes" if failed else "Complete"

    def _start(self, index: int) -> None:
        number = sum(attempt.index == index for attempt in self.attempts)
        pod = f"{self.job['metadata']['name']}-{index}-{number}"
        template = copy.deepcopy(self.spec["template"])
        (container,) = template["spec"]["containers"]
        # podman has no index for the annotation that this variable comes from.
        others = [variable for variable in container.get("env", []) if variable["name"] != INDEX]
        container["env"] = [{"name": INDEX, "value": str(index)}, *others]
        container["args"] = [_expanded(word, index) for word in container.get("args", [])]
        metadata = {**template.get("metadata", {}), "name": pod}
        metadata["labels"] = {**metadata.get("labels", {}), INDEX_ANNOTATION: str(index)}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        attempt = Attempt(index, number, pod, f"{pod}-{container['name']}")
        self._living[index] = attempt
        # As the kubelet does with a sandbox that its runtime could not make, which says nothing about the program.
        for chance in reversed(range(SANDBOXES)):
            words = ("kube", "play", "--network", "host", "-")
            if podman(*words, check=not chance, input=json.dumps(manifest)).returncode == 0:
                return
            podman("pod", "rm", "--force", "--time", "0", pod, check=False)

    def _ended(self) -> list[Attempt]:
        ended = []
        for attempt in list(self._living.values()):
            state = inspected(attempt.container)
            if state["Status"] not in ("exited", "stopped"):
                self.running(attempt)
                continue
            attempt.exit_code = int(state["ExitCode"])
            said = podman("logs", attempt.container)
            attempt.output = said.stdout + said.stderr
            self._remove(attempt)
            ended.append(attempt)
        return ended

    def _action(self, attempt: Attempt) -> str:
        """Of the first rule that matches; a failure that none is about counts."""
        for rule in self.spec.get("podFailurePolicy", {}).get("rules", []):
            patterns = rule.get("onPodConditions", [])
            if any(pattern["status"] == "True" and pattern["type"] in attempt.conditions for pattern in patterns):
                return str(rule["action"])
            if codes := rule.get("onExitCodes"):
                own = codes.get("containerName") in (None, attempt.container.removeprefix(f"{attempt.pod}-"))
                listed = attempt.exit_code in codes["values"]
                if own and listed == (codes["operator"] == "In"):
                    return str(rule["action"])
        return "Count"

    def _end(self, reason: str) -> str:
        for attempt in list(self._living.values()):
            self._remove(attempt)
        return reason

    def _remove(self, attempt: Attempt) -> None:
        podman("pod", "rm", "--force", "--time", "0", attempt.pod)
        self.attempts.append(self._living.pop(attempt.index))


def _expanded(word: str, index: int) -> str:
    """What the kubelet makes of a word: `$(NAME)` is a variable's value, `$$` a dollar."""
    parts = word.split("$$")
    return "$".join(part.replace(f"$({INDEX})", str(index)) for part in parts)
