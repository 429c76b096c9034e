"""Google's APIs and those of a cluster, for tests of jobs; nobody is patient with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.job.jobs.google_server import GoogleServer
from tests.job.jobs.kubernetes_server import Cluster
from tests.job.jobs.submitting import TARGETS

Patch = pytest.MonkeyPatch


@pytest.fixture
def cloud(monkeypatch: Patch) -> Iterator[GoogleServer]:
    """Google's APIs on this machine, which all clients of this process and its children find."""
    from job.jobs.backends import google

    with GoogleServer().running() as server:
        for api in ("COMPUTE", "BATCH", "LOGGING", "IAM"):
            # gcloud's own values end with a path.
            path = "compute/v1/" if api == "COMPUTE" else ""
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"{server.url}/{path}")
        limits = {"CHANGE_POLL_SECONDS": 0.01, "LOG_POLL_SECONDS": 0.05, "LOG_SETTLE_SECONDS": 0.3}
        for name, seconds in (limits | {"API_RETRY_PAUSES_SECONDS": (0.01,) * 3}).items():
            monkeypatch.setattr(google, name, seconds)
        yield server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: Patch) -> Iterator[Cluster]:
    """A cluster on this machine, and the kubeconfig for it in `tmp_path`."""
    from job.jobs.backends import kubernetes

    limits = {"GONE_POLL_SECONDS": 0.02, "API_RETRIES": 3, "API_RETRY_SECONDS": 0.01, "PODS_POLL_SECONDS": 0.05}
    for name, limit in limits.items():
        monkeypatch.setattr(kubernetes, name, limit)
    with Cluster().running() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A working folder and a cache of the test's own, and no variable that says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    for name in ("DDPM_BUCKET", "DDPM_TARGETS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def targets_folder(folder: Path) -> Path:
    """The same, with targets."""
    (folder / "targets.yaml").write_text(TARGETS)
    return folder
