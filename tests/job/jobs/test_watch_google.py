"""`--watch` on VMs and on Batch, against servers on this machine: what is submitted again there, and what counts."""

from __future__ import annotations

import pytest

from job.jobs.backends.batch import MAX_RETRIES
from job.jobs.watch import JobEndedError, Watch
from tests.job.jobs.google_jobs import backend_of, sampling, spec
from tests.job.jobs.story import Story, nothing

NAME = "sample-celeba"


def again(told):
    return [line for line in told if "submitting it again" in line]


def test_what_counts_of_machines_that_end(cloud):
    def machines_end(*words):
        for index, (code, event) in enumerate(words):
            cloud.logging.ended(NAME, code, index, 2, event)
        cloud.compute.vanish()

    def watched(*words, then=()):
        told, events = [], [lambda: machines_end(*words), nothing] * 8
        last = [lambda: machines_end(*then)] if then else []
        Watch(backend_of("vm"), sampling(slices=2), Story(*events, *last), told.append).run()
        return told

    # As without `roles/logging.logWriter`, and with no word in the bucket: nobody can tell what came of the job.
    with pytest.raises(JobEndedError, match=r"is gone, the 5th failure: giving up.*its machine is gone"):
        watched()
    with pytest.raises(JobEndedError, match="the 5th failure") as caught:
        watched((75, "taken"), (137, "ended"))
    assert caught.value.exit_code == 137
    # Machines that are taken away, and jobs that saved, as by --stop-after.
    told = watched((75, "taken"), (75, "ended"), then=[(0, "ended")] * 2)
    assert len(again(told)) == 8 and not any("failure" in line for line in again(told))


def test_a_job_that_batch_gives_up_for_preemptions_alone_is_submitted_again_uncounted(cloud):
    def lost(code):
        cloud.batch.end_task("celeba", 137, *[code] * (1 + MAX_RETRIES))
        cloud.batch.move("celeba", "FAILED")

    def finishes():
        cloud.batch.tasks.clear()
        cloud.batch.move("celeba", "SUCCEEDED")

    told, events = [], []
    for code in (50001, 50002, 50003, 50006) * 2:
        events += [lambda code=code: lost(code), nothing]
    Watch(backend_of("batch"), spec(), Story(*events, finishes), told.append).run()
    assert len(again(told)) == 8 and not any("failure" in line for line in again(told))
