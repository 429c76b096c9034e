"""Jobs on a cluster, by the official client and a server on this machine: sent, followed, refused and taken away."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from job.coordination.outcome import outcome_written
from job.exits import Exit, State, StoppedError
from job.jobs.backends import Cause, kubernetes
from job.jobs.backends.kubernetes import KubernetesTarget
from tests.job.command_line import ddpm_here, environment, raised, refused, succeeded
from tests.job.jobs.submitting import GKE, sampling, spec, target
from tests.job.launching import eventually

NAME = "train-celeba"
KUBECTL = str(Path(sys.executable).with_name("kubectl"))
TRAIN = ("submit", "train", "--dataset", "celeba", "--on", "gke")
VERBS = ("get", "list", "create", "delete")
both = pytest.mark.parametrize(("job", "plural"), [(spec(), "jobs"), (spec(nodes=2), "jobsets")], ids=["job", "group"])


@pytest.fixture
def backend(server):
    return target()


def elsewhere(server, tmp_path, port):
    """The kubeconfig leads to another server."""
    text = yaml.safe_dump(server.kubeconfig()).replace(server.url, f"http://127.0.0.1:{port}")
    (tmp_path / "kubeconfig").write_text(text)


@pytest.fixture
def gke(server, targets_folder):
    """A cluster, and a working folder with targets for it."""
    blocks = {"gke": GKE, "gke-big": GKE | {"gpus": 8, "context": "test"}, "other": GKE | {"namespace": "training"}}
    (targets_folder / "targets.yaml").write_text(yaml.safe_dump(blocks))
    return server


@pytest.mark.parametrize("options", [(), ("--nodes", "2")], ids=["job", "group"])
def test_dry_runs_print_what_is_sent(gke, options):
    printed = succeeded(ddpm_here(*TRAIN, "--dry-run", *options))
    assert not gke.requests
    succeeded(ddpm_here(*TRAIN, "--yes", *options))
    assert all("fieldValidation=Strict" in request for request in gke.requests if request.startswith("POST"))
    # As kubectl reads it, which a person pipes it into.
    words = [KUBECTL, "label", "--local", "--filename=-", "--output=json", "app=ddpm"]
    read = subprocess.run(words, input=printed, env=environment(), capture_output=True, text=True, check=True)
    assert [json.loads(read.stdout)] == gke.bodies


def test_names_are_unique_per_namespace(gke, targets_folder):
    succeeded(ddpm_here(*TRAIN, "--yes"))
    gke.print(gke.start_pod(NAME), "epoch 1")
    assert succeeded(ddpm_here("jobs", "list")).count(NAME) == 1
    lines = succeeded(ddpm_here("jobs", "status", NAME, "--bucket", targets_folder)).splitlines()
    assert [line for line in lines if line.startswith("job ")] == [f"job         {NAME}, on gke, in node-0"]
    assert succeeded(ddpm_here("jobs", "logs", NAME)) == "epoch 1\n"
    succeeded(ddpm_here(*TRAIN[:-1], "other", "--yes"))
    assert succeeded(ddpm_here("jobs", "list")).count(NAME) == 2
    line = refused(ddpm_here("jobs", "cancel", NAME), Exit.BAD_REQUEST)
    assert "on several targets (gke, other): choose one with --on" in line
    succeeded(ddpm_here("jobs", "cancel", NAME, "--on", "gke"))


@both
def test_bucket_knows_attempts_without_pods(server, backend, job, plural, tmp_path, monkeypatch):
    bucket = str(tmp_path)

    def told():
        status = backend.alive(NAME).with_outcome(bucket)
        return status.state, status.attempts, status.message

    backend.submit(job)
    assert told() == (State.WAITING, 0, "waits for a pod")
    before = "waits for a pod; the attempt before ended with exit code 75: stopped by SIGTERM"
    for count in (1, 2, 3):
        pods = [server.start_pod(NAME, node, plural) for node in range(job.nodes)]
        with suppress(StoppedError), ExitStack() as programs:
            for node in range(job.nodes):
                monkeypatch.setenv("DDPM_JOB", NAME)
                programs.enter_context(outcome_written(bucket, node, job.nodes, is_group=True))
            assert told() == (State.RUNNING, count, "")
            raise StoppedError("stopped by SIGTERM")
        # Who is evicted goes with its pod, and a pause of minutes follows.
        for pod in pods:
            server.remove("pods", pod)
        assert told() == (State.WAITING, count, before)
    # Who stopped, however often, has not failed, though Kubernetes gives up.
    server.end_job(NAME, "Failed", "in its own words", plural)
    assert (backend.alive(NAME).failures, backend.alive(NAME).with_outcome(bucket).failures) == (5, 0)
    # What was before this job is another one's.
    later = replace(backend.alive(NAME), created="2100-01-01T00:00:00Z")
    assert later.with_outcome(bucket) == later


def test_queue_must_exist_before_the_job(server):
    backend = target("queued")
    # Who may not see queues may still submit.
    server.forbidden = {("get", "localqueues")}
    backend.submit(spec())
    server.forbidden.clear()
    for installed in ("v1beta2", "v1beta1"):
        said = r"no LocalQueue 'gpus' in namespace 'training'.*create it in Kueue .kubectl"
        raised(66, said, backend.submit, spec(f"train-{installed}"))
        server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")
        backend.submit(spec(f"train-{installed}"))
        assert backend.alive(f"train-{installed}").message == "waits in the queue 'gpus'"
        server.served["kueue.x-k8s.io/v1beta1"] = server.served.pop(f"kueue.x-k8s.io/{installed}")
        server.remove("localqueues", "gpus", "training")


@pytest.mark.parametrize("forbidden", [(), VERBS], ids=["admin", "edit"])
def test_missing_jobsets_are_named(server, backend, forbidden):
    del server.served["jobset.x-k8s.io/v1alpha2"]
    server.forbidden = {(verb, "jobsets") for verb in forbidden}
    said = r"--nodes 2 needs JobSets in the cluster: kubectl apply --server-side -f .*jobset"
    raised(66, said, backend.submit, spec(nodes=2))
    assert not server.bodies
    backend.submit(spec())
    assert [status.state for status in backend.jobs()] == [State.WAITING]


def test_only_needed_rights_are_used(server, backend):
    server.forbidden = {(verb, resource) for verb in VERBS for resource in ("jobsets", "workloads")}
    backend.submit(spec())
    server.change("jobs", NAME, conditions=[{"type": "Suspended", "status": "True"}])
    assert [status.state for status in backend.jobs()] == [backend.alive(NAME).state] == [State.WAITING]
    backend.cancel(NAME)
    eventually(lambda: backend.alive(NAME).state is State.GONE)
    said = r"cannot create resource .jobsets.*jobs need get, list, create"
    raised(77, said, backend.submit, spec(nodes=2))


def test_living_jobs_are_not_submitted_twice(server, backend):
    def lose():
        server.create("default", "jobs", backend.render(spec())[0])
        raise ConnectionResetError

    # Nor is one whose first answer was lost.
    server.faults.append(("POST", lose))
    said = r"train-celeba runs in namespace 'default' already.*jobs cancel train-celeba"
    for job in (spec(), spec(), spec(nodes=2)):
        raised(64, said, backend.submit, job)
    assert server.names("jobs", "jobsets") == [NAME]
    for how, code in (("Complete", 0), ("Failed", 78)):
        server.end_pod(server.start_pod(NAME), code)
        server.end_job(NAME, how)
        old = server.get("jobs", NAME)["metadata"]["uid"]
        backend.submit(spec())
        assert server.get("jobs", NAME)["metadata"]["uid"] != old and not server.names("pods")
        assert backend.alive(NAME).state is State.WAITING


@both
def test_cancelling_ends_the_pods(server, backend, job, plural):
    server.goes_after_seconds = 0.4
    backend.submit(job)
    server.start_pod(NAME, 0, plural)
    assert backend.cancel(NAME).startswith("is stopping: it saves first")
    assert backend.alive(NAME).state is State.CANCELLED
    assert backend.cancel(NAME) == "is being deleted: its pods may save first"
    backend.submit(job)
    assert not server.names("pods")
    assert backend.cancel(NAME).startswith("was waiting and is removed")
    eventually(lambda: backend.alive(NAME).state is State.GONE)
    # By which a watch knows that somebody deleted it.
    assert backend.keeps_ended
    raised(66, "'gke' knows no job 'train-celeba'", backend.cancel, NAME)


@both
def test_dead_nodes_are_named(server, backend, job, plural, monkeypatch):
    """A kubelet dies, and its node stays: the pod never goes, and no other comes."""
    monkeypatch.setattr(kubernetes, "GONE_MARGIN_SECONDS", -backend.grace_seconds)
    told = "node node-0 does not answer: pod train-celeba-0-"
    backend.submit(job)
    pods = [server.start_pod(NAME, node, plural) for node in range(job.nodes)]
    server.kill_kubelet("node-0")
    for status in (backend.alive(NAME), *backend.jobs()):
        assert (status.state, status.place) == (State.WAITING, f"node-{job.nodes - 1}") and told in status.message
    raised(66, told, list, backend.logs(NAME, follow=True))
    backend.cancel(NAME)
    raised(64, f"old job 'train-celeba' in namespace 'default' does not end: {told}", backend.submit, job)
    server.delete_node("node-0")
    assert pods[0] not in server.names("pods")
    monkeypatch.undo()
    backend.submit(job)


def test_refused_jobs_leave_nothing(server, backend, monkeypatch):
    ((job,), (group,)), nowhere = map(backend.render, (spec(), spec(nodes=2))), target(namespace="nowhere")
    raised(66, r'namespaces "nowhere" not found: `kubectl create` it, or set', nowhere.submit, spec())
    job["spec"]["template"]["spec"]["restartPolicie"] = "Never"
    group["spec"]["failurePolicy"]["rules"][0]["name"] = "taken-away"
    for made, said in (
        (job, r"refuses it .400.: strict decoding error.*restartPolicie"),
        (group, r"refuses it .403.: admission webhook .* names of failure rules$"),
    ):
        monkeypatch.setattr(KubernetesTarget, "render", lambda self, job, made=made: [made])
        raised(64, said, backend.submit, spec(nodes=1 + (made is group)))
    assert not server.names("jobs", "jobsets")


def test_busy_api_is_asked_again(server, backend, tmp_path):
    for code in (429, 503):
        for method in ("GET", "POST"):
            server.refuse_next(code, "try again", times=2, method=method)
        backend.submit(spec(f"train-{code}"))
    assert len(server.names("jobs")) == 2
    server.refuse_next(429, "the test says 429", times=4)
    raised(69, "answers 429: the test says 429", backend.alive, NAME)
    assert not server.faults
    said = 'Internal error occurred: failed calling webhook "mjob.kb.io": Post "https://kueue-webhook-service": {}'
    for code in (500, 503):
        server.refuse_next(code, said.format(code), times=4, method="POST")
        told = rf"answers {code}: Internal .*: {code}: the pods of this webhook's"
        raised(69, told, backend.submit, spec())
    elsewhere(server, tmp_path, 9)
    raised(69, "127.0.0.1:9, does not answer", target().submit, spec())


UNUSABLE = "^the kubeconfig .* cannot be used: [^\n]+$"
NO_CONTEXT = r"kubeconfig cannot be used: .* name prod in .*contexts.* `context:` of the"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        *((text, 78, UNUSABLE) for text in ("", "a: [", "- a", "just words", "contexts: 5", "{}", "\x00")),
        ({"current-context": "prod"}, 78, NO_CONTEXT),
        ({"current-context": ""}, 78, "kubeconfig"),
        ({"users": [{"name": "somebody", "user": {"token": "two\nl"}}]}, 78, "a token that is not valid$"),
        ({"users": [{"name": "somebody", "user": {"token": "wrong"}}]}, 77, "sign in again"),
    ],
)
def test_wrong_kubeconfigs_are_refused(server, tmp_path, monkeypatch, content, error, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    path, usual = tmp_path / "kubeconfig", server.kubeconfig()
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(usual | content))
    context = "prod" if said == NO_CONTEXT else ""
    raised(error, said, target(context=context).jobs)
    path.unlink()
    raised(66, r"the kubeconfig .* is missing: .*get-credentials", target().jobs)


def doctor(keys="gke"):
    return {check.name: check for check in target(keys).checks("")}


def test_doctor_finds_what_a_job_misses(server, monkeypatch, tmp_path):
    server.add("serviceaccounts", {"metadata": {"name": "ddpm"}})
    found = doctor()
    assert list(found) == ["cluster", "service account", "queue"] and all(check.passed for check in found.values())
    server.refuse_next(503, "busy", method="GET")
    assert [name for name, check in doctor().items() if not check.passed] == ["service account"]
    server.forbidden = {("get", "serviceaccounts")}
    account = doctor()["service account"]
    assert account.passed and "not looked at" in account.message
    server.forbidden.clear()
    found = doctor("queued")
    assert 'serviceaccounts "ddpm" not found' in found["service account"].message
    assert "namespace 'training'" in found["service account"].message
    assert not found["queue"].passed and "no LocalQueue 'gpus'" in found["queue"].message
    # What `ddpm jobs` needs.
    for verb, resource in (("get", "pods/log"), ("list", "pods"), ("get", "jobs"), ("list", "jobs")):
        server.forbidden = {(verb, resource)}
        (check,) = doctor().values()
        assert (check.passed, check.exit_code) == (False, Exit.NO_PERMISSION)
        assert f"you may not {verb} {resource} in namespace 'default'" in check.message
    server.refuse_next(503, "busy", times=2, method="POST")
    (check,) = doctor().values()
    assert (check.name, check.passed, check.exit_code) == ("cluster", False, Exit.BUCKET_AWAY)
    assert len(server.faults) == 1, "somebody waits: it is asked once"
    monkeypatch.setattr(kubernetes, "DOCTOR_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere(server, tmp_path, silent.getsockname()[1])
        (check,) = doctor().values()
    assert "does not answer" in check.message


def test_used_hours_are_found(server, backend):
    backend.submit(spec(nodes=2))
    # A JobSet only says that one of its Jobs failed.
    server.add("jobs", {"metadata": {"name": "part", "labels": {"jobset.sigs.k8s.io/jobset-name": NAME}}})
    server.end_job("part", "Failed", "DeadlineExceeded")
    server.end_job(NAME, "Failed", "FailJobSetFailurePolicyAction", "jobsets")
    for status in (backend.alive(NAME), *backend.jobs()):
        assert status.cause is Cause.OUT_OF_TIME
        assert status.message.startswith("DeadlineExceeded: its --max-hours are over")


@both
def test_workloads_show_what_queues_do(server, job, plural):
    def uid():
        return server.get(plural, NAME, "training")["metadata"]["uid"]

    def holds(active, kind, **condition):
        thing = {"metadata": {"name": NAME, "labels": {"kueue.x-k8s.io/job-uid": uid()}}, "spec": {"active": active}}
        server.add("workloads", {**thing, "status": {"conditions": [{"type": kind, **condition}]}}, "training")

    def runs_out():
        late = "The workload is deactivated due to exceeding the maximum execution time"
        holds(False, "Evicted", status="True", message=late)

    server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")
    queued = target("queued")
    queued.submit(job)
    first, said = uid(), "insufficient quota for nvidia.com/gpu in flavor gpu-spot, request > maximum capacity (8 > 4)"
    holds(True, "QuotaReserved", status="False", reason="Pending", message=said)
    (found,) = queued.jobs()
    assert found == queued.alive(NAME)
    assert found.state is State.WAITING and f"Pending: {said}" in found.message
    raised(64, "runs in namespace 'training' already", queued.submit, job)
    # One that the queue ended for its hours makes room.
    runs_out()
    assert queued.alive(NAME).cause is Cause.OUT_OF_TIME
    queued.submit(job)
    assert uid() != first and queued.alive(NAME).state is State.WAITING
    runs_out()
    assert queued.cancel(NAME).startswith("was failed already")


@pytest.fixture
def followed(backend):
    """Follows a job in a thread, as `ddpm jobs logs -f` does; gives a function that waits until lines have come."""

    def followed(name=NAME):
        lines = []
        thread = threading.Thread(target=lambda: lines.extend(backend.logs(name, follow=True)), daemon=True)
        thread.start()

        def wait_for(*expected, ends=False):
            eventually(lambda: lines == [*expected] and not (ends and thread.is_alive()))

        return wait_for

    return followed


def past(backend, name=NAME):
    return list(backend.logs(name, follow=False))


def test_what_was_printed_until_now(server, backend):
    raised(66, "no job 'train-celeba'", past, backend)
    backend.submit(spec())
    raised(66, "has no output, or it is gone", past, backend)
    first = server.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    raised(66, "has no output, or it is gone", past, backend)
    server.set_pod(first, waiting={"reason": "ImagePullBackOff", "message": "manifest unknown"})
    said = "train-celeba prints nothing: ImagePullBackOff: manifest unknown"
    raised(66, said, list, backend.logs(NAME, follow=True))
    server.set_pod(first, running={})
    server.print(first, "one", "two  with spaces ", "")
    server.end_pod(first, 75)
    server.print(server.start_pod(NAME), "grüße 🙂")
    assert past(backend) == ["one", "two  with spaces ", "", "grüße 🙂"]


def test_following_loses_no_line(server, backend, followed):
    backend.submit(spec())
    wait_for = followed()
    first = server.start_pod(NAME)
    # Their times end with zeros, which are left out, and without.
    lines = [f"line {number % 3}" for number in range(24)]
    server.print(first, *lines)
    wait_for(*lines)
    # A node throws the first lines of a long output away, and the API is away for a moment.
    server.refuse_next(503, "busy", times=2, method="GET")
    server.forget_log(first, 20)
    server.print(first, "saved")
    wait_for(*lines, "saved")
    # All is asked for once, and then what is new.
    asked = ["sinceSeconds=" in request for request in server.requests if "/log" in request]
    assert not asked[0] and asked[-1]
    server.end_pod(first, 75)
    second = server.start_pod(NAME)
    server.print(second, "epoch 2")
    wait_for(*lines, "saved", "epoch 2")
    # One that goes with its node; and one that is cancelled is followed until it has saved.
    server.remove("pods", second)
    third, server.goes_after_seconds = server.start_pod(NAME), 1.0
    server.print(third, "epoch 3")
    wait_for(*lines, "saved", "epoch 2", "epoch 3")
    backend.cancel(NAME)
    time.sleep(0.5)
    server.print(third, "saved again")
    wait_for(*lines, "saved", "epoch 2", "epoch 3", "saved again", ends=True)


def test_lines_name_their_slice(server, backend, followed):
    for job, plural, done in ((sampling(slices=2), "jobs", "Complete"), (spec(nodes=2), "jobsets", "Completed")):
        backend.submit(job)
        pods = [server.start_pod(job.name, index, plural) for index in (0, 1)]
        wait_for = followed(job.name)
        server.print(pods[1], "first")
        wait_for("[1] first")
        server.print(pods[0], "second")
        wait_for("[1] first", "[0] second")
        for pod in pods:
            server.end_pod(pod, 0)
        server.end_job(job.name, done, plural=plural)
        wait_for("[1] first", "[0] second", ends=True)
        assert past(backend, job.name) == ["[0] second", "[1] first"]
    # Others are not listed.
    server.add("jobs", {"metadata": {"name": "other", "labels": {"app": "web"}}, "spec": {}})
    found = {status.name: status.state for status in backend.jobs()}
    assert found == {sampling().name: State.FINISHED, NAME: State.FINISHED}
