"""Jobs on a cluster, by the official client and a server on this machine: sent, seen, refused and taken away."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from job.exits import BadRequestError, BucketAwayError, Exit, MissingInputError, NoPermissionError
from job.jobs.backends import backend_for
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, spec
from tests.job.jobs.kubernetes_server import wait_for

NAME = "train-celeba"
FAST = (0.01, 0.02, 0.03)


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET, FAST, poll_seconds=0.05)


@pytest.mark.parametrize("job", [spec(), spec(nodes=2), sampling()], ids=["job", "jobset", "slices"])
def test_what_is_sent_is_what_a_dry_run_prints(server, backend, job):
    backend.submit(job)
    assert server.bodies == backend.render(job)
    assert all("fieldValidation=Strict" in path for method, path in server.requests if method == "POST")


def test_the_engine_of_a_target_is_this_one():
    assert isinstance(backend_for(TARGET), KubernetesBackend)


def test_a_job_from_its_beginning_to_its_end(server, backend):
    backend.submit(spec())
    status = backend.status(NAME)
    assert (status.name, status.state, status.message) == (NAME, State.WAITING, "has no pod yet")
    assert status.created.endswith("Z")
    pod = server.cluster.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    assert "ContainerCreating on node-0" in backend.status(NAME).message
    server.cluster.set_pod(pod, running={})
    status = backend.status(NAME)
    assert (status.state, status.message, status.place, status.attempts) == (State.RUNNING, "", "node-0", 1)
    server.cluster.end_pod(pod, 75, "ddpm: stopped by SIGTERM, saved")
    status = backend.status(NAME)
    assert (status.state, status.exit_code) == (State.WAITING, 75)
    assert "the next attempt follows; the last one: exit code 75 (stopped by" in status.message
    second = server.cluster.start_pod(NAME)
    status = backend.status(NAME)
    assert (status.state, status.attempts) == (State.RUNNING, 2)
    assert "an attempt before: exit code 75" in status.message
    server.cluster.end_pod(second, 0, reason="Completed")
    server.cluster.end_job(NAME, "Complete")
    status = backend.status(NAME)
    assert (status.state, status.exit_code, status.message) == (State.FINISHED, 0, "")
    assert backend.status("other").state is State.GONE


def test_a_job_in_a_queue(server):
    server.cluster.namespaces.add("training")
    server.cluster.add("localqueues", {"metadata": {"name": "gpus"}}, namespace="training")
    backend = KubernetesBackend(QUEUED, FAST)
    backend.submit(spec())
    assert backend.status(NAME).message == "waits in the queue 'gpus'"


def test_a_queue_that_is_not_there_gets_no_job(server):
    server.cluster.namespaces.add("training")
    backend = KubernetesBackend(QUEUED, FAST)
    with pytest.raises(MissingInputError, match=r"no LocalQueue 'gpus'"):
        backend.submit(spec())
    del server.cluster.served["kueue.x-k8s.io", "v1beta2"]
    with pytest.raises(MissingInputError, match=r"knows no queues"):
        backend.submit(spec())
    assert not server.bodies
    server.cluster.served["kueue.x-k8s.io", "v1beta1"] = ("localqueues",)
    server.forbidden.add(("list", "localqueues"))
    backend.submit(spec())
    assert len(server.bodies) == 1, "who may not see queues may still submit"


def test_several_nodes_are_a_jobset(server, backend):
    backend.submit(spec(nodes=2))
    assert server.cluster.names("jobsets") == [NAME] and not server.cluster.names("jobs")
    pods = [server.cluster.start_pod(NAME, index, "jobsets") for index in (0, 1)]
    server.cluster.set_pod(pods[1], waiting={"reason": "ImagePullBackOff", "message": "denied"})
    status = backend.status(NAME)
    assert status.state is State.RUNNING
    assert "1 of 2 pods run; ImagePullBackOff: denied" in status.message
    server.cluster.change("jobsets", NAME, restarts=3)
    assert backend.status(NAME).attempts == 4
    server.cluster.end_job(NAME, "Completed", plural="jobsets")
    assert backend.status(NAME).state is State.FINISHED
    assert [status.name for status in backend.jobs()] == [NAME]


def test_a_cluster_without_jobsets_says_what_installs_them(server, backend):
    del server.cluster.served["jobset.x-k8s.io", "v1alpha2"]
    with pytest.raises(MissingInputError, match=r"kubectl apply --server-side -f .*jobset") as caught:
        backend.submit(spec(nodes=2))
    assert caught.value.exit_code == Exit.MISSING_INPUT
    assert not server.bodies
    backend.submit(spec())
    assert backend.status(NAME).state is State.WAITING
    assert len(backend.jobs()) == 1


def test_a_job_that_is_alive_is_not_submitted_twice(server, backend):
    backend.submit(spec())
    for job in (spec(), spec(nodes=2)):
        with pytest.raises(BadRequestError, match=r"is there and waiting .*ddpm jobs cancel train-celeba") as caught:
            backend.submit(job)
        assert caught.value.exit_code == Exit.BAD_REQUEST
    assert len(server.bodies) == 1


def test_a_race_for_the_name_has_one_winner(server, backend):
    rival = backend.render(spec(max_hours=2.0))[0]

    def be_earlier(handler):
        if handler.command != "POST":
            server.faults.insert(0, be_earlier)
        else:
            server.cluster.create("default", "jobs", rival, is_dry=False)
        return False

    server.faults.append(be_earlier)
    with pytest.raises(BadRequestError, match=r"is there and waiting"):
        backend.submit(spec())
    assert server.cluster.get("default", "jobs", NAME)["spec"]["activeDeadlineSeconds"] == 7200


@pytest.mark.parametrize("how", ["Complete", "Failed"])
def test_a_job_that_is_over_makes_room(server, backend, how):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    server.cluster.end_pod(pod, 0 if how == "Complete" else 78)
    server.cluster.end_job(NAME, how)
    old = server.cluster.get("default", "jobs", NAME)["metadata"]["uid"]
    backend.submit(spec())
    assert server.cluster.get("default", "jobs", NAME)["metadata"]["uid"] != old
    assert not server.cluster.names("pods")
    assert backend.status(NAME).state is State.WAITING


def test_a_job_that_is_being_cancelled_is_waited_for(server, backend):
    server.cluster.goes_after_seconds = 0.5
    backend.submit(spec())
    backend.cancel(NAME)
    assert backend.status(NAME).state is State.CANCELLED
    backend.submit(spec())
    assert backend.status(NAME).state is State.WAITING


def test_cancelling_ends_the_pods_in_order(server, backend):
    server.cluster.goes_after_seconds = 0.3
    for job, plural in ((spec(), "jobs"), (spec(nodes=2), "jobsets")):
        backend.submit(job)
        server.cluster.start_pod(NAME, 0, plural)
        backend.cancel(NAME)
        # In the foreground: the object stays while its pods save.
        assert server.cluster.get("default", plural, NAME)["metadata"]["finalizers"] == ["foregroundDeletion"]
        assert backend.status(NAME).state is State.CANCELLED
        wait_for(lambda: not server.cluster.names("pods"))
        assert backend.status(NAME).state is State.GONE
        with pytest.raises(MissingInputError, match=r"no job 'train-celeba' in namespace 'default'"):
            backend.cancel(NAME)


def test_jobs_are_listed_newest_first_and_others_are_not(server, backend):
    for name in ("train-a", "train-b"):
        backend.submit(spec(name))
        time.sleep(1.1)
    backend.submit(spec("train-c", nodes=2))
    server.cluster.add("jobs", {"metadata": {"name": "other", "labels": {"app": "web"}}, "spec": {}})
    owner = [{"kind": "JobSet", "name": "train-c", "uid": "x"}]
    child = {"name": "train-c-node-0", "labels": {"app": "ddpm"}, "ownerReferences": owner}
    server.cluster.add("jobs", {"metadata": child, "spec": {}})
    server.cluster.start_pod("train-b")
    found = backend.jobs()
    assert [status.name for status in found] == ["train-c", "train-b", "train-a"]
    assert [status.state for status in found] == [State.WAITING, State.RUNNING, State.WAITING]


def test_describe_is_what_the_cluster_holds(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    about = {"involvedObject": {"name": pod}, "type": "Normal", "reason": "Pulled"}
    server.cluster.add("events", {"metadata": {"name": "e", "managedFields": []}, **about})
    told = backend.describe(NAME)
    assert told["job"]["metadata"]["name"] == NAME
    assert [entry["metadata"]["name"] for entry in told["pods"]] == [pod]
    assert [event["reason"] for event in told["events"]] == ["Pulled"]
    assert "managedFields" not in json.dumps(told)
    with pytest.raises(MissingInputError):
        backend.describe("other")


def test_a_namespace_that_is_not_there(backend, server):
    elsewhere = KubernetesBackend(TARGET.model_copy(update={"namespace": "nowhere"}), FAST)
    with pytest.raises(MissingInputError, match=r"no namespace 'nowhere'.*kubectl create namespace") as caught:
        elsewhere.submit(spec())
    assert caught.value.exit_code == Exit.MISSING_INPUT


def test_what_the_server_refuses_is_told_and_leaves_nothing(server, backend, monkeypatch):
    made = backend.render(spec())
    made[0]["spec"]["template"]["spec"]["restartPolicie"] = "Never"
    monkeypatch.setattr(backend, "render", lambda job: made)
    with pytest.raises(BadRequestError, match=r"strict decoding error.*restartPolicie"):
        backend.submit(spec())
    del made[0]["spec"]["template"]["spec"]["restartPolicie"]
    made[0]["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    with pytest.raises(BadRequestError, match=r"refuses it .422.*restartPolicy"):
        backend.submit(spec())
    assert not server.cluster.names("jobs")


def test_credentials_that_are_not_known(server, backend):
    server.tokens = ["another"]
    with pytest.raises(NoPermissionError, match=r"does not take these credentials.*sign in again"):
        backend.submit(spec())


@pytest.mark.parametrize(
    ("right", "act"),
    [
        (("create", "jobs"), lambda backend: backend.submit(spec())),
        (("get", "jobs"), lambda backend: backend.status(NAME)),
        (("list", "jobs"), lambda backend: backend.jobs()),
        (("list", "pods"), lambda backend: backend.jobs()),
    ],
)
def test_no_permission_names_what_is_needed(server, backend, right, act):
    server.forbidden.add(right)
    with pytest.raises(NoPermissionError, match=rf"cannot {right[0]} resource.*jobs need get, list, create") as caught:
        act(backend)
    assert caught.value.exit_code == Exit.NO_PERMISSION
    assert not server.cluster.names("jobs")


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_an_api_that_is_busy_is_asked_again(server, backend, code):
    server.answer_next(code, times=2)
    backend.submit(spec())
    assert server.cluster.names("jobs") == [NAME]
    server.answer_next(code, times=3)
    assert backend.status(NAME).state is State.WAITING


def test_an_api_that_stays_busy_is_given_up(server, backend):
    server.answer_next(429, times=99)
    began = time.monotonic()
    with pytest.raises(BucketAwayError, match=r"answers 429.*tried 4 times") as caught:
        backend.submit(spec())
    assert caught.value.exit_code == Exit.BUCKET_AWAY
    assert time.monotonic() - began < 5
    server.faults.clear()
    assert not server.cluster.names("jobs")


def test_a_server_that_says_how_long_to_wait_is_heard(server):
    backend = KubernetesBackend(TARGET, (0.01,))
    server.answer_next(429, Retry_After="1")
    began = time.monotonic()
    backend.status(NAME)
    assert time.monotonic() - began >= 1


def test_an_answer_that_gets_lost_makes_no_second_job(server, backend):
    server.lose_next_answer()
    backend.submit(spec())
    assert server.cluster.names("jobs") == [NAME]
    assert [method for method, _ in server.requests].count("POST") == 2


def test_an_answer_that_gets_lost_does_not_hide_another_job(server, backend):
    rival = backend.render(spec(max_hours=2.0))[0]

    def add_rival_and_break(handler):
        if handler.command != "POST":
            server.faults.insert(0, add_rival_and_break)
            return False
        server.cluster.create("default", "jobs", rival, is_dry=False)
        handler.close_connection = True
        return True

    server.faults.append(add_rival_and_break)
    with pytest.raises(BadRequestError, match=r"is there and waiting"):
        backend.submit(spec())


def test_what_arrived_although_nobody_said_so_is_removed(server):
    backend = KubernetesBackend(TARGET, ())
    server.lose_next_answer()
    with pytest.raises(BucketAwayError, match=r"what had arrived was removed"):
        backend.submit(spec())
    wait_for(lambda: not server.cluster.names("jobs"))


def test_an_api_that_is_away(server, backend, tmp_path):
    config = server.kubeconfig()
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    for act in (lambda: backend.submit(spec()), lambda: backend.status(NAME), backend.jobs):
        with pytest.raises(BucketAwayError, match=r"127.0.0.1:9, does not answer.*tried 4 times"):
            act()


def test_the_servers_own_watch_understands_the_official_client(server, backend):
    """No part of the program: it shows that the server of these tests speaks as the client expects."""
    from kubernetes import client, watch

    from job.jobs.backends.kubernetes_credentials import configuration

    backend.submit(spec())
    api = client.BatchV1Api(client.ApiClient(configuration("")))
    kinds = []
    for event in watch.Watch().stream(api.list_namespaced_job, "default", timeout_seconds=2):
        kinds.append((event["type"], event["object"].metadata.name))
        if len(kinds) == 1:
            server.cluster.change("jobs", NAME, active=1)
        else:
            break
    assert kinds == [("ADDED", NAME), ("MODIFIED", NAME)]
