"""Which exit codes Kubernetes retries, for all 256 of them, by the rendered policies: as their table says."""

from __future__ import annotations

import functools

import pytest
import yaml

from job.exits import TABLE, Exit
from job.jobs.backends.kubernetes_manifests import RETRIES
from tests.job.jobs.kubernetes_jobs import GOLDEN
from tests.job.jobs.kubernetes_policies import End, JobController, JobSetController

OUTCOME = {"never": "failed", "bounded": "counted", "always": "retried"}


def expected(code: int) -> str:
    if code == Exit.FINISHED:
        return "finished"
    return OUTCOME[TABLE[Exit(code)].retried if code in TABLE else "bounded"]


@functools.cache
def kept(case: str):
    return yaml.safe_load((GOLDEN / f"{case}.yaml").read_text())


def controller(case: str) -> JobController | JobSetController:
    made = kept(case)
    return JobSetController(made) if made["kind"] == "JobSet" else JobController(made)


@pytest.fixture(params=["one-gpu-spot", "eight-gpus", "two-nodes", "sampling-slices"])
def case(request):
    return request.param


def test_every_exit_code_is_retried_as_the_table_says(case):
    outcomes = {code: controller(case).after(End(code)) for code in range(256)}
    assert outcomes == {code: expected(code) for code in range(256)}


def test_a_pod_that_was_taken_away_is_retried_whatever_its_code_and_not_counted(case):
    for code in range(1, 256):
        assert controller(case).after(End(code, disrupted=True)) == "retried"


def test_a_crash_is_retried_so_often_and_no_more(case):
    tried = controller(case)
    outcomes = [tried.after(End(139)) for _ in range(RETRIES + 1)]
    assert outcomes[:-1] == ["counted"] * RETRIES
    assert outcomes[-1] == ("index failed" if case == "sampling-slices" else "failed")


def test_preemptions_are_no_crashes(case):
    tried = controller(case)
    for _ in range(100):
        assert tried.after(End(75)) == "retried"
        assert tried.after(End(137, disrupted=True)) == "retried"
    assert tried.after(End(137)) == "counted"


def test_slices_that_fail_leave_the_others_alone_until_they_are_most():
    tried = controller("sampling-slices")
    for index in (0, 1):
        assert [tried.after(End(1, index=index)) for _ in range(RETRIES + 1)][-1] == "index failed"
    assert tried.after(End(1, index=2)) == "counted"
    outcomes = [tried.after(End(1, index=3)) for _ in range(RETRIES + 1)]
    assert outcomes[-1] == "failed" and tried.reason == "MaxFailedIndexesExceeded"


def test_a_deadline_ends_a_jobset_and_an_unknown_message_is_a_counted_restart():
    tried = controller("two-nodes")
    assert isinstance(tried, JobSetController)
    assert tried.after_job("DeadlineExceeded", "Job was active longer than specified deadline") == "failed"
    # Should a later Kubernetes word its message otherwise, no job is lost, and none goes on for ever.
    assert tried.after_job("PodFailurePolicy", "in other words") == "counted"


def test_one_code_is_not_taken_for_another_that_it_is_part_of():
    tried = controller("two-nodes")
    assert isinstance(tried, JobSetController)
    for code in (20, 27, 175, 164, 7, 5, 6):
        assert controller("two-nodes").after(End(code)) == "counted", code
