"""Jobs on a cluster, by the official client and a server on this machine: sent, seen, refused and taken away."""

from __future__ import annotations

import json
import socket
import time

import pytest
import yaml

from job.exits import BadRequestError, BucketAwayError, Exit, MissingInputError, NoPermissionError
from job.jobs.backends import kubernetes_api
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, spec
from tests.job.jobs.kubernetes_server import wait_for

NAME = "train-celeba"


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET)


def queue(server):
    server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")


@pytest.mark.parametrize("job", [spec(), spec(nodes=2), sampling()], ids=["job", "jobset", "slices"])
def test_what_is_sent_is_what_a_dry_run_prints(server, backend, job):
    backend.submit(job)
    assert server.bodies == backend.render(job)
    assert all("fieldValidation=Strict" in path for method, path in server.requests if method == "POST")
    assert [status.name for status in backend.jobs()] == [job.name]


def test_a_job_from_its_beginning_to_its_end(server, backend):
    backend.submit(spec())
    status = backend.status(NAME)
    assert (status.name, status.state, status.message) == (NAME, State.WAITING, "has no pod yet")
    assert status.created.endswith("Z")
    pod = server.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    assert "ContainerCreating on node-0" in backend.status(NAME).message
    server.set_pod(pod, running={})
    status = backend.status(NAME)
    assert (status.state, status.message, status.place, status.attempts) == (State.RUNNING, "", "node-0", 1)
    server.end_pod(pod, 75, "ddpm: stopped by SIGTERM, saved")
    status = backend.status(NAME)
    assert (status.state, status.exit_code) == (State.WAITING, 75)
    assert "the next attempt follows; the last one: exit code 75 (stopped by" in status.message
    second = server.start_pod(NAME)
    status = backend.status(NAME)
    assert (status.state, status.attempts) == (State.RUNNING, 2)
    assert "an attempt before: exit code 75" in status.message
    server.end_pod(second, 0)
    server.end_job(NAME, "Complete")
    status = backend.status(NAME)
    assert (status.state, status.exit_code, status.message) == (State.FINISHED, 0, "")
    assert backend.status("other").state is State.GONE


def test_a_queue_must_be_there_before_the_job(server):
    backend = KubernetesBackend(QUEUED)
    with pytest.raises(MissingInputError, match=r"no LocalQueue 'gpus' in namespace 'training'"):
        backend.submit(spec())
    assert not server.bodies
    queue(server)
    backend.submit(spec())
    assert backend.status(NAME).message == "waits in the queue 'gpus'"
    backend.cancel(NAME)
    server.served["kueue.x-k8s.io/v1beta1"] = server.served.pop("kueue.x-k8s.io/v1beta2")
    backend.submit(spec())
    backend.cancel(NAME)
    del server.served["kueue.x-k8s.io/v1beta1"]
    with pytest.raises(MissingInputError, match=r"once Kueue is installed .kubectl apply"):
        backend.submit(spec())


def test_who_may_not_see_queues_may_still_submit(server):
    server.forbidden.add(("get", "localqueues"))
    KubernetesBackend(QUEUED).submit(spec())
    assert server.names("jobs", "training") == [NAME]


def test_several_nodes_are_a_jobset(server, backend):
    backend.submit(spec(nodes=2))
    assert server.names("jobsets") == [NAME] and not server.names("jobs")
    pods = [server.start_pod(NAME, index, "jobsets") for index in (0, 1)]
    server.set_pod(pods[1], waiting={"reason": "ImagePullBackOff", "message": "denied"})
    status = backend.status(NAME)
    assert status.state is State.RUNNING
    assert "1 of 2 pods run; ImagePullBackOff: denied" in status.message
    server.change("jobsets", NAME, restarts=3)
    assert backend.status(NAME).attempts == 4
    server.end_job(NAME, "Completed", plural="jobsets")
    assert backend.status(NAME).state is State.FINISHED


def test_a_cluster_without_jobsets_says_what_installs_them(server, backend):
    del server.served["jobset.x-k8s.io/v1alpha2"]
    with pytest.raises(MissingInputError, match=r"--nodes 2 needs: kubectl apply --server-side -f .*jobset"):
        backend.submit(spec(nodes=2))
    assert not server.bodies
    backend.submit(spec())
    assert [status.state for status in backend.jobs()] == [State.WAITING]


def test_a_job_that_is_alive_is_not_submitted_twice(server, backend):
    backend.submit(spec())
    for job in (spec(), spec(nodes=2)):
        with pytest.raises(BadRequestError, match=r"is there and waiting .*ddpm jobs cancel train-celeba"):
            backend.submit(job)
    assert len(server.bodies) == 1


def test_a_job_that_is_over_makes_room(server, backend):
    backend.submit(spec())
    for how, code in (("Complete", 0), ("Failed", 78)):
        server.end_pod(server.start_pod(NAME), code)
        server.end_job(NAME, how)
        old = server.get("jobs", NAME)["metadata"]["uid"]
        backend.submit(spec())
        assert server.get("jobs", NAME)["metadata"]["uid"] != old
        assert not server.names("pods")
        assert backend.status(NAME).state is State.WAITING


def test_cancelling_ends_the_pods_in_order_and_room_is_made_when_they_are_gone(server, backend):
    server.goes_after_seconds = 0.4
    for job, plural in ((spec(), "jobs"), (spec(nodes=2), "jobsets")):
        backend.submit(job)
        server.start_pod(NAME, 0, plural)
        assert backend.cancel(NAME).startswith("was told to stop: it saves first")
        assert backend.status(NAME).state is State.CANCELLED
        assert backend.cancel(NAME) == "is being deleted: its pods may save first"
        backend.submit(job)
        assert not server.names("pods")
        assert backend.cancel(NAME).startswith("was waiting, and is no more")
        wait_for(lambda: backend.status(NAME).state is State.GONE)
        with pytest.raises(MissingInputError, match=r"no job 'train-celeba' in namespace 'default'"):
            backend.cancel(NAME)


def test_jobs_are_listed_newest_first_and_others_are_not(server, backend):
    for job in (spec("train-a"), spec("train-b"), spec("train-c", nodes=2)):
        backend.submit(job)
    server.add("jobs", {"metadata": {"name": "other", "labels": {"app": "web"}}, "spec": {}})
    server.start_pod("train-b")
    found = backend.jobs()
    assert [status.name for status in found] == ["train-c", "train-b", "train-a"]
    assert [status.state for status in found] == [State.WAITING, State.RUNNING, State.WAITING]


def test_describe_is_what_the_cluster_holds(server, backend):
    backend.submit(spec())
    pod = server.start_pod(NAME)
    server.add("events", {"metadata": {"name": "e", "managedFields": []}, "involvedObject": {"name": pod}})
    told = backend.describe(NAME)
    assert told["job"]["metadata"]["name"] == NAME
    assert [thing["metadata"]["name"] for thing in (*told["pods"], *told["events"])] == [pod, "e"]
    assert "managedFields" not in json.dumps(told)
    with pytest.raises(MissingInputError):
        backend.describe("other")


def test_what_the_server_refuses_is_told_and_leaves_nothing(server, backend, monkeypatch):
    elsewhere = KubernetesBackend(TARGET.model_copy(update={"namespace": "nowhere"}))
    with pytest.raises(MissingInputError, match=r'namespaces "nowhere" not found: `kubectl create` it, or set'):
        elsewhere.submit(spec())
    made = backend.render(spec())
    made[0]["spec"]["template"]["spec"]["restartPolicie"] = "Never"
    monkeypatch.setattr(backend, "render", lambda job: made)
    with pytest.raises(BadRequestError, match=r"refuses it .400.: strict decoding error.*restartPolicie"):
        backend.submit(spec())
    assert not server.names("jobs")


def test_no_permission_names_what_is_needed(server, backend):
    for right, act in (
        (("create", "jobs"), lambda: backend.submit(spec())),
        (("get", "jobs"), lambda: backend.status(NAME)),
        (("list", "pods"), backend.jobs),
    ):
        server.forbidden = {right}
        with pytest.raises(NoPermissionError, match=rf"cannot {right[0]} resource.*jobs need get, list, create"):
            act()
    server.tokens = ["another"]
    with pytest.raises(NoPermissionError, match=r"does not take these credentials.*sign in again"):
        backend.submit(spec())
    assert not server.names("jobs")


def test_an_api_that_is_busy_or_away_is_asked_again_but_not_for_ever(server, backend, tmp_path):
    for code in (429, 500, 503):
        server.answer_next(code, times=2)
        server.answer_next(code, times=2, method="POST")
        backend.submit(spec(f"train-{code}"))
    assert len(server.names("jobs")) == 3
    began = time.monotonic()
    server.answer_next(429, times=99)
    with pytest.raises(BucketAwayError, match=r"answers 429: the test says 429; tried 4 times") as caught:
        backend.status(NAME)
    assert caught.value.exit_code == Exit.BUCKET_AWAY
    assert time.monotonic() - began < 5
    server.faults.clear()
    config = server.kubeconfig()
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    with pytest.raises(BucketAwayError, match=r"127.0.0.1:9, does not answer.*tried 4 times"):
        KubernetesBackend(TARGET).submit(spec())


def test_an_answer_that_gets_lost_makes_no_second_job_and_hides_no_other(server, backend):
    def lose(job):
        def answer(handler):
            server.create("default", "jobs", backend.render(job)[0])
            handler.close_connection = True

        server.faults.append(("POST", answer))

    lose(spec())
    backend.submit(spec())
    assert [method for method, _ in server.requests].count("POST") == 2
    lose(spec("train-b", max_hours=2.0))
    with pytest.raises(BadRequestError, match=r"'train-b' is there and waiting"):
        backend.submit(spec("train-b"))
    assert server.get("jobs", "train-b")["spec"]["activeDeadlineSeconds"] == 7200
    server.answer_next(503, times=4, method="POST")
    with pytest.raises(BucketAwayError, match="`ddpm jobs status train-c` says whether it arrived"):
        backend.submit(spec("train-c"))


ACCOUNT = {
    "metadata": {"name": "ddpm", "annotations": {"iam.gke.io/gcp-service-account": "ddpm@p.iam.gserviceaccount.com"}}
}


def doctor(target=TARGET):
    return {check.name: check for check in KubernetesBackend(target).checks()}


def test_a_doctor_finds_what_a_job_would_miss(server):
    server.add("serviceaccounts", ACCOUNT)
    found = doctor()
    assert list(found) == ["cluster", "service account", "JobSets", "queue", "GPU quota", "image"]
    assert [name for name, check in found.items() if not check.passed] == []
    assert found["service account"].message == "ddpm acts as ddpm@p.iam.gserviceaccount.com"
    assert found["JobSets"].message == "installed"
    server.forbidden = {("create", "jobsets"), ("list", "resourcequotas")}
    found = doctor()
    assert "may not create them" in found["JobSets"].message
    assert found["GPU quota"].passed and "not looked at" in found["GPU quota"].message
    # Only --nodes needs them, and this target may never be asked for several.
    del server.served["jobset.x-k8s.io/v1alpha2"]
    found = doctor(QUEUED)
    assert found["JobSets"].passed and "kubectl apply" in found["JobSets"].message
    assert found["service account"].remedy == "`kubectl -n training create serviceaccount ddpm`"
    assert not found["queue"].passed and "no LocalQueue 'gpus'" in found["queue"].message


def test_a_doctor_counts_the_gpus_that_are_left(server):
    name = "requests.nvidia.com/gpu"
    for used in ("3", "4"):
        server.add("resourcequotas", {"metadata": {"name": "q"}, "status": {"hard": {name: "4"}, "used": {name: used}}})
        check = doctor()["GPU quota"]
        assert check.passed is (used == "3")
    assert "4 of the 4 GPUs of namespace 'default' are taken, and a job asks for 1" in check.message


def test_a_doctor_says_in_one_line_that_a_cluster_cannot_be_used(server, monkeypatch, tmp_path):
    server.forbidden.add(("get", "pods/log"))
    (check,) = doctor().values()
    assert "may not get pods/log in namespace 'default'" in check.message
    server.answer_next(503, times=2, method="POST")
    (check,) = doctor().values()
    assert (check.name, check.passed, check.exit_code) == ("cluster", False, Exit.BUCKET_AWAY)
    assert len(server.faults) == 1, "somebody waits: it is asked once"
    monkeypatch.setattr(kubernetes_api, "DOCTOR_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = server.kubeconfig()
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        (check,) = doctor().values()
    assert "does not answer" in check.message
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (check,) = doctor().values()
    assert check.exit_code is Exit.MISSING_INPUT
