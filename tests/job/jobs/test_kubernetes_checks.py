"""What `ddpm doctor` says about a cluster, with what to do."""

from __future__ import annotations

import pytest
import yaml

from job.exits import Exit
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET
from tests.job.jobs.kubernetes_server import kubernetes_server


@pytest.fixture
def server(tmp_path, monkeypatch):
    with kubernetes_server() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield running


def checked(target=TARGET):
    return {check.name: check for check in KubernetesBackend(target, ()).checks()}


def with_account(server, namespace="default", **annotations):
    server.cluster.add("serviceaccounts", {"metadata": {"name": "ddpm", "annotations": annotations}}, namespace)


def test_a_cluster_that_has_all(server):
    with_account(server, **{"iam.gke.io/gcp-service-account": "ddpm@p.iam.gserviceaccount.com"})
    found = checked()
    assert [name for name, check in found.items() if not check.passed] == []
    assert list(found) == ["cluster", "job rights", "service account", "JobSets", "queue", "GPU quota"]
    assert found["service account"].message == "ddpm acts as ddpm@p.iam.gserviceaccount.com"
    assert found["JobSets"].message == "installed"


def test_what_is_missing_is_named_with_what_to_do(server):
    server.cluster.namespaces.add("training")
    del server.cluster.served["jobset.x-k8s.io", "v1alpha2"]
    server.cluster.denied.add(("get", "pods/log"))
    found = checked(QUEUED)
    assert not found["job rights"].passed and "may not get pods/log" in found["job rights"].message
    assert found["job rights"].exit_code is Exit.NO_PERMISSION
    assert not found["service account"].passed
    assert found["service account"].remedy == "`kubectl -n training create serviceaccount ddpm`"
    assert not found["queue"].passed and "no LocalQueue 'gpus'" in found["queue"].message
    # Only --nodes needs them, and this target may never be asked for several.
    assert found["JobSets"].passed and "kubectl apply" in found["JobSets"].message


def test_an_account_that_is_bound_to_no_other_is_told(server):
    with_account(server)
    assert "granted to it itself" in checked()["service account"].message


@pytest.mark.parametrize(("used", "passed"), [("3", True), ("4", False)])
def test_a_quota_without_room_for_a_job(server, used, passed):
    name = "requests.nvidia.com/gpu"
    quota = {"metadata": {"name": "gpus"}, "status": {"hard": {name: "4"}, "used": {name: used}}}
    server.cluster.add("resourcequotas", quota)
    check = checked()["GPU quota"]
    assert check.passed is passed
    assert passed or "4 of the 4 GPUs of namespace 'default' are taken" in check.message
    server.forbidden.add(("list", "resourcequotas"))
    assert checked()["GPU quota"].passed


def test_a_cluster_that_does_not_answer_is_one_line(server, monkeypatch, tmp_path):
    server.tokens = []
    (check,) = checked().values()
    assert (check.name, check.passed, check.exit_code) == ("cluster", False, Exit.NO_PERMISSION)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (check,) = checked().values()
    assert check.exit_code is Exit.MISSING_INPUT
