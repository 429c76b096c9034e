"""Jobs for VMs and for Batch whose requests are kept beside the tests, and the servers that clients talk to here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.jobs.backends.batch import batch_job
from job.jobs.backends.vm import vm_instances
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget, VmTarget
from tests.job.jobs.google_server import PROJECT

GOLDEN = Path(__file__).with_name("golden")
BUCKET = "gs://bucket"
IMAGE = "us-central1-docker.pkg.dev/my-project/ddpm/ddpm:1"
ACCOUNT = "ddpm@my-project.iam.gserviceaccount.com"
ZONES, REGIONS = ("us-central1-a", "us-east1-c"), ("us-central1", "us-east1")
VM = VmTarget(name="vm", backend="vm", project=PROJECT, zones=ZONES, image=IMAGE, service_account=ACCOUNT)
BATCH = BatchTarget(
    name="batch", backend="batch", project=PROJECT, regions=REGIONS, image=IMAGE, service_account=ACCOUNT
)
EIGHT = {"machine_type": "g2-standard-96", "network": "ddpm", "subnetwork": "ddpm-us-central1"}
T4 = {"machine_type": "n1-standard-8", "gpu_type": "nvidia-tesla-t4", "service_account": ""}


def spec(name: str = "celeba", **changes: Any) -> JobSpec:
    """A training job; `changes` replace its fields."""
    argv = ("train", "--dataset", "celeba", "--wait", "65", "--bucket", BUCKET)
    given: dict[str, Any] = {"verb": "train", "argv": argv, "image": IMAGE, "bucket": BUCKET, "run": "celeba"}
    return JobSpec(name=name, **given | changes)


def sampling(name: str = "sample-celeba", slices: int = 3, **changes: Any) -> JobSpec:
    """Many images, in slices."""
    argv = ("sample", "--run", "celeba", "--checkpoints", "490", "--count", "50000", "--bucket", BUCKET)
    return spec(name, **{"verb": "sample", "argv": argv, "slices": slices} | changes)


JOBS: dict[str, tuple[JobSpec, dict[str, Any]]] = {
    "one-gpu-spot": (spec(env={"NCCL_DEBUG": "INFO"}), {}),
    "eight-gpus": (spec(gpus=8, spot=False, max_hours=72.0), EIGHT),
    "extra-gpus": (spec(gpus=2), T4),
    "sampling-slices": (sampling(), {}),
}
"""The case's name is its file's: the job, and what differs in the target."""


def rendered(backend: str, case: str) -> list[dict[str, Any]]:
    """What is sent for a case of `JOBS`."""
    one, changes = JOBS[case]
    if backend == "vm":
        return vm_instances(one, VM.model_copy(update=changes), ZONES[0])
    return [batch_job(one, BATCH.model_copy(update=changes), REGIONS[0])]


def metadata_of(instance: dict[str, Any]) -> dict[str, str]:
    """What a VM knows of its job, by key."""
    return {item["key"]: item["value"] for item in instance["metadata"]["items"]}


def never() -> bool:
    """Nobody stops this test."""
    return False
