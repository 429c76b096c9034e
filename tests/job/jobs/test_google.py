"""Google's APIs when they do not answer, or refuse; what doctor says; machines with GPUs, and their quotas."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
from google.cloud import compute_v1

from job.exits import BadRequestError, BucketAwayError, Exit, NoPermissionError
from job.jobs.backends import google
from job.jobs.backends.base import State
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.google_jobs import quota_metric
from job.jobs.backends.machines import machine_for
from job.jobs.backends.vm import VmBackend
from tests.job.jobs.google_jobs import BATCH, VM, spec
from tests.job.jobs.google_services import Refusal

both = pytest.mark.parametrize(("kind", "target"), [(VmBackend, VM), (BatchBackend, BATCH)])


def endpoints(monkeypatch, port):
    for api in ("COMPUTE", "BATCH"):
        monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"http://127.0.0.1:{port}")


@both
def test_nobody_at_the_other_end(monkeypatch, kind, target):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoints(monkeypatch, taken.getsockname()[1])
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (0.01,))
        with pytest.raises(BucketAwayError, match="Connection refused") as caught:
            kind(target).submit(spec())
    assert caught.value.exit_code == Exit.BUCKET_AWAY


@both
def test_an_api_that_says_nothing(monkeypatch, kind, target):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints(monkeypatch, silent.getsockname()[1])
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", ())
        monkeypatch.setattr(google, "API_TIMEOUT_SECONDS", 0.3)
        with pytest.raises(BucketAwayError, match="away or too busy"):
            kind(target).status("celeba")
        # The doctor waits for nothing, and for as long as it takes here.
        monkeypatch.setattr(google, "API_RETRY_PAUSES_SECONDS", (1000.0,))
        monkeypatch.setattr(google, "HURRIED_TIMEOUT_SECONDS", 0.3)
        (check,) = kind(target).checks()
    assert not check.passed and check.exit_code == Exit.BUCKET_AWAY


def test_nobody_is_logged_in(tmp_path):
    code = (
        "import sys\n"
        "from job.exits import JobError\n"
        "from job.jobs.backends.vm import VmBackend\n"
        "from job.jobs.targets import VmTarget\n"
        "try:\n"
        "    VmBackend(VmTarget(backend='vm', project='my-project', zones=('us-east1-b',))).status('celeba')\n"
        "except JobError as error:\n"
        "    print(error); sys.exit(int(error.exit_code))\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDSDK", "GOOGLE"))}
    # NO_GCE_CHECK: nobody asks whether this is a machine of Google's.
    environment = {**kept, "HOME": str(tmp_path), "NO_GCE_CHECK": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.NO_PERMISSION, done.stderr
    assert "gcloud auth application-default login" in done.stdout
    assert done.stderr == ""


def test_credentials_go_to_no_server_in_plain_http(cloud, monkeypatch):
    # It would be asked for if they were looked for.
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    VmBackend(VM).status("celeba")


@both
def test_refusals_are_errors_that_a_person_can_act_on(cloud, kind, target):
    disabled = "Batch API has not been used in project my-project before or it is disabled. Enable it by visiting …"
    needed = "Required 'compute.instances.create' permission for 'projects/my-project/zones/us-central1-a/instances/x'"
    for refusal, error, words in [
        (Refusal(400, "Invalid value for field 'resource.disks[0]'", "invalid"), BadRequestError, "resource.disks"),
        (Refusal(401, "Request had invalid authentication credentials."), NoPermissionError, "gcloud auth application"),
        (Refusal(403, needed, "forbidden"), NoPermissionError, "no permission compute.instances.create"),
        (Refusal(403, "Permission 'batch.jobs.create' denied on 'x'"), NoPermissionError, "batch.jobs.create"),
        (Refusal(403, disabled), NoPermissionError, "Enable it by visiting"),
        (Refusal(409, "Resource 'x' already exists"), BadRequestError, "already exists"),
        (Refusal(503, "Backend Error", "backendError"), BucketAwayError, "Backend Error"),
    ]:
        cloud.denied["POST .*/(instances|jobs)$"] = refusal
        with pytest.raises(error, match=re.escape(words)):
            kind(target).submit(spec())
    assert not cloud.compute.instances and not cloud.batch.jobs


@both
def test_an_api_that_is_away_or_too_busy_is_asked_a_bounded_number_of_times(cloud, kind, target):
    for refusal in (Refusal(429, "Quota exceeded for 'Queries'"), Refusal(403, "Limit", "rateLimitExceeded")):
        cloud.refusals = [refusal] * 2
        assert kind(target).status("celeba").state is State.GONE
    cloud.requests.clear()
    cloud.denied["GET"] = Refusal(503, "The service is currently unavailable.")
    with pytest.raises(BucketAwayError, match="currently unavailable"):
        kind(target).status("celeba")
    assert len(cloud.requests) == 4


@both
def test_an_answer_that_is_lost_makes_no_second_job_and_no_error(cloud, monkeypatch, kind, target):
    service, name = (cloud.compute, "_insert") if kind is VmBackend else (cloud.batch, "_create")
    real, lost = getattr(service, name), []

    def once(*arguments):
        made = real(*arguments)
        if not lost:
            lost.append(made)
            raise Refusal(502, "The server encountered a temporary error")
        return made

    monkeypatch.setattr(service, name, once)
    kind(target).submit(spec())
    assert lost and len(cloud.compute.instances) + len(cloud.batch.jobs) == 1


@both
def test_a_job_that_is_there_is_not_started_twice_in_any_place(cloud, kind, target):
    kind(target).submit(spec())
    for one in (kind(target), kind(target).elsewhere()):
        with pytest.raises(BadRequestError, match=r"is waiting in us-central1.*ddpm jobs cancel celeba"):
            one.submit(spec())
    assert len(cloud.compute.instances) + len(cloud.batch.jobs) == 1


@both
def test_the_doctor_looks_at_the_api_the_quotas_the_account_and_the_image(cloud, kind, target):
    account = "ddpm-job@my-project.iam.gserviceaccount.com"
    target = target.model_copy(update={"image": "example.com/ddpm:1", "service_account": account})
    found = list(kind(target).checks())
    _, quota, everywhere, account_check, image = found
    assert [check.name for check in found if not check.passed] == []
    assert quota.message.startswith("PREEMPTIBLE_NVIDIA_L4_GPUS: us-central1 3 of 4 free")
    assert everywhere.message == "GPUS_ALL_REGIONS: 3 of 4 free; a job takes 1"
    assert account_check.message == f"{account} is there"
    assert "not checked here" in image.message
    cloud.accounts, cloud.compute.gpus_everywhere = set(), 1.0
    found = list(kind(target).checks())
    failed = {check.name: check.exit_code for check in found if not check.passed}
    missing, refused = Exit.MISSING_INPUT, Exit.BAD_REQUEST
    assert failed == {"GPU quota, everywhere": refused, "service account": missing}
    (_, quota, *_) = kind(target.model_copy(update={"gpus": 8, "machine_type": "g2-standard-96"})).checks()
    assert not quota.passed and "iam-admin/quotas" in quota.remedy
    (machine,) = kind(target.model_copy(update={"gpus": 2})).checks()
    assert not machine.passed and "g2-standard-24" in machine.remedy
    cloud.denied["(aggregated|jobs)"] = Refusal(403, "Permission 'x.y.list' denied")
    (api,) = kind(target).checks()
    assert (api.passed, api.exit_code) == (False, Exit.NO_PERMISSION)


def test_the_names_of_quotas_are_those_of_the_api():
    for gpu, spot, metric in [
        ("nvidia-l4", True, "PREEMPTIBLE_NVIDIA_L4_GPUS"),
        ("nvidia-tesla-t4", False, "NVIDIA_T4_GPUS"),
        ("nvidia-tesla-a100", True, "PREEMPTIBLE_NVIDIA_A100_GPUS"),
        ("nvidia-a100-80gb", False, "NVIDIA_A100_80GB_GPUS"),
        ("nvidia-h100-80gb", True, "PREEMPTIBLE_NVIDIA_H100_GPUS"),
    ]:
        assert quota_metric(gpu, spot) == metric
        assert metric in dir(compute_v1.Quota.Metric)


def test_machines_with_gpus():
    for machine, gpu, count, extra in [
        ("g2-standard-8", "", 1, False),
        ("g2-standard-96", "nvidia-l4", 8, False),
        ("a2-highgpu-8g", "nvidia-tesla-a100", 8, False),
        ("a3-highgpu-8g", "nvidia-h100-80gb", 8, False),
        ("n1-standard-8", "nvidia-tesla-t4", 1, True),
        ("n1-standard-32", "nvidia-tesla-v100", 8, True),
    ]:
        found = machine_for(machine, gpu, count)
        assert (found.gpu_type, found.gpus, found.extra) == (gpu or "nvidia-l4", count, extra)
    assert machine_for("a3-highgpu-1g", "", 1, spot=True).gpus == 1
    # The newest machines take no other disks.
    for machine, disk in (("a4-highgpu-8g", "hyperdisk"), ("g2-standard-8", "pd"), ("c4d-standard-8", "hyperdisk")):
        assert machine_for(machine, "", 0).disk_type == f"{disk}-balanced"


def test_pairs_that_do_not_exist_name_what_there_is():
    for machine, gpu, count, hint in [
        ("g2-standard-8", "nvidia-l4", 2, "machine_type: g2-standard-24"),
        ("g2-standard-8", "nvidia-h100-80gb", 8, "machine_type: a3-highgpu-8g"),
        ("g2-standard-8", "nvidia-l4", 3, "machines with 1, 2, 4, 8 nvidia-l4"),
        ("n1-standard-8", "nvidia-tesla-t4", 8, "machines with 1, 2, 4 nvidia-tesla-t4"),
        ("n1-standard-8", "", 1, "use --gpu-type"),
        ("n2-standard-8", "nvidia-tesla-t4", 1, "machine_type: n1-standard-8"),
        ("a3-highgpu-3g", "nvidia-h100-80gb", 3, "machines with 1, 2, 4, 8 nvidia-h100-80gb"),
        ("a3-highgpu-1g", "", 1, "a3-highgpu-1g is not to be had on demand: use --spot"),
    ]:
        with pytest.raises(BadRequestError, match=hint):
            machine_for(machine, gpu, count, spot="on demand" not in hint)


def test_the_shape_of_a_machine():
    shapes = {
        "g2-standard-8": (8, 32),
        "a2-highgpu-8g": (96, 680),
        "n1-standard-8": (8, 30),
        "a3-highgpu-8g": (208, 1872),
    }
    for machine, (cpus, gigabytes) in shapes.items():
        found = machine_for(machine, "", 0).shape
        assert found is not None and found[0] == cpus
        assert 0.8 * 1024 * gigabytes < found[1] < 0.9 * 1024 * gigabytes
