"""Google's APIs, for tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.job.jobs.google_server import GoogleServer, google_server


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    """Google's APIs on this machine, which all clients of this process and its children find; nobody is patient."""
    from job.jobs.backends import batch, google, google_logs, vm

    with google_server() as server:
        for api in ("COMPUTE", "BATCH", "LOGGING", "IAM"):
            # gcloud's own values end with a path.
            path = "compute/v1/" if api == "COMPUTE" else ""
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"{server.url}/{path}")
        monkeypatch.setattr(google, "PAUSES_SECONDS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(vm, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(google_logs, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(google_logs, "SETTLE_SECONDS", 0.3)
        yield server
