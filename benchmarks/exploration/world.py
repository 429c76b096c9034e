"""A deterministic world: processes whose threads are greenlets, a clock that only moves when all wait, and a bucket.

Exactly one thread runs. It goes on until it waits; another one runs earlier only where the schedule says so. Requests
to the bucket are numbered, and a schedule is a list of disturbances at some of these numbers. So a schedule with the
same disturbances takes the same course, always.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

from job.exits import BucketAwayError
from job.stop import Stop

SILENCE_SECONDS = 7.5
"""A client gives up a request without an answer after this time, as `job.store.retry` says."""
MOST_REQUESTS = 4_000
MOST_SECONDS = 4_000.0
DISTURBANCE = re.compile(r"(\d+)([sczlewtakoZC])(\d*)")


class Killed(BaseException):
    """Ends a thread of a process that was killed; no code of the job catches it for long."""


class Violation(Exception):  # noqa: N818 - the field's name for what an exploration finds
    """An invariant does not hold; the message says which, and where."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """The disturbance of a numbered request: a letter of `DISTURBANCES`, and its seconds or its variant."""

    kind: str
    amount: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.amount or ''}"


DISTURBANCES = {
    "s": "another thread runs first",
    "w": "the request takes this many seconds",
    "z": "the process is suspended for this many seconds before it",
    "Z": "its machine sleeps for this many seconds before it: its own clock stands still, too",
    "a": "the process is suspended for this many seconds after it, before the answer arrives",
    "c": "the process is killed before it",
    "C": "the process is killed after it",
    "e": "the bucket refuses it; nothing is changed",
    "l": "it takes effect, and its answer is lost",
    "t": "its answer is lost, and it takes effect this many seconds after it was sent",
    "o": "the bucket is away from this process for this many seconds",
    "k": "the process gets a stop request before it",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request to the bucket: `op` is fetch, open, list, folders, create, replace, put or delete."""

    process: Process
    thread: str
    op: str
    key: str
    data: bytes = b""

    @property
    def writes(self) -> bool:
        """Whether it changes the bucket."""
        return self.op in ("create", "replace", "put", "delete")


Chooser = Callable[[int, Request], Disturbance | None]
"""Returns the disturbance of a numbered request, None for none."""


@dataclass(slots=True)
class Step:
    """A line of the table of a schedule."""

    number: int
    now: float
    who: str
    op: str
    key: str
    outcome: str


@dataclass(eq=False)
class Process:
    """A simulated process: its threads share a stop request, a clock and a fate."""

    name: str
    host: str
    pid: int
    stop: Stop = field(default_factory=lambda: Stop(30.0))
    is_dead: bool = False
    frozen_until: float = 0.0
    frozen_seconds: float = 0.0
    """The time for which it was suspended in all."""
    unknown_seconds: float = 0.0
    """The part between the last renewal of its lease and the answer to that."""
    slept_seconds: float = 0.0
    """The part of that for which its machine slept."""
    away_until: float = 0.0
    threads: list[Thread] = field(default_factory=list)
    ended: Callable[[Process], None] = lambda _: None
    error: BaseException | None = None
    """The error of its main thread."""
    thread_error: BaseException | None = None
    """The error of another thread, which would go unseen."""
    result: Any = None
    was_killed: bool = False


class Thread:
    """A thread of a simulated process."""

    def __init__(self, process: Process, name: str, work: Callable[[], object], turn: int, hub: greenlet) -> None:
        self.process, self.name, self.turn = process, name, turn
        self.ready: Callable[[], bool] | None = _always
        self.deadline = float("inf")
        self.is_done = False
        self._work = work
        self.greenlet = greenlet(self._run, hub)

    def _run(self) -> None:
        try:
            self._work()
        except Killed:
            pass
        except Exception as error:
            self.process.thread_error = error
        finally:
            self.is_done = True


def _always() -> bool:
    return True


class Threads:
    """Runs the threads of simulated processes, one at a time, until all have ended.

    Attributes:
        now: seconds since the beginning.
        processes: all that ever were, in order.
        current: the thread that runs; None between two.
    """

    def __init__(self) -> None:
        self.now, self.processes = 0.0, list[Process]()
        self.current: Thread | None = None
        self.violation: Violation | None = None
        self._hub = getcurrent()
        self._turns, self._pids = itertools.count(), itertools.count(100)
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._to_kill: Process | None = None

    def spawn(
        self, name: str, host: str, main: Callable[[Process], Any], ended: Callable[[Process], None] | None = None
    ) -> Process:
        """Starts a process; `ended` is called when it has ended, however it did."""
        process = Process(name, host, next(self._pids))
        process.ended = ended or process.ended
        self.processes.append(process)

        def work() -> None:
            try:
                process.result = main(process)
            except Exception as error:
                process.error = error

        self.start(work, "main", process)
        return process

    def start(self, work: Callable[[], object], name: str, process: Process | None = None) -> Thread:
        """Starts a thread, of the calling process by default."""
        process = process or self.process
        if process.is_dead:
            raise Killed
        thread = Thread(process, name, work, next(self._turns), self._hub)
        process.threads.append(thread)
        return thread

    @property
    def process(self) -> Process:
        """The process that runs."""
        assert self.current is not None
        return self.current.process

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Has `event` called so many seconds from now."""
        heapq.heappush(self._later, (self.now + seconds, next(self._turns), event))

    def wait(self, ready: Callable[[], bool] | None, deadline: float = float("inf"), *, first: bool = False) -> None:
        """Lets others run until `ready` returns true, or the time has come; then it is last in line, or first."""
        thread = self.current
        assert thread is not None
        if thread.process.is_dead:
            raise Killed
        thread.ready, thread.deadline, thread.turn = ready, deadline, next(self._turns)
        if first:
            thread.turn = -thread.turn
        self._hub.switch()

    def sleep(self, seconds: float) -> None:
        """Lets others run for so many seconds."""
        self.wait(None, self.now + seconds)

    def run(self) -> None:
        """Runs until no process is left.

        Raises:
            Violation: an invariant does not hold, or the processes wait for each other.
        """
        self._hub = getcurrent()
        while self.violation is None:
            thread = self._next_thread()
            if thread is None:
                return
            self.current = thread
            thread.greenlet.switch()
            self.current = None
            if self._to_kill is not None:
                process, self._to_kill = self._to_kill, None
                process.was_killed = True
                self._end(process)
            elif thread.is_done and thread is thread.process.threads[0]:
                self._end(thread.process)
        raise self.violation

    def end(self) -> None:
        """Ends all threads that are left, so that none leaks into another world."""
        for process in self.processes:
            process.ended = lambda _: None
            self._end(process)

    def _end(self, process: Process) -> None:
        if process.is_dead:
            return
        process.is_dead = True
        before = self.current
        for thread in list(process.threads):
            self.current = thread
            for _ in range(20):
                if thread.greenlet.dead or not thread.greenlet:
                    break
                thread.greenlet.throw(Killed())
        self.current = before
        process.threads.clear()
        self._check(lambda: process.ended(process))

    def _next_thread(self) -> Thread | None:
        while True:
            found, soonest, is_any = None, float("inf"), False
            for process in self.processes:
                if process.is_dead:
                    continue
                is_frozen = process.frozen_until > self.now
                if is_frozen:
                    is_any, soonest = True, min(soonest, process.frozen_until)
                    continue
                for thread in process.threads:
                    if thread.is_done:
                        continue
                    is_any = True
                    if thread.deadline <= self.now or (thread.ready is not None and thread.ready()):
                        if found is None or thread.turn < found.turn:
                            found = thread
                    else:
                        soonest = min(soonest, thread.deadline)
            if found is not None:
                found.ready, found.deadline = _always, float("inf")
                return found
            if self._later:
                soonest = min(soonest, self._later[0][0])
            elif not is_any:
                return None
            if soonest == float("inf"):
                raise Violation("deadlock: every thread waits for another")
            if soonest > MOST_SECONDS:
                raise Violation(f"no end after {MOST_SECONDS:,.0f} s")
            self.now = max(self.now, soonest)
            while self._later and self._later[0][0] <= self.now:
                heapq.heappop(self._later)[2]()
                if self.violation:
                    raise self.violation

    def _check(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Violation as violation:
            self._fail(violation)

    def _fail(self, violation: Violation) -> None:
        """Ends the schedule: the thread that runs never goes on."""
        self.violation = self.violation or violation
        if getcurrent() is not self._hub:
            self._hub.switch()


class World(Threads):
    """Threads and a bucket, whose every request is numbered, disturbed as the schedule says, recorded and checked.

    Attributes:
        objects: the bucket: content and version by key.
        trace: the requests so far, in order.
        observe: called after each change of the bucket with the request and the content before it.
        asked: called before each request.
        content_versions: whether versions are hashes of the content.
    """

    def __init__(self, choose: Chooser, *, content_versions: bool = False) -> None:
        super().__init__()
        self.objects, self.trace, self.requests = dict[str, tuple[bytes, str]](), list[Step](), 0
        self.observe: Callable[[Request, bytes | None], None] = lambda request, before: None
        self.asked: Callable[[Request], None] = lambda request: None
        self.content_versions = content_versions
        self._choose, self._numbers = choose, itertools.count(1)

    def next_number(self) -> int:
        """Returns a number that was never returned before, for ids and versions."""
        return next(self._numbers)

    def request(self, request: Request, effect: Callable[[], Any]) -> Any:
        """Does a request to the bucket: `effect`, disturbed as the schedule says."""
        process = request.process
        if process.is_dead:
            raise Killed
        number, self.requests = self.requests, self.requests + 1
        if number >= MOST_REQUESTS:
            self._fail(Violation(f"no end after {MOST_REQUESTS:,} requests"))
        if process.away_until > self.now:
            self.sleep(1.0)
            self._record(number, request, "the bucket is away")
            raise BucketAwayError(f"sim: {request.key} is away")
        self._check(lambda: self.asked(request))
        disturbance = self._choose(number, request)
        if disturbance is None:
            return self._done(number, request, effect)
        return self._disturbed(number, request, effect, disturbance)

    def calm(self) -> None:
        """Ends all disturbances."""
        self._choose = lambda number, request: None

    def _disturbed(self, number: int, request: Request, effect: Callable[[], Any], disturbance: Disturbance) -> Any:
        process, seconds = request.process, float(disturbance.amount)
        match disturbance.kind:
            case "s":
                self._record(number, request, "waits: another thread runs first")
                for _ in range(disturbance.amount + 1):
                    self.wait(_always)
            case "w":
                self._record(number, request, f"sent, and takes {seconds:g} s")
                self.sleep(seconds)
            case "z" | "Z":
                self._record(number, request, f"suspended for {seconds:g} s before it")
                self._freeze(process, seconds, is_asleep=disturbance.kind == "Z")
            case "c":
                self._record(number, request, "killed before it")
                self._die(process)
            case "k":
                process.stop.request("SIGTERM")
            case "e":
                self._record(number, request, "refused, nothing changed")
                raise BucketAwayError(f"sim: {request.key} was refused")
            case "o":
                self._record(number, request, f"the bucket is away for {seconds:g} s")
                process.away_until = self.now + seconds
                raise BucketAwayError(f"sim: {request.key} is away")
            case "t":
                self._record(number, request, f"no answer; takes effect {seconds:g} s later")
                self.at(seconds, lambda: self._late(number, request, effect))
                self.sleep(SILENCE_SECONDS)
                raise BucketAwayError(f"sim: no answer about {request.key}")
        try:
            result = self._done(number, request, effect)
        finally:
            if disturbance.kind == "C":
                self.trace[-1].outcome += ", killed after it"
                self._die(process)
        if disturbance.kind == "a":
            self.trace[-1].outcome += f", suspended for {seconds:g} s after it"
            if request.key.endswith("lease.json"):
                process.unknown_seconds += seconds
            self._freeze(process, seconds)
        elif disturbance.kind == "l":
            self.trace[-1].outcome += ", answer lost"
            self.sleep(SILENCE_SECONDS)
            raise BucketAwayError(f"sim: no answer about {request.key}")
        return result

    def _freeze(self, process: Process, seconds: float, *, is_asleep: bool = False) -> None:
        process.frozen_until = self.now + seconds
        process.frozen_seconds += seconds
        if is_asleep:
            process.slept_seconds += seconds
            for thread in process.threads:
                thread.deadline += seconds
        # It goes on before the other threads of its process, of which one could tell that it was replaced meanwhile.
        self.wait(_always, first=True)

    def _die(self, process: Process) -> None:
        self._to_kill = process
        self._hub.switch()

    def _late(self, number: int, request: Request, effect: Callable[[], Any]) -> None:
        try:
            self._done(number, request, effect)
        except Exception as error:
            self.trace[-1].outcome = f"late: {type(error).__name__}"
        else:
            self.trace[-1].outcome = f"late: {self.trace[-1].outcome}"

    def _done(self, number: int, request: Request, effect: Callable[[], Any]) -> Any:
        entry = self.objects.get(request.key)
        try:
            result = effect()
        except Exception as error:
            self._record(number, request, type(error).__name__.removesuffix("Error"))
            raise
        self._record(number, request, "conflict" if request.writes and result is None else "done")
        if request.writes and result is not None:
            self._check(lambda: self.observe(request, entry[0] if entry else None))
        return result

    def _record(self, number: int, request: Request, outcome: str) -> None:
        who = f"{request.process.name}/{request.thread}"
        self.trace.append(Step(number, self.now, who, request.op, request.key, outcome))


class Planned:
    """A schedule that is known beforehand: disturbances by number of the request."""

    def __init__(self, disturbances: Mapping[int, Disturbance]) -> None:
        self.disturbances = dict(disturbances)

    def __call__(self, number: int, request: Request) -> Disturbance | None:
        """Returns the disturbance of a request."""
        return self.disturbances.get(number)

    def __str__(self) -> str:
        return ",".join(f"{number}{self.disturbances[number]}" for number in sorted(self.disturbances))

    @classmethod
    def parse(cls, text: str) -> Planned:
        """Parses the inverse of `str`.

        Raises:
            ValueError: the text is not a schedule.
        """
        found = dict[int, Disturbance]()
        for word in filter(None, text.split(",")):
            match = DISTURBANCE.fullmatch(word)
            if match is None:
                raise ValueError(f"{word!r} is not a disturbance, such as 17c or 40z25")
            found[int(match[1])] = Disturbance(match[2], int(match[3] or 0))
        return cls(found)
