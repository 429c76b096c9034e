"""What `ddpm doctor` says about a cluster, with what to do."""

from __future__ import annotations

import socket
import time

import pytest
import yaml

from job.exits import Exit
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET
from tests.job.jobs.registry_server import registry


def checked(target=TARGET):
    with registry() as there:
        there.images = {"ddpm:1"}
        target = target.model_copy(update={"image": f"{there.host}/ddpm:1"})
        return {check.name: check for check in KubernetesBackend(target, ()).checks()}


def with_account(server, namespace="default", **annotations):
    server.cluster.add("serviceaccounts", {"metadata": {"name": "ddpm", "annotations": annotations}}, namespace)


def test_a_cluster_that_has_all(server):
    with_account(server, **{"iam.gke.io/gcp-service-account": "ddpm@p.iam.gserviceaccount.com"})
    found = checked()
    assert [name for name, check in found.items() if not check.passed] == []
    assert list(found) == ["cluster", "job rights", "service account", "JobSets", "queue", "GPU quota", "image"]
    assert found["service account"].message == "ddpm acts as ddpm@p.iam.gserviceaccount.com"
    assert found["JobSets"].message == "installed"


def test_what_is_missing_is_named_with_what_to_do(server):
    server.cluster.namespaces.add("training")
    del server.cluster.served["jobset.x-k8s.io", "v1alpha2"]
    server.cluster.denied.add(("get", "pods/log"))
    # Whether it may be made is of no interest where there is none.
    server.cluster.denied.add(("create", "jobsets"))
    found = checked(QUEUED)
    assert not found["job rights"].passed and "may not get pods/log" in found["job rights"].message
    assert found["job rights"].exit_code is Exit.NO_PERMISSION
    assert not found["service account"].passed
    assert found["service account"].remedy == "`kubectl -n training create serviceaccount ddpm`"
    assert not found["queue"].passed and "no LocalQueue 'gpus'" in found["queue"].message
    # Only --nodes needs them, and this target may never be asked for several.
    assert found["JobSets"].passed and "kubectl apply" in found["JobSets"].message


def test_who_may_not_make_job_sets_learns_it_before_several_nodes_are_asked_for(server):
    with_account(server)
    server.cluster.denied.add(("create", "jobsets"))
    assert "may not create them" in checked()["JobSets"].message


def test_a_cluster_that_keeps_silent_is_not_waited_for(server, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = server.kubeconfig()
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        path = tmp_path / "silent"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        began = time.monotonic()
        (check,) = KubernetesBackend(TARGET).checks()
        assert time.monotonic() - began < 10
    assert (check.name, check.exit_code) == ("cluster", Exit.BUCKET_AWAY)


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
