"""The output of pods on a cluster: while they run, across pods that follow each other."""

from __future__ import annotations

import threading
import time

import pytest

from job.exits import MissingInputError
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import TARGET, sampling, spec
from tests.job.jobs.kubernetes_server import wait_for

NAME = "train-celeba"


@pytest.fixture
def backend(server):
    return KubernetesBackend(TARGET)


class Followed:
    """A thread that follows a job, as `ddpm jobs logs -f` does."""

    def __init__(self, backend, name=NAME):
        self.lines = []
        self._thread = threading.Thread(target=lambda: self.lines.extend(backend.logs(name, follow=True)), daemon=True)
        self._thread.start()

    def wait_for(self, *lines):
        wait_for(lambda: self.lines == list(lines))

    def ended(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.lines


def past(backend, name=NAME):
    return list(backend.logs(name, follow=False))


def test_what_was_printed_until_now(server, backend):
    with pytest.raises(MissingInputError, match="no job 'train-celeba'"):
        past(backend)
    backend.submit(spec())
    with pytest.raises(MissingInputError, match=r"has no output, or it is gone"):
        past(backend)
    first = server.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    with pytest.raises(MissingInputError, match=r"has no output, or it is gone"):
        past(backend)
    server.set_pod(first, running={})
    server.print(first, "one", "two  with spaces ", "")
    server.end_pod(first, 75)
    server.print(server.start_pod(NAME), "grüße 🙂")
    assert past(backend) == ["one", "two  with spaces ", "", "grüße 🙂"]


def test_following_goes_on_in_the_pod_that_replaces_another_and_loses_no_line(server, backend):
    backend.submit(spec())
    followed = Followed(backend)
    first = server.start_pod(NAME)
    # Their times end with zeros, which are left out, and without.
    lines = [f"line {number % 3}" for number in range(24)]
    for line in lines:
        server.print(first, line)
    followed.wait_for(*lines)
    # A node throws the first lines of a long output away, and the API is away for a moment.
    server.answer_next(503, times=2)
    server.forget_log(first, 20)
    server.print(first, "saved")
    followed.wait_for(*lines, "saved")
    # What was read is not asked for again and again.
    assert any("sinceSeconds=60" in path for _, path in server.requests)
    server.end_pod(first, 75)
    second = server.start_pod(NAME)
    server.print(second, "epoch 2")
    followed.wait_for(*lines, "saved", "epoch 2")
    # One that goes with its node.
    server.remove("pods", second)
    third = server.start_pod(NAME)
    server.print(third, "epoch 3", "finished")
    server.end_pod(third, 0)
    server.end_job(NAME, "Complete")
    assert followed.ended() == [*lines, "saved", "epoch 2", "epoch 3", "finished"]


def test_slices_and_nodes_are_told_apart_and_none_hides_another(server, backend):
    for job, plural, done in ((sampling(slices=2), "jobs", "Complete"), (spec(nodes=2), "jobsets", "Completed")):
        backend.submit(job)
        pods = [server.start_pod(job.name, index, plural) for index in (0, 1)]
        followed = Followed(backend, job.name)
        server.print(pods[1], "first")
        followed.wait_for("[1] first")
        server.print(pods[0], "second")
        followed.wait_for("[1] first", "[0] second")
        for pod in pods:
            server.end_pod(pod, 0)
        server.end_job(job.name, done, plural=plural)
        assert followed.ended() == ["[1] first", "[0] second"]
        assert past(backend, job.name) == ["[0] second", "[1] first"]


def test_a_job_that_is_cancelled_is_followed_until_it_has_saved(server, backend):
    server.goes_after_seconds = 1.0
    backend.submit(spec())
    pod = server.start_pod(NAME)
    server.print(pod, "one")
    followed = Followed(backend)
    followed.wait_for("one")
    backend.cancel(NAME)
    time.sleep(0.5)
    server.print(pod, "saved")
    assert followed.ended() == ["one", "saved"]


def test_following_a_job_whose_image_cannot_be_pulled_ends(server, backend):
    backend.submit(spec())
    server.start_pod(NAME, waiting={"reason": "ImagePullBackOff", "message": "manifest unknown"})
    with pytest.raises(MissingInputError, match="train-celeba prints nothing: ImagePullBackOff: manifest unknown"):
        list(backend.logs(NAME, follow=True))
