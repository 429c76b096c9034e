"""A person at a cluster: `ddpm submit` and `ddpm jobs`, and kubectl with what a dry run prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job.exits import Exit
from tests.job.command_line import ddpm_here, environment, refused, succeeded

KUBECTL = str(Path(sys.executable).with_name("kubectl"))
TRAIN = ("submit", "train", "--dataset", "celeba", "--on", "gke")


def block(name, **changes):
    """A target of the cluster."""
    target = {"backend": "kubernetes", "image": "registry.example.com/ddpm@sha256:0123", "bucket": "gs://bucket"}
    return yaml.safe_dump({name: target | {"gpu_type": "nvidia-l4"} | changes})


@pytest.fixture
def server(server, targets_folder):
    """A cluster, and a working folder with a target for it."""
    (targets_folder / "targets.yaml").write_text(block("gke"))
    return server


def test_two_targets_of_one_namespace_have_one_job(server, targets_folder):
    (targets_folder / "targets.yaml").write_text(block("gke") + block("gke-big", gpus=8, context="test"))
    succeeded(ddpm_here(*TRAIN, "--yes"))
    server.print(server.start_pod("train-celeba"), "epoch 1")
    assert succeeded(ddpm_here("jobs", "list")).count("train-celeba") == 1
    lines = succeeded(ddpm_here("jobs", "status", "train-celeba", "--bucket", targets_folder)).splitlines()
    assert [line for line in lines if line.startswith("job ")] == ["job         train-celeba, on gke, in node-0"]
    assert succeeded(ddpm_here("jobs", "logs", "train-celeba")) == "epoch 1\n"
    succeeded(ddpm_here("jobs", "cancel", "train-celeba"))


def test_a_name_in_two_namespaces_is_two_jobs(server, targets_folder):
    (targets_folder / "targets.yaml").write_text(block("gke") + block("gke-big", namespace="training"))
    succeeded(ddpm_here(*TRAIN, "--yes"))
    succeeded(ddpm_here(*TRAIN[:-1], "gke-big", "--yes"))
    assert succeeded(ddpm_here("jobs", "list")).count("train-celeba") == 2
    line = refused(ddpm_here("jobs", "cancel", "train-celeba"), Exit.BAD_REQUEST)
    assert "on several targets (gke, gke-big): say which with --on" in line


@pytest.mark.parametrize("options", [("-o", "yaml"), ("-o", "json", "--nodes", "2")], ids=["yaml", "json"])
def test_kubectl_sends_what_a_dry_run_prints(server, options):
    printed = succeeded(ddpm_here(*TRAIN, "--dry-run", *options))
    assert not server.requests
    # kubectl sends no token over a connection that is not encrypted.
    server.tokens.append("")
    # The server has no OpenAPI document for kubectl; it checks what arrives itself.
    words = [KUBECTL, "apply", "--validate=false", "-f", "-"]
    done = subprocess.run(words, input=printed, env=environment(), capture_output=True, text=True, check=False)
    assert "train-celeba created" in done.stdout, done.stderr
    (sent,) = server.bodies
    assert list(sent["metadata"].pop("annotations")) == ["kubectl.kubernetes.io/last-applied-configuration"]
    assert sent == yaml.safe_load(printed)
