"""Jobs whose manifests are kept beside the tests, and judges of manifests: schemas and models that are not ours."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from job.jobs.backends.kubernetes_rules import problems
from job.jobs.spec import JobSpec
from job.jobs.targets import KubernetesTarget

GOLDEN = Path(__file__).with_name("golden") / "kubernetes"
VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes: the first where all fields are stable, one in the middle, and the newest that the schemas know."""
BUCKET = "gs://bucket"
IMAGE = "europe-docker.pkg.dev/project/images/ddpm@sha256:" + "5f" * 32
TARGET = KubernetesTarget(
    name="gke", backend="kubernetes", image=IMAGE, bucket=BUCKET, gpu_type="nvidia-l4", service_account="ddpm"
)
QUEUED = TARGET.model_copy(update={"queue": "gpus", "namespace": "training", "grace_seconds": 105})


def spec(name: str = "train-celeba", target: KubernetesTarget = TARGET, **changes: Any) -> JobSpec:
    """A training job; `changes` replace its fields."""
    argv = ("train", "--dataset", "celeba", "--wait", "65", "--bucket", BUCKET)
    given: dict[str, Any] = {"verb": "train", "argv": argv, "image": target.image, "bucket": BUCKET, "run": "celeba"}
    return JobSpec(name=name, **given | changes)


def sampling(name: str = "sample-celeba-1a2b3c4d", slices: int = 4, **changes: Any) -> JobSpec:
    """Many images, in slices."""
    argv = ("sample", "--run", "celeba", "--checkpoints", "490", "--count", "50000", "--bucket", BUCKET)
    return spec(name, **{"verb": "sample", "argv": argv, "slices": slices} | changes)


CASES: dict[str, tuple[JobSpec, KubernetesTarget]] = {
    "one-gpu-spot": (spec(), TARGET),
    "eight-gpus": (
        spec(gpus=8, gpu_type="nvidia-h100-80gb", spot=False, max_hours=72.0, labels={"team": "vision"}),
        QUEUED.model_copy(update={"cpus": "96", "memory": "800Gi", "scratch": "1Ti", "shared_memory": "64Gi"}),
    ),
    "two-nodes": (spec(nodes=2, gpus=8), TARGET),
    "sampling-slices": (sampling(), TARGET),
}
"""What is kept: the case's name is its file's."""


# It reads its schemas, of megabytes, for each manifest: hundreds of times here.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def judged(made: dict[str, Any], versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """What schemas, models and rules say against a manifest; empty if it is right."""
    return _by_schemas(made, versions) + [f"rule {text}" for text in problems(made)]


def _by_schemas(made: dict[str, Any], versions: tuple[str, ...]) -> list[str]:
    if made.get("kind") != "JobSet":
        return _by_kubernetes(made, versions)
    found = []
    try:
        model = JobsetV1alpha2JobSet.from_dict(made)
        # These models leave out what they do not know instead of refusing it.
        if model is None or model.to_dict() != made:
            found.append("model: there are fields that a JobSet does not have")
    except ValueError as error:
        found.append(f"model: {error}")
    for part in made.get("spec", {}).get("replicatedJobs", []):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part.get("template", {})}
        found += _by_kubernetes(job, versions)
    return found


def _by_kubernetes(job: dict[str, Any], versions: tuple[str, ...]) -> list[str]:
    found = []
    for version in versions:
        try:
            kubernetes_validate.validate(job, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"schema {version}: {'.'.join(map(str, error.path))}: {error.message}")
        except (KeyError, kubernetes_validate.SchemaNotFoundError) as error:
            found.append(f"schema {version}: {error!r}")
    return found
