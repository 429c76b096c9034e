"""`--watch` on a cluster, by the official client and a server on this machine."""

from __future__ import annotations

import pytest

from job.exits import StoppedError
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
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


def test_a_job_that_reached_its_deadline_while_it_waited_for_a_node_is_submitted_again(server, backend):
    def wait():
        story.seconds += 45

    def reach_the_deadline():
        # A JobSet only says that one of its Jobs failed.
        server.add("jobs", {"metadata": {"name": "part", "labels": {"jobset.sigs.k8s.io/jobset-name": NAME}}})
        server.end_job("part", "Failed", "DeadlineExceeded")
        server.end_job(NAME, "Failed", "FailJobSetFailurePolicyAction", "jobsets")

    def finish():
        server.end_job(NAME, "Completed", plural="jobsets")

    story = Story(*[wait] * 20, reach_the_deadline, nothing, finish)
    watched(backend, spec(nodes=2), story)
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
