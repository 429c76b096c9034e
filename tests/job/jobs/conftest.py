"""Google's APIs and those of a cluster, for tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.job.jobs.google_server import GoogleServer, google_server
from tests.job.jobs.kubernetes_server import Cluster, kubernetes_server
from tests.job.jobs.submitting import TARGETS


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    """Google's APIs on this machine, which all clients of this process and its children find; nobody is patient."""
    from job.jobs.backends import google

    with google_server() as server:
        for api in ("COMPUTE", "BATCH", "LOGGING", "IAM"):
            # gcloud's own values end with a path.
            path = "compute/v1/" if api == "COMPUTE" else ""
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"{server.url}/{path}")
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(google, "CHANGE_POLL_SECONDS", 0.01)
        monkeypatch.setattr(google, "LOG_POLL_SECONDS", 0.05)
        monkeypatch.setattr(google, "LOG_SETTLE_SECONDS", 0.3)
        yield server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster on this machine, and the kubeconfig for it in `tmp_path`; nobody is patient."""
    from job.jobs.backends import kubernetes

    monkeypatch.setattr(kubernetes, "GONE_POLL_SECONDS", 0.02)
    monkeypatch.setattr(kubernetes, "API_RETRIES", 3)
    monkeypatch.setattr(kubernetes, "API_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(kubernetes, "PODS_POLL_SECONDS", 0.05)
    with kubernetes_server() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
