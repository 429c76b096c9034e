"""Jobs for VMs and for Batch whose requests are kept beside the tests."""

from __future__ import annotations

from typing import Any

from job.jobs.backends.batch import BatchTarget
from job.jobs.backends.google import GoogleTarget
from job.jobs.backends.vm import VmTarget
from job.jobs.spec import JobSpec

BUCKET = "gs://bucket"
ZONES, REGIONS = ["us-central1-a", "us-east1-c"], ["us-central1", "us-east1"]
COMMON: dict[str, Any] = {
    "project": "my-project",
    "image": "us-central1-docker.pkg.dev/my-project/ddpm/ddpm:1",
    "service_account": "ddpm-job@my-project.iam.gserviceaccount.com",
}
VM = VmTarget(name="vm", backend="vm", zones=ZONES, **COMMON)
BATCH = BatchTarget(name="batch", backend="batch", regions=REGIONS, **COMMON)


def spec(name: str = "celeba", **changes: Any) -> JobSpec:
    """A training job; `changes` replace its fields."""
    argv = ("train", "--dataset", "celeba", "--wait", "65", "--bucket", BUCKET)
    given: dict[str, Any] = {"verb": "train", "argv": argv, "image": VM.image, "bucket": BUCKET, "run": "celeba"}
    return JobSpec(name=name, **given | changes)


def sampling(slices: int = 3, **changes: Any) -> JobSpec:
    """Many images, in slices."""
    argv = ("sample", "--run", "celeba", "--checkpoints", "490", "--count", "50000", "--bucket", BUCKET)
    return spec("sample-celeba", **{"verb": "sample", "argv": argv, "slices": slices} | changes)


def backend_of(engine: str, **changes: Any) -> GoogleTarget:
    """A target in which `changes` replace fields."""
    return {"vm": VM, "batch": BATCH}[engine].model_copy(update=changes)


def metadata_of(instance: dict[str, Any]) -> dict[str, str]:
    """What a VM knows of its job, by key."""
    return {item["key"]: item["value"] for item in instance["metadata"]["items"]}
