"""The output of a job's pods: one after the other, or as it comes from all of them, across pods that replace others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import dropwhile

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError
from job.jobs.backends.base import Cause, JobStatus, JsonObject
from job.jobs.backends.kubernetes_api import ClusterApi, NoSuchObjectError
from job.jobs.backends.kubernetes_status import has_ended, index_of, is_running

PODS_POLL_SECONDS = 2.0
"""How often a job that is followed is asked for new pods."""
LAST_LINES_SECONDS = 20.0
"""How long the output of a job that is over may take to come."""
Observe = Callable[[], tuple[JobStatus, list[JsonObject]]]


def past_lines(api: ClusterApi, pods: list[JsonObject], numbered: bool) -> Iterator[str]:
    """What was printed until now, pod after pod; if `numbered`, with a pod's index before each line.

    Raises:
        MissingInputError: none of them has any output.
    """
    found = False
    for pod in pods:
        try:
            for line in api.log(pod["metadata"]["name"], follow=False):
                found = True
                yield _shown_line(line, pod, numbered)
        except (NoSuchObjectError, BadRequestError, BucketAwayError):
            # One has not begun, or its output is gone with its node; that of the others is not.
            continue
    if not found:
        raise MissingInputError(
            "the job has no output, or it is gone with its node: its run's folder in the bucket has the rest"
        )


class Follower:
    """Follows the pods of one job, each by a thread of its own, so that a silent pod hides no other."""

    def __init__(self, api: ClusterApi, look: Observe, numbered: bool) -> None:
        """`look` says how the job is going, and which pods it has."""
        self._api, self._look, self._numbered = api, look, numbered
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readers: dict[str, threading.Thread] = {}
        self._pods: dict[str, JsonObject] = {}
        """Those there are now, by their UIDs."""
        self._stopped = threading.Event()

    def lines(self, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Yields lines until the job is over and all of them were read.

        Raises:
            MissingInputError: the image cannot be pulled, so that nothing will come.
        """
        next_look, ended_at = 0.0, float("inf")
        try:
            while not should_stop():
                now = time.monotonic()
                if now >= next_look and ended_at == float("inf"):
                    next_look = now + PODS_POLL_SECONDS
                    ended_at = now if self._find_pods() else ended_at
                try:
                    yield self._lines.get(timeout=0.1)
                except queue.Empty:
                    all_read = not self._is_reading() and self._lines.empty()
                    if (ended_at <= now and all_read) or now > ended_at + LAST_LINES_SECONDS:
                        return
        finally:
            self._stopped.set()

    def _find_pods(self) -> bool:
        """Begins to read pods that have begun since the last time; returns whether nothing more will come."""
        status, pods = self._look()
        self._pods = {pod["metadata"]["uid"]: pod for pod in pods}
        for uid, pod in self._pods.items():
            if uid not in self._readers and (is_running(pod) or has_ended(pod)):
                self._readers[uid] = threading.Thread(target=self._read, args=(uid, pod), daemon=True)
                self._readers[uid].start()
        if status.cause is Cause.NO_IMAGE and not self._is_reading():
            raise MissingInputError(f"job {status.name!r} prints nothing: {status.message}")
        # The pods of one that is cancelled still save.
        return status.state.is_over and all(map(has_ended, pods))

    def _is_reading(self) -> bool:
        return any(reader.is_alive() for reader in self._readers.values())

    def _read(self, uid: str, pod: JsonObject) -> None:
        last = ""
        while not self._stopped.is_set() and (now := self._pods.get(uid)) is not None:
            # Once more after the end: the last lines may have come after a connection broke off.
            is_last = has_ended(now)
            try:
                # A connection that is made anew begins with what is known already.
                lines = dropwhile(partial(_was_read, last), self._api.log(pod["metadata"]["name"], follow=True))
                for line in lines:
                    last = line
                    self._lines.put(_shown_line(line, pod, self._numbered))
                    if self._stopped.is_set():
                        return
            except NoSuchObjectError:
                return
            except JobError:
                is_last = False
            if is_last:
                return
            self._stopped.wait(PODS_POLL_SECONDS)


def _was_read(last: str, line: str) -> bool:
    """Whether a line was printed no later than the last one that was read; each begins with its time."""
    # A time may have lost the zeros at its end.
    moments = [text.partition(" ")[0].rstrip("Z") for text in (line, last)]
    return moments[0] <= moments[1]


def _shown_line(line: str, pod: JsonObject, numbered: bool) -> str:
    text = line.partition(" ")[2]
    return f"[{index_of(pod)}] {text}" if numbered else text
