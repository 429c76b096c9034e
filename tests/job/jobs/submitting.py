"""Targets of every kind, jobs made of words or of fields for them, and outputs that are kept beside the tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml

import job
from job.cli import command
from job.cli.app import EXAMPLES
from job.jobs.backends import JobStatus, Target
from job.jobs.spec import JobSpec
from job.jobs.submit import spec_of
from job.jobs.targets import BACKENDS, BUILT_IN, parse_targets, target_on
from job.requests import JobRequest, SubmitRequest

TARGETS = """
local: {bucket: gs://of-local}
gke: {backend: kubernetes, image: registry/ddpm:1, bucket: gs://bucket, gpu_type: nvidia-l4, grace_seconds: 105}
vm: {backend: vm, project: my-project, zones: [us-east1-b], image: registry/ddpm:1, bucket: gs://bucket, spot: false}
plain: {backend: kubernetes, cluster: plain, image: i, bucket: gs://bucket, gpu_type: nvidia-l4, gpus: 8}
own: {backend: kubernetes, node_selector: {gpu: l4}, image: i, bucket: gs://bucket}
bare: {backend: kubernetes, bucket: gs://bucket}
s3: {backend: kubernetes, image: i, env: {A: b}}
queued: {backend: kubernetes, image: i, bucket: gs://bucket, queue: gpus}
batch: {backend: batch, project: my-project, regions: [us-east1], image: registry/ddpm:1, bucket: gs://bucket}
"""
GKE = {"image": "registry.example.com/ddpm@sha256:" + "5f" * 32, "bucket": "gs://bucket", "gpu_type": "nvidia-l4"}
GKE |= {"backend": "kubernetes", "service_account": "ddpm"}
QUEUED = GKE | {"queue": "gpus", "namespace": "training", "grace_seconds": 105}
GOOGLE = {"project": "my-project", "image": "us-central1-docker.pkg.dev/my-project/ddpm/ddpm:1"}
GOOGLE |= {"service_account": "ddpm-job@my-project.iam.gserviceaccount.com"}
ZONES, REGIONS = ["us-central1-a", "us-east1-c"], ["us-central1", "us-east1"]
KEYS = {"gke": GKE, "queued": QUEUED, "vm": GOOGLE | {"backend": "vm", "zones": ZONES}}
KEYS |= {"batch": GOOGLE | {"backend": "batch", "regions": REGIONS}}
DOCS = Path(job.__file__).parents[1] / "docs"
FOR_TRAIN = ["--dataset", "celeba"]
REWRITE = "DDPM_TEST_REWRITE_GOLDEN"
GOLDEN = Path(__file__).with_name("golden")


def _shown(backend: str) -> dict[str, Any]:
    """The keys of the target that the engine's page shows; one that exists without a file needs none."""
    if backend in BUILT_IN:
        return {}
    page = (DOCS / f"{backend}.md").read_text()
    (block,) = re.findall(rf"^\w+:\n  backend: {backend}\n(?:  .*\n)+", page, re.MULTILINE)
    (keys,) = yaml.safe_load(block).values()
    return dict(keys)


SHOWN = {backend: _shown(backend) for backend in BACKENDS}
"""A target of each engine, as a person copies it."""
KINDS = {kind.command[-1]: kind for kind in EXAMPLES}


def _requests(words: Sequence[str], *kinds: type) -> list:
    """What a command of these requests makes of words."""
    app, made = typer.Typer(add_completion=False), []
    command(app, "verb", lambda *requests: made.extend(requests), *kinds)
    typer.main.get_command(app).main([*words], standalone_mode=False)
    return made


def parsed(verb: str, words: Sequence[str]) -> JobRequest:
    (request,) = _requests(words, KINDS[verb])
    return request


def built(verb: str, words: list[str], on: str = "gke", **machines) -> JobSpec:
    request, how = _requests(["--on", on, *words], KINDS[verb], SubmitRequest)
    return spec_of(request, target_on(on), replace(how, **machines))


def target(keys: str | dict[str, Any] = "gke", /, **changes: Any) -> Any:
    """A target of these keys, or of known ones, that has sent no request yet; `changes` replace keys."""
    block = KEYS.get(keys, {"backend": keys}) if isinstance(keys, str) else keys
    name = keys if isinstance(keys, str) else str(block["backend"])
    return parse_targets(yaml.safe_dump({name: block | changes}), "targets.yaml", name)[name]


def spec(name: str = "train-celeba", **changes: Any) -> JobSpec:
    """A training job; `changes` replace its fields."""
    argv = ("train", "--dataset", "celeba", "--wait", "65", "--bucket", "gs://bucket")
    given: dict[str, Any] = {"verb": "train", "argv": argv, "image": GOOGLE["image"], "bucket": "gs://bucket"}
    return JobSpec(name, **given | {"run": "celeba"} | changes)


def sampling(name: str = "sample-celeba", slices: int = 3, **changes: Any) -> JobSpec:
    """Many images, in slices."""
    argv = ("sample", "--run", "celeba", "--checkpoints", "490", "--count", "50000", "--bucket", "gs://bucket")
    return spec(name, **{"verb": "sample", "argv": argv, "slices": slices} | changes)


def told(backend: Target, name: str) -> JobStatus:
    """Returns the status that `ddpm jobs status` shows, by the engine and by the bucket."""
    alive = backend.alive(name)
    return alive.with_outcome(alive.bucket or backend.usual_bucket)


def assert_kept(name: str, made: str) -> None:
    """Output is what a file beside the tests holds."""
    path = GOLDEN / name
    if os.environ.get(REWRITE):
        path.write_text(made)
    assert path.read_text() == made, f"{REWRITE}=1 writes {path} anew, if that is meant"


def assert_rows(name: str, told: Callable[[dict[str, Any]], Any]) -> None:
    """Each row of such a file says what is given, and then what is told of it; comments say which fault it prevents."""
    made = ""
    for row in re.split(r"(?m)^(?=[-#])", (GOLDEN / name).read_text())[1:]:
        made += row.partition("  told:")[0]
        for given in yaml.safe_load(row) or ():
            flow = yaml.safe_dump(
                {"told": told(given)}, default_flow_style=True, width=100, sort_keys=False, allow_unicode=True
            )
            made += "  " + flow[1:-2].replace("\n", "\n  ") + "\n"
    assert_kept(name, made)
