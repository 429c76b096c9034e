"""Being stopped: one flag that every phase polls, and that all processes of a run agree on.

It is set by a signal, by the notice that Compute Engine gives a VM before it takes it away, and by a deadline.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from job.exits import BadRequestError, Exit
from job.processes.group import rendezvous_seconds
from job.processes.heartbeat import beat
from job.processes.launcher import handle_stop_signals, ignore_stop_signals

if TYPE_CHECKING:
    import torch
    from torch.distributed import Work

STOP_AT = "DDPM_STOP_AT"
"""The deadline in seconds of CLOCK_BOOTTIME, which all processes of a machine share and which counts a suspension."""

_DURATION = re.compile(
    r"(?:(?P<d>[0-9]{1,9})d)?(?:(?P<h>[0-9]{1,9})h)?(?:(?P<m>[0-9]{1,9})m)?(?:(?P<s>[0-9]{1,9})s?)?", re.IGNORECASE
)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_NO_ETAG = "0"
"""Asks for a value as it is (cloud.google.com/compute/docs/metadata/querying-metadata)."""
_POLL_SECONDS = 60
_ALONE_SECONDS = 0.5
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 5.0
"""Between two attempts to reach the metadata server: a notice comes 30 s, or even 15, before the end."""


def duration_seconds(text: str, option: str) -> int:
    """`"90m"`, `"1h30m"`, `"2d"`, `"45s"` or a number of seconds, in seconds.

    Raises:
        BadRequestError: it is none of these, or zero.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = sum(_UNITS[unit] * int(count or 0) for unit, count in match.groupdict().items()) if match else 0
    if not seconds:
        raise BadRequestError(f"{option} {text!r}: use a duration such as 90m, 1h30m or 3600 (seconds)")
    return seconds


@contextmanager
def deadline(stop_after: str) -> Iterator[None]:
    """Sets the flags that are installed within, here and in child processes, `stop_after` from now; empty means never.

    A deadline that is set already stays: the launcher counts from its own start, and its ranks take over what it says.

    Raises:
        BadRequestError: `stop_after` is no duration.
    """
    seconds = duration_seconds(stop_after, "--stop-after") if stop_after else 0
    if not seconds or STOP_AT in os.environ:
        yield
        return
    os.environ[STOP_AT] = str(_now() + seconds)
    try:
        yield
    finally:
        del os.environ[STOP_AT]


class StopFlag:
    """Calling it says whether to stop; `reason` says why. A poll in the main thread is also a heartbeat.

    A second signal changes nothing: a signal to a process group reaches a process twice, directly and from its
    launcher, and must not cut the save short.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._leaves_at_once = False
        self._stop_at = float("inf")
        self._main_thread = threading.get_ident()
        self._installed = self._takes_signals = False

    def install(self, *, signals: bool = True) -> StopFlag:
        """Takes over this process's signals (main thread only), the deadline, and on Compute Engine its notices.

        Without `signals` these end the process as they did before; a later call may take them over. Otherwise a second
        call changes nothing.
        """
        if signals and not self._takes_signals:
            self._takes_signals = True
            handle_stop_signals(self._handle)
            # On its way out the interpreter restores the default actions: a second signal would change the exit code.
            atexit.register(ignore_stop_signals)
        if self._installed:
            return self
        self._installed = True
        self._stop_at = float(os.environ.get(STOP_AT, "inf"))
        if host := _metadata_host():
            for resource, value, counts_at_once in _NOTICES:
                arguments = (host, resource, value, counts_at_once)
                threading.Thread(target=self._watch, args=arguments, name=resource, daemon=True).start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._set(signal.Signals(number).name)

    def _set(self, reason: str) -> None:
        self.reason = self.reason or reason
        if self._leaves_at_once:
            self._leave()

    def _leave(self) -> NoReturn:
        os.write(2, f"ddpm: stopped by {self.reason} before it began; the same command begins again\n".encode())
        os._exit(int(Exit.STOPPED))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process waits for others to begin, who may never come, being stopped ends it: nothing is to save.

        It takes signals afterwards. Waiting for others is no hang, though nothing polls, until they would have come.
        """
        have_met, began = threading.Event(), time.monotonic()
        patience_seconds = rendezvous_seconds() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0

        def stand_in() -> None:
            while not have_met.wait(_ALONE_SECONDS):
                if time.monotonic() - began < patience_seconds:
                    beat()
                if self():
                    self._leave()

        self._leaves_at_once = True
        threading.Thread(target=stand_in, name="until-all-have-met", daemon=True).start()
        try:
            yield
        finally:
            self._leaves_at_once = False
            have_met.set()
        self.install()

    def _watch(self, host: str, resource: str, value: str, counts_at_once: bool) -> None:
        """Waits for a metadata value, through all errors of the server; a daemon thread, which no exit waits for."""
        found, etag, pause_seconds = value if not counts_at_once else "", _NO_ETAG, _PAUSE_SECONDS
        while not self.reason:
            try:
                before, (found, etag) = found, _changed_metadata(host, resource, etag)
            except OSError:
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            else:
                if found == value != before:
                    self._set(f"the machine's notice {resource}={value}")
                pause_seconds = _PAUSE_SECONDS
            # Also after an answer: a server that does not know how to wait must not be asked without end.
            time.sleep(pause_seconds)

    def __call__(self) -> bool:
        """Whether anything has asked this process to stop; costs a microsecond."""
        # In other threads a poll may go on for ever while the work hangs.
        if threading.get_ident() == self._main_thread:
            beat()
        if not self.reason and self._stop_at < float("inf") and _now() >= self._stop_at:
            self._set("its deadline (--stop-after)")
        return bool(self.reason)


class Agreement:
    """Flags that hold once any process raised them, agreed without waiting.

    Each step starts an exchange and reads the one before, so the answer is one step late and the same everywhere.
    """

    def __init__(self, world_size: int, flags: int) -> None:
        self._world_size = world_size
        self._flags = flags
        self._pending: tuple[Work, torch.Tensor] | None = None
        if world_size > 1:
            import torch.distributed as dist

            # NCCL would need a device tensor, and reading it would wait for the device.
            self._group = dist.new_group(backend="gloo")

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Offers this step's flags and returns those that any process offered in the step before.

        With one process the answer is immediate.
        """
        if self._world_size == 1:
            return flags
        import torch
        import torch.distributed as dist

        agreed = self.finish()
        offered = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(offered, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, offered)
        return agreed

    def finish(self) -> tuple[bool, ...]:
        """Waits for the exchange under way, if there is one, and returns its flags."""
        if self._pending is None:
            return (False,) * self._flags
        work, offered = self._pending
        work.wait()
        self._pending = None
        return tuple(bool(flag) for flag in offered.tolist())


_NOTICES = (
    ("instance/preempted", "TRUE", True),
    # It comes up to an hour ahead: an attempt that begins on the machine meanwhile has to make use of it.
    ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", False),
)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _metadata_host() -> str:
    """The metadata server, if this is a machine of Compute Engine or the environment names one."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with suppress(OSError):
        if _PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return ""


def _changed_metadata(host: str, resource: str, etag: str) -> tuple[str, str]:
    """A value and its etag, as soon as that is another one than `etag`, or after a minute.

    Raises:
        OSError: the server did not answer, or with something else.
    """
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import quote

    path = f"/computeMetadata/v1/{resource}?wait_for_change=true&last_etag={quote(etag)}&timeout_sec={_POLL_SECONDS}"
    try:
        with closing(HTTPConnection(host, timeout=_POLL_SECONDS + 15)) as connection:
            connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"{host} answered {response.status}")
            return response.read(1024).decode(errors="replace").strip(), response.headers.get("ETag", _NO_ETAG)
    except (HTTPException, ValueError) as error:
        raise OSError(f"{host}: {error}") from error
