"""`--watch` on VMs and on Batch, against servers on this machine: what is submitted again there, and what counts."""

from __future__ import annotations

import pytest

from job.exits import StoppedError
from job.jobs.backends.batch import MAX_RETRIES, BatchBackend
from job.jobs.backends.vm import VmBackend
from job.jobs.watch import JobEndedError, Watch
from tests.job.jobs.google_jobs import BATCH, VM, sampling, spec
from tests.job.jobs.story import Story, nothing
from tests.job.jobs.test_vm import ends, taken

NAME = "sample-celeba"


@pytest.fixture
def vm(cloud):
    return VmBackend(VM)


@pytest.fixture
def batch(cloud):
    return BatchBackend(BATCH)


def fails(cloud, *codes):
    """What happens when the first task of a job has ended so often, and Batch gives up."""

    def happen():
        for code in codes:
            cloud.batch.end_task("celeba", code)
        cloud.batch.move("celeba", "FAILED")

    return happen


def again(told):
    return [line for line in told if "submitting it again" in line]


def test_machines_that_say_nothing_are_not_made_for_ever(cloud, vm):
    """As without `roles/logging.logWriter`, and with no word in the bucket: nobody can tell what came of the job."""
    told = []
    with pytest.raises(JobEndedError, match=r"is gone, the 5th failure: giving up.*its machine is gone"):
        Watch(vm, sampling(slices=2), Story(*[cloud.compute.instances.clear, nothing] * 40), told.append).run()
    assert len(again(told)) == 4


def test_machines_that_are_taken_away_and_jobs_that_saved_do_not_count(cloud, vm):
    def are_taken_away():
        taken(cloud, NAME, 0, 2)
        # As by --stop-after.
        ends(cloud, NAME, 75, 1, 2)
        cloud.compute.instances.clear()

    def finish():
        for index in range(2):
            ends(cloud, NAME, 0, index, 2)
        cloud.compute.instances.clear()

    told = []
    Watch(vm, sampling(slices=2), Story(*[are_taken_away, nothing] * 8, finish), told.append).run()
    assert len(again(told)) == 8 and not any("failure" in line for line in again(told))


def test_a_machine_whose_job_crashed_is_made_again_four_times(cloud, vm):
    def crashes():
        taken(cloud, NAME, 0, 2)
        ends(cloud, NAME, 137, 1, 2)
        cloud.compute.instances.clear()

    with pytest.raises(JobEndedError, match="the 5th failure") as caught:
        Watch(vm, sampling(slices=2), Story(*[crashes, nothing] * 40), [].append).run()
    assert caught.value.exit_code == 137


def test_a_job_that_batch_gives_up_for_preemptions_alone_is_submitted_again_uncounted(cloud, batch):
    def finishes():
        cloud.batch.tasks.clear()
        cloud.batch.move("celeba", "SUCCEEDED")

    told = []
    lost = [fails(cloud, 137, *[code] * (1 + MAX_RETRIES)) for code in (50001, 50002, 50003, 50006)]
    Watch(batch, spec(), Story(*[event for one in lost * 2 for event in (one, nothing)], finishes), told.append).run()
    assert len(again(told)) == 8 and not any("failure" in line for line in again(told))


def test_a_task_that_could_not_be_ended_is_not_submitted_again(cloud, batch):
    told = []
    with pytest.raises(JobEndedError, match=r"celeba failed, which would come again.*could not be ended"):
        Watch(batch, spec(), Story(fails(cloud, 50004), nothing), told.append).run()
    assert not again(told)


def test_a_task_that_ran_for_its_hours_is_not_submitted_again(cloud, batch):
    def runs_for_its_hours():
        story.seconds += 24 * 3600
        fails(cloud, 50005)()

    story = Story(runs_for_its_hours, nothing)
    with pytest.raises(StoppedError, match="has used its 24 hours"):
        Watch(batch, spec(), story, [].append).run()


@pytest.mark.parametrize("code", [50000, 139])
def test_what_may_be_a_crash_counts(cloud, batch, code):
    with pytest.raises(JobEndedError, match="the 5th failure"):
        Watch(batch, spec(), Story(*[fails(cloud, code), nothing] * 9), [].append).run()


def test_a_job_that_is_deleted_is_not_submitted_again_by_its_watch(cloud, batch):
    with pytest.raises(StoppedError, match="celeba was deleted"):
        Watch(batch, spec(), Story(cloud.batch.jobs.clear), [].append).run()
    assert not cloud.batch.jobs
