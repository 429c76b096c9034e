"""Rendered Jobs as a cluster would run them: the real image in pods, an object server, and a kubelet that is podman.

podman runs one pod of a Job and knows nothing of indexes, retries and failure policies. So each attempt at an index is
a pod of its own here. Which end a Job's rules have followed by another attempt, `test_manifests` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from google.cloud import storage

from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.containers.conftest import IMAGE, podman
from tests.containers.runs import IMAGES, assert_equal, training
from tests.job.command_line import ddpm_here, succeeded
from tests.job.launching import eventually

pytestmark = pytest.mark.containers
INDEX, INDEX_ANNOTATION = "JOB_COMPLETION_INDEX", "batch.kubernetes.io/job-completion-index"


def played(job: dict[str, Any], index: int = 0, attempt: int = 0) -> str:
    """Starts a pod of an index; returns the name of its container."""
    template = json.loads(json.dumps(job["spec"]["template"]))
    (container,) = template["spec"]["containers"]
    pod = f"{job['metadata']['name']}-{index}-{attempt}"
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
    return f"{pod}-{container['name']}"


def end_of(container: str) -> tuple[int, str]:
    """The exit code and the output of a pod's container; the pod is removed."""
    code, said = int(podman("wait", container).stdout), podman("logs", container)
    podman("pod", "rm", "--force", "--time", "0", container.removesuffix("-ddpm"))
    return code, said.stdout + said.stderr


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


def rendered(*words: object) -> dict[str, Any]:
    """The Job that a dry run prints."""
    return dict(yaml.safe_load(succeeded(ddpm_here("submit", *words, "--on", "cluster", "--dry-run"))))


def test_disrupted_runs_have_undisturbed_weights(bucket):
    run, other = (open_store(bucket).sub(f"runs/{name}") for name in ("taken", "undisturbed"))
    job = rendered(*training("taken", bucket))

    def has_saved(fence: int) -> bool:
        return run.exists("config.yaml") and any(ref.fence == fence for ref in list_checkpoints(run))

    for attempt in (0, 1):
        container = played(job, attempt=attempt)
        eventually(lambda: has_saved(attempt + 1), 400)  # noqa: B023
        # By the kubelet, to process 1.
        podman("kill", "--signal", "TERM", container)
        code, output = end_of(container)
        said = re.search(r"after ([\d,]+) images; everything is saved, and the same command goes on", output)
        assert code == 75 and said is not None, output
        assert int(said[1].replace(",", "")) % IMAGES, "stopped between two epochs, which proves less"
    for one in (played(job, attempt=2), played(rendered(*training("undisturbed", bucket)))):
        code, output = end_of(one)
        assert code == 0, output
    assert max(list_checkpoints(run)).fence == 3
    assert_equal(run, other)


def test_two_slices_make_each_image_once(bucket):
    assert end_of(played(rendered(*training("drawn", bucket, epochs=1))))[0] == 0
    count, words = 40, ("sample", "--run", "drawn", "--save", "png", "--bucket", bucket, "--slices", 2)
    job = rendered(*words, "--count", count)
    assert (job["spec"]["completions"], job["spec"]["backoffLimitPerIndex"]) == (2, 4)
    # What is there is not made again.
    for attempt, said in ((0, ""), (1, "complete already")):
        pods = [played(job, index, attempt) for index in (0, 1)]
        assert all(code == 0 and said in output for code, output in map(end_of, pods))
    made = [entry.key for entry in open_store(bucket).list("runs/drawn/samples") if entry.key.endswith(".png")]
    made = [key.rpartition("/")[2] for key in made if "-40-" in key and "grid" not in key]
    assert len({*made}) == count
