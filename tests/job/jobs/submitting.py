"""Targets of every kind, and jobs made of command lines for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml

import job
from job.cli import command
from job.cli.app import EXAMPLES
from job.jobs.backends import JobStatus, JsonObject, Target
from job.jobs.spec import JobSpec
from job.jobs.submit import formatted, spec_of
from job.jobs.targets import BACKENDS, BUILT_IN, target_on
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
DOCS = Path(job.__file__).parents[1] / "docs"
FOR_TRAIN = ["--dataset", "celeba"]
REWRITE = "DDPM_TEST_REWRITE_GOLDEN"


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


def told(backend: Target, name: str) -> JobStatus:
    """Returns the status that `ddpm jobs status` shows, by the engine and by the bucket."""
    alive = backend.alive(name)
    return alive.with_outcome(alive.bucket or backend.usual_bucket)


def assert_kept(engine: str, case: str, made: list[JsonObject], cases: Iterable[str]) -> None:
    """What is rendered is what a file beside the tests holds, one for each of the cases."""
    path = Path(__file__).with_name("golden") / engine / f"{case}.yaml"
    if os.environ.get(REWRITE):
        path.write_text(formatted(made))
    assert path.read_text() == formatted(made), f"{REWRITE}=1 writes {path} anew, if that is meant"
    assert sorted(other.stem for other in path.parent.glob("*")) == sorted(cases)
