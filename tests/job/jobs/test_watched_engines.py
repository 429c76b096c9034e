"""`--watch` of jobs on servers that speak for the engines: what each of them tells means to it what it should."""

from __future__ import annotations

import pytest

from job.exits import Exit, StoppedError
from job.jobs.watch import JobEndedError, Watch
from tests.job.jobs import google_jobs, kubernetes_jobs


def watched(backend, job, *happenings):
    """Watches a job to its end; after each look, and in each pause, the next thing happens on the engine."""
    following = iter(happenings)
    Watch(backend, job, lambda seconds: bool(next(following)())).run()
    assert next(following, None) is None


def nothing():
    """A pause passes."""


def test_batch_jobs_are_submitted_again(cloud):
    def becomes(state, *codes):
        cloud.batch.end_task("celeba", *codes)
        cloud.batch.move("celeba", state)

    def runs():
        becomes("RUNNING")

    backend, job = google_jobs.backend_of("batch"), google_jobs.spec()
    lost = [lambda: becomes("FAILED", *[50001] * 10), nothing, runs]
    watched(backend, job, runs, *lost * 6, lambda: becomes("SUCCEEDED", 0))
    with pytest.raises(JobEndedError, match="could not be ended"):
        watched(backend, job, runs, lambda: becomes("FAILED", 50004))
    # Batch makes eleven attempts by itself.
    with pytest.raises(JobEndedError, match="ended with 137, the 6th failure: giving up"):
        watched(backend, job, runs, lambda: becomes("FAILED", *[50001] * 5, *[137] * 6))


def test_cluster_jobs_are_submitted_again(server):
    name, pods = "train-celeba", []

    def runs():
        pods.append(server.start_pod(name))

    def ends(code, *how):
        server.end_pod(pods.pop(), code)
        server.end_job(name, *how)

    backend, job = kubernetes_jobs.cluster(), kubernetes_jobs.spec()

    def late():
        server.remove("pods", pods.pop())
        server.end_job(name, "Failed", "DeadlineExceeded")

    def crashes():
        server.end_pod(pods[-1], 137)

    # Of the five failures that it may have three are used up before it waits for a node until its hours are over.
    crashed = [runs, crashes] * 3
    watched(backend, job, *crashed, runs, late, nothing, runs, lambda: ends(0, "Complete"))
    assert [body["spec"]["backoffLimit"] for body in server.bodies] == [4, 1]
    with pytest.raises(JobEndedError, match="ended with 137, the 5th failure: giving up") as failed:
        watched(backend, job, runs, lambda: ends(137, "Failed", "BackoffLimitExceeded"))
    assert (failed.value.exit_code, len(server.bodies)) == (137, 3)
    with pytest.raises(StoppedError, match="deleted by a person") as stopped:
        watched(backend, job, runs, lambda: server.remove("jobs", name))
    assert stopped.value.exit_code is Exit.STOPPED
