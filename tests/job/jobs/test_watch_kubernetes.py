"""`--watch` on a cluster, by the official client and a server on this machine."""

from __future__ import annotations

import pytest

from job.exits import Exit, StoppedError
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
from job.jobs.watch import JobEndedError
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, spec
from tests.job.jobs.kubernetes_server import wait_for
from tests.job.jobs.story import Story, nothing, watched

NAME = "train-celeba"


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET)


def test_a_job_that_is_cancelled_between_two_looks_of_a_watch_stays_so(server, backend):
    def cancel():
        backend.cancel(NAME)
        wait_for(lambda: backend.status(NAME).state is State.GONE)

    with pytest.raises(StoppedError, match=r"train-celeba was deleted: what it saved stays"):
        watched(backend, spec(), Story(cancel))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(("nodes", "plural"), [(1, "jobs"), (2, "jobsets")])
def test_a_job_that_reached_its_deadline_while_it_waited_for_a_node_is_submitted_again(server, backend, nodes, plural):
    def wait_for_a_node():
        server.unschedulable(server.start_pod(NAME, 0, plural))

    def wait():
        story.seconds += 45

    def reach_the_deadline():
        for pod in server.names("pods"):
            server.remove_pod(pod)
        if plural == "jobs":
            server.end_job(NAME, "Failed", "DeadlineExceeded")
            return
        # A JobSet only says that one of its Jobs failed.
        server.add("jobs", {"metadata": {"name": "part", "labels": {"jobset.sigs.k8s.io/jobset-name": NAME}}})
        server.end_job("part", "Failed", "DeadlineExceeded")
        server.end_job(NAME, "Failed", "FailJobSetFailurePolicyAction", plural)

    def finish():
        server.end_job(NAME, "Complete" if plural == "jobs" else "Completed", plural=plural)

    story = Story(wait_for_a_node, *[wait] * 20, reach_the_deadline, nothing, finish)
    watched(backend, spec(nodes=nodes), story)
    assert story.again() == ["train-celeba had a machine for less than its 24 hours; submitting it again"]
    assert len(server.bodies) == 2


def test_a_job_that_its_queue_stops_for_good_has_used_its_hours(server):
    def stop():
        story.seconds += 24 * 3600
        about = {"name": NAME, "uid": server.get("jobs", NAME, "training")["metadata"]["uid"]}
        said = "The workload is deactivated due to exceeding the maximum execution time"
        event = {"metadata": {"name": "e"}, "involvedObject": about, "reason": "Stopped", "message": said}
        server.add("events", event, "training")

    server.add("localqueues", {"metadata": {"name": "gpus"}}, "training")
    story = Story(nothing, stop)
    with pytest.raises(StoppedError, match="has used its 24 hours"):
        watched(KubernetesBackend(QUEUED), spec(), story)
    wait_for(lambda: not server.names("jobs", "training"))


def test_a_job_whose_image_cannot_be_pulled_is_removed_after_five_minutes(server, backend):
    reasons = ["ErrImagePull", "ImagePullBackOff"] * 30

    def begin():
        # The first of several pods has a node.
        server.start_pod(NAME, 0, "jobsets", waiting={"reason": "ContainerCreating"})
        server.unschedulable(server.start_pod(NAME, 1, "jobsets"))
        server.answer_next(503, times=4, method="DELETE")

    def go_on():
        pod = next(name for name in server.names("pods") if f"{NAME}-0" in name)
        server.set_pod(pod, waiting={"reason": reasons.pop(), "message": "manifest unknown"})

    story = Story(begin, *[go_on] * 25)
    with pytest.raises(JobEndedError, match=r"cannot begin, and is removed: .*manifest unknown; is the image") as ended:
        watched(backend, spec(nodes=2), story)
    assert ended.value.exit_code == Exit.MISSING_INPUT
    assert any(line.endswith("allowed to reach it?; trying again to remove train-celeba") for line in story.told)
    wait_for(lambda: not server.names("jobsets") and not server.names("pods"))
    assert 300 < story.seconds < 400
