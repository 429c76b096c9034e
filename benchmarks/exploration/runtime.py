"""Simulated threads, clocks, ids, processes and a bucket in the place of real ones, for the modules of the job alone.

The code of the job stays as it is: while `simulated` is open, its modules find these objects under the names of `time`,
`threading`, `uuid`, `random`, `ThreadPoolExecutor` and `wait`. Every request to the bucket, which lies in memory, is a
point where the schedule may interfere. It keeps the contract of `job.store.base`: each request changes one object, at
one moment, or nothing. Reads and listings show all that took effect before.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import random
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import patch

from benchmarks.exploration.world import Killed, Process, Request, Thread, World
from job import progress
from job.coordination import lease, sealed
from job.coordination.lease import ProcessIdentity
from job.coordination.sealed import Sealed
from job.runs import layout, metric_rows
from job.store.base import Entry, ObjectMissingError, Store
from job.store.retry import Retry

AWAY_SECONDS = 120.0
"""How long a bucket may be away from a run here; 900 s are the default."""
BEGAN = 1_800_000_000.0
"""The time of day at which every world begins, in seconds since 1970."""
TIMES = {
    "job.coordination.lease.WATCH_SECONDS": 2.5,
    "job.stop._SLICE_SECONDS": 2.5,
    "job.runs.writer.WAIT_SECONDS": 1.0,
    "job.coordination.pieces._POLL_SECONDS": 1.0,
    "job.coordination.pieces._POLL_CLAIMS_SECONDS": 5.0,
}
"""Intervals of polling that are longer here, since each look costs time and changes nothing."""

_world: World | None = None


def world() -> World:
    """Returns the world that runs."""
    assert _world is not None
    return _world


@contextmanager
def running(new: World) -> Iterator[World]:
    """Makes a world the one that simulated objects belong to."""
    global _world
    _world = new
    try:
        yield new
    finally:
        new.end()
        _world = None


class SimulatedThread:
    """`threading.Thread`."""

    def __init__(
        self, target: Callable[..., object], name: str = "", daemon: bool = False, args: tuple[Any, ...] = ()
    ) -> None:
        self._work, self.name, self._thread = (lambda: target(*args)), name, None

    def start(self) -> None:
        """Starts it."""
        self._thread: Thread | None = world().start(self._work, self.name)

    def is_alive(self) -> bool:
        """Returns whether it has not ended."""
        return self._thread is not None and not self._thread.is_done

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end."""
        if self.is_alive():
            world().wait(lambda: not self.is_alive(), _deadline(timeout))


class SimulatedEvent:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        """Returns whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Sets it."""
        self._is_set = True

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is set."""
        if not self._is_set:
            world().wait(self.is_set, _deadline(timeout))
        return self._is_set


class SimulatedLock:
    """`threading.Lock`, and `RLock`: threads only change at requests, so few ever wait for one."""

    def __init__(self) -> None:
        self._owner: Thread | None = None
        self._count = 0

    def __enter__(self) -> SimulatedLock:
        me = world().current
        if me is not None and me.process.is_dead:
            raise Killed
        while self._owner not in (None, me):
            world().wait(lambda: self._owner is None)
        self._owner, self._count = me, self._count + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if self._count <= 0:
            self._owner, self._count = None, 0


class SimulatedCondition(SimulatedLock):
    """`threading.Condition`."""

    def __init__(self) -> None:
        super().__init__()
        self._notified = 0

    def notify_all(self) -> None:
        """Wakes those that wait."""
        self._notified += 1

    def wait(self, timeout: float | None = None) -> None:
        """Releases the lock until it is notified."""
        seen, count = self._notified, self._count
        self._owner, self._count = None, 0
        try:
            world().wait(lambda: self._notified != seen, _deadline(timeout))
        finally:
            if not world().process.is_dead:
                self.__enter__()
                self._count = count


class SimulatedFuture(concurrent.futures.Future[Any]):
    """`concurrent.futures.Future`."""

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result, and returns it."""
        if not self.done():
            world().wait(self.done, _deadline(timeout))
        return super().result(0)


class SimulatedExecutor(concurrent.futures.Executor):
    """`ThreadPoolExecutor`."""

    def __init__(self, max_workers: int = 1, thread_name_prefix: str = "pool") -> None:
        self._most, self._name, self._workers = max_workers, thread_name_prefix, list[Thread]()
        self._queue: deque[tuple[SimulatedFuture, Callable[[], Any]]] = deque()
        self._idle, self._is_closed = 0, False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for all that was submitted."""
        self._is_closed = True
        if wait and not world().process.is_dead and not all(worker.is_done for worker in self._workers):
            world().wait(lambda: all(worker.is_done for worker in self._workers))

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> SimulatedFuture:
        """Queues work."""
        future = SimulatedFuture()
        self._queue.append((future, partial(work, *args, **named)))
        if not self._idle and len(self._workers) < self._most:
            self._workers.append(world().start(self._work, f"{self._name}-{len(self._workers)}"))
        return future

    def _work(self) -> None:
        while True:
            if not self._queue:
                if self._is_closed:
                    return
                self._idle += 1
                world().wait(lambda: bool(self._queue) or self._is_closed)
                self._idle -= 1
                continue
            future, work = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)


def _wait(futures: Iterable[SimulatedFuture], timeout: float | None = None) -> SimpleNamespace:
    futures = list(futures)
    if not all(future.done() for future in futures):
        world().wait(lambda: all(future.done() for future in futures), _deadline(timeout))
    return SimpleNamespace(done={future for future in futures if future.done()})


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else world().now + max(0.0, timeout)


class _Uuid(SimpleNamespace):
    @property
    def hex(self) -> str:
        """As of a `UUID`: unique in its world."""
        return f"{world().next_number() * 2654435761 % 2**128:032x}"


class _Datetime(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        """Returns the time of the world."""
        return datetime.fromtimestamp(BEGAN + int(world().now), UTC)


def _monotonic() -> float:
    return world().now - world().process.slept_seconds + 1_000.0


_MAIN = object()
_NO_PROGRESS = nullcontext(SimpleNamespace(update=lambda *_, **__: None))
_TIME = SimpleNamespace(
    monotonic=_monotonic,
    time=lambda: BEGAN + world().now,
    sleep=lambda seconds: world().sleep(seconds),
    clock_gettime=lambda _: world().now + 1_000.0,
    CLOCK_BOOTTIME=time.CLOCK_BOOTTIME,
    perf_counter=_monotonic,
    thread_time=lambda: 0.0,
)
_THREADING = SimpleNamespace(
    Thread=SimulatedThread,
    Event=SimulatedEvent,
    Lock=SimulatedLock,
    RLock=SimulatedLock,
    Condition=SimulatedCondition,
    current_thread=lambda: None,
    main_thread=lambda: _MAIN,
)
_REPLACED: list[tuple[object, object]] = [
    (time, _TIME),
    (threading, _THREADING),
    (uuid, SimpleNamespace(uuid4=_Uuid)),
    (random, SimpleNamespace(uniform=lambda low, high: high)),
    (concurrent.futures.ThreadPoolExecutor, SimulatedExecutor),
    (concurrent.futures.wait, _wait),
    (datetime, _Datetime),
]
_ROOMS = ("job.coordination.lease", "job.coordination.pieces", "job.coordination.sealed", "job.runs", "job.verbs",
          "job.data.pack", "job.data.latents", "job.stop", "job.store.retry", "job.store.base", "job.evaluation",
          "job.sampling.sampling_plan", "job.platform")  # fmt: skip


@lru_cache(20_000)
def _indented(compact: str) -> bytes:
    return _REAL_BYTES(json.loads(compact))


@lru_cache(20_000)
def _parsed(kind: type[Sealed], data: bytes, uri: str) -> Sealed:
    return _REAL_FROM_JSON.__func__(kind, data, uri)


_REAL_BYTES, _REAL_FROM_JSON = sealed._bytes, Sealed.from_json
_REPLACED += [(layout.located, lru_cache(20_000)(layout.located)), (progress.note, lambda _: None)]


class SimulatedStore(Store):
    """The bucket of a world, as one of its processes sees it."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__("sim://bucket", Retry(AWAY_SECONDS, process.stop))
        self._world, self._process = world, process

    def _ask(self, op: str, key: str, effect: Callable[[], Any], data: bytes = b"") -> Any:
        thread = self._world.current
        name = thread.name if thread else ""
        return self._world.request(Request(self._process, name, op, key, data), effect)

    def _found(self, key: str) -> tuple[bytes, str]:
        try:
            return self._world.objects[key]
        except KeyError:
            raise ObjectMissingError(f"no object at {key}") from None

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        whole = f"{self._prefix}{key}"
        data, version = self._ask("fetch", whole, lambda: self._found(whole))
        consume(data)
        return version

    def _open(self, key: str) -> BinaryIO:
        whole = f"{self._prefix}{key}"
        return io.BytesIO(self._ask("open", whole, lambda: self._found(whole))[0])

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        whole, data, objects = f"{self._prefix}{key}", content.read(), self._world.objects

        def write() -> str | None:
            version = objects[whole][1] if whole in objects else ""
            if over is not None and over != version:
                return None
            new = hashlib.sha256(data).hexdigest() if self._world.content_versions else str(self._world.next_number())
            objects[whole] = data, new
            return new

        op = "put" if over is None else "replace" if over else "create"
        return self._ask(op, whole, write, data)

    def _list(self, prefix: str) -> Sequence[Entry]:
        whole, cut = f"{self._prefix}{prefix}", len(self._prefix)

        def found() -> list[Entry]:
            objects = self._world.objects
            return [Entry(key[cut:], len(objects[key][0])) for key in objects if key.startswith(whole)]

        return self._ask("list", whole, found)

    def _folders(self, prefix: str) -> Sequence[str]:
        whole = f"{self._prefix}{prefix}"

        def found() -> list[str]:
            rests = (key.removeprefix(whole) for key in self._world.objects if key.startswith(whole))
            return list({rest.partition("/")[0] for rest in rests if "/" in rest})

        return self._ask("folders", whole, found)

    def _delete(self, key: str) -> None:
        whole = f"{self._prefix}{key}"
        self._ask("delete", whole, lambda: self._world.objects.pop(whole, True))


def _identity_of(process: Process) -> ProcessIdentity:
    return ProcessIdentity(
        host=process.host, pid=process.pid, boot_id=f"boot-of-{process.host}", pid_namespace="pid:[1]", start_ticks=7
    )


def _kill(pid: int, number: int) -> None:
    if all(process.pid != pid or process.is_dead for process in world().processes):
        raise ProcessLookupError


@contextmanager
def simulated() -> Iterator[None]:
    """Has the modules of the job use simulated threads, clocks and ids until the context ends."""
    with patch.multiple(lease, os=SimpleNamespace(kill=_kill), _stat=lambda pid: [b"S", *[b"7"] * 20]):
        patches = []
        for name, module in sorted(sys.modules.items()):
            if not name.startswith(_ROOMS):
                continue
            for attribute, value in list(vars(module).items()):
                if attribute == "Progress":
                    patches.append(patch.object(module, attribute, lambda *_, **__: _NO_PROGRESS))
                for real, ours in _REPLACED:
                    if value is real:
                        patches.append(patch.object(module, attribute, ours))
        patches += [patch(name, value) for name, value in TIMES.items()]
        # Pure functions, whose results repeat from world to world.
        patches.append(patch.object(sealed, "_bytes", lambda document: _indented(json.dumps(document))))
        patches.append(patch.object(Sealed, "from_json", classmethod(_parsed)))
        # TensorBoard's events go through a local file, which takes time; no protocol needs them.
        patches.append(patch.object(metric_rows, "_file_of", lambda events: b"events"))
        patches.append(patch.object(ProcessIdentity, "of_this_process", lambda: _identity_of(world().process)))
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in reversed(patches):
                each.stop()


assert lease.WATCH_SECONDS <= TIMES["job.coordination.lease.WATCH_SECONDS"] < lease.EXPIRE_SECONDS / 4
