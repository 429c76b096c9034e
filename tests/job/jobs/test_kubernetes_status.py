"""What a person learns of a job on a cluster: why it waits, and why it failed."""

from __future__ import annotations

import pytest

from job.coordination.sealed import utc_now
from job.exits import State
from job.jobs.backends import Cause
from job.jobs.backends.kubernetes_objects import INDEX_ANNOTATION, manifest, observed
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, spec


def job(*conditions, made=None, **status):
    """A Job as the API gives it, with conditions that are true, as `(type, reason, message)`."""
    names = ("type", "reason", "message")
    told = [{"status": "True", **dict(zip(names, words, strict=False))} for words in conditions]
    return {**(made or manifest(spec(), TARGET)), "status": {"conditions": told, **status}}


def pod(index=0, node="node-0", unscheduled="", **state):
    """A pod whose container is `waiting`, `running` or `terminated`, or has not come that far."""
    status = {"containerStatuses": [{"name": "ddpm", "state": state}]} if state else {}
    if unscheduled:
        status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": unscheduled}]
    place = {} if unscheduled else {"nodeName": node}
    return {"metadata": {}, "spec": {"containers": [{"image": "r/ddpm:1"}], **place}, "status": status}


def ended(code, message="", reason="Error", at="1"):
    return pod(terminated={"exitCode": code, "reason": reason, "message": message, "finishedAt": at})


def event(reason, message, kind="Warning"):
    return {"type": kind, "reason": reason, "message": message}


RUNNING = pod(running={})
NO_NODE = pod(unscheduled="0/3 nodes are available:\n3 Insufficient nvidia.com/gpu.")
NO_ACCOUNT = pod(waiting={"reason": "CreateContainerConfigError", "message": "no\naccount"})
GONE, EVICTED = ({**pod(), "status": {"phase": "Failed", **said}} for said in ({}, {"reason": "Evicted"}))


def test_why_a_job_waits():
    for pods, events, message, has_machine in [
        ([], [], "waits for a pod", False),
        ([], [event("FailedCreate", "exceeded quota: gpus")], "FailedCreate: exceeded quota: gpus", False),
        ([NO_NODE], [], "FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", False),
        ([pod()], [], "waits for a node", True),
        ([pod(waiting={"reason": "ContainerCreating"})], [], "ContainerCreating on node-0: its image is fetched", True),
        ([NO_ACCOUNT], [], "CreateContainerConfigError: no account", True),
        ([EVICTED], [], "the next attempt follows; Evicted", False),
        ([GONE], [], "the next attempt follows; its node is gone", False),
        ([ended(1, "oh\n")], [], "the next attempt follows", False),
        ([ended(137, reason="OOMKilled")], [], "OOMKilled: `memory:` of the target is too little; the next", False),
    ]:
        status = observed(job(), pods, events)
        assert (status.state, status.cause) == (State.WAITING, None) and status.message.startswith(message)
        assert status.has_machine is has_machine, message


def test_why_a_job_failed():
    for reason, ends, code, message in [
        ("PodFailurePolicy", [ended(78, "before\nlast\n")], 78, "last; PodFailurePolicy: said"),
        ("BackoffLimitExceeded", [ended(139, "x")], 139, "x; BackoffLimitExceeded: said"),
        ("BackoffLimitExceeded", [ended(137, reason="OOMKilled")], 137, "OOMKilled: `memory:` of the target is too"),
        ("BackoffLimitExceeded", [], None, "BackoffLimitExceeded: said"),
        (
            "DeadlineExceeded",
            [ended(75)],
            75,
            "DeadlineExceeded: its --max-hours are over, including the wait for a node",
        ),
        # Of a group the others are stopped after one ended for good, and end later.
        ("PodFailurePolicy", [ended(65, "corrupt"), ended(75, at="2")], 65, "corrupt; PodFailurePolicy"),
    ]:
        status = observed(job(("Failed", reason, "said")), ends)
        assert (status.state, status.exit_code) == (State.FAILED, code)
        assert status.cause is (Cause.OUT_OF_TIME if reason == "DeadlineExceeded" else None)
        assert status.message.startswith(message)


@pytest.mark.parametrize("kind", [spec(), spec(nodes=2)], ids=["job", "group"])
def test_pods_that_outlive_their_node_are_named(kind):
    def leaving(at):
        return {**pod(node="c0", running={}), "metadata": {"name": "train-celeba-0-abcde", "deletionTimestamp": at}}

    made = manifest(kind, TARGET)
    told = "node c0 does not answer: pod train-celeba-0-abcde should have ended by 2026-01-01T00:00:00Z"
    status = observed(job(made=made), [leaving("2026-01-01T00:00:00Z"), RUNNING])
    assert (status.state, status.cause, status.has_machine) == (State.WAITING, Cause.STUCK, True)
    assert status.message.startswith(told) and status.message.endswith("`kubectl delete node c0`")
    removed = {**job(made=made), "metadata": {**made["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    status = observed(removed, [leaving("2026-01-01T00:00:00Z")])
    assert (status.state, status.cause) == (State.CANCELLED, Cause.STUCK) and status.message.startswith(told)
    # One that still saves, and one that has ended.
    for last in (leaving(utc_now()), {**ended(75), **{"metadata": leaving("2026-01-01T00:00:00Z")["metadata"]}}):
        assert observed(job(made=made), [last, RUNNING]).state is State.RUNNING
    # Slices do not wait for each other.
    slices = manifest(sampling(slices=2), TARGET)
    status = observed(job(made=slices), [leaving("2026-01-01T00:00:00Z"), RUNNING])
    assert (status.state, status.cause) == (State.RUNNING, None) and status.message.startswith(told)


def test_missing_images_are_named():
    for reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
        without = pod(waiting={"reason": reason, "message": "manifest unknown"})
        status = observed(job(), [without, NO_NODE])
        assert (status.state, status.cause, status.has_machine) == (State.WAITING, Cause.NO_IMAGE, True)
        assert status.message.startswith(f"{reason}: manifest unknown; is the image r/ddpm:1 there")
    status = observed(job(), [RUNNING, without])
    assert (status.state, status.cause) == (State.RUNNING, None)
    assert status.message.startswith("1 of 2 pods run; InvalidImageName: manifest unknown; is the image r/ddpm:1 there")


def test_queues_hold_jobs():
    queued = manifest(spec(), QUEUED)
    assert observed(job(made=queued), []).message == "waits in the queue 'gpus'"
    suspended = ("Suspended", "", "Job suspended")
    assert observed(job(suspended, made=queued), []).message == "waits in the queue 'gpus': Job suspended"
    assert observed(job(suspended), []).message == "is suspended: Job suspended"


def test_queues_say_why_jobs_wait():
    held = job(("Suspended", "", "Job suspended"), made=manifest(spec(), QUEUED))
    waiting, stopped = "waits in the queue 'gpus': ", "its queue 'gpus' lets it run no more: "
    gave_up = "The workload is deactivated due to exceeding the maximum "
    for active, kind, reason, said, state, message in [
        (True, "QuotaReserved", "Pending", "no\nquota", State.WAITING, f"{waiting}Pending: no quota"),
        # One that was let go again, one that has to make room, and one of which nothing is known.
        (True, "Evicted", "PodsReadyTimeout", "too slow", State.WAITING, f"{waiting}Job suspended"),
        (True, "Evicted", "Preempted", "for another", State.WAITING, "was preempted (for another), and waits in the"),
        (None, "", "", "", State.WAITING, f"{waiting}Job suspended"),
        (False, "", "", "", State.CANCELLED, f"{stopped}a person deactivated it"),
        (False, "Evicted", "Deactivated", f"{gave_up}number", State.CANCELLED, f"{stopped}{gave_up}number"),
        (False, "Evicted", "Deactivated", f"{gave_up}execution time", State.FAILED, "its --max-hours are over"),
    ]:
        condition = {"type": kind, "status": str(kind == "Evicted"), "reason": reason, "message": said}
        workload = {"spec": {"active": active}, "status": {"conditions": [condition]}}
        status = observed(held, [], [], [workload])
        assert status.state is state and status.message.startswith(message), status
        assert status.cause is (Cause.OUT_OF_TIME if state is State.FAILED else None)


def test_jobs_that_never_fit_are_told():
    """Kueue's reason is that of its worst flavor, or `Pending` in all cases: only its text tells."""
    text = "insufficient quota for nvidia.com/gpu in flavor spot, request > maximum capacity (8 > 4)"
    pending = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": text}
    workload = {"spec": {"active": True}, "status": {"conditions": [pending]}}
    status = observed(job(("Suspended",), made=manifest(spec(), QUEUED)), [], [], [workload])
    assert (status.state, status.message) == (State.WAITING, f"waits in the queue 'gpus': Pending: {text}")


def test_failures_are_counted():
    late = ("Failed", "DeadlineExceeded", "said")
    first, second = ({"metadata": {"annotations": {INDEX_ANNOTATION: index}}} for index in "01")
    for made, status, pods, failures in (
        (spec(), {}, [ended(137), ended(75), ended(1), RUNNING], 2),
        (spec(), {"failed": 2}, [], 0),
        (sampling(), {}, [{**ended(137), **first}, {**ended(1), **second}, {**ended(1), **second}], 2),
        (spec(nodes=2), {"restarts": 7, "restartsCountTowardsMax": 3}, [RUNNING], 3),
    ):
        for conditions in ((), (late,)):
            assert observed(job(*conditions, made=manifest(made, TARGET), **status), pods).failures == failures
    # All that there may be, though its pods are gone.
    for reason, pods in (("BackoffLimitExceeded", []), ("ReachedMaxRestarts", [ended(71)])):
        assert observed(job(("Failed", reason, "said")), pods).failures == 5
    # A group whose pods stopped by themselves too often has not failed.
    assert observed(job(("Failed", "ReachedMaxRestarts", "said")), [ended(75)]).failures == 0


def test_last_lines_cannot_command_a_terminal():
    status = observed(job(("Failed", "PodFailurePolicy", "said")), [ended(1, "a\x1b[2Jb\x9b31mc\bd")])
    assert status.message.isprintable() and status.message.startswith("a%1B[2Jb%C2%9B31mc%08d; PodFailurePolicy")


def test_failed_slices_are_named():
    lost, over = [ended(74, "no space left")], ("Failed", "FailedIndexes", "said")
    for conditions, pods, state, message in (
        ([], [*lost, RUNNING], State.RUNNING, "failed slices: 0,3"),
        ([over], lost, State.FAILED, "failed slices: 0,3; no space left; FailedIndexes: said"),
    ):
        status = observed(job(*conditions, failedIndexes="0,3"), pods)
        assert (status.state, status.message, status.exit_code) == (state, message, 74)
