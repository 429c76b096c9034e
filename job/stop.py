"""Stop requests: one object with whether, why, and the time left; and the heartbeats of processes that work.

The command makes the object, `install` connects it with signals and the deadline, `preemption_watched` with the
machine's notice, and functions get it as `stop`. `in_order` waits for work in threads, and checks for a stop meanwhile.
"""

from __future__ import annotations

import atexit
import mmap
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

from job.exits import BadRequestError, Exit, StoppedError
from job.platform import boot_clock, shared_memory

STOP_AT = "DDPM_STOP_AT"
"""The deadline in seconds of `boot_clock`, which all processes of a machine share and which counts a suspension."""
GRACE_VARIABLE = "DDPM_GRACE_SECONDS"
SPOT_GRACE_SECONDS = 30.0
"""The notice of a spot VM. A GKE spot node gives 15 by default; the variable has the value of its pool."""
MARGIN_SECONDS = 3.0
"""The time to notice the signal and to end the process."""
HEARTBEATS = "DDPM_HEARTBEATS"
"""`DESCRIPTOR:RANK` of the memory that this process shares with its launcher, and its place in it."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_POLL_SECONDS = 0.05
"""How often a waiting thread checks for a stop."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", re.IGNORECASE | re.ASCII)
_UNIT_SECONDS = (86400, 3600, 60, 1)
_SLICE_SECONDS = 0.1
_LONGEST_LOOK_SECONDS = 3.0
_MEETING_SLICE_SECONDS = 0.5
_NOTICE = "instance/preempted"
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_NO_ETAG = "0"
"""Requests the present value (cloud.google.com/compute/docs/metadata/querying-metadata)."""
_NOTICE_HOLD_SECONDS = 60
_NOTICE_PAUSE_SECONDS = 1.0
"""Between two requests to the metadata server: a notice comes 30 s, or only 15, before the end."""


class StopSignal(SystemExit):
    """Ends a process at a signal. A `SystemExit` of any other kind may come from the user's code."""


class Stop:
    """A stop request: a call returns whether to stop. One per process, passed down as `stop`, never wrapped.

    A second request changes nothing: a signal to a process group reaches a process twice, directly and from its
    launcher, and must not interrupt the save.

    Attributes:
        reason: the reason, for people; empty until a request comes.
        grace_seconds: the time from the first request to the end of the machine.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        """Begins without a request; the default of `grace_seconds` is `DDPM_GRACE_SECONDS`, else that of a spot VM."""
        self.reason = ""
        if grace_seconds is None:
            which = "between a preemption notice and the end"
            grace_seconds = seconds_of(GRACE_VARIABLE, SPOT_GRACE_SECONDS, which, least=1.0)
        self.grace_seconds = grace_seconds
        self._asked_at = self._deadline = float("inf")
        self._is_installed = False
        self._ends_at_once = ""

    def install(self, *, signals: bool = True) -> Stop:
        """Connects the signals of this process (main thread only) and its deadline, and returns itself.

        Without `signals` a signal still ends the process, until `waiting` is over.
        """
        self._is_installed = True
        if os.environ.get(STOP_AT):
            self._deadline = seconds_of(STOP_AT, 0.0, "of this machine's clock at which to stop")
        if signals:
            handle_stop_signals(self._on_signal)
            # At exit the interpreter restores the default actions: a second signal would change the exit code.
            atexit.register(ignore_stop_signals)
        return self

    def __call__(self) -> bool:
        """Returns whether to stop, in a microsecond. A call in the main thread is a heartbeat: see `beat`."""
        # A loop in another thread may go on for ever while the work hangs.
        if threading.current_thread() is threading.main_thread():
            beat()
        if not self.reason and self._deadline < float("inf") and boot_clock() >= self._deadline:
            self.request("its deadline (--stop-after)")
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Asks this process to stop, for a signal, a preemption notice or another process. The first request counts."""
        if not self.reason:
            self._asked_at, self.reason = time.monotonic(), reason

    def check(self, what: str, then: str = "the same command goes on") -> None:
        """Raises if this process has a stop request.

        Args:
            what: continues the message "stopped by SIGTERM", such as "while packing".
            then: the state of the work, and how to continue.

        Raises:
            StoppedError: a stop was requested.
        """
        if self():
            raise StoppedError(f"stopped by {self.reason} {what}; {then}")

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Ends work that has nothing to save at a signal, in any of its lines, with the error of `check`.

        For work of the main thread that waits for libraries, or computes in loops that do not ask.
        """
        if threading.current_thread() is threading.main_thread():
            self._ends_at_once = what
        try:
            yield
        except Exception as error:
            # A library may have replaced the error by its own.
            if not isinstance(error, StoppedError):
                self.check(what, "the same command begins again")
            raise
        finally:
            self._ends_at_once = ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        what, self._ends_at_once = self._ends_at_once, ""
        if what:
            self.check(what, "the same command begins again")

    def sleep(self, seconds: float) -> bool:
        """Sleeps until the time is over or a stop is requested; returns whether it is requested.

        Sends heartbeats in any thread. So use it only for waits with a limit, such as for a bucket that is away.
        """
        until = time.monotonic() + seconds
        while not self() and (left := until - time.monotonic()) > 0:
            beat()
            time.sleep(min(_SLICE_SECONDS, left))
        return bool(self.reason)

    def seconds_left(self) -> float:
        """Returns the seconds until the machine is gone; infinite without a request."""
        return max(0.0, self._asked_at + self.grace_seconds - time.monotonic())

    def seconds_left_to_save(self) -> float:
        """Returns `seconds_left` minus the time for an orderly end of the process."""
        return max(0.0, self.seconds_left() - min(MARGIN_SECONDS, self.grace_seconds / 2))

    @contextmanager
    def waiting(self, patience_seconds: float) -> Iterator[None]:
        """Ends this process at a stop request while it waits for other processes to begin: it has nothing to save yet.

        The wait counts as no hang for `patience_seconds`, although the main thread sends no heartbeats. Afterwards
        signals are connected, if `install` was called before.
        """
        if not self._is_installed:
            yield
            return
        have_met, began = threading.Event(), time.monotonic()

        def stand_in() -> None:
            while not have_met.wait(_MEETING_SLICE_SECONDS):
                if time.monotonic() - began < patience_seconds:
                    beat()
                if self():
                    said = f"ddpm: stopped by {self.reason} before it began; the same command begins again\n"
                    os.write(2, said.encode())
                    os._exit(int(Exit.STOPPED))

        threading.Thread(target=stand_in, name="until-all-have-met", daemon=True).start()
        try:
            yield
        finally:
            have_met.set()
        self.install()


def seconds_of(variable: str, default: float, which: str, least: float = 0.0) -> float:
    """Returns the seconds in an environment variable, or `default`; `which` describes them in the error message.

    Raises:
        BadRequestError: the value is not a finite number of at least `least`.
    """
    text = os.environ.get(variable) or str(default)
    with suppress(ValueError):
        if least <= float(text) < float("inf"):
            return float(text)
    raise BadRequestError(f"{variable}={text[:100]!r}: give the seconds {which}, such as {default:g}")


def count_of(variable: str, default: int, least: int = 0, most: int = 1_000_000) -> int:
    """Returns the whole number in an environment variable, or `default`, such as those that launchers set.

    Raises:
        BadRequestError: the value is not a whole number from `least` to `most`.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise BadRequestError(f"{variable}={text[:100]!r}: unset it, or give a number from {least} to {most:,}")


NEVER = Stop(SPOT_GRACE_SECONDS)
"""A stop that gets no request; the default of library functions."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Connects `handler` with the signals that ask this process to stop (main thread only)."""
    for number in STOP_SIGNALS:
        # nohup sets SIGHUP to be ignored: a hang-up must not stop that job.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Ignores stop signals, so that none replaces the exit code of a process that ends (main thread only)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def duration_seconds(text: str) -> int:
    """Parses the value of `--stop-after`: `"90m"`, `"1h30m"`, `"2d"`, `"45s"` or a number of seconds into seconds.

    Raises:
        BadRequestError: the text is another one, or the duration is zero.
    """
    match = _DURATION.fullmatch(text.strip())
    counts = match.groups("0") if match else ()
    seconds = sum(int(count) * unit for count, unit in zip(counts, _UNIT_SECONDS, strict=False))
    if not seconds:
        raise BadRequestError(f"--stop-after {text!r}: use a duration such as 90m, 1h30m or 3600 (seconds)")
    return seconds


@contextmanager
def deadline(stop_after: str) -> Iterator[None]:
    """Sets the deadline of this process and its children to `stop_after` from now; empty means no deadline.

    An existing deadline stays: the launcher counts from its own start, and its ranks inherit the deadline.

    Raises:
        BadRequestError: `stop_after` is not a duration.
    """
    seconds = duration_seconds(stop_after) if stop_after else 0
    if not seconds or os.environ.get(STOP_AT):
        yield
        return
    os.environ[STOP_AT] = str(boot_clock() + seconds)
    try:
        yield
    finally:
        del os.environ[STOP_AT]


@contextmanager
def preemption_watched(stop: Stop) -> Iterator[None]:
    """Lets Compute Engine's preemption notice request `stop`, in a daemon thread; does nothing on other machines."""
    ended = threading.Event()
    if host := _metadata_host():
        threading.Thread(target=_watch_notice, args=(stop, host, ended), name=_NOTICE, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _metadata_host() -> str:
    """Returns the metadata server of Compute Engine, or the one that the environment names; empty elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with suppress(OSError):
        if _PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return ""


def _watch_notice(stop: Stop, host: str, ended: threading.Event) -> None:
    """Waits for the notice; errors of the server do not end the wait."""
    from http.client import HTTPException
    from urllib.parse import quote
    from urllib.request import ProxyHandler, Request, build_opener

    # A proxy would return the notice of its own machine.
    direct, etag = build_opener(ProxyHandler({})), _NO_ETAG
    while not stop():
        query = f"wait_for_change=true&last_etag={quote(etag)}&timeout_sec={_NOTICE_HOLD_SECONDS}"
        url = f"http://{host}/computeMetadata/v1/{_NOTICE}?{query}"
        with suppress(OSError, HTTPException, ValueError):
            # The answer comes when the value has another etag, or after a minute.
            asked = Request(url, headers={"Metadata-Flavor": "Google"})
            with direct.open(asked, timeout=_NOTICE_HOLD_SECONDS + 15) as answer:
                found, etag = answer.read(1024).strip(), answer.headers.get("ETag", _NO_ETAG)
            if found == b"TRUE":
                stop.request(f"the machine's notice {_NOTICE}=TRUE")
        # Also after an answer: a server that does not wait must not get requests without end.
        if ended.wait(_NOTICE_PAUSE_SECONDS):
            return


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    window: int,
    check: Callable[[], object] = bool,
) -> Iterator[Result]:
    """Yields `function` of each item in order, like `pool.map`, but takes only `window` items ahead, to limit memory.

    Args:
        pool: the threads that call `function`.
        function: the work.
        items: taken one by one.
        window: number of items ahead.
        check: called for each result and during the wait for it; raises if this process has to stop.
    """
    waiting: deque[Future[Result]] = deque()
    failed: list[int] = []

    def work(number: int, item: Item) -> Result:
        # After an error no later item is started, which would only wait as long for the same outage.
        if min(failed, default=number) < number:
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            failed.append(number)
            raise

    def first() -> Result:
        future = waiting.popleft()
        check()
        while not wait([future], timeout=STOP_POLL_SECONDS).done:
            check()
        return future.result()

    try:
        for number, item in enumerate(items):
            waiting.append(pool.submit(work, number, item))
            if len(waiting) >= window:
                yield first()
        while waiting:
            yield first()
    finally:
        for future in waiting:
            future.cancel()


class Heartbeats:
    """The launcher's side of heartbeats: the time of each rank's last one, in shared memory.

    Silence counts from the start, so that the launcher also finds a process that hangs before its first heartbeat.
    """

    def __init__(self, processes: int) -> None:
        # Ranks inherit the descriptor.
        self.descriptor = shared_memory(8 * processes)
        self._times = memoryview(mmap.mmap(self.descriptor, 0)).cast("d")
        self._counts_from = self._looked = time.monotonic()

    def silent_seconds(self) -> list[float]:
        """Returns the seconds since each rank's last heartbeat; call it about every second.

        The count starts anew if the launcher itself did not run: a suspended laptop, a migrated VM or Ctrl-Z stops all
        processes, and that is not a hang.
        """
        now = time.monotonic()
        if now - self._looked > _LONGEST_LOOK_SECONDS:
            self._counts_from = now
        self._looked = now
        return [now - max(beaten, self._counts_from) for beaten in self._times]


_own_beat: memoryview[float] | None = None
"""This process's place in the memory that it shares with its launcher."""


def beat() -> None:
    """Sends a heartbeat to the launcher; does nothing without one.

    It takes less than a microsecond and never waits. Call it in each round of a loop that does the work, and during
    waits that may take long, from any thread. Do not call it from a thread that does nothing else: it would go on while
    the work hangs.
    """
    if _own_beat is not None:
        _own_beat[0] = time.monotonic()


def connect_heartbeat() -> None:
    """Connects `beat` with the launcher of this process, if it has one."""
    global _own_beat
    if place := os.environ.pop(HEARTBEATS, ""):
        descriptor, rank = map(int, place.split(":"))
        _own_beat = memoryview(mmap.mmap(descriptor, 0)).cast("d")[rank:]
        os.close(descriptor)
        beat()
