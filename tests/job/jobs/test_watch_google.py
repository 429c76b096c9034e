"""`--watch` on VMs and on Batch, by Google's own clients against servers on this machine."""

from __future__ import annotations

import pytest

from job.exits import StoppedError
from job.jobs.backends.base import State
from job.jobs.backends.batch import BatchBackend
from job.jobs.backends.batch_manifests import MAX_RETRIES
from job.jobs.backends.vm import VmBackend
from job.jobs.watch import JobEndedError, Watch
from tests.job.jobs.google_jobs import BATCH, VM, sampling, spec
from tests.job.jobs.story import Story, nothing
from tests.job.jobs.test_vm import tells


@pytest.fixture
def vm(cloud):
    return VmBackend(VM)


@pytest.fixture
def batch(cloud):
    return BatchBackend(BATCH)


def fails(cloud, *codes, name="celeba"):
    """What happens when the first task of a job has ended so often, and Batch gives up."""

    def happen():
        for code in codes:
            cloud.batch.end_task(name, code)
        cloud.batch.move(name, "FAILED")

    return happen


@pytest.mark.parametrize("job", [spec(), sampling(slices=2)], ids=["training", "slices"])
def test_machines_that_say_nothing_are_not_made_for_ever(cloud, vm, job):
    """As without `roles/logging.logWriter`: nobody can tell whether a job finished, failed for good, or was lost."""
    told = []

    def ends():
        cloud.compute.instances.clear()

    with pytest.raises(JobEndedError, match=r"is gone, the 5th failure: giving up.*its machine is gone"):
        Watch(vm, job, Story(*[ends, nothing] * 40), told.append).run()
    assert len([line for line in told if "submitting it again" in line]) == 4


def test_machines_that_are_taken_away_do_not_count(cloud, vm):
    told = []

    def is_taken_away():
        tells(cloud, "sample-celeba", "stopped", 75, 0, 2)
        tells(cloud, "sample-celeba", "stopped", 75, 1, 2)
        cloud.compute.instances.clear()

    def finishes():
        for index in range(2):
            tells(cloud, "sample-celeba", "over", 0, index, 2)
        cloud.compute.instances.clear()

    Watch(vm, sampling(slices=2), Story(*[is_taken_away, nothing] * 8, finishes), told.append).run()
    again = [line for line in told if "submitting it again" in line]
    assert len(again) == 8 and not any("failure" in line for line in again)
    # One slice of two may have failed for good.
    told.clear()

    def one_says_nothing():
        tells(cloud, "sample-celeba", "stopped", 75, 0, 2)
        cloud.compute.instances.clear()

    with pytest.raises(JobEndedError, match="the 5th failure"):
        Watch(vm, sampling(slices=2), Story(*[one_says_nothing, nothing] * 40), told.append).run()


@pytest.mark.parametrize("codes", [(71, 65), (65, 71), (75, 65), (137, 65)])
def test_the_slice_for_which_there_is_least_hope_decides(cloud, vm, codes):
    name = "sample-celeba"
    vm.submit(sampling(slices=2))
    for index, code in enumerate(codes):
        tells(cloud, name, "over", code, index, 2)
    cloud.compute.instances.clear()
    status = vm.status(name)
    assert (status.state, status.exit_code, status.retried) == (State.FAILED, 65, "never")
    assert f"slice {codes.index(65)}" in status.message


def test_a_job_that_batch_gives_up_for_preemptions_alone_is_submitted_again_uncounted(cloud, batch):
    def finishes():
        cloud.batch.tasks.clear()
        cloud.batch.move("celeba", "SUCCEEDED")

    told = []
    lost = [fails(cloud, 137, *[code] * (1 + MAX_RETRIES)) for code in (50001, 50002, 50003, 50006)]
    Watch(batch, spec(), Story(*[event for one in lost * 2 for event in (one, nothing)], finishes), told.append).run()
    again = [line for line in told if "submitting it again" in line]
    assert len(again) == 8 and not any("failure" in line for line in again)


def test_a_task_that_could_not_be_ended_is_not_submitted_again(cloud, batch):
    told = []
    with pytest.raises(JobEndedError, match=r"celeba failed, which would come again.*could not be ended"):
        Watch(batch, spec(), Story(fails(cloud, 50004), nothing), told.append).run()
    assert not any("submitting" in line for line in told)


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
    told = []
    with pytest.raises(StoppedError, match="celeba was deleted"):
        Watch(batch, spec(), Story(cloud.batch.jobs.clear), told.append).run()
    assert not cloud.batch.jobs
