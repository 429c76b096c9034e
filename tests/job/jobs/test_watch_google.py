"""`--watch` on VMs and on Batch, against servers on this machine: what is submitted again there, and what counts."""

from __future__ import annotations

from functools import partial

import pytest

from job.jobs.backends.batch import MAX_RETRIES, BatchBackend
from job.jobs.backends.vm import VmBackend
from job.jobs.watch import JobEndedError
from tests.job.jobs.google_jobs import BATCH, VM, sampling, spec
from tests.job.jobs.story import Story, nothing, watched
from tests.job.jobs.test_vm import ends, taken

NAME = "sample-celeba"


@pytest.fixture
def vm(cloud):
    return VmBackend(VM)


def test_machines_that_say_nothing_are_not_made_for_ever(cloud, vm):
    """As without `roles/logging.logWriter`, and with no word in the bucket: nobody can tell what came of the job."""
    story = Story(*[cloud.compute.instances.clear, nothing] * 40)
    with pytest.raises(JobEndedError, match=r"is gone, the 5th failure: giving up.*its machine is gone"):
        watched(vm, sampling(slices=2), story)
    assert len(story.again()) == 4


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

    story = Story(*[are_taken_away, nothing] * 8, finish)
    watched(vm, sampling(slices=2), story)
    assert len(story.again()) == 8 and not any("failure" in line for line in story.again())


def test_a_job_that_batch_gives_up_for_preemptions_alone_is_submitted_again_uncounted(cloud):
    def lost(*codes):
        for code in codes:
            cloud.batch.end_task("celeba", code)
        cloud.batch.move("celeba", "FAILED")

    def finishes():
        cloud.batch.tasks.clear()
        cloud.batch.move("celeba", "SUCCEEDED")

    ends = [partial(lost, 137, *[code] * (1 + MAX_RETRIES)) for code in (50001, 50002, 50003, 50006)]
    story = Story(*[event for end in ends * 2 for event in (end, nothing)], finishes)
    watched(BatchBackend(BATCH), spec(), story)
    assert len(story.again()) == 8 and not any("failure" in line for line in story.again())
