"""`--watch` on a cluster, by the official client and a server on this machine."""

from __future__ import annotations

import pytest

from job.exits import Exit, StoppedError
from job.jobs.backends.base import State
from job.jobs.backends.kubernetes import KubernetesBackend
from job.jobs.watch import JobEndedError, Watch
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, spec
from tests.job.jobs.kubernetes_server import wait_for
from tests.job.jobs.story import Story, nothing

NAME = "train-celeba"
FAST = (0.01, 0.02, 0.03)


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET, FAST, poll_seconds=0.05)


@pytest.mark.parametrize("job", [spec(), spec(nodes=2)], ids=["job", "jobset"])
def test_a_job_that_is_cancelled_between_two_looks_of_a_watch_stays_so(server, backend, job):
    def cancel():
        backend.cancel(NAME)
        wait_for(lambda: backend.status(NAME).state is State.GONE)

    told = []
    with pytest.raises(StoppedError, match=r"train-celeba was deleted: what it saved stays"):
        Watch(backend, job, Story(cancel), told.append).run()
    assert len(server.bodies) == 1 and not server.cluster.names("jobs")


def test_a_job_that_kubernetes_ends_at_its_deadline_has_used_its_hours(server, backend):
    def reach_the_deadline():
        story.seconds += 24 * 3600
        server.cluster.end_pod(server.cluster.start_pod(NAME), 75, "ddpm: stopped by SIGTERM, saved")
        server.cluster.end_job(NAME, "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")

    backend.submit(spec())
    server.cluster.start_pod(NAME)
    story = Story(reach_the_deadline)
    with pytest.raises(StoppedError, match="has used its 24 hours"):
        Watch(backend, spec(), story, [].append).run()
    assert len(server.bodies) == 1


@pytest.mark.parametrize("job", [spec(), spec(nodes=2)], ids=["job", "jobset"])
def test_a_job_that_reached_its_deadline_while_it_waited_for_a_node_is_submitted_again(server, backend, job):
    plural = "jobsets" if job.nodes > 1 else "jobs"

    def wait_for_a_node():
        server.cluster.unschedulable(server.cluster.start_pod(NAME, 0, plural), "0/3 nodes are available")

    def wait():
        story.seconds += 45

    def reach_the_deadline():
        # What the controllers do: a JobSet only says that one of its Jobs failed.
        for pod in server.cluster.names("pods"):
            server.cluster.remove_pod(pod)
        if plural == "jobs":
            server.cluster.end_job(NAME, "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
            return
        child = {"name": f"{NAME}-node-0", "labels": {"jobset.sigs.k8s.io/jobset-name": NAME}}
        ended = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
        server.cluster.add("jobs", {"metadata": child, "spec": {}, "status": {"conditions": [ended]}})
        server.cluster.end_job(NAME, "Failed", "FailJobSetFailurePolicyAction", "first failed job", plural)

    def finish():
        server.cluster.end_job(NAME, "Complete" if plural == "jobs" else "Completed", plural=plural)

    told = []
    story = Story(wait_for_a_node, *[wait] * 20, reach_the_deadline, nothing, finish)
    Watch(backend, job, story, told.append).run()
    assert "train-celeba had a machine for less than its 24 hours; submitting it again" in told
    assert len(server.bodies) == 2
    assert server.bodies[1]["spec"].keys() == server.bodies[0]["spec"].keys()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_that_its_queue_stops_for_good_has_used_its_hours(server, nodes):
    backend = KubernetesBackend(QUEUED, FAST, poll_seconds=0.05)
    plural = "jobsets" if nodes > 1 else "jobs"
    server.cluster.namespaces.add(QUEUED.namespace)
    queue = {"metadata": {"name": QUEUED.queue}, "spec": {"clusterQueue": "all"}}
    server.cluster.add("localqueues", queue, QUEUED.namespace)

    def event(reason, message):
        uid = server.cluster.get(QUEUED.namespace, plural, NAME)["metadata"]["uid"]
        about = {"involvedObject": {"name": NAME, "uid": uid}, "type": "Normal", "reason": reason}
        named = {"metadata": {"name": f"{reason}-{message[-4:]}"}, "lastTimestamp": f"2026-{len(told)}"}
        server.cluster.add("events", {**about, **named, "message": message}, QUEUED.namespace)
        told.append(message)

    def stop():
        story.seconds += 24 * 3600
        event("Started", "Admitted by clusterQueue all")
        event("Stopped", "The workload is deactivated due to exceeding the maximum execution time")

    told, notes = [], []
    story = Story(nothing, stop)
    with pytest.raises(StoppedError, match="no longer watching"):
        Watch(backend, spec(nodes=nodes), Story(nothing), notes.append).run()
    assert server.cluster.names(plural, QUEUED.namespace) == [NAME]
    story = Story(nothing, stop)
    stopped = "its --max-hours are over: after `ddpm jobs cancel train-celeba` the same command goes on"
    with pytest.raises(StoppedError, match="has used its 24 hours"):
        Watch(backend, spec(nodes=nodes), story, notes.append).run()
    assert f"train-celeba is waiting: {stopped}" in notes
    wait_for(lambda: not server.cluster.names(plural, QUEUED.namespace))


def test_a_failed_job_that_is_cancelled_before_the_next_attempt_gets_none(server, backend):
    def fail():
        server.cluster.end_pod(server.cluster.start_pod(NAME), 137)
        server.cluster.end_job(NAME, "Failed", "BackoffLimitExceeded")

    def cancel():
        backend.cancel(NAME)
        wait_for(lambda: backend.status(NAME).state is State.GONE)

    told = []
    with pytest.raises(StoppedError, match=r"train-celeba was deleted"):
        Watch(backend, spec(), Story(fail, cancel), told.append).run()
    assert "submitting it again (failure 1 of 4)" in told[-1]
    assert len(server.bodies) == 1


@pytest.mark.parametrize("job", [spec(), spec(nodes=2), sampling(NAME)], ids=["job", "jobset", "slices"])
def test_a_watch_removes_a_job_whose_image_cannot_be_pulled(server, backend, job):
    plural, reasons = "jobsets" if job.nodes > 1 else "jobs", ["ErrImagePull", "ImagePullBackOff"] * 30
    told, pods = [], []

    def begin():
        # The first of several pods has a node.
        pods.append(server.cluster.start_pod(NAME, 0, plural, waiting={"reason": "ContainerCreating"}))
        for index in range(1, job.machines):
            server.cluster.unschedulable(server.cluster.start_pod(NAME, index, plural), "0/1 nodes are available")

    def go_on():
        server.cluster.set_pod(pods[0], waiting={"reason": reasons.pop(), "message": "manifest unknown"})

    story = Story(begin, *[go_on] * 25)
    with pytest.raises(JobEndedError, match=r"cannot begin, and is removed: .*manifest unknown; is the image") as ended:
        Watch(backend, job, story, told.append).run()
    assert ended.value.exit_code == Exit.MISSING_INPUT
    wait_for(lambda: not server.cluster.names(plural) and not server.cluster.names("pods"))
    assert len(server.bodies) == 1
    assert 300 < story.seconds < 400


def test_an_image_that_is_late_ends_nothing(server, backend):
    pods = []

    def begin():
        pods.append(server.cluster.start_pod(NAME, waiting={"reason": "ErrImagePull", "message": "timeout"}))

    def pull():
        server.cluster.set_pod(pods[0], running={})

    def finish():
        server.cluster.end_job(NAME, "Complete")

    Watch(backend, spec(), Story(begin, *[nothing] * 12, pull, *[nothing] * 12, finish), [].append).run()


@pytest.mark.parametrize("why", ["node", "queue", "image on its way"])
def test_a_job_that_waits_for_what_costs_nothing_waits_for_ever(server, backend, why):
    def begin():
        if why == "node":
            server.cluster.unschedulable(server.cluster.start_pod(NAME), "0/3 nodes are available")
        elif why == "queue":
            server.cluster.change("jobs", NAME, conditions=[{"type": "Suspended", "status": "True"}])
        else:
            server.cluster.start_pod(NAME, waiting={"reason": "ContainerCreating"})

    with pytest.raises(StoppedError, match="no longer watching train-celeba, which goes on"):
        Watch(backend, spec(), Story(begin), [].append).run()
    assert server.cluster.names("jobs") == [NAME]


def test_a_job_of_which_a_part_runs_is_not_ended_for_an_image(server, backend):
    def begin():
        server.cluster.start_pod(NAME, 0)
        server.cluster.start_pod(NAME, 1, waiting={"reason": "ImagePullBackOff", "message": "denied"})

    with pytest.raises(StoppedError, match="no longer watching"):
        Watch(backend, sampling(NAME), Story(begin), [].append).run()
    assert server.cluster.names("jobs") == [NAME]


def test_a_job_without_an_image_is_removed_when_the_cluster_answers_again(server, backend):
    told = []

    def begin():
        server.cluster.start_pod(NAME, waiting={"reason": "InvalidImageName", "message": "bad"})

    server.answer_next(503, times=1 + len(FAST), method="DELETE")
    with pytest.raises(JobEndedError, match="cannot begin, and is removed"):
        Watch(backend, spec(), Story(begin), told.append).run()
    assert told[-1].endswith("is this machine allowed to reach it?; trying again to remove train-celeba")
    wait_for(lambda: not server.cluster.names("jobs"))
