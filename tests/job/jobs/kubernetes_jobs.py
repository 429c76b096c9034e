"""Jobs and targets for tests, and judges of manifests that are not ours: Kubernetes' schemas and JobSet's models."""

from __future__ import annotations

import functools
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils

from job.jobs.backends.kubernetes import KubernetesTarget
from job.jobs.spec import JobSpec

BUCKET = "gs://bucket"
IMAGE = "europe-docker.pkg.dev/project/images/ddpm@sha256:" + "5f" * 32
TARGET = KubernetesTarget(
    name="gke", backend="kubernetes", image=IMAGE, bucket=BUCKET, gpu_type="nvidia-l4", service_account="ddpm"
)
QUEUED = TARGET.model_copy(update={"queue": "gpus", "namespace": "training", "grace_seconds": 105})


def cluster(target: KubernetesTarget = TARGET, **changes: Any) -> KubernetesTarget:
    """A target that has sent no request yet; `changes` replace its keys."""
    return KubernetesTarget(**target.model_dump(exclude_defaults=True) | changes)


def spec(name: str = "train-celeba", **changes: Any) -> JobSpec:
    """A training job; `changes` replace its fields."""
    argv = ("train", "--dataset", "celeba", "--wait", "65", "--bucket", BUCKET)
    given: dict[str, Any] = {"verb": "train", "argv": argv, "image": IMAGE, "bucket": BUCKET, "run": "celeba"}
    return JobSpec(name=name, **given | changes)


def sampling(name: str = "sample-celeba-1a2b3c4d", slices: int = 4, **changes: Any) -> JobSpec:
    """Many images, in slices."""
    argv = ("sample", "--run", "celeba", "--checkpoints", "490", "--count", "50000", "--bucket", BUCKET)
    return spec(name, **{"verb": "sample", "argv": argv, "slices": slices} | changes)


# It reads its schemas, of megabytes, for each manifest.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def schema_problems(made: dict[str, Any], version: str = "1.34") -> list[str]:
    """What the schemas of a version of Kubernetes say against a Job or a JobSet; empty if it is right."""
    found = []
    if made["kind"] == "JobSet":
        from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

        try:
            model = JobsetV1alpha2JobSet.from_dict(made)
            # These models leave out what they do not know instead of refusing it.
            if model is None or model.to_dict() != made:
                found.append("there are fields that a JobSet does not have")
        except ValueError as error:
            found.append(str(error))
        (part,) = made["spec"]["replicatedJobs"]
        made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part["template"]}
    try:
        kubernetes_validate.validate(made, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(f"{'.'.join(map(str, error.path))}: {error.message}")
    return found
