"""What Kubernetes' Job controller does with a Job, over `podman kube play`: an emulation, not Kubernetes itself.

podman runs one pod of a Job and knows nothing of indexes, retries and failure policies. So each attempt at an index is
a pod of its own here, and its end is judged by the Job's own rules, as far as ours have any (kubernetes.io/docs/
concepts/workloads/controllers/job). Left out are the pauses between attempts, and all that concerns nodes.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    disrupted: bool = False
    exit_code: int | None = None
    action: str = ""
    """What the failure policy did about it: Ignore, FailJob or Count; empty for a pod that succeeded."""
    output: str = ""

    def terminate(self) -> None:
        """As the kubelet does: SIGTERM to process 1, and SIGKILL after the pod's grace period."""
        podman("kill", "--signal", "TERM", self.container)

    def disrupt(self) -> None:
        """As a node that is taken away does: the pod gets the condition DisruptionTarget, then it is terminated."""
        self.disrupted = True
        self.terminate()


class JobRunner:
    """Runs a rendered `batch/v1` Job to its end; `attempts` are all its pods, in the order in which they ended."""

    def __init__(self, job: dict[str, Any], running: Callable[[Attempt], None] = lambda attempt: None) -> None:
        """`running` is called again and again about each pod that runs, and may terminate or disrupt it."""
        assert job["kind"] == "Job" and job["spec"]["parallelism"] == job["spec"]["completions"]
        self.job, self.spec, self.running = job, job["spec"], running
        self.attempts: list[Attempt] = []
        self._living: dict[int, Attempt] = {}

    def run(self) -> None:
        """To the end. A pod that failed is followed by another where the Job's rules ignore the failure."""
        for index in range(self.spec["completions"]):
            self._start(index)
        while self._living:
            time.sleep(LOOK_SECONDS)
            for attempt in self._ended():
                if attempt.exit_code:
                    attempt.action = self._action(attempt)
                    assert attempt.action == "Ignore", attempt.output
                    self._start(attempt.index)

    def _start(self, index: int) -> None:
        number = sum(attempt.index == index for attempt in self.attempts)
        pod = f"{self.job['metadata']['name']}-{index}-{number}"
        template = copy.deepcopy(self.spec["template"])
        (container,) = template["spec"]["containers"]
        # podman has no index for the annotation that this variable comes from, and the kubelet replaces it in words.
        others = [variable for variable in container.get("env", []) if variable["name"] != INDEX]
        container["env"] = [{"name": INDEX, "value": str(index)}, *others]
        container["args"] = [word.replace(f"$({INDEX})", str(index)) for word in container.get("args", [])]
        labels = {**template["metadata"]["labels"], INDEX_ANNOTATION: str(index)}
        metadata = {**template["metadata"], "name": pod, "labels": labels}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self._living[index] = Attempt(index, number, pod, f"{pod}-{container['name']}")
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
        for rule in self.spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {"operator": "In", "values": []})
            assert codes["operator"] == "In"
            on_disruption = any(pattern["type"] == "DisruptionTarget" for pattern in rule.get("onPodConditions", []))
            if attempt.exit_code in codes["values"] or (on_disruption and attempt.disrupted):
                return str(rule["action"])
        return "Count"

    def _remove(self, attempt: Attempt) -> None:
        podman("pod", "rm", "--force", "--time", "0", attempt.pod)
        self.attempts.append(self._living.pop(attempt.index))
