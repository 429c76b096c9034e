"""What a person learns of a job on a cluster: why it waits, and why it failed."""

from __future__ import annotations

from job.jobs.backends.base import Cause, State
from job.jobs.backends.kubernetes_manifests import INDEX_ANNOTATION, manifest
from job.jobs.backends.kubernetes_status import observed_status
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, spec


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
        ([], [], "has no pod yet", False),
        ([], [event("FailedCreate", "exceeded quota: gpus")], "FailedCreate: exceeded quota: gpus", False),
        ([NO_NODE], [], "FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", False),
        ([pod()], [], "waits for a node", True),
        ([pod(waiting={"reason": "ContainerCreating"})], [], "ContainerCreating on node-0: its image is fetched", True),
        ([NO_ACCOUNT], [], "CreateContainerConfigError: no account", True),
        ([EVICTED], [], "the next attempt follows; the last one: Evicted", False),
        ([GONE], [], "the next attempt follows; the last one: its node is gone", False),
        ([ended(1, "oh\n")], [], "the next attempt follows; the last one: exit code 1 (crashed): oh", False),
    ]:
        status = observed_status(job(), pods, events)
        assert (status.state, status.message, status.cause) == (State.WAITING, message, None)
        assert status.has_machine is has_machine, message


def test_why_a_job_failed():
    for reason, ends, code, message in [
        ("PodFailurePolicy", [ended(78, "before\nlast\n")], 78, "exit code 78 (the configuration is not valid"),
        (
            "BackoffLimitExceeded",
            [ended(139, "x")],
            139,
            "exit code 139 (killed by signal 11): x (BackoffLimitExceeded: said)",
        ),
        ("BackoffLimitExceeded", [ended(137, reason="OOMKilled")], 137, "exit code 137 (OOMKilled: `memory:` of the"),
        ("BackoffLimitExceeded", [], None, "BackoffLimitExceeded: said"),
        ("DeadlineExceeded", [ended(75)], 75, "DeadlineExceeded: its --max-hours are over, what it waited for a node"),
        # Of a group the others are stopped after one ended for good, and end later.
        ("PodFailurePolicy", [ended(65, "rotten"), ended(75, at="2")], 65, "exit code 65 (bad data: unreadable"),
    ]:
        status = observed_status(job(("Failed", reason, "said")), ends)
        assert (status.state, status.exit_code) == (State.FAILED, code)
        assert status.cause is (Cause.OUT_OF_TIME if reason == "DeadlineExceeded" else None)
        assert status.message.startswith(message)


def test_an_image_that_cannot_be_pulled_is_named():
    for reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
        without = pod(waiting={"reason": reason, "message": "manifest unknown"})
        status = observed_status(job(), [without, NO_NODE])
        assert (status.state, status.cause, status.has_machine) == (State.WAITING, Cause.NO_IMAGE, True)
        assert status.message.startswith(f"{reason}: manifest unknown; is the image r/ddpm:1 there")
    status = observed_status(job(), [RUNNING, without])
    assert (status.state, status.cause) == (State.RUNNING, None), "a part of it runs"


def test_a_queue_holds_a_job_and_may_stop_it_for_good():
    queued = manifest(spec(), QUEUED)
    assert observed_status(job(made=queued), []).message == "waits in the queue 'gpus'"
    suspended = ("Suspended", "", "Job suspended")
    assert observed_status(job(suspended, made=queued), []).message == "waits in the queue 'gpus': Job suspended"
    assert observed_status(job(suspended), []).message == "is suspended: Job suspended"
    stop = event("Stopped", "The workload is deactivated due to exceeding the maximum execution time", "Normal")
    status = observed_status(job(suspended, made=queued), [ended(75)], [event("Started", "", "Normal"), stop])
    assert (status.state, status.cause) == (State.FAILED, Cause.OUT_OF_TIME)
    assert status.message.startswith("its --max-hours are over")
    again = [stop, event("Started", "Admitted", "Normal")]
    assert observed_status(job(suspended, made=queued), [ended(75)], again).cause is None


def test_a_queue_says_why_a_job_waits_and_that_it_will_not_run():
    def told(active=True, **conditions):
        """The state, cause and message of a job with a Workload of these conditions: status, reason and message."""
        names = ("status", "reason", "message")
        listed = [{"type": kind, **dict(zip(names, words, strict=True))} for kind, words in conditions.items()]
        workload = {"spec": {"active": active}, "status": {"conditions": listed}}
        held = job(("Suspended", "", "Job suspended"), made=manifest(spec(), QUEUED))
        status = observed_status(held, [], [], [workload])
        return status.state, status.cause, status.message

    deactivated = "The workload is deactivated due to exceeding the maximum"
    for active, conditions, state, cause, message in [
        (True, {}, State.WAITING, None, "waits in the queue 'gpus': Job suspended"),
        (
            True,
            {"QuotaReserved": ("False", "Pending", "insufficient\nunused quota")},
            State.WAITING,
            None,
            "waits in the queue 'gpus': Pending: insufficient unused quota",
        ),
        (
            True,
            {"QuotaReserved": ("False", "ExceedsMaxQuota", "request (8) > maximum capacity (4)")},
            State.WAITING,
            None,
            "waits in the queue 'gpus': ExceedsMaxQuota: request (8) > maximum capacity (4); it can never run so: ask",
        ),
        # One that was let go again.
        (True, {"Evicted": ("True", "Preempted", "for another")}, State.WAITING, None, "waits in the queue 'gpus'"),
        (
            False,
            {"Evicted": ("True", "DeactivatedDueToRequeuingLimitExceeded", f"{deactivated} number of requeuings")},
            State.CANCELLED,
            None,
            f"its queue 'gpus' lets it run no more: {deactivated} number of requeuings",
        ),
        (False, {}, State.CANCELLED, None, "its queue 'gpus' lets it run no more: somebody deactivated it"),
        (
            False,
            {"Evicted": ("True", "Deactivated", f"{deactivated} execution time")},
            State.FAILED,
            Cause.OUT_OF_TIME,
            "its --max-hours are over",
        ),
    ]:
        found = told(active, **conditions)
        assert found[:2] == (state, cause) and found[2].startswith(message), found


def test_slices_that_failed_for_good_are_named_while_others_run_and_in_the_end():
    lost = [ended(74, "no space left")]
    status = observed_status(job(failedIndexes="0,3"), [*lost, RUNNING])
    assert (status.state, status.message) == (
        State.RUNNING,
        "failed slices: 0,3; an attempt before: exit code 74 (the local disk is full): no space left",
    )
    over = observed_status(job(("Failed", "FailedIndexes", "said"), failedIndexes="0"), lost)
    assert (over.state, over.exit_code) == (State.FAILED, 74)
    assert over.message.startswith("failed slices: 0; exit code 74 (the local disk is full): no space left")


def test_attempts_are_pods_that_had_a_node_and_one_that_waits_for_one():
    assert observed_status(job(), [NO_NODE] * 4).attempts == 1
    assert observed_status(job(failed=1), [ended(1), NO_NODE]).attempts == 2
    # Pods that are gone are in the counts.
    assert observed_status(job(failed=3), [RUNNING]).attempts == 4
    assert observed_status(job(("Complete",), succeeded=1), [ended(75), ended(0)]).attempts == 2
    # Of a group each pod that stopped by itself has had another after it, without a restart of all.
    group = manifest(spec(nodes=2), TARGET)
    first, second = ({**RUNNING, "metadata": {"annotations": {INDEX_ANNOTATION: index}}} for index in "01")
    assert observed_status(job(made=group, restarts=1), [first, second, first, second]).attempts == 3
