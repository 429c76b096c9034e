"""The life of a job of Google Batch: against a server on this machine; and its retries by the table of exit codes."""

from __future__ import annotations

import threading
import time

import pytest

from job.exits import BadRequestError, MissingInputError, retried
from job.jobs.backends.base import Cause, State
from job.jobs.backends.batch import BatchBackend, batch_job
from job.requests import SampleRequest
from tests.job.jobs.google_jobs import BATCH, REGIONS, sampling, spec

NO_STOCK = (
    "VM in Managed Instance Group meets error: Batch Error: code - CODE_GCE_ZONE_RESOURCE_POOL_EXHAUSTED, "
    "description - error count is 4, latest message example: Instance 'x' creation failed"
)


@pytest.fixture
def backend(cloud):
    return BatchBackend(BATCH)


def full(name, region=REGIONS[0]):
    return f"projects/my-project/locations/{region}/jobs/{name}"


def fails(cloud, code, name="celeba"):
    cloud.batch.end_task(name, code)
    cloud.batch.move(name, "FAILED")


def test_every_code_is_retried_as_the_table_says():
    task = batch_job(spec(), BATCH, REGIONS[0])["taskGroups"][0]["taskSpec"]
    (policy,) = task["lifecyclePolicies"]
    # Batch counts all retries, and is given as many as it takes.
    assert (policy["action"], task["maxRetryCount"]) == ("FAIL_TASK", 10)
    final = {code for code in range(1, 256) if retried(code) == "never"}
    # Of Batch itself: could not be ended, longer than --max-hours.
    assert {*policy["actionCondition"]["exitCodes"]} == {*final, 50004, 50005}


def test_a_job_through_its_states(cloud, backend):
    assert backend.status("celeba").state is State.GONE
    (made,) = backend.render(spec())
    backend.submit(spec())
    arrived = cloud.batch.jobs[full("celeba")]
    assert {key: arrived[key] for key in made} == made
    for word, state in (("QUEUED", State.WAITING), ("SCHEDULED", State.WAITING), ("RUNNING", State.RUNNING)):
        cloud.batch.move("celeba", word)
        assert backend.status("celeba").state is state
    cloud.batch.end_task("celeba", 75)
    status = backend.status("celeba")
    assert (status.state, status.attempts, status.exit_code, status.place) == (State.RUNNING, 1, None, REGIONS[0])
    cloud.batch.end_task("celeba", 0)
    cloud.batch.move("celeba", "SUCCEEDED")
    status = backend.status("celeba")
    assert (status.state, status.attempts, status.exit_code) == (State.FINISHED, 2, 0)
    assert [(one.name, one.state) for one in backend.jobs()] == [("celeba", State.FINISHED)]


@pytest.mark.parametrize(
    ("code", "shown", "cause", "message"),
    [
        (65, 65, None, "bad data"),
        (137, 137, None, "killed by signal 9"),
        (50000, None, None, "does not say why"),
        (50001, None, Cause.TAKEN_AWAY, "taken away"),
        (50004, None, None, "could not be ended"),
        (50005, None, Cause.OUT_OF_TIME, "--max-hours"),
    ],
)
def test_a_failure_says_why(cloud, backend, code, shown, cause, message):
    backend.submit(spec())
    fails(cloud, code)
    status = backend.status("celeba")
    assert (status.state, status.exit_code, status.cause) == (State.FAILED, shown, cause)
    assert message in status.message


def test_a_job_that_is_over_makes_room(cloud, backend):
    backend.submit(spec())
    before = cloud.batch.jobs[full("celeba")]["uid"]
    cloud.batch.move("celeba", "FAILED")
    backend.submit(spec())
    assert cloud.batch.jobs[full("celeba")]["uid"] != before


def test_no_stock_is_said_and_the_next_region_may_have_some(cloud, backend):
    backend.submit(spec())
    cloud.batch.move("celeba", "SCHEDULED", NO_STOCK)
    status = backend.status("celeba")
    assert (status.state, status.message) == (State.WAITING, "there is no such machine now, and Batch keeps trying")
    backend.cancel("celeba")
    following = backend.elsewhere()
    following.submit(spec())
    assert backend.status("celeba").place == REGIONS[1]
    assert following.elsewhere() is None
    # The one that was cancelled in the first region is out of the way.
    assert [*cloud.batch.jobs] == [full("celeba", REGIONS[1])]


def test_a_task_knows_its_slice(monkeypatch):
    request = SampleRequest(run="celeba", bucket="gs://b", count=50, slice="BATCH_TASK_INDEX/3")
    with pytest.raises(BadRequestError, match="BATCH_TASK_INDEX"):
        request.check()
    monkeypatch.setenv("BATCH_TASK_INDEX", "2")
    assert request.check().slice_of == (2, 3)
    monkeypatch.setenv("BATCH_TASK_INDEX", "3")
    with pytest.raises(BadRequestError):
        request.check()


def test_cancelling_keeps_the_story(cloud, backend):
    backend.submit(spec())
    cloud.batch.move("celeba", "RUNNING")
    assert backend.cancel("celeba").startswith("was told to stop: it saves first")
    assert backend.status("celeba").state is State.CANCELLED
    with pytest.raises(BadRequestError, match="cancelled already"):
        backend.cancel("celeba")
    with pytest.raises(MissingInputError, match="no job 'nobody'"):
        backend.cancel("nobody")


def test_slices_that_batch_mended_say_nothing_about_why_the_job_failed(cloud, backend):
    backend.submit(sampling())
    for index, codes in enumerate(((50001, 65), (50001,), (137, 0))):
        for code in codes:
            cloud.batch.end_task("sample-celeba", code, index)
    cloud.batch.move("sample-celeba", "FAILED")
    status = backend.status("sample-celeba")
    assert (status.exit_code, status.cause) == (65, None)
    cloud.batch.tasks.clear()
    for index, codes in enumerate(((50001,), (137, 0))):
        for code in codes:
            cloud.batch.end_task("sample-celeba", code, index)
    status = backend.status("sample-celeba")
    assert (status.exit_code, status.cause) == (None, Cause.TAKEN_AWAY)
    assert len(backend.describe("sample-celeba")["tasks"]) == 2


def test_logs_are_those_of_this_job_and_followed_across_its_tasks(cloud, backend):
    backend.submit(spec())
    uid = cloud.batch.jobs[full("celeba")]["uid"]
    cloud.logging.printed_by_task("celeba-of-last-week", "another")
    cloud.logging.printed_by_task(uid, "epoch 1")
    assert [*backend.logs("celeba", False)] == ["epoch 1"]

    def story():
        cloud.batch.move("celeba", "RUNNING")
        for number in range(2, 5):
            time.sleep(0.1)
            cloud.logging.printed_by_task(uid, f"epoch {number}")
        cloud.batch.move("celeba", "SUCCEEDED")
        cloud.logging.printed_by_task(uid, "finished")

    thread = threading.Thread(target=story)
    thread.start()
    lines = [*backend.logs("celeba", True)]
    thread.join()
    assert lines == ["epoch 1", "epoch 2", "epoch 3", "epoch 4", "finished"]
    backend.submit(sampling())
    cloud.logging.printed_by_task(cloud.batch.jobs[full("sample-celeba")]["uid"], "piece 4", 2)
    assert [*backend.logs("sample-celeba", False)] == ["[2] piece 4"]
