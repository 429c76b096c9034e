"""`--watch` on VMs and on Batch, against servers on this machine: what is submitted again there, and what counts."""

from __future__ import annotations

from functools import partial

import pytest

from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.watch import JobEndedError
from tests.job.jobs.google_jobs import backend_of, sampling, spec
from tests.job.jobs.story import Story, nothing, watched

NAME = "sample-celeba"


def test_what_counts_of_machines_that_end(cloud):
    def machines_end(*words):
        for index, (code, event) in enumerate(words):
            cloud.logging.ended(NAME, code, index, 2, event)
        cloud.compute.vanish()

    def watch(*words, then=()):
        last = [lambda: machines_end(*then)] if then else []
        story = Story(*[lambda: machines_end(*words), nothing] * 8, *last)
        watched(backend_of("vm"), sampling(slices=2), story)
        return story

    # As without `roles/logging.logWriter`, and with no word in the bucket: nobody can tell what came of the job.
    with pytest.raises(JobEndedError, match=r"is gone, the 5th failure: giving up.*its machine is gone"):
        watch()
    with pytest.raises(JobEndedError, match="the 5th failure") as caught:
        watch((75, "taken"), (137, "ended"))
    assert caught.value.exit_code == 137
    # Machines that are taken away, and jobs that saved, as by --stop-after.
    story = watch((75, "taken"), (75, "ended"), then=[(0, "ended")] * 2)
    assert len(story.again()) == 8 and not any("failure" in line for line in story.again())


def test_a_job_that_batch_gives_up_for_preemptions_alone_is_submitted_again_uncounted(cloud):
    def lost(code):
        cloud.batch.end_task("celeba", 137, *[code] * (1 + MAX_RETRIES))
        cloud.batch.move("celeba", "FAILED")

    def finishes():
        cloud.batch.tasks.clear()
        cloud.batch.move("celeba", "SUCCEEDED")

    story = Story(*[e for code in (50001, 50002, 50003, 50006) * 2 for e in (partial(lost, code), nothing)], finishes)
    watched(backend_of("batch"), spec(), story)
    assert len(story.again()) == 8 and not any("failure" in line for line in story.again())
