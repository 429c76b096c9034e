"""Slurm from elsewhere: through ssh to a login node, after Slurm has forgotten a job, and as `ddpm doctor` finds it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from google.cloud import storage

from tests.containers.runs import training
from tests.job.command_line import ddpm, ddpm_here, refused, succeeded
from tests.servers import free_port
from tests.slurm.conftest import until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900, func_only=True), pytest.mark.usefixtures("cluster", "folder")]


@pytest.fixture
def login_node(cluster, tmp_path, monkeypatch):
    """A real sshd on loopback, and the `ssh` of a person with a key, who knows it as `login`."""
    port, said = free_port(), " ".join(f"{name}={value}" for name, value in cluster.variables.items())
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    for name in ("sshd_config", "ssh_config"):
        text = Path(__file__).with_name(name).read_text()
        (tmp_path / name).write_text(text.format(port=port, folder=tmp_path, variables=said))
    (tmp_path / ".bash_profile").write_text("echo welcome\n")
    (ssh := tmp_path / "bin/ssh").parent.mkdir()
    # The real one, with these settings for a person's own.
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{tmp_path}/ssh_config" "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    Path("/run/sshd").mkdir(exist_ok=True)
    words = ["/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd_config"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as server:
        yield
        server.terminate()


@pytest.mark.usefixtures("login_node")
def test_login_nodes_are_enough(folder, bucket, gcs_server, tmp_path, monkeypatch):
    """For targets that reach the cluster through ssh, and know nothing of this machine's files."""
    storage.Client(project="test").create_bucket("far")
    env = {"OMP_NUM_THREADS": "1", "STORAGE_EMULATOR_HOST": gcs_server}
    far = json.loads((folder / "targets.yaml").read_text())["low"] | {"bucket": "gs://far", "env": env}
    hosts = {name: far | {"host": name} for name in ("login", "stranger", "nobody")}
    (tmp_path / "targets.yaml").write_text(json.dumps(hosts))
    monkeypatch.setenv("DDPM_TARGETS", f"{tmp_path}/targets.yaml")
    # Here nothing tells of the cluster.
    monkeypatch.delenv("SLURM_CONF")
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
    # Without its memory, the controller knows no jobs that are over, as minutes later.
    pid = cluster.pid("controller")
    os.kill(pid, signal.SIGTERM)
    until(lambda: not psutil.pid_exists(pid))
    cluster.run("slurmctld", "-c")
    cluster.start()
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
def test_doctor_looks_from_a_node(on, code, finding):
    found = ddpm("doctor", "--on", on)
    assert finding in found.stdout, found.stdout
    assert found.returncode == code


def test_missing_slurm_is_said(tmp_path, monkeypatch):
    (tmp_path / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(ddpm("jobs", "list", "--on", "low"), 66)
    assert "Slurm is not installed here: set the login node as the target's `host:`" in said
