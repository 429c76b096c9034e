"""The output of jobs on VMs: while they run, when their machines are gone, and out of order."""

from __future__ import annotations

import threading
import time

import pytest

from job.jobs.backends.vm import VmBackend
from tests.job.jobs.google_jobs import VM, never, sampling, spec
from tests.job.jobs.test_vm import runs, tells, vanishes


@pytest.fixture
def backend(cloud):
    return VmBackend(VM)


def test_following_goes_on_across_attempts_until_the_job_is_over(cloud, backend):
    backend.submit(spec())
    runs(cloud, "celeba", phase="running", attempts="1")

    lines, has_seen_all = [], threading.Event()

    def story():
        for number in range(5):
            time.sleep(0.1)
            cloud.logging.printed("celeba", f"line {number}")
        assert has_seen_all.wait(20)
        tells(cloud, "celeba", "over", 0, message="finished")
        vanishes(cloud, "celeba")
        # The last lines of a job arrive when its machine is no more, and not in order.
        time.sleep(0.1)
        cloud.logging.printed("celeba", "late line", ago_seconds=0.3)

    thread = threading.Thread(target=story)
    thread.start()
    for line in backend.logs("celeba", True, never):
        if not line.startswith("ddpm-vm: submitted"):
            lines.append(line)
        if line == "line 4":
            has_seen_all.set()
    thread.join()
    assert lines[:5] == [f"line {number}" for number in range(5)]
    assert sorted(lines[5:]) == ["ddpm-vm: finished", "late line"]


def test_who_follows_may_stop(cloud, backend):
    backend.submit(spec())
    cloud.logging.printed("celeba", "a line")
    seen = []
    for line in backend.logs("celeba", True, lambda: "a line" in seen):
        seen.append(line)
    assert "a line" in seen


def test_slices_have_their_number_before_each_line(cloud, backend):
    backend.submit(sampling())
    cloud.logging.printed("sample-celeba", "piece 4", index=2)
    assert "[2] piece 4" in [*backend.logs("sample-celeba", False, never)]


def test_more_lines_than_a_page_holds(cloud, backend):
    backend.submit(spec())
    for number in range(2500):
        cloud.logging.printed("celeba", f"line {number}")
    lines = [line for line in backend.logs("celeba", False, never) if line.startswith("line")]
    assert lines == [f"line {number}" for number in range(2500)]
