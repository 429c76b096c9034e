"""Jobs on a cluster, by the official client and a server on this machine: sent, followed, refused and taken away."""

from __future__ import annotations

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
from job.exits import (
    BadConfigError,
    BadRequestError,
    BucketAwayError,
    Exit,
    MissingInputError,
    NoPermissionError,
    State,
    StoppedError,
)
from job.jobs.backends import Cause, kubernetes
from job.jobs.backends.kubernetes import KubernetesTarget
from tests.job.command_line import ddpm_here, environment, refused, succeeded
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


@pytest.fixture
def queued(server):
    """A target with a queue that is there."""
    server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")
    return target("queued")


def elsewhere(server, tmp_path, port):
    """The kubeconfig leads to another server."""
    text = yaml.safe_dump(server.kubeconfig()).replace(server.url, f"http://127.0.0.1:{port}")
    (tmp_path / "kubeconfig").write_text(text)


def test_dry_runs_print_what_is_sent(server, backend):
    jobs = [spec(), spec("train-b", nodes=2), sampling()]
    for job in jobs:
        backend.submit(job)
    assert server.bodies == [made for job in jobs for made in backend.render(job)]
    assert all("fieldValidation=Strict" in path for method, path in server.requests if method == "POST")
    # Others are not listed.
    server.add("jobs", {"metadata": {"name": "other", "labels": {"app": "web"}}, "spec": {}})
    server.start_pod("train-b", plural="jobsets")
    found = {status.name: status.state for status in backend.jobs()}
    assert found == {jobs[2].name: State.WAITING, "train-b": State.RUNNING, NAME: State.WAITING}


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
    server.forbidden = set()
    said = r"no LocalQueue 'gpus' in namespace 'training'.*create it in Kueue .kubectl"
    for installed in ("v1beta2", "v1beta1"):
        with pytest.raises(MissingInputError, match=said):
            backend.submit(spec(f"train-{installed}"))
        server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")
        backend.submit(spec(f"train-{installed}"))
        assert backend.alive(f"train-{installed}").message == "waits in the queue 'gpus'"
        kept = server.served.pop(f"kueue.x-k8s.io/{installed}")
        server.served |= {"kueue.x-k8s.io/v1beta1": kept} if installed == "v1beta2" else {}
        server.remove("localqueues", "gpus", "training")


@pytest.mark.parametrize("forbidden", [(), VERBS], ids=["admin", "edit"])
def test_missing_jobsets_are_named(server, backend, forbidden):
    del server.served["jobset.x-k8s.io/v1alpha2"]
    server.forbidden = {(verb, "jobsets") for verb in forbidden}
    said = r"--nodes 2 needs JobSets in the cluster: kubectl apply --server-side -f .*jobset"
    with pytest.raises(MissingInputError, match=said):
        backend.submit(spec(nodes=2))
    assert not server.bodies
    backend.submit(spec())
    assert [status.state for status in backend.jobs()] == [State.WAITING]


def test_living_jobs_are_not_submitted_twice(server, backend):
    def lose(handler):
        server.create("default", "jobs", backend.render(spec())[0])
        handler.close_connection = True

    # Nor is one whose first answer was lost.
    server.faults.append(("POST", lose))
    said = r"train-celeba runs in namespace 'default' already.*jobs cancel train-celeba"
    for job in (spec(), spec(), spec(nodes=2)):
        with pytest.raises(BadRequestError, match=said):
            backend.submit(job)
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
    with pytest.raises(MissingInputError, match="'gke' knows no job 'train-celeba'"):
        backend.cancel(NAME)


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
    with pytest.raises(MissingInputError, match=told):
        list(backend.logs(NAME, follow=True))
    backend.cancel(NAME)
    with pytest.raises(BadRequestError, match=f"old job 'train-celeba' in namespace 'default' does not end: {told}"):
        backend.submit(job)
    server.delete_node("node-0")
    assert pods[0] not in server.names("pods")
    monkeypatch.undo()
    backend.submit(job)


def test_refused_jobs_leave_nothing(server, backend, monkeypatch):
    made = backend.render(spec())
    (group,) = backend.render(spec(nodes=2))
    with pytest.raises(MissingInputError, match=r'namespaces "nowhere" not found: `kubectl create` it, or set'):
        target(namespace="nowhere").submit(spec())
    made[0]["spec"]["template"]["spec"]["restartPolicie"] = "Never"
    monkeypatch.setattr(KubernetesTarget, "render", lambda self, job: made)
    with pytest.raises(BadRequestError, match=r"refuses it .400.: strict decoding error.*restartPolicie"):
        backend.submit(spec())
    made = [group]
    group["spec"]["failurePolicy"]["rules"][0]["name"] = "taken-away"
    with pytest.raises(BadRequestError, match=r"refuses it .403.: admission webhook .* names of failure rules$"):
        backend.submit(spec(nodes=2))
    assert not server.names("jobs", "jobsets")


def test_only_needed_rights_are_used(server, backend):
    server.forbidden = {(verb, resource) for verb in VERBS for resource in ("jobsets", "workloads")}
    backend.submit(spec())
    server.change("jobs", NAME, conditions=[{"type": "Suspended", "status": "True"}])
    assert [status.state for status in backend.jobs()] == [backend.alive(NAME).state] == [State.WAITING]
    backend.cancel(NAME)
    eventually(lambda: backend.alive(NAME).state is State.GONE)
    with pytest.raises(NoPermissionError, match=r"cannot create resource .jobsets.*jobs need get, list, create"):
        backend.submit(spec(nodes=2))


def test_busy_api_is_asked_again(server, backend, tmp_path):
    for code in (429, 503):
        server.answer_next(code, times=2)
        server.answer_next(code, times=2, method="POST")
        backend.submit(spec(f"train-{code}"))
    assert len(server.names("jobs")) == 2
    server.answer_next(429, times=99)
    with pytest.raises(BucketAwayError, match=r"answers 429: the test says 429"):
        backend.alive(NAME)
    server.faults.clear()
    said = 'Internal error occurred: failed calling webhook "mjob.kb.io": Post "https://kueue-webhook-service": {}'
    for code in (500, 503):
        server.answer_next(code, times=4, method="POST", message=said)
        with pytest.raises(BucketAwayError, match=rf"answers {code}: Internal .*: {code}: the pods of this webhook's"):
            backend.submit(spec())
    elsewhere(server, tmp_path, 9)
    with pytest.raises(BucketAwayError, match=r"127.0.0.1:9, does not answer"):
        target().submit(spec())


UNUSABLE = "^the kubeconfig .* cannot be used: [^\n]+$"
WRONG = [
    (text, "", BadConfigError, UNUSABLE) for text in ("", "a: [", "- a", "just words", "contexts: 5", "{}", "\x00")
]
WRONG += [
    ({}, "prod", BadConfigError, r"kubeconfig cannot be used: .* name prod in .*contexts.* `context:` of the"),
    ({"current-context": ""}, "", BadConfigError, "kubeconfig"),
    ({"users": [{"name": "somebody", "user": {"token": "two\nl"}}]}, "", BadConfigError, "a token that is not valid$"),
    ({"users": [{"name": "somebody", "user": {"token": "wrong"}}]}, "", NoPermissionError, "sign in again"),
]


@pytest.mark.parametrize(("content", "context", "error", "said"), WRONG)
def test_wrong_kubeconfigs_are_refused(server, tmp_path, monkeypatch, content, context, error, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    path, usual = tmp_path / "kubeconfig", server.kubeconfig()
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(usual | content))
    with pytest.raises(error, match=said):
        target(context=context).jobs()
    path.unlink()
    with pytest.raises(MissingInputError, match=r"the kubeconfig .* is missing: .*get-credentials"):
        target().jobs()


def doctor(keys="gke"):
    return {check.name: check for check in target(keys).checks("")}


def test_doctor_finds_what_a_job_misses(server):
    server.add("serviceaccounts", {"metadata": {"name": "ddpm"}})
    found = doctor()
    assert list(found) == ["cluster", "service account", "queue"]
    assert [name for name, check in found.items() if not check.passed] == []
    server.answer_next(503)
    assert [name for name, check in doctor().items() if not check.passed] == ["service account"]
    server.forbidden = {("get", "serviceaccounts")}
    account = doctor()["service account"]
    assert account.passed and "not looked at" in account.message
    server.forbidden.clear()
    found = doctor("queued")
    assert 'serviceaccounts "ddpm" not found' in found["service account"].message
    assert "namespace 'training'" in found["service account"].message
    assert not found["queue"].passed and "no LocalQueue 'gpus'" in found["queue"].message


def test_doctor_names_an_unusable_cluster(server, monkeypatch, tmp_path):
    # What `ddpm jobs` needs.
    for verb, resource in (("get", "pods/log"), ("list", "pods"), ("get", "jobs"), ("list", "jobs")):
        server.forbidden = {(verb, resource)}
        (check,) = doctor().values()
        assert (check.passed, check.exit_code) == (False, Exit.NO_PERMISSION)
        assert f"you may not {verb} {resource} in namespace 'default'" in check.message
    server.forbidden = set()
    server.answer_next(503, times=2, method="POST")
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
def test_workloads_show_what_queues_do(server, queued, job, plural):
    def holds(uid, active, **condition):
        thing = {"metadata": {"name": NAME, "labels": {"kueue.x-k8s.io/job-uid": uid}}, "spec": {"active": active}}
        server.add("workloads", {**thing, "status": {"conditions": [condition]}}, "training")

    def uid():
        return server.get(plural, NAME, "training")["metadata"]["uid"]

    said = "insufficient quota for nvidia.com/gpu in flavor gpu-spot, request > maximum capacity (8 > 4)"
    late = "The workload is deactivated due to exceeding the maximum execution time"
    over = {"active": False, "type": "Evicted", "status": "True", "message": late}
    queued.submit(job)
    first = uid()
    holds(first, True, type="QuotaReserved", status="False", reason="Pending", message=said)
    (found,) = queued.jobs()
    assert found == queued.alive(NAME)
    assert found.state is State.WAITING and f"Pending: {said}" in found.message
    with pytest.raises(BadRequestError, match="runs in namespace 'training' already"):
        queued.submit(job)
    # One that the queue ended for its hours makes room.
    holds(first, **over)
    assert queued.alive(NAME).cause is Cause.OUT_OF_TIME
    queued.submit(job)
    assert uid() != first and queued.alive(NAME).state is State.WAITING
    holds(uid(), **over)
    assert queued.cancel(NAME).startswith("was failed already")


class Followed:
    """A thread that follows a job, as `ddpm jobs logs -f` does."""

    def __init__(self, backend, name=NAME):
        self.lines = []
        self._thread = threading.Thread(target=lambda: self.lines.extend(backend.logs(name, follow=True)), daemon=True)
        self._thread.start()

    def wait_for(self, *lines):
        eventually(lambda: self.lines == list(lines))

    def ended(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.lines


def past(backend, name=NAME):
    return list(backend.logs(name, follow=False))


def test_what_was_printed_until_now(server, backend):
    with pytest.raises(MissingInputError, match="no job 'train-celeba'"):
        past(backend)
    backend.submit(spec())
    with pytest.raises(MissingInputError, match=r"has no output, or it is gone"):
        past(backend)
    first = server.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    with pytest.raises(MissingInputError, match=r"has no output, or it is gone"):
        past(backend)
    server.set_pod(first, waiting={"reason": "ImagePullBackOff", "message": "manifest unknown"})
    with pytest.raises(MissingInputError, match="train-celeba prints nothing: ImagePullBackOff: manifest unknown"):
        list(backend.logs(NAME, follow=True))
    server.set_pod(first, running={})
    server.print(first, "one", "two  with spaces ", "")
    server.end_pod(first, 75)
    server.print(server.start_pod(NAME), "grüße 🙂")
    assert past(backend) == ["one", "two  with spaces ", "", "grüße 🙂"]


def test_following_loses_no_line(server, backend):
    backend.submit(spec())
    followed = Followed(backend)
    first = server.start_pod(NAME)
    # Their times end with zeros, which are left out, and without.
    lines = [f"line {number % 3}" for number in range(24)]
    for line in lines:
        server.print(first, line)
    followed.wait_for(*lines)
    # A node throws the first lines of a long output away, and the API is away for a moment.
    server.answer_next(503, times=2)
    server.forget_log(first, 20)
    server.print(first, "saved")
    followed.wait_for(*lines, "saved")
    # All is asked for once, and then what is new.
    asked = ["sinceSeconds=" in path for _, path in server.requests if "/log" in path]
    assert not asked[0] and asked[-1]
    server.end_pod(first, 75)
    second = server.start_pod(NAME)
    server.print(second, "epoch 2")
    followed.wait_for(*lines, "saved", "epoch 2")
    # One that goes with its node.
    server.remove("pods", second)
    third = server.start_pod(NAME)
    server.print(third, "epoch 3", "finished")
    server.end_pod(third, 0)
    server.end_job(NAME, "Complete")
    assert followed.ended() == [*lines, "saved", "epoch 2", "epoch 3", "finished"]


def test_lines_name_their_slice(server, backend):
    for job, plural, done in ((sampling(slices=2), "jobs", "Complete"), (spec(nodes=2), "jobsets", "Completed")):
        backend.submit(job)
        pods = [server.start_pod(job.name, index, plural) for index in (0, 1)]
        followed = Followed(backend, job.name)
        server.print(pods[1], "first")
        followed.wait_for("[1] first")
        server.print(pods[0], "second")
        followed.wait_for("[1] first", "[0] second")
        for pod in pods:
            server.end_pod(pod, 0)
        server.end_job(job.name, done, plural=plural)
        assert followed.ended() == ["[1] first", "[0] second"]
        assert past(backend, job.name) == ["[0] second", "[1] first"]


def test_cancelled_jobs_are_followed_until_saved(server, backend):
    server.goes_after_seconds = 1.0
    backend.submit(spec())
    pod = server.start_pod(NAME)
    server.print(pod, "one")
    followed = Followed(backend)
    followed.wait_for("one")
    backend.cancel(NAME)
    time.sleep(0.5)
    server.print(pod, "saved")
    assert followed.ended() == ["one", "saved"]


@pytest.fixture
def gke(server, targets_folder):
    """A cluster, and a working folder with targets for it."""
    blocks = {"gke": GKE, "gke-big": GKE | {"gpus": 8, "context": "test"}, "other": GKE | {"namespace": "training"}}
    (targets_folder / "targets.yaml").write_text(yaml.safe_dump(blocks))
    return server


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


@pytest.mark.parametrize("options", [(), ("--nodes", "2")], ids=["job", "group"])
def test_kubectl_sends_the_dry_run(gke, options):
    printed = succeeded(ddpm_here(*TRAIN, "--dry-run", *options))
    assert not gke.requests
    # kubectl sends no token over a connection that is not encrypted.
    gke.tokens.append("")
    # The server has no OpenAPI document for kubectl; it checks what arrives itself.
    words = [KUBECTL, "apply", "--validate=false", "-f", "-"]
    done = subprocess.run(words, input=printed, env=environment(), capture_output=True, text=True, check=False)
    assert "train-celeba created" in done.stdout, done.stderr
    (sent,) = gke.bodies
    assert list(sent["metadata"].pop("annotations")) == ["kubectl.kubernetes.io/last-applied-configuration"]
    assert sent == yaml.safe_load(printed)
