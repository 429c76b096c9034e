"""A person at a cluster: `ddpm submit` and `ddpm jobs`, and kubectl with what a dry run prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job.exits import Exit
from tests.job.command_line import ddpm, ddpm_here, environment, refused, succeeded

KUBECTL = str(Path(sys.executable).with_name("kubectl"))
TRAIN = ("submit", "train", "--dataset", "celeba", "--on", "gke")
TARGETS = """
gke:
  backend: kubernetes
  image: registry.example.com/ddpm@sha256:0123
  bucket: gs://bucket
  gpu_type: nvidia-l4
"""


@pytest.fixture
def server(server, tmp_path, monkeypatch):
    """A cluster, and a working folder with a target for it."""
    monkeypatch.chdir(tmp_path)
    for name in ("DDPM_BUCKET", "DDPM_TARGETS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "targets.yaml").write_text(TARGETS)
    return server


def kubectl(*words, text=""):
    done = subprocess.run(
        [KUBECTL, *words], input=text, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_is_submitted_followed_and_cancelled(server):
    out = succeeded(ddpm_here(*TRAIN, "--yes"))
    assert "1 × node, 1 × nvidia-l4 each" in out
    assert "train-celeba is submitted" in out
    pod = server.cluster.start_pod("train-celeba")
    server.cluster.print(pod, "epoch 1")
    assert "running" in succeeded(ddpm_here("jobs", "list", "--on", "gke"))
    assert succeeded(ddpm_here("jobs", "logs", "train-celeba", "--on", "gke")) == "epoch 1\n"
    assert "is there and running" in refused(ddpm_here(*TRAIN, "--yes"), Exit.BAD_REQUEST)
    assert "restartPolicy: Never" in succeeded(ddpm_here("jobs", "describe", "train-celeba", "--on", "gke"))
    line = succeeded(ddpm_here("jobs", "cancel", "train-celeba", "--on", "gke"))
    assert line == ("train-celeba on gke was told to stop: it saves first, and the same command goes on from there\n")
    assert server.cluster.get("default", "jobs", "train-celeba")["metadata"]["deletionTimestamp"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("waiting", "was waiting, and is no more: the same command submits it again"),
        ("Complete", "was finished already: what its engine still had of it is removed"),
        ("Failed", "was failed already: what its engine still had of it is removed"),
        ("deleted", "is being deleted: its pods may save first"),
    ],
)
def test_who_cancels_is_told_what_that_did(server, how, said):
    succeeded(ddpm_here(*TRAIN, "--yes"))
    if how == "deleted":
        server.cluster.goes_after_seconds = 5.0
        succeeded(ddpm_here("jobs", "cancel", "train-celeba"))
    elif how != "waiting":
        server.cluster.end_job("train-celeba", how)
    assert succeeded(ddpm_here("jobs", "cancel", "train-celeba")) == f"train-celeba on gke {said}\n"


@pytest.mark.parametrize("context", ["", "context: test"])
def test_two_targets_of_one_namespace_have_one_job(server, tmp_path, context):
    other = TARGETS.strip().replace("gke:", "gke-big:", 1)
    (tmp_path / "targets.yaml").write_text(f"{TARGETS}{other}\n  gpus: 8\n  {context}\n")
    succeeded(ddpm_here(*TRAIN, "--yes"))
    pod = server.cluster.start_pod("train-celeba")
    server.cluster.print(pod, "epoch 1")
    assert succeeded(ddpm_here("jobs", "list")).count("train-celeba") == 1
    lines = succeeded(ddpm_here("jobs", "status", "train-celeba", "--bucket", tmp_path)).splitlines()
    assert [line for line in lines if line.startswith("job ")] == ["job         train-celeba, on gke, in node-0"]
    assert succeeded(ddpm_here("jobs", "logs", "train-celeba")) == "epoch 1\n"
    assert "restartPolicy: Never" in succeeded(ddpm_here("jobs", "describe", "train-celeba"))
    succeeded(ddpm_here("jobs", "cancel", "train-celeba"))


def test_a_name_in_two_namespaces_is_two_jobs(server, tmp_path):
    other = TARGETS.strip().replace("gke:", "gke-big:", 1)
    (tmp_path / "targets.yaml").write_text(f"{TARGETS}{other}\n  namespace: big\n")
    server.cluster.namespaces.add("big")
    succeeded(ddpm_here(*TRAIN, "--yes"))
    succeeded(ddpm_here(*TRAIN[:-1], "gke-big", "--yes"))
    assert succeeded(ddpm_here("jobs", "list")).count("train-celeba") == 2
    line = refused(ddpm_here("jobs", "cancel", "train-celeba"), Exit.BAD_REQUEST)
    assert "on several targets (gke, gke-big): say which with --on" in line


@pytest.mark.parametrize("wishes", [(), ("--nodes", "2"), ("--gpus", "8", "--on-demand")], ids=["one", "nodes", "gpus"])
@pytest.mark.parametrize("output", ["yaml", "json"])
def test_kubectl_sends_what_a_dry_run_prints(server, wishes, output):
    printed = succeeded(ddpm_here(*TRAIN, *wishes, "--dry-run", "-o", output))
    assert not server.requests
    # kubectl sends no token over a connection that is not encrypted.
    server.tokens.append("")
    # The server has no OpenAPI document for kubectl; it checks what arrives itself.
    assert "train-celeba created" in kubectl("apply", "--validate=false", "-f", "-", text=printed)
    (sent,) = server.bodies
    assert sent["metadata"]["annotations"].pop("kubectl.kubernetes.io/last-applied-configuration")
    assert sent == yaml.safe_load(printed)


def test_a_dry_run_needs_no_cluster_and_no_client(server, monkeypatch, tmp_path):
    (tmp_path / "kubernetes.py").write_text("raise ImportError('not installed', name='kubernetes')")
    environment = {"KUBECONFIG": str(tmp_path / "none"), "PYTHONPATH": str(tmp_path)}
    assert "kind: Job" in succeeded(ddpm(*TRAIN, "--dry-run", **environment))
    line = refused(ddpm(*TRAIN, "--yes", **environment), Exit.MISSING_INPUT)
    assert "pip install 'ddpm-job[kubernetes]'" in line


@pytest.mark.parametrize(
    ("break_it", "code", "said"),
    [
        (lambda server: server.tokens.clear(), Exit.NO_PERMISSION, "sign in again"),
        (lambda server: server.forbidden.add(("create", "jobs")), Exit.NO_PERMISSION, "cannot create resource"),
        (lambda server: server.cluster.namespaces.clear(), Exit.MISSING_INPUT, "there is no namespace 'default'"),
    ],
)
def test_what_stands_in_the_way_is_one_line(server, break_it, code, said):
    break_it(server)
    assert said in refused(ddpm_here(*TRAIN, "--yes"), code)
    assert not server.cluster.names("jobs")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "gkee"], "no target 'gkee'; did you mean 'gke'?"),
        (["--on", "gke", "--run", "A_B"], "cannot be a run's name"),
        (["--on", "gke", "--nodes", "0"], "nodes"),
        (["--on", "gke", "--max-hours", "0"], "max-hours"),
    ],
)
def test_a_request_that_means_nothing_asks_no_cluster(server, words, said):
    done = ddpm_here("submit", "train", "--dataset", "celeba", *words, "--yes")
    assert done.returncode in (Exit.BAD_REQUEST, Exit.USAGE)
    assert said in done.stderr
    assert not server.requests
