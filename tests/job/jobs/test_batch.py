"""The life of a job of Google Batch, against a server on this machine."""

from __future__ import annotations

import pytest

from job.exits import BadRequestError, MissingInputError, State
from job.jobs.backends import Cause
from tests.job.jobs.google_jobs import REGIONS, backend_of, sampling, spec

SHORTAGE = (
    "VM in Managed Instance Group meets error: Batch Error: code - {}, description - error count is 4, latest message "
    "example: Instance 'x' creation failed"
)


@pytest.fixture
def backend(cloud):
    return backend_of("batch")


def test_a_job_through_its_states(cloud, backend):
    assert backend.alive("celeba").state is State.GONE
    backend.submit(spec())
    (arrived,) = cloud.batch.jobs.values()
    (made,) = backend.render(spec())
    assert {key: arrived[key] for key in made} == made
    for word, state in (("QUEUED", State.WAITING), ("SCHEDULED", State.WAITING), ("RUNNING", State.RUNNING)):
        cloud.batch.move("celeba", word)
        assert backend.alive("celeba").state is state
    cloud.batch.end_task("celeba", 75)
    status = backend.alive("celeba")
    assert (status.state, status.exit_code, status.place) == (State.RUNNING, None, REGIONS[0])
    cloud.batch.end_task("celeba", 0)
    cloud.batch.move("celeba", "SUCCEEDED")
    status = backend.alive("celeba")
    assert (status.state, status.exit_code) == (State.FINISHED, 0)
    assert [(one.name, one.state) for one in backend.jobs()] == [("celeba", State.FINISHED)]
    # One that is over makes room.
    backend.submit(spec())
    assert next(iter(cloud.batch.jobs.values()))["uid"] != arrived["uid"]


def test_a_failure_says_why(cloud, backend):
    for code, shown, cause, message in [
        (65, 65, None, "bad data"),
        (137, 137, None, "killed by signal 9"),
        (50000, None, None, "gives no reason"),
        *((code, None, Cause.TAKEN_AWAY, "its") for code in (50001, 50002, 50003, 50006)),
        (50004, None, Cause.STUCK, "could not be ended"),
        (50005, None, Cause.OUT_OF_TIME, "--max-hours"),
    ]:
        cloud.batch.tasks.clear()
        backend.submit(spec())
        cloud.batch.end_task("celeba", code)
        cloud.batch.move("celeba", "FAILED")
        status = backend.alive("celeba")
        assert (status.state, status.exit_code, status.cause) == (State.FAILED, shown, cause)
        assert message in status.why


def test_shortages_are_named(cloud, backend):
    backend.submit(spec())
    for code, said in (
        ("CODE_GCE_QUOTA_EXCEEDED", "the project's quota does not allow it"),
        ("CODE_GCE_ZONE_RESOURCE_POOL_EXHAUSTED", "such machines are out of stock"),
    ):
        cloud.batch.move("celeba", "SCHEDULED", SHORTAGE.format(code))
        status = backend.alive("celeba")
        assert (status.state, status.message) == (State.WAITING, f"{said}, and Batch keeps trying")
    backend.cancel("celeba")
    backend.elsewhere().submit(spec())
    assert backend.alive("celeba").place == REGIONS[1]
    # The one that was cancelled in the first region is out of the way.
    assert len(cloud.batch.jobs) == 1


def test_cancelling_keeps_the_story(cloud, backend):
    backend.submit(spec())
    cloud.batch.move("celeba", "CANCELLATION_IN_PROGRESS")
    assert backend.cancel("celeba").startswith("is stopping: it saves first")
    assert (backend.alive("celeba").message, cloud.made(":cancel")) == ("it is being ended", [])
    cloud.batch.move("celeba", "RUNNING")
    backend.cancel("celeba")
    assert backend.alive("celeba").state is State.CANCELLED
    with pytest.raises(BadRequestError, match="cancelled already"):
        backend.cancel("celeba")
    with pytest.raises(MissingInputError, match="no job 'nobody'"):
        backend.cancel("nobody")


def test_mended_slices_explain_no_failure(cloud, backend):
    backend.submit(sampling())
    for tasks, code, cause in [
        (((50001, 65), (50001,), (137, 0)), 65, None),
        (((50001,), (137, 0)), None, Cause.TAKEN_AWAY),
    ]:
        cloud.batch.tasks.clear()
        for index, codes in enumerate(tasks):
            cloud.batch.end_task("sample-celeba", *codes, index=index)
        cloud.batch.move("sample-celeba", "FAILED")
        status = backend.alive("sample-celeba")
        assert (status.exit_code, status.cause) == (code, cause)


def test_logs_are_those_of_the_tasks(cloud, backend):
    cloud.logging.printed_by_task("celeba-of-last-week", "another")
    for job, prefix in ((spec(), ""), (sampling(), "[2] ")):
        backend.submit(job)
        cloud.logging.printed_by_task(cloud.batch.jobs[cloud.batch.full(job.name)]["uid"], "epoch 1", 2)
        assert [*backend.logs(job.name, False)] == [f"{prefix}epoch 1"]
