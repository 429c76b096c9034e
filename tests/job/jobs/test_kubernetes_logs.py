"""The output of pods on a cluster: while they run, across pods that follow each other, and connections that break."""

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
    return KubernetesBackend(TARGET, (0.01, 0.02), poll_seconds=0.05)


class Followed:
    """A thread that follows a job, as `ddpm jobs logs -f` does."""

    def __init__(self, backend, name=NAME):
        self.lines, self.stop = [], threading.Event()
        self._thread = threading.Thread(target=self._follow, args=(backend, name), daemon=True)
        self._thread.start()

    def _follow(self, backend, name):
        for line in backend.logs(name, follow=True, should_stop=self.stop.is_set):
            self.lines.append(line)

    def wait_for(self, *lines):
        wait_for(lambda: self.lines == list(lines))

    def ended(self, seconds=20):
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self.lines


def never():
    return False


def test_what_was_printed_until_now(server, backend):
    backend.submit(spec())
    first = server.cluster.start_pod(NAME)
    server.cluster.print(first, "one", "two  with spaces ", "")
    server.cluster.end_pod(first, 75)
    server.cluster.print(server.cluster.start_pod(NAME), "grüße 🙂")
    assert list(backend.logs(NAME, False, never)) == ["one", "two  with spaces ", "", "grüße 🙂"]


def test_following_goes_on_in_the_pod_that_replaces_another(server, backend):
    backend.submit(spec())
    followed = Followed(backend)
    first = server.cluster.start_pod(NAME, waiting={"reason": "ContainerCreating"})
    time.sleep(0.2)
    server.cluster.set_pod(first, running={})
    server.cluster.print(first, "epoch 1")
    followed.wait_for("epoch 1")
    server.cluster.print(first, "saved")
    server.cluster.end_pod(first, 75)
    second = server.cluster.start_pod(NAME)
    server.cluster.print(second, "epoch 2")
    followed.wait_for("epoch 1", "saved", "epoch 2")
    server.cluster.print(second, "finished")
    server.cluster.end_pod(second, 0)
    server.cluster.end_job(NAME, "Complete")
    assert followed.ended() == ["epoch 1", "saved", "epoch 2", "finished"]


def test_a_connection_that_breaks_loses_no_line_and_repeats_none(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    followed = Followed(backend)
    stamp = "2026-01-01T00:00:00.5Z"
    server.cluster.print(pod, "a", "b", "b", stamp=stamp)
    server.cluster.break_log(pod)
    server.cluster.print(pod, "b", "c", stamp=stamp)
    # The digits of a second lose their zeros at the end: this one is later.
    server.cluster.print(pod, "d", stamp="2026-01-01T00:00:00.51Z")
    server.cluster.break_log(pod)
    server.cluster.print(pod, "e", stamp="2026-01-01T00:00:01Z")
    # Somebody sets the node's clock back.
    server.cluster.print(pod, "f", stamp="2025-12-31T23:59:59Z")
    followed.wait_for("a", "b", "b", "b", "c", "d", "e", "f")
    server.cluster.end_pod(pod, 0)
    server.cluster.end_job(NAME, "Complete")
    assert followed.ended() == ["a", "b", "b", "b", "c", "d", "e", "f"]


def test_an_output_that_its_node_cuts_is_gone_on_with(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    followed = Followed(backend)
    for number in range(4):
        server.cluster.print(pod, f"line {number}", stamp=f"2026-01-01T00:00:0{number}Z")
    followed.wait_for(*(f"line {number}" for number in range(4)))
    server.cluster.cut_log(pod, 2)
    server.cluster.print(pod, "line 4", stamp="2026-01-01T00:00:05Z")
    server.cluster.break_log(pod)
    server.cluster.print(pod, "line 5", stamp="2026-01-01T00:00:06Z")
    followed.wait_for(*(f"line {number}" for number in range(6)))
    server.cluster.end_pod(pod, 0)
    server.cluster.end_job(NAME, "Complete")
    assert followed.ended() == [f"line {number}" for number in range(6)]


def test_a_pod_that_goes_with_its_node_is_followed_by_its_replacement(server, backend):
    backend.submit(spec())
    first = server.cluster.start_pod(NAME)
    server.cluster.print(first, "one")
    followed = Followed(backend)
    followed.wait_for("one")
    server.cluster.break_log(first)
    server.cluster.remove_pod(first)
    second = server.cluster.start_pod(NAME)
    server.cluster.print(second, "two")
    followed.wait_for("one", "two")
    server.cluster.end_pod(second, 0)
    server.cluster.end_job(NAME, "Complete")
    assert followed.ended() == ["one", "two"]


def test_slices_are_told_apart_and_none_hides_another(server, backend):
    name = "sample-celeba-1a2b3c4d"
    backend.submit(sampling(slices=2))
    pods = [server.cluster.start_pod(name, index) for index in (0, 1)]
    followed = Followed(backend, name)
    server.cluster.print(pods[1], "first")
    followed.wait_for("[1] first")
    server.cluster.print(pods[0], "second")
    followed.wait_for("[1] first", "[0] second")
    for pod in pods:
        server.cluster.end_pod(pod, 0)
    server.cluster.end_job(name, "Complete")
    assert sorted(followed.ended()) == ["[0] second", "[1] first"]
    assert list(backend.logs(name, False, never)) == ["[0] second", "[1] first"]


def test_the_nodes_of_a_jobset_are_told_apart(server, backend):
    backend.submit(spec(nodes=2))
    for index in (0, 1):
        server.cluster.print(server.cluster.start_pod(NAME, index, "jobsets"), f"node {index}")
    assert list(backend.logs(NAME, False, never)) == ["[0] node 0", "[1] node 1"]


def test_a_job_that_is_cancelled_ends_what_follows_it(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    server.cluster.print(pod, "one")
    followed = Followed(backend)
    followed.wait_for("one")
    server.cluster.print(pod, "saved")
    backend.cancel(NAME)
    assert followed.ended(30) == ["one", "saved"]


def test_who_follows_may_stop_at_any_time(server, backend):
    backend.submit(spec())
    server.cluster.print(server.cluster.start_pod(NAME), "one")
    followed = Followed(backend)
    followed.wait_for("one")
    began = time.monotonic()
    followed.stop.set()
    followed.ended()
    assert time.monotonic() - began < 2


def test_an_api_that_is_away_for_a_moment_does_not_end_it(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    followed = Followed(backend)
    server.cluster.print(pod, "one")
    followed.wait_for("one")
    server.answer_next(503, times=2)
    server.cluster.break_log(pod)
    server.cluster.print(pod, "two")
    followed.wait_for("one", "two")
    server.cluster.end_pod(pod, 0)
    server.cluster.end_job(NAME, "Complete")
    assert followed.ended() == ["one", "two"]


def test_no_job_and_no_output(server, backend):
    with pytest.raises(MissingInputError, match=r"no job 'train-celeba'"):
        list(backend.logs(NAME, False, never))
    backend.submit(spec())
    for waiting in (None, "ContainerCreating"):
        if waiting:
            server.cluster.start_pod(NAME, waiting={"reason": waiting})
        with pytest.raises(MissingInputError, match=r"has no output, or it is gone"):
            list(backend.logs(NAME, False, never))


def test_many_lines_come_in_order(server, backend):
    backend.submit(spec())
    pod = server.cluster.start_pod(NAME)
    lines = [f"line {number} {'x' * 200}" for number in range(20_000)]
    server.cluster.print(pod, *lines)
    server.cluster.end_pod(pod, 0)
    server.cluster.end_job(NAME, "Complete")
    assert list(backend.logs(NAME, True, never)) == lines
