"""One writer per run: a lease that its holder renews, and that others take once it is released, dead or silent.

    RUN/lease.json     the holder of the lease, its fence, and the number of renewals

The object is created once and from then on only replaced by compare-and-swap. An attempt that finds the lease held
watches it for changes by its own clock: the clocks of two machines are never compared. Fences only grow. A holder that
was stopped and replaced may wake in the middle of a write, but its fence is lower, so that its objects never win.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from job.coordination.sealed import Moment, Sealed, utc_now
from job.exits import BadDataError, BucketAwayError, JobError, LostRunError
from job.platform import boot_clock
from job.stop import Stop
from job.store import ConflictError, ObjectExistsError, ObjectMissingError, Store

LEASE_KEY = "lease.json"
MAX_FENCE = 10**6 - 1
"""The largest number of six digits, which a checkpoint's name has."""
RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 20.0
WATCH_SECONDS = 0.5
"""The interval at which a waiting attempt reads the lease and checks for a stop request."""
AGAIN_SECONDS = 1.0
"""The pause after a failed renewal. Google Cloud Storage takes about one write a second to one object."""
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 15.0
"""The limit of retries of a write: shorter than the expiry, after which it would come too late."""
_SWAPS = 5
_STATE, _START = 0, 19
"""Fields 3 and 22 of `/proc/PID/stat` (proc_pid_stat(5)), counted from the end of the process's name."""


class ProcessIdentity(BaseModel):
    """A process, as a later process of the same machine recognises it, which can so prove that it is dead.

    Without `/proc`, as on macOS, or with that of another PID namespace, `boot_id` and `pid_namespace` are empty, and
    the process always counts as alive: its lease expires.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int = Field(ge=1, lt=2**31)
    boot_id: str
    """A random number that the kernel draws when it starts."""
    pid_namespace: str
    """`pid:[INODE]`: in another namespace the same number means another process."""
    start_ticks: int = Field(ge=0)
    """The start of the process, in clock ticks since that of the machine: a process that reuses `pid` has another."""

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """Returns the identity of the calling process."""
        host, pid = socket.gethostname(), os.getpid()
        with suppress(OSError):
            # A container with its host's /proc would look up its own numbers among the host's.
            if Path("/proc/self").readlink() == Path(str(pid)):
                start_ticks = int(_stat(pid)[_START])
                namespace = str(Path("/proc/self/ns/pid").readlink())
                boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                return cls(host=host, pid=pid, boot_id=boot_id, pid_namespace=namespace, start_ticks=start_ticks)
        return cls(host=host, pid=pid, boot_id="", pid_namespace="", start_ticks=0)

    def certainly_dead(self) -> bool:
        """Returns whether this very process has ended; False if that cannot be known from here."""
        here = ProcessIdentity.of_this_process()
        # Clones of a virtual machine share their boot id, but seldom their host name.
        place = (self.host, self.boot_id, self.pid_namespace)
        if not self.boot_id or place != (here.host, here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)
            stat = _stat(self.pid)
        except ProcessLookupError:
            return True
        except OSError:
            # A process of another user, which /proc may hide, proves nothing.
            return False
        # A zombie, or dead.
        return stat[_STATE] in b"ZXx" or int(stat[_START]) != self.start_ticks


def _stat(pid: int) -> list[bytes]:
    """Returns the fields of `/proc/PID/stat` after the process's name, which may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


class LeaseRecord(Sealed):
    """The content of `lease.json`."""

    fence: int = Field(ge=1, le=MAX_FENCE)
    holder: str
    renewal: int = Field(ge=0)
    """Grows with every write, so that no two records are alike: by the content a store recognises its own write."""
    released: bool
    since: Moment
    """For people only; decides nothing."""
    process: ProcessIdentity

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host!r} since {self.since} (fence {self.fence})"


def load_lease(run: Store) -> LeaseRecord:
    """Returns the record of the run's lease, be it held or released.

    Raises:
        BadDataError: it is corrupt.
        ObjectMissingError: no attempt ever held the lease.
    """
    return LeaseRecord.load(run, LEASE_KEY)


def _read_lease(run: Store) -> tuple[LeaseRecord | None, str]:
    """Returns the record, None if it is missing or corrupt, and its version, empty if it is missing."""
    try:
        blob = run.read(LEASE_KEY)
    except ObjectMissingError:
        return None, ""
    with suppress(BadDataError):
        return LeaseRecord.from_json(blob.data, run.uri_of(LEASE_KEY)), blob.version
    return None, blob.version


def claim_version(folder: Store) -> str:
    """Returns the version of the lease in a folder, which changes with every renewal; empty if the folder has none."""
    return _read_lease(folder)[1]


def _write_lease(run: Store, record: LeaseRecord, version: str) -> str:
    """Writes a record and returns the new version; empty if the object has changed since `version`."""
    try:
        if version:
            return run.replace(LEASE_KEY, record.to_json(), version)
        return run.create(LEASE_KEY, record.to_json())
    except (ObjectExistsError, ConflictError):
        return ""


class _Watch:
    """The observation of a lease by an attempt that waits for it, by the attempt's clock.

    Unlike the holder's clock this one stands still while the machine sleeps: when a laptop wakes, a holder on the same
    laptop must have the time to renew.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self.record: LeaseRecord | None = None
        self.version = ""
        self.silent_seconds = self._changed_at = 0.0
        """The time for which it has certainly not changed."""
        self.is_renewed = False
        """Whether this holder has renewed it: one that has just won a race for the lease may be dead."""

    def look(self) -> None:
        asked = time.monotonic()
        record, version = _read_lease(self._run)
        if version != self.version:
            self.is_renewed = bool(record and self.record and record.holder == self.record.holder)
            self.record, self.version, self._changed_at = record, version, time.monotonic()
        elif time.monotonic() - asked > EXPIRE_SECONDS / 2:
            # While the bucket was away the holder could not renew: its time begins again.
            self._changed_at = time.monotonic()
        self.silent_seconds = max(0.0, asked - self._changed_at)

    def why_free(self) -> str:
        """Returns the reason why the lease may be taken; empty while it may not."""
        if not self.version:
            return "it was free"
        if self.record and self.record.released:
            return "it was released"
        if self.record and self.record.process.certainly_dead():
            return f"{self.record} is dead"
        if self.silent_seconds >= EXPIRE_SECONDS:
            return f"{self.who} was silent for {self.silent_seconds:.0f} s"
        return ""

    @property
    def who(self) -> str:
        return str(self.record) if self.record else f"a holder whose {LEASE_KEY} is damaged"


class Lease:
    """The right to write to a run, renewed by a thread until `close`.

    While the bucket is away the thread retries, and `confirm` raises; the run is lost only if the lease has another
    holder.

    Attributes:
        fence: higher than that of every holder before.
        holder: an id that only this holder has.
        lost: a message that names the attempt that took the run; empty until then.
    """

    def __init__(
        self, run: Store, record: LeaseRecord, version: str, asked_at: float, note: Callable[[str], None]
    ) -> None:
        """Starts to renew a lease that `take` requested at `asked_at`."""
        self.fence, self.holder = record.fence, record.holder
        self._run, self._record, self._version, self._note = run, record, version, note
        self._uri = run.uri_of(LEASE_KEY)
        self._confirmed_at, self.lost = asked_at, ""
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, run: Store, floor: int, wait_seconds: float, stop: Stop, note: Callable[[str], None]) -> Lease:
        """Takes the lease: at once if it is free or its holder certainly dead, else when the holder falls silent.

        Args:
            run: the run's folder.
            floor: the highest fence of attempts and checkpoints.
            wait_seconds: the time to wait for a living holder; 0 gives up at its first renewal.
            stop: ends the wait.
            note: receives messages for people, also from other threads.

        Raises:
            LostRunError: the holder lives; the message names it.
            BadDataError: an object has the last possible fence, or `lease.json` is not an object.
            StoppedError: a stop was requested.
            BucketAwayError: the lease cannot be read or written.
        """
        watch, began, noted = _Watch(run), time.monotonic(), ""
        while True:
            stop.check(f"before {run.uri} could be taken")
            watch.look()
            if why := watch.why_free():
                last = max(floor, watch.record.fence if watch.record else 0)
                if last >= MAX_FENCE:
                    where = f"an attempt or a checkpoint of {run.uri}" if last == floor else run.uri_of(LEASE_KEY)
                    raise BadDataError(
                        f"{where} has fence {last}, which no run reaches: delete it (`ddpm runs verify`)"
                    )
                record = LeaseRecord(
                    fence=last + 1,
                    holder=uuid.uuid4().hex,
                    renewal=0,
                    released=False,
                    since=utc_now(),
                    process=ProcessIdentity.of_this_process(),
                )
                asked_at = boot_clock()
                if version := _write_lease(run, record, watch.version):
                    if noted or (watch.record and not watch.record.released):
                        note(f"took {run.uri} over: {why}")
                    return cls(run.within(RETRY_SECONDS), record, version, asked_at, note)
                continue
            over = time.monotonic() - began >= wait_seconds
            # A holder that has just fallen silent is worth the wait: it either comes back or expires.
            if over and watch.is_renewed and watch.silent_seconds < 2 * RENEW_SECONDS:
                remedy = "stop it (a job: `ddpm jobs cancel`), or wait for it with `ddpm train --wait SECONDS`"
                raise LostRunError(f"{run.uri} is held by {watch.who}, which is alive: {remedy}")
            if noted != watch.who:
                noted = watch.who
                note(f"{run.uri} is held by {noted}: watching for up to {EXPIRE_SECONDS:g} s whether it is alive")
            stop.sleep(WATCH_SECONDS)

    def confirm(self) -> None:
        """Checks that this attempt certainly still has the lease; call it before every commit and every delete.

        It renews the lease, unless the last renewal is younger than `RENEW_SECONDS`.

        Raises:
            LostRunError: another attempt took the run.
            BucketAwayError: the bucket does not answer, or the lease was released; write nothing.
        """
        if self._closing.is_set():
            raise BucketAwayError(f"{self._uri} was released: nothing more is written")
        self._renew()

    def check_lost(self) -> None:
        """Raises if the run is known to be lost; cheap enough for every step.

        Raises:
            LostRunError: another attempt took the run.
        """
        if self.lost:
            raise LostRunError(self.lost)

    @contextmanager
    def unless_lost(self) -> Iterator[None]:
        """Has damage count only while this attempt has the lease: a successor deletes checkpoints that are being read.

        Raises:
            LostRunError: another attempt took the run.
        """
        try:
            yield
        except BadDataError:
            self.confirm()
            raise

    def close(self, timeout_seconds: float = float("inf")) -> None:
        """Releases the lease, if the bucket answers in that time or `CLOSE_SECONDS`; the fence stays in the record."""
        self._closing.set()
        self._thread.join(min(timeout_seconds, CLOSE_SECONDS))
        if self._thread.is_alive():
            self._note(f"{self._uri} could not be released in time: the next attempt waits until it expires")

    def _left_seconds(self) -> float:
        """Returns the time until the next renewal."""
        return self._confirmed_at + RENEW_SECONDS - boot_clock()

    def _work(self) -> None:
        is_failing = False
        while not self._closing.wait(AGAIN_SECONDS if is_failing else self._left_seconds()):
            try:
                self._renew()
                is_failing = False
            except LostRunError:
                return
            # After any other error the thread retries: if it ended, the lease would expire.
            except Exception as error:
                if not is_failing:
                    self._note(f"could not renew {self._uri}, and nothing is written until then: {error}")
                is_failing = True
        try:
            with self._lock:
                self._swap(released=True)
        except LostRunError:
            pass
        except JobError as error:
            self._note(f"could not release {self._uri}: {error}; the next attempt waits until it expires")

    def _renew(self) -> None:
        """Renews the lease, if it is due."""
        with self._lock:
            self.check_lost()
            if self._left_seconds() <= 0:
                self._swap(released=False)

    def _swap(self, released: bool) -> None:
        """Replaces this holder's last record by the next one, and no other record."""
        for _ in range(_SWAPS):
            self.check_lost()
            asked_at = boot_clock()
            update = {"renewal": self._record.renewal + 1, "released": released}
            self._record = self._record.model_copy(update=update)
            if version := _write_lease(self._run, self._record, self._version):
                self._version, self._confirmed_at = version, asked_at
                return
            # This holder's late write, or damage, can be replaced; another holder's record means that the run is lost.
            record, self._version = _read_lease(self._run)
            if record is None:
                self._note(f"{self._uri} was {'damaged' if self._version else 'deleted'}: writing it again")
            elif record.holder != self.holder:
                self.lost = f"{self._run.uri} was taken over by {record}: this attempt writes nothing more"
        self.check_lost()
        raise BucketAwayError(f"{self._uri} changes faster than it can be renewed: find out what else writes it")
