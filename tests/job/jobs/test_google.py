"""Google's APIs when they do not answer, or refuse; and what the doctor says of them."""

from __future__ import annotations

import re
import socket

import pytest

from job.exits import BadRequestError, BucketAwayError, Exit, NoPermissionError, State
from job.jobs.backends import google
from tests.job.jobs.google_jobs import backend_of, spec
from tests.job.jobs.google_server import Refusal

both = pytest.mark.parametrize("engine", ["vm", "batch"])


def test_absent_and_silent_apis(monkeypatch):
    monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01,))
    monkeypatch.setattr(google, "API_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(f"{google.ENDPOINT_VARIABLE}BATCH", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(BucketAwayError, match=r"away or too busy.*timed out"):
            backend_of("batch").alive("celeba")
        # The doctor waits for nothing, and for as long as it takes here.
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (1000.0,))
        monkeypatch.setattr(google, "HURRIED_TIMEOUT_SECONDS", 0.3)
        (check,) = backend_of("batch").checks("")
    assert not check.passed and check.exit_code == Exit.BUCKET_AWAY
    monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01,))
    with pytest.raises(BucketAwayError, match="Connection refused"):
        backend_of("batch").submit(spec())


def test_nobody_is_logged_in(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    # Nobody asks whether this is a machine of Google's.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    google._authorized_session.cache_clear()
    with pytest.raises(NoPermissionError, match="gcloud auth application-default login"):
        backend_of("vm").alive("celeba")
    assert not recwarn


def test_refusals_become_errors(cloud):
    disabled = "Batch API has not been used in project my-project before or it is disabled. Enable it by visiting …"
    needed = "Required 'compute.instances.create' permission for 'projects/my-project/zones/us-central1-a/instances/x'"
    for refusal, error, words in [
        (Refusal(400, "Invalid value for field 'resource.disks[0]'", "invalid"), BadRequestError, "resource.disks"),
        (Refusal(401, "Request had invalid authentication credentials."), NoPermissionError, "gcloud auth application"),
        (Refusal(403, needed, "forbidden"), NoPermissionError, "compute.instances.create"),
        (Refusal(403, disabled), NoPermissionError, "Enable it by visiting"),
        (Refusal(409, "Resource 'x' already exists"), BadRequestError, "already exists"),
        (Refusal(503, "Backend Error", "backendError"), BucketAwayError, "Backend Error"),
    ]:
        cloud.denied["POST .*/instances$"] = refusal
        with pytest.raises(error, match=re.escape(words)):
            backend_of("vm").submit(spec())
    assert not cloud.compute.instances


def test_busy_apis_are_asked_again(cloud):
    for refusal in (Refusal(429, "Quota exceeded for 'Queries'"), Refusal(403, "Limit", "rateLimitExceeded")):
        cloud.refusals = [refusal] * 2
        assert backend_of("vm").alive("celeba").state is State.GONE
    cloud.requests.clear()
    cloud.denied["GET"] = Refusal(503, "The service is currently unavailable.")
    with pytest.raises(BucketAwayError, match="currently unavailable"):
        backend_of("vm").alive("celeba")
    assert len(cloud.requests) == 4


@both
def test_jobs_are_made_once(cloud, engine):
    cloud.lost_answers = 1
    backend = backend_of(engine)
    backend.submit(spec())
    for one in (backend, backend.elsewhere()):
        with pytest.raises(BadRequestError, match=r"celeba runs in us-central1.*ddpm jobs cancel celeba"):
            one.submit(spec())
    assert cloud.lost_answers == 0 and len(cloud.compute.instances) + len(cloud.batch.jobs) == 1
    assert backend.elsewhere().elsewhere() is None


@both
def test_doctor_looks_at_all_parts(cloud, engine):
    found = {check.name: check for check in backend_of(engine).checks("")}
    assert all(check.passed for check in found.values())
    assert list(found)[1:] == ["service account"]
    cloud.accounts = set()
    failed = {check.name: check for check in backend_of(engine).checks("") if not check.passed}
    assert failed["service account"].exit_code is Exit.MISSING_INPUT and len(failed) == 1
    cloud.denied["serviceAccounts"] = Refusal(403, "Permission 'iam.serviceAccounts.get' denied")
    found = {check.name: check for check in backend_of(engine, machine_type="a2-highgpu-1g", gpu_type="").checks("")}
    assert found["service account"].message.startswith("not looked at: ") and found["service account"].passed
    (machine,) = backend_of(engine, gpus=2).checks("")
    assert not machine.passed and "another machine_type" in machine.remedy
    cloud.denied["(aggregated|jobs)"] = Refusal(403, "Permission 'x.y.list' denied")
    (api,) = backend_of(engine).checks("")
    assert (api.passed, api.exit_code) == (False, Exit.NO_PERMISSION)
