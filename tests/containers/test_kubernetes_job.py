"""Rendered Jobs as a cluster would run them: the real image in pods, an object server, and the Jobs' own rules.

podman runs one pod of a Job and knows nothing of indexes, retries and failure policies. So each attempt at an index is
a pod of its own here, and its end is judged by the Job's own rules, as far as ours have any (kubernetes.io/docs/
concepts/workloads/controllers/job). Left out are the pauses between attempts, and all that concerns nodes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from google.cloud import storage

from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.containers.conftest import IMAGE, inspected, podman
from tests.containers.runs import IMAGES, assert_equal, training
from tests.job.command_line import ddpm_here, succeeded

pytestmark = pytest.mark.containers
INDEX, INDEX_ANNOTATION = "JOB_COMPLETION_INDEX", "batch.kubernetes.io/job-completion-index"
Job = dict[str, Any]


@dataclass
class Attempt:
    """One pod of an index, and how it ended."""

    index: int
    number: int
    pod: str
    container: str
    disrupted: bool = False
    exit_code: int | None = None
    output: str = ""

    def terminate(self, disrupted: bool) -> None:
        """As the kubelet does, by SIGTERM to process 1; a node that is taken away gives the pod a condition, too."""
        self.disrupted = disrupted
        podman("kill", "--signal", "TERM", self.container)


def run_job(job: Job, running: Callable[[Attempt], None] = lambda attempt: None) -> list[Attempt]:
    """Runs a `batch/v1` Job to its end; returns all its pods, in the order in which they ended.

    A pod that failed is followed by another where the Job's rules ignore the failure. `running` is called again and
    again about each pod that runs, and may terminate it.
    """
    assert job["kind"] == "Job" and job["spec"]["parallelism"] == job["spec"]["completions"]
    living, over = [_started(job, index, 0) for index in range(job["spec"]["completions"])], list[Attempt]()
    while living:
        time.sleep(0.2)
        for attempt in [*living]:
            state = inspected(attempt.container)["State"]
            if state["Status"] not in ("exited", "stopped"):
                running(attempt)
                continue
            said = podman("logs", attempt.container)
            attempt.exit_code, attempt.output = int(state["ExitCode"]), said.stdout + said.stderr
            podman("pod", "rm", "--force", "--time", "0", attempt.pod)
            living.remove(attempt)
            over.append(attempt)
            if attempt.exit_code:
                assert _action(job, attempt) == "Ignore", attempt.output
                living.append(_started(job, attempt.index, attempt.number + 1))
    return over


def _started(job: Job, index: int, number: int) -> Attempt:
    template = json.loads(json.dumps(job["spec"]["template"]))
    (container,) = template["spec"]["containers"]
    pod = f"{job['metadata']['name']}-{index}-{number}"
    # podman has no index for the annotation that this variable comes from, and the kubelet replaces it in words.
    others = [variable for variable in container.get("env", []) if variable["name"] != INDEX]
    container["env"] = [{"name": INDEX, "value": str(index)}, *others]
    container["args"] = [word.replace(f"$({INDEX})", str(index)) for word in container.get("args", [])]
    template["metadata"]["labels"][INDEX_ANNOTATION] = str(index)
    manifest = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": pod}}
    # As the kubelet does with a sandbox that its runtime could not make, which says nothing about the program.
    for is_last in (False, False, True):
        words = ("kube", "play", "--network", "host", "-")
        if podman(*words, check=is_last, input=json.dumps(manifest)).returncode == 0:
            break
        podman("pod", "rm", "--force", "--time", "0", pod, check=False)
    return Attempt(index, number, pod, f"{pod}-{container['name']}")


def _action(job: Job, attempt: Attempt) -> str:
    """Of the first rule that matches; a failure that none is about counts."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        assert codes["operator"] == "In"
        on_disruption = any(pattern["type"] == "DisruptionTarget" for pattern in rule.get("onPodConditions", []))
        if attempt.exit_code in codes["values"] or (on_disruption and attempt.disrupted):
            return str(rule["action"])
    return "Count"


@pytest.fixture(scope="module")
def bucket(gcs_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gs:// bucket with the packed images, and a target whose pods find its server on the host's loopback."""
    storage.Client(project="test").create_bucket("pods")
    target = {"backend": "kubernetes", "image": IMAGE, "bucket": "gs://pods", "cluster": "plain", "gpus": 0}
    target |= {"memory": "4Gi", "grace_seconds": 30}
    target |= {"env": {"STORAGE_EMULATOR_HOST": gcs_server, "OMP_NUM_THREADS": "1"}}
    folder = tmp_path_factory.mktemp("kubernetes")
    (folder / "targets.yaml").write_text(json.dumps({"cluster": target}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", "gs://pods"))
        yield "gs://pods"


def rendered(*words: object) -> Job:
    """The Job that a dry run prints."""
    return dict(yaml.safe_load(succeeded(ddpm_here("submit", *words, "--on", "cluster", "--dry-run"))))


def of(bucket: str, run: str) -> Store:
    return open_store(bucket).sub(f"runs/{run}")


def test_disrupted_runs_have_undisturbed_weights(bucket):
    run, ended = of(bucket, "taken"), set[str]()

    def once_it_has_saved(attempt: Attempt) -> None:
        if attempt.number > 1 or attempt.pod in ended:
            return
        if run.exists("config.yaml") and any(ref.fence == attempt.number + 1 for ref in list_checkpoints(run)):
            ended.add(attempt.pod)
            attempt.terminate(disrupted=attempt.number == 1)

    attempts = run_job(rendered(*training("taken", bucket)), once_it_has_saved)
    assert [attempt.exit_code for attempt in attempts] == [75, 75, 0]
    for attempt in attempts[:2]:
        said = re.search(r"after ([\d,]+) images; everything is saved, and the same command goes on", attempt.output)
        assert said is not None, attempt.output
        assert int(said[1].replace(",", "")) % IMAGES, "stopped between two epochs, which proves less"
    assert max(list_checkpoints(run)).fence == 3
    run_job(rendered(*training("undisturbed", bucket)))
    assert_equal(run, of(bucket, "undisturbed"))


def test_two_slices_make_each_image_once(bucket):
    run_job(rendered(*training("drawn", bucket, epochs=1)))
    count, run = 40, of(bucket, "drawn")
    words = ("sample", "--run", "drawn", "--count", count, "--save", "png", "--bucket", bucket, "--slices", 2)
    job = rendered(*words)
    assert (job["spec"]["completions"], job["spec"]["backoffLimitPerIndex"]) == (2, 4)
    assert sorted((attempt.index, attempt.exit_code) for attempt in run_job(job)) == [(0, 0), (1, 0)]
    made = [entry.key for entry in run.list("samples") if entry.key.endswith(".png") and "-40-" in entry.key]
    assert len({key.rpartition("/")[2] for key in made if "grid" not in key}) == count
    # What is there is not made again.
    assert all("complete already" in attempt.output for attempt in run_job(job))
