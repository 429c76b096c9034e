"""The output of a job's pods: one after the other, or as it comes from all of them, across pods that replace others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError
from job.jobs.backends.base import JobStatus, Manifest
from job.jobs.backends.kubernetes_api import Api, NotThereError
from job.jobs.backends.kubernetes_manifests import CONTAINER
from job.jobs.backends.kubernetes_status import IMAGE_REASONS, has_ended, index_of, is_running

POLL_SECONDS = 2.0
"""How often a job that is followed is asked for new pods."""
LAST_LINES_SECONDS = 20.0
"""How long the output of a job that is over may take to come."""
SILENCE_SECONDS = 120.0
"""A connection that is silent for so long may be a dead one: it is made anew."""
_QUEUE_LINES = 10_000


def past_lines(api: Api, pods: list[Manifest]) -> Iterator[str]:
    """What was printed until now, pod after pod.

    Raises:
        MissingInputError: none of them has any output.
    """
    many, found = _are_many(pods), False
    for pod in (pod for pod in pods if is_running(pod) or has_ended(pod)):
        try:
            for line in api.log(pod["metadata"]["name"], CONTAINER, follow=False):
                found = True
                yield _shown(line, index_of(pod), many)
        except (NotThereError, BadRequestError, BucketAwayError):
            # The output of a pod is gone with its node; that of the others is not.
            continue
    if not found:
        raise MissingInputError(
            "the job has no output, or it is gone with its node: its run's folder in the bucket has the rest"
        )


class Follower:
    """Follows the pods of one job, each by a thread of its own, so that a silent pod hides no other."""

    def __init__(
        self,
        api: Api,
        pods: Callable[[], list[Manifest]],
        status: Callable[[list[Manifest]], JobStatus],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`pods` asks for the job's pods, oldest first; `status` says how a job with these pods is going."""
        self._api, self._pods, self._status, self._poll_seconds = api, pods, status, poll_seconds
        self._lines: queue.Queue[str] = queue.Queue(_QUEUE_LINES)
        self._stopped = threading.Event()
        self._readers: dict[str, threading.Thread] = {}
        self._many = False

    def lines(self, should_stop: Callable[[], bool]) -> Iterator[str]:
        """Yields lines until the job is over and all of them were read.

        Raises:
            MissingInputError: the image cannot be pulled, so that nothing will come.
        """
        over_at, next_look = float("inf"), 0.0
        try:
            while not should_stop():
                if time.monotonic() >= next_look and over_at == float("inf"):
                    next_look = time.monotonic() + self._poll_seconds
                    if self._look():
                        over_at = time.monotonic()
                try:
                    yield self._lines.get(timeout=min(0.2, self._poll_seconds))
                except queue.Empty:
                    is_read = not any(reader.is_alive() for reader in self._readers.values()) and self._lines.empty()
                    if (over_at < float("inf") and is_read) or time.monotonic() > over_at + LAST_LINES_SECONDS:
                        return
        finally:
            self._stopped.set()

    def _look(self) -> bool:
        """Starts to read pods that are new, and says whether the job is over."""
        pods = self._pods()
        status = self._status(pods)
        # Two slices are many from the beginning, even if one of them waits for its machine.
        self._many = self._many or _are_many(pods)
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if uid not in self._readers and (is_running(pod) or has_ended(pod)):
                reader = threading.Thread(target=self._read, args=(pod,), name=f"log-{uid}", daemon=True)
                self._readers[uid] = reader
                reader.start()
        if status.message.startswith(IMAGE_REASONS) and not any(r.is_alive() for r in self._readers.values()):
            raise MissingInputError(f"job {status.name!r} prints nothing: {status.message}")
        return status.state.is_over

    def _read(self, pod: Manifest) -> None:
        name, index, position = pod["metadata"]["name"], index_of(pod), _Position()
        while not self._stopped.is_set():
            try:
                position.begin()
                for line in self._api.log(name, CONTAINER, follow=True, silence_seconds=SILENCE_SECONDS):
                    if position.is_new(line):
                        self._put(_shown(line, index, self._many))
                    if self._stopped.is_set():
                        return
            except NotThereError:
                return
            except JobError:
                # It broke off, or has not begun: what was read already is left out the next time.
                pass
            try:
                now = self._api.pod(name)
            except JobError:
                now = pod
            if now is None or now["metadata"]["uid"] != pod["metadata"]["uid"]:
                return
            if has_ended(now) and position.was_whole:
                return
            # One more look after the end: the last lines may have come after the connection broke off.
            position.was_whole = has_ended(now)
            self._stopped.wait(min(1.0, self._poll_seconds))

    def _put(self, line: str) -> None:
        while not self._stopped.is_set():
            try:
                self._lines.put(line, timeout=0.5)
                return
            except queue.Full:
                continue


class _Position:
    """Which lines of an output were read already, when it is read again from its beginning."""

    def __init__(self) -> None:
        self.was_whole = False
        """Whether the pod had ended before the last reading began."""
        self._first, self._last = "", ""
        self._count = self._met = 0
        self._is_cut = False

    def begin(self) -> None:
        """A reading begins."""
        self._met = 0

    def is_new(self, line: str) -> bool:
        """Whether this line, the next of a reading, was in no reading before."""
        self._met += 1
        if self._met == 1 and line != self._first:
            # A node cuts the output of a pod at some megabytes: it begins otherwise then, and only times tell.
            self._is_cut, self._first, self._count = bool(self._first), line, 0
        if self._is_cut and _moment(line) <= _moment(self._last):
            self._count = self._met
            return False
        # Elsewhere times are not asked: a node's clock may be set back.
        if not self._is_cut and self._met <= self._count:
            return False
        self._is_cut, self._count, self._last = False, self._met, line
        return True


def _moment(line: str) -> tuple[str, str]:
    """A time stamp that can be compared: the digits of a second lose their zeros at the end on the way."""
    stamp, _, fraction = line.partition(" ")[0].partition(".")
    return stamp.rstrip("Z"), fraction.rstrip("Z").ljust(9, "0")


def _shown(line: str, index: int, many: bool) -> str:
    text = line.partition(" ")[2]
    return f"[{index}] {text}" if many else text


def _are_many(pods: list[Manifest]) -> bool:
    return any(index_of(pod) > 0 for pod in pods)
