"""Google's APIs when they do not answer, or nobody is logged in; and machines with GPUs that do not exist."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
from google.cloud import compute_v1

from job.exits import BadRequestError, BucketAwayError, Exit, NoPermissionError
from job.jobs.backends import google
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.google_checks import metric_of
from job.jobs.backends.machines import machine_for
from job.jobs.backends.vm import VmBackend
from tests.job.jobs.google_jobs import BATCH, VM, spec
from tests.job.jobs.google_services import Refusal
from tests.job.jobs.registry_server import registry

both = pytest.mark.parametrize(("kind", "target"), [(VmBackend, VM), (BatchBackend, BATCH)])


@both
def test_nobody_at_the_other_end(monkeypatch, kind, target):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for api in ("COMPUTE", "BATCH"):
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(google, "PAUSES_SECONDS", (0.01,))
        with pytest.raises(BucketAwayError, match="Connection refused") as caught:
            kind(target).submit(spec())
    assert caught.value.exit_code == Exit.BUCKET_AWAY


@both
def test_an_api_that_says_nothing(monkeypatch, kind, target):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for api in ("COMPUTE", "BATCH"):
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(google, "PAUSES_SECONDS", ())
        monkeypatch.setattr(google, "TIMEOUT_SECONDS", 0.3)
        with pytest.raises(BucketAwayError, match="away or too busy"):
            kind(target).status("celeba")


@both
def test_the_doctor_does_not_wait_for_an_api_that_says_nothing(monkeypatch, kind, target):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for api in ("COMPUTE", "BATCH"):
            monkeypatch.setenv(google.ENDPOINT_VARIABLE + api, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        (check,) = kind(target).checks()
        assert time.monotonic() - began < 10
    assert not check.passed and check.exit_code == Exit.BUCKET_AWAY


@both
def test_nobody_is_logged_in(tmp_path, kind, target):
    code = (
        "import sys\n"
        "from job.exits import JobError\n"
        f"from {kind.__module__} import {kind.__name__}\n"
        f"from tests.job.jobs.google_jobs import {'VM' if kind is VmBackend else 'BATCH'} as target\n"
        "try:\n"
        f"    {kind.__name__}(target).status('celeba')\n"
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


@both
def test_credentials_that_are_no_longer_valid(cloud, kind, target):
    cloud.denied["GET"] = Refusal(401, "Request had invalid authentication credentials.")
    with pytest.raises(NoPermissionError, match="gcloud auth application-default login"):
        kind(target).status("celeba")


def test_credentials_go_to_no_server_in_plain_http(cloud, monkeypatch):
    # It would be asked for if they were looked for.
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    VmBackend(VM).status("celeba")


@both
def test_the_doctor_looks_at_the_api_the_quotas_the_account_and_the_image(cloud, kind, target):
    with registry() as there:
        there.images = {"ddpm:1"}
        account = "ddpm-job@my-project.iam.gserviceaccount.com"
        target = target.model_copy(update={"image": f"{there.host}/ddpm:1", "service_account": account})
        found = list(kind(target).checks())
        api, quota, everywhere, account_check, image = found
        assert [check.name for check in found if not check.passed] == []
        assert everywhere.message == "GPUS_ALL_REGIONS: 3 of 4 free; a job takes 1"
        assert account_check.message == f"{account} is there"
        assert "not checked here" in image.message
        there.images = set()
        cloud.accounts, cloud.compute.gpus_everywhere = set(), 1.0
        found = list(kind(target).checks())
        failed = {check.name: check.exit_code for check in found if not check.passed}
        missing, refused = Exit.MISSING_INPUT, Exit.BAD_REQUEST
        assert failed == {"GPU quota, everywhere": refused, "service account": missing}
    assert quota.message.startswith("PREEMPTIBLE_NVIDIA_L4_GPUS: us-central1 3 of 4 free")
    (_, quota, *_) = kind(target.model_copy(update={"gpus": 8, "machine_type": "g2-standard-96"})).checks()
    assert not quota.passed and "iam-admin/quotas" in quota.remedy
    (_, machine) = kind(target.model_copy(update={"gpus": 2})).checks()
    assert not machine.passed and "g2-standard-24" in machine.remedy
    cloud.denied["(aggregated|jobs)"] = Refusal(403, "Permission 'x.y.list' denied")
    (api,) = kind(target).checks()
    assert (api.passed, api.exit_code) == (False, Exit.NO_PERMISSION)


@pytest.mark.parametrize(
    ("gpu", "spot", "metric"),
    [
        ("nvidia-l4", True, "PREEMPTIBLE_NVIDIA_L4_GPUS"),
        ("nvidia-tesla-t4", False, "NVIDIA_T4_GPUS"),
        ("nvidia-tesla-a100", True, "PREEMPTIBLE_NVIDIA_A100_GPUS"),
        ("nvidia-a100-80gb", False, "NVIDIA_A100_80GB_GPUS"),
        ("nvidia-h100-80gb", True, "PREEMPTIBLE_NVIDIA_H100_GPUS"),
    ],
)
def test_the_names_of_quotas_are_those_of_the_api(gpu, spot, metric):
    assert metric_of(gpu, spot) == metric
    assert metric in dir(compute_v1.Quota.Metric)


@pytest.mark.parametrize(
    ("machine", "gpu", "count", "extra"),
    [
        ("g2-standard-8", "", 1, False),
        ("g2-standard-96", "nvidia-l4", 8, False),
        ("a2-highgpu-8g", "nvidia-tesla-a100", 8, False),
        ("a3-highgpu-8g", "nvidia-h100-80gb", 8, False),
        ("n1-standard-8", "nvidia-tesla-t4", 1, True),
        ("n1-standard-32", "nvidia-tesla-v100", 8, True),
    ],
)
def test_machines_with_gpus(machine, gpu, count, extra):
    found = machine_for(machine, gpu, count)
    assert (found.gpus, found.extra) == (count, extra)
    assert found.gpu_type == (gpu or "nvidia-l4")


@pytest.mark.parametrize(
    ("machine", "gpu", "count", "hint"),
    [
        ("g2-standard-8", "nvidia-l4", 2, "machine_type: g2-standard-24"),
        ("g2-standard-8", "nvidia-h100-80gb", 8, "machine_type: a3-highgpu-8g"),
        ("g2-standard-8", "nvidia-l4", 3, "machines with 1, 2, 4, 8 nvidia-l4"),
        ("n1-standard-8", "nvidia-tesla-t4", 8, "machines with 1, 2, 4 nvidia-tesla-t4"),
        ("n1-standard-8", "", 1, "use --gpu-type"),
        ("n2-standard-8", "nvidia-tesla-t4", 1, "machine_type: n1-standard-8"),
        ("a3-highgpu-3g", "nvidia-h100-80gb", 3, "known are a3-highgpu-1g"),
    ],
)
def test_pairs_that_do_not_exist(machine, gpu, count, hint):
    with pytest.raises(BadRequestError, match=hint):
        machine_for(machine, gpu, count)


def test_the_newest_machines_have_the_disks_that_they_take():
    assert machine_for("a4-highgpu-8g", "", 8).disk_type == "hyperdisk-balanced"
    assert machine_for("g2-standard-8", "", 1).disk_type == "pd-balanced"
    assert machine_for("c4d-standard-8", "", 0).disk_type == "hyperdisk-balanced"


def test_what_is_not_sold_on_demand_is_refused():
    assert machine_for("a3-highgpu-1g", "", 1, spot=True).gpus == 1
    with pytest.raises(BadRequestError, match="a3-highgpu-1g is not to be had on demand: use --spot"):
        machine_for("a3-highgpu-1g", "", 1, spot=False)


@pytest.mark.parametrize(
    ("machine", "cpus", "gigabytes"),
    [("g2-standard-8", 8, 32), ("a2-highgpu-8g", 96, 680), ("n1-standard-8", 8, 30), ("a3-highgpu-8g", 208, 1872)],
)
def test_the_shape_of_a_machine(machine, cpus, gigabytes):
    found = machine_for(machine, "", 0).shape
    assert found is not None and found[0] == cpus
    assert 0.8 * 1024 * gigabytes < found[1] < 0.9 * 1024 * gigabytes
