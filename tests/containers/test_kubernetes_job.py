"""Rendered Jobs as a cluster would run them: the real image in pods, an object server, and the Jobs' own rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from google.cloud import storage

from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.containers.job_runner import Attempt, JobRunner
from tests.containers.podman import IMAGE
from tests.containers.runs import IMAGES, assert_equal, training
from tests.job.command_line import ddpm_here, succeeded


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


def of(bucket: str, run: str) -> Store:
    return open_store(bucket).sub(f"runs/{run}")


def test_disrupted_runs_have_undisturbed_weights(bucket):
    run, ended = of(bucket, "taken"), set[str]()

    def once_it_has_saved(attempt: Attempt) -> None:
        if attempt.number > 1 or attempt.pod in ended:
            return
        if run.exists("config.yaml") and any(ref.fence == attempt.number + 1 for ref in list_checkpoints(run)):
            ended.add(attempt.pod)
            attempt.disrupt() if attempt.number else attempt.terminate()

    runner = JobRunner(rendered(*training("taken", bucket)), once_it_has_saved)
    runner.run()
    outcomes = [(attempt.exit_code, attempt.action) for attempt in runner.attempts]
    assert outcomes == [(75, "Ignore"), (75, "Ignore"), (0, "")]
    for attempt in runner.attempts[:2]:
        said = re.search(r"after ([\d,]+) images; everything is saved, and the same command goes on", attempt.output)
        assert said is not None, attempt.output
        assert int(said[1].replace(",", "")) % IMAGES, "stopped between two epochs, which proves less"
    assert max(list_checkpoints(run)).fence == 3
    JobRunner(rendered(*training("undisturbed", bucket))).run()
    assert_equal(run, of(bucket, "undisturbed"))


def test_two_slices_make_each_image_once(bucket):
    JobRunner(rendered(*training("drawn", bucket, epochs=1))).run()
    count, run = 40, of(bucket, "drawn")
    words = ("sample", "--run", "drawn", "--count", count, "--save", "png", "--bucket", bucket, "--slices", 2)
    job = rendered(*words)
    assert (job["spec"]["completions"], job["spec"]["backoffLimitPerIndex"]) == (2, 4)
    runner = JobRunner(job)
    runner.run()
    assert sorted((attempt.index, attempt.exit_code) for attempt in runner.attempts) == [(0, 0), (1, 0)]
    made = [entry.key for entry in run.list("samples") if entry.key.endswith(".png") and "-40-" in entry.key]
    assert len({key.rpartition("/")[2] for key in made if "grid" not in key}) == count
    # What is there is not made again.
    again = JobRunner(job)
    again.run()
    assert all("complete already" in attempt.output for attempt in again.attempts)
