"""Slurm from elsewhere: through ssh to a login node, after Slurm has forgotten a job, and as `ddpm doctor` finds it."""

from __future__ import annotations

import json
import os

import pytest
from google.cloud import storage

from tests.containers.runs import training
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.slurm.cluster import until
from tests.slurm.login import login_node


@pytest.fixture
def through_ssh(cluster, folder, gcs_server, tmp_path, monkeypatch):
    """Targets that reach the cluster through ssh, and know nothing of this machine's files."""
    storage.Client(project="test").create_bucket("far")
    targets = json.loads((folder / "targets.yaml").read_text())
    env = {"OMP_NUM_THREADS": "1", "STORAGE_EMULATOR_HOST": gcs_server}
    far = targets["low"] | {"host": "login", "bucket": "gs://far", "env": env}
    hosts = {name: far | {"host": name} for name in ("login", "stranger", "nobody")}
    (tmp_path / "targets.yaml").write_text(json.dumps(hosts))
    monkeypatch.setenv("DDPM_TARGETS", f"{tmp_path}/targets.yaml")
    with login_node(tmp_path, cluster.variables) as commands:
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        # Here nothing tells of the cluster.
        monkeypatch.delenv("SLURM_CONF")
        yield


@pytest.mark.usefixtures("through_ssh")
def test_login_nodes_are_enough(bucket):
    away = refused(ddpm_here("submit", *training("far", bucket, 1), "--on", "login", "--dry-run"), 64)
    assert "is a path of this machine, which jobs on 'login' cannot see" in away
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", "gs://far"))
    succeeded(ddpm("submit", *training("far", "gs://far", 1), "--on", "login", "--yes"))
    output = succeeded(ddpm("jobs", "logs", "train-far", "--on", "login", "-f"))
    assert "Run 'far' is finished" in output
    # What the profile prints is no output of the job.
    assert output.startswith("ddpm-slurm: job ")
    (listed,) = json.loads(succeeded(ddpm_here("jobs", "list", "--on", "login", "--json")))[:1]
    assert (listed["name"], listed["state"], listed["bucket"]) == ("train-far", "finished", "gs://far")
    checks = succeeded(ddpm("doctor", "--on", "login"))
    assert "ok    bucket write (node)       gs://far takes an object" in checks
    assert "let `ssh stranger` log in without a question" in refused(ddpm("jobs", "list", "--on", "stranger"), 77)
    assert "nobody does not answer" in refused(ddpm("jobs", "list", "--on", "nobody"), 69)


def test_forgotten_jobs_have_output(cluster, bucket):
    succeeded(ddpm_here("submit", *training("old", bucket, 1), "--on", "low", "--yes"))
    until(lambda: not cluster.run("squeue", "-h", "-o", "%i"))
    cluster.forget()
    until(lambda: cluster.run("sinfo", "-hN", "-p", "low", "-o", "%T").split() == ["idle"] * 2)
    assert "Run 'old' is finished" in succeeded(ddpm_here("jobs", "logs", "train-old", "--on", "low"))
    assert "state       finished, 1 start" in succeeded(ddpm_here("jobs", "status", "train-old", "--on", "low"))
    assert "knows a job 'train-new'" in refused(ddpm_here("jobs", "logs", "train-new", "--on", "low"), 66)


@pytest.mark.parametrize(
    ("on", "code", "finding"),
    [
        ("low", 0, "ok    all-reduce (node)         2 processes"),
        ("too-long", 66, "FAIL  job                       no node yet (PartitionTimeLimit)"),
        ("too-many", 64, "Requested node configuration is not available"),
        ("no-driver", 66, "FAIL  GPUs (node)               this job was given 1 GPU, and PyTorch sees 0"),
        ("elsewhere", 66, "nothing/bin/ddpm: No such file or directory"),
    ],
)
@pytest.mark.usefixtures("cluster", "folder")
def test_doctor_looks_from_a_node(on, code, finding):
    found = ddpm("doctor", "--on", on)
    assert finding in found.stdout, found.stdout
    assert found.returncode == code


@pytest.mark.usefixtures("cluster", "folder")
def test_missing_slurm_is_said(tmp_path, monkeypatch):
    (tmp_path / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(ddpm("jobs", "list", "--on", "low"), 66)
    assert "Slurm is not installed here: set the login node as the target's `host:`" in said
