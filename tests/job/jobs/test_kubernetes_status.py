"""What a person learns of a job on a cluster: why it waits, and why it failed."""

from __future__ import annotations

import time

import pytest

from job.exits import MissingInputError
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import TARGET, sampling, spec

NAME = "train-celeba"
FAST = (0.01, 0.02, 0.03)


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET, FAST, poll_seconds=0.05)


@pytest.mark.parametrize(
    ("code", "why", "said"),
    [
        (78, "PodFailurePolicy", "exit code 78 (the configuration is not valid"),
        (139, "BackoffLimitExceeded", "exit code 139 (a signal): last words (BackoffLimitExceeded"),
        (75, "DeadlineExceeded", "DeadlineExceeded: its --max-hours are over, what it waited for a node included"),
    ],
)
def test_why_a_job_failed(server, backend, code, why, said):
    backend.submit(spec())
    server.cluster.end_pod(server.cluster.start_pod(NAME), code, "line before\nlast words\n")
    server.cluster.end_job(NAME, "Failed", why, "in Kubernetes' words")
    status = backend.status(NAME)
    assert (status.state, status.exit_code) == (State.FAILED, code)
    assert status.message.startswith(said)


def test_of_a_group_the_one_that_ended_for_good_decides(server, backend):
    backend.submit(spec(nodes=2))
    pods = [server.cluster.start_pod(NAME, index, "jobsets") for index in range(2)]
    server.cluster.end_pod(pods[1], 65, "the shard is rotten")
    time.sleep(1.1)
    server.cluster.end_pod(pods[0], 75, "stopped, saved")
    server.cluster.end_job(NAME, "Failed", "FailJobSetFailurePolicyAction", "first failed job", "jobsets")
    status = backend.status(NAME)
    assert (status.exit_code, status.retried) == (65, "never")
    assert status.message.startswith(
        "exit code 65 (bad data: unreadable, truncated, rotten or unsafe): the shard is rotten"
    )


def test_memory_that_is_too_little_is_named(server, backend):
    backend.submit(spec())
    server.cluster.end_pod(server.cluster.start_pod(NAME), 137, reason="OOMKilled")
    assert "OOMKilled: `memory:` of the target is too little" in backend.status(NAME).message


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_an_image_that_cannot_be_pulled_is_named(server, backend, reason):
    backend.submit(spec())
    server.cluster.start_pod(NAME, waiting={"reason": reason, "message": "manifest unknown"})
    status = backend.status(NAME)
    assert status.state is State.WAITING
    assert status.message.startswith(f"{reason}: manifest unknown; is the image {TARGET.image} there")
    with pytest.raises(MissingInputError, match=reason):
        list(backend.logs(NAME, follow=True, should_stop=lambda: False))


def test_why_a_job_waits(server, backend):
    backend.submit(spec())
    about = {"name": NAME, "uid": server.cluster.get("default", "jobs", NAME)["metadata"]["uid"]}
    event = {"involvedObject": about, "type": "Warning", "reason": "FailedCreate", "lastTimestamp": "2026"}
    server.cluster.add("events", {"metadata": {"name": "e"}, **event, "message": "exceeded quota: gpus"})
    assert backend.status(NAME).message == "FailedCreate: exceeded quota: gpus"
    server.forbidden.add(("list", "events"))
    assert backend.status(NAME).message == "has no pod yet"
    pod = server.cluster.start_pod(NAME)
    server.cluster.unschedulable(pod, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert backend.status(NAME).message == "FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    server.cluster.set_pod(pod, waiting={"reason": "CreateContainerConfigError", "message": "no service account"})
    assert backend.status(NAME).message == "CreateContainerConfigError: no service account"


def test_a_slice_without_a_node_is_no_attempt_beyond_the_first(server, backend):
    backend.submit(sampling())
    for index in range(4):
        server.cluster.unschedulable(
            server.cluster.start_pod("sample-celeba-1a2b3c4d", index), "0/3 nodes are available"
        )
    assert backend.status("sample-celeba-1a2b3c4d").attempts == 1
    backend.submit(spec())
    lost = server.cluster.start_pod(NAME)
    server.cluster.end_pod(lost, 75)
    server.cluster.unschedulable(server.cluster.start_pod(NAME), "0/3 nodes are available")
    assert backend.status(NAME).attempts == 2
