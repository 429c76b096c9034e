"""One writer per run: a lease that its holder renews, and that others take when it is given back, dead or silent.

    RUN/lease.json     who holds the run, under which fence, and how often it was renewed

The object is created once and from then on only replaced by compare-and-swap. Who finds it held watches, by its own
clock, whether it changes: the clocks of two machines are never compared. Fences only grow, so that a holder that was
stopped, replaced and woken in the middle of a write has a lower one and harms nobody.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from pydantic import Field

from job.exits import BadDataError, BucketAwayError, JobError, LostRunError
from job.processes.process_identity import ProcessIdentity
from job.runs.layout import MAX_FENCE, ObjectKind
from job.sealed import Moment, Sealed, utc_now
from job.stop import Stop
from job.store import ConflictError, ObjectExistsError, ObjectMissingError, Store

LEASE_KEY = ObjectKind.LEASE.value
RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 20.0
WATCH_SECONDS = 0.5
"""How often one who watches reads the lease, and asks whether to stop."""
AGAIN_SECONDS = 1.0
"""After a renewal that failed. Google Cloud Storage takes about one write a second to one object."""
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 15.0
"""How long a write is tried again: less than it takes to expire, after which it would come too late."""
_SWAPS = 5


class LeaseRecord(Sealed):
    """The content of `lease.json`."""

    fence: int = Field(ge=1, le=MAX_FENCE)
    holder: str
    renewal: int = Field(ge=0)
    """Goes up with every write, so that no two are alike: a store tells its own lost answers by the content."""
    released: bool
    since: Moment
    """For people only: nothing is decided by it."""
    process: ProcessIdentity

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host!r} since {self.since} (fence {self.fence})"


def load_lease(run: Store) -> LeaseRecord:
    """What the run's lease says, whether it is held or was given back.

    Raises:
        BadDataError: it is rotten.
        ObjectMissingError: nobody ever held the run.
    """
    return LeaseRecord.load(run, LEASE_KEY)


def _read_lease(run: Store) -> tuple[LeaseRecord | None, str]:
    """The record and its version; no version if there is no object, no record if nobody can read it."""
    try:
        blob = run.read(LEASE_KEY)
    except ObjectMissingError:
        return None, ""
    with suppress(BadDataError):
        return LeaseRecord.from_json(blob.data, run.uri_of(LEASE_KEY)), blob.version
    return None, blob.version


def _write_lease(run: Store, record: LeaseRecord, version: str) -> str:
    """The new version; none if somebody else wrote since `version` was read."""
    try:
        if version:
            return run.replace(LEASE_KEY, record.to_json(), version)
        return run.create(LEASE_KEY, record.to_json())
    except (ObjectExistsError, ConflictError):
        return ""


def _lease_clock() -> float:
    """A clock that never jumps and counts the time a machine sleeps: what was ours before a sleep may not be after."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Watch:
    """What one who wants a lease sees of it, by a clock of its own.

    Unlike the holder's that clock stands still while a machine sleeps: a laptop that wakes must give the holder, which
    wakes with it, the time to renew.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self.record: LeaseRecord | None = None
        self.version = ""
        self.silent_seconds = self._seen_at = 0.0
        """How long it has certainly not changed."""
        self.is_renewed = False
        """Whether the present holder was seen to renew it: that another has won a race does not say that it lives."""

    def look(self) -> None:
        asked = time.monotonic()
        record, version = _read_lease(self._run)
        if version != self.version:
            self.is_renewed = bool(record and self.record and record.holder == self.record.holder)
            self.record, self.version, self._seen_at = record, version, time.monotonic()
        elif time.monotonic() - asked > EXPIRE_SECONDS / 2:
            # While the bucket was away the holder could not renew: it gets its time anew.
            self._seen_at = time.monotonic()
        self.silent_seconds = max(0.0, asked - self._seen_at)

    def why_free(self) -> str:
        """Why the lease may be taken; nothing while it may not."""
        if not self.version:
            return "nobody held it"
        if self.record and self.record.released:
            return "it was given back"
        if self.record and self.record.process.certainly_dead():
            return f"{self.record} is dead"
        if self.silent_seconds >= EXPIRE_SECONDS:
            return f"{self.who} was silent for {self.silent_seconds:.0f} s"
        return ""

    @property
    def who(self) -> str:
        return str(self.record) if self.record else f"somebody whose {LEASE_KEY} is damaged"


class Lease:
    """The right to write to a run, kept by a thread until `close`.

    While the bucket is away the thread keeps trying, and `confirm` refuses; only another holder's record means that the
    run is lost.

    Attributes:
        fence: higher than that of everybody who held the run before.
        holder: unique to this holder.
        lost: which other attempt is known to have taken the run, for people; empty while none is.
    """

    def __init__(
        self, run: Store, record: LeaseRecord, version: str, asked_at: float, note: Callable[[str], None]
    ) -> None:
        """Keeps what `take` got by asking for it at `asked_at`."""
        self.fence, self.holder = record.fence, record.holder
        self._run, self._record, self._version, self._note = run, record, version, note
        self._uri = run.uri_of(LEASE_KEY)
        self._confirmed_at, self.lost = asked_at, ""
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, run: Store, floor: int, wait_seconds: float, stop: Stop, note: Callable[[str], None]) -> Lease:
        """Takes the run: at once if it is free or its holder certainly dead, else when the holder falls silent.

        Args:
            run: the run's folder.
            floor: the highest fence known from elsewhere, such as attempts and checkpoints.
            wait_seconds: how long to wait for a holder that lives; 0 gives up with its first renewal.
            stop: ends the watching.
            note: told what a person should know; from other threads, too.

        Raises:
            LostRunError: the holder lives; the message names it.
            BadDataError: something bears the last fence there is, or what lies there is no object.
            StoppedError: `stop` said so.
            BucketAwayError: the lease cannot be read or written.
        """
        watch, began, told = _Watch(run), time.monotonic(), ""
        while True:
            stop.check(f"before {run.uri} could be taken")
            watch.look()
            if why := watch.why_free():
                last = max(floor, watch.record.fence if watch.record else 0)
                if last >= MAX_FENCE:
                    where = f"an attempt or a checkpoint of {run.uri}" if last == floor else run.uri_of(LEASE_KEY)
                    raise BadDataError(
                        f"{where} has fence {last}, the last there is, which no run comes to: delete it"
                        " (`ddpm runs verify` names what is damaged)"
                    )
                record = LeaseRecord(
                    fence=last + 1,
                    holder=uuid.uuid4().hex,
                    renewal=0,
                    released=False,
                    since=utc_now(),
                    process=ProcessIdentity.of_this_process(),
                )
                asked_at = _lease_clock()
                if version := _write_lease(run, record, watch.version):
                    if told or (watch.record and not watch.record.released):
                        note(f"took {run.uri} over: {why}")
                    return cls(run.within(RETRY_SECONDS), record, version, asked_at, note)
                continue
            over = time.monotonic() - began >= wait_seconds
            # A holder that just fell silent is not waited for in vain: it either comes back or expires.
            if over and watch.is_renewed and watch.silent_seconds < 2 * RENEW_SECONDS:
                raise LostRunError(
                    f"{run.uri} is held by {watch.who}, which is alive: stop it first (`ddpm jobs cancel`, if it was "
                    "submitted), or have `ddpm train --wait SECONDS` wait for it"
                )
            if told != watch.who:
                told = watch.who
                note(f"{run.uri} is held by {told}: watching for up to {EXPIRE_SECONDS:g} s whether it is alive")
            stop.sleep(WATCH_SECONDS)

    def confirm(self) -> None:
        """Returns if the run is certainly still ours; call it before every commit and every delete.

        It asks the bucket, by renewing, unless a renewal of the last `RENEW_SECONDS` answers it.

        Raises:
            LostRunError: another attempt took the run.
            BucketAwayError: it cannot be known now, or the lease was given back; write nothing.
        """
        if self._closing.is_set():
            raise BucketAwayError(f"{self._uri} was given back: nothing more is written")
        self._renew()

    def check_lost(self) -> None:
        """Raises if the run is known to be lost; cheap enough for every step.

        Raises:
            LostRunError: another attempt took the run.
        """
        if self.lost:
            raise LostRunError(self.lost)

    def close(self, timeout_seconds: float = float("inf")) -> None:
        """Gives the lease back if the bucket answers in that time or `CLOSE_SECONDS`; the fence stays in the record."""
        self._closing.set()
        self._thread.join(min(timeout_seconds, CLOSE_SECONDS))
        if self._thread.is_alive():
            self._note(f"{self._uri} could not be given back in time: the next attempt waits until it expires")

    def _left_seconds(self) -> float:
        """Until it is to be renewed."""
        return self._confirmed_at + RENEW_SECONDS - _lease_clock()

    def _work(self) -> None:
        is_failing = False
        while not self._closing.wait(AGAIN_SECONDS if is_failing else self._left_seconds()):
            try:
                self._renew()
                is_failing = False
            except LostRunError:
                return
            # Whatever it was, a thread that ends here would give the run away.
            except Exception as error:
                if not is_failing:
                    self._note(f"could not renew {self._uri}, without which nothing is written: {error}")
                is_failing = True
        try:
            with self._lock:
                self._swap(released=True)
        except LostRunError:
            pass
        except JobError as error:
            self._note(f"could not give {self._uri} back: {error}; the next attempt waits until it expires")

    def _renew(self) -> None:
        """If it is time for that."""
        with self._lock:
            self.check_lost()
            if self._left_seconds() <= 0:
                self._swap(released=False)

    def _swap(self, released: bool) -> None:
        """Writes the next record over our last one, and over nothing else."""
        for _ in range(_SWAPS):
            self.check_lost()
            asked_at = _lease_clock()
            update = {"renewal": self._record.renewal + 1, "released": released}
            self._record = self._record.model_copy(update=update)
            if version := _write_lease(self._run, self._record, self._version):
                self._version, self._confirmed_at = version, asked_at
                return
            # An own write that came late, or damage, is no loss; another's record is.
            record, self._version = _read_lease(self._run)
            if record is None:
                self._note(f"{self._uri} was {'damaged' if self._version else 'deleted'}: writing it anew")
            elif record.holder != self.holder:
                self.lost = f"{self._run.uri} was taken over by {record}: this attempt writes nothing more"
        self.check_lost()
        raise BucketAwayError(f"{self._uri} changes faster than it can be renewed: find out who else writes it")
