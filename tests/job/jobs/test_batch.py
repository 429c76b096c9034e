"""Google Batch's own client against a server on this machine: the life of a job, and its retries by the table."""

from __future__ import annotations

import threading
import time

import pytest

from job.exits import (
    BadRequestError,
    BucketAwayError,
    Exit,
    MissingInputError,
    NoPermissionError,
    retried,
)
from job.jobs.backends.base import Cause, State
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.batch_manifests import MAX_RETRIES, job
from job.requests import SampleRequest
from tests.job.jobs.google_jobs import BATCH, REGIONS, never, sampling, spec
from tests.job.jobs.google_services import Refusal

NO_STOCK = (
    "VM in Managed Instance Group meets error: Batch Error: code - CODE_GCE_ZONE_RESOURCE_POOL_EXHAUSTED, "
    "description - error count is 4, latest message example: Instance 'x' creation failed"
)


@pytest.fixture
def backend(cloud):
    return BatchBackend(BATCH)


def full(name, region=REGIONS[0]):
    return f"projects/my-project/locations/{region}/jobs/{name}"


def is_retried(code):
    """What Batch does after a task that ended with `code`, by its documentation of lifecycle policies."""
    task = job(spec(), BATCH, REGIONS[0])["taskGroups"][0]["taskSpec"]
    (policy,) = task["lifecyclePolicies"]
    listed = code in policy["actionCondition"]["exitCodes"]
    return code != 0 and task["maxRetryCount"] > 0 and listed == (policy["action"] == "RETRY_TASK")


@pytest.mark.parametrize("code", range(1, 256))
def test_codes_of_the_program_are_retried_as_the_table_says(code):
    assert is_retried(code) == (retried(code) != "never")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, False),
        (50000, True),  # no reason known, as after a crash
        (50001, True),  # preempted
        (50002, True),  # stopped answering
        (50003, True),  # restarted
        (50004, False),  # could not be ended, though it was to end
        (50005, False),  # longer than --max-hours
        (50006, True),  # made anew
    ],
)
def test_codes_of_batch(code, expected):
    assert is_retried(code) is expected


def test_batch_counts_all_retries_and_is_given_as_many_as_it_takes():
    assert MAX_RETRIES == 10


def test_what_is_rendered_is_what_arrives(cloud, backend):
    (made,) = backend.render(spec())
    backend.submit(spec())
    arrived = cloud.batch.jobs[full("celeba")]
    assert {key: arrived[key] for key in made} == made


def test_a_job_through_its_states(cloud, backend):
    assert backend.status("celeba").state is State.GONE
    backend.submit(spec())
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
    ("code", "shown", "message"),
    [(65, 65, "bad data"), (137, 137, "killed by signal 9"), (50001, None, "taken away"), (50005, None, "--max-hours")],
)
def test_a_failure_says_why(cloud, backend, code, shown, message):
    backend.submit(spec())
    cloud.batch.end_task("celeba", code)
    cloud.batch.move("celeba", "FAILED")
    status = backend.status("celeba")
    assert (status.state, status.exit_code) == (State.FAILED, shown)
    assert message in status.message


def test_a_job_that_is_there_is_not_started_twice_in_any_region(cloud, backend):
    backend.submit(spec())
    for one in (backend, backend.elsewhere()):
        with pytest.raises(BadRequestError, match=r"is waiting in us-central1.*ddpm jobs cancel celeba"):
            one.submit(spec())


def test_a_job_that_is_over_makes_room(cloud, backend):
    backend.submit(spec())
    before = cloud.batch.jobs[full("celeba")]["uid"]
    cloud.batch.move("celeba", "FAILED")
    backend.submit(spec())
    assert cloud.batch.jobs[full("celeba")]["uid"] != before


def test_a_name_that_somebody_takes_first_is_refused(cloud, backend):
    cloud.denied["POST .*/jobs$"] = Refusal(409, f"Resource '{full('celeba')}' already exists")
    with pytest.raises(BadRequestError, match="already exists"):
        backend.submit(spec())


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


def test_slices_are_tasks(cloud, backend):
    backend.submit(sampling())
    uid = cloud.batch.jobs[full("sample-celeba")]["uid"]
    cloud.logging.printed_by_task(uid, "piece 4", 2)
    assert [*backend.logs("sample-celeba", False, never)] == ["[2] piece 4"]
    described = backend.describe("sample-celeba")
    assert described["taskGroups"][0]["taskCount"] == "3"


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


def test_logs_are_those_of_this_job_and_followed_across_its_tasks(cloud, backend):
    backend.submit(spec())
    uid = cloud.batch.jobs[full("celeba")]["uid"]
    cloud.logging.printed_by_task("celeba-of-last-week", "another")
    cloud.logging.printed_by_task(uid, "epoch 1")
    assert [*backend.logs("celeba", False, never)] == ["epoch 1"]

    def story():
        cloud.batch.move("celeba", "RUNNING")
        for number in range(2, 5):
            time.sleep(0.1)
            cloud.logging.printed_by_task(uid, f"epoch {number}")
        cloud.batch.move("celeba", "SUCCEEDED")
        cloud.logging.printed_by_task(uid, "finished")

    thread = threading.Thread(target=story)
    thread.start()
    lines = [*backend.logs("celeba", True, never)]
    thread.join()
    assert lines == ["epoch 1", "epoch 2", "epoch 3", "epoch 4", "finished"]


def test_an_answer_that_is_lost_makes_no_error(cloud, backend):
    real, lost = cloud.batch._create, []

    def once(*arguments):
        made = real(*arguments)
        if not lost:
            lost.append(made)
            raise Refusal(503, "The service is currently unavailable.")
        return made

    cloud.batch._create = once
    backend.submit(spec())
    assert lost and len(cloud.batch.jobs) == 1


def test_no_permission_names_it(cloud, backend):
    cloud.denied["POST .*/jobs$"] = Refusal(403, "Permission 'batch.jobs.create' denied on 'projects/my-project'")
    with pytest.raises(NoPermissionError, match=r"batch\.jobs\.create") as caught:
        backend.submit(spec())
    assert caught.value.exit_code == Exit.NO_PERMISSION


def test_an_api_that_was_never_enabled_says_how(cloud, backend):
    message = "Batch API has not been used in project my-project before or it is disabled. Enable it by visiting …"
    cloud.denied["jobs"] = Refusal(403, message)
    with pytest.raises(NoPermissionError, match="Enable it by visiting"):
        backend.status("celeba")


def test_an_api_that_is_away_or_too_busy_is_asked_a_bounded_number_of_times(cloud, backend):
    cloud.refusals = [Refusal(429, "Quota exceeded for quota metric 'Read requests'")] * 3
    assert backend.status("celeba").state is State.GONE
    cloud.denied["jobs"] = Refusal(503, "The service is currently unavailable.")
    with pytest.raises(BucketAwayError, match="currently unavailable"):
        backend.status("celeba")
