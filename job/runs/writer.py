"""Saving while training goes on: training waits for a copy into host buffers, and a thread does the rest.

copy to host → (training goes on) → safetensors files on the local disk → objects under a fresh prefix → manifest →
deletion of old checkpoints.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from job.exits import BucketAwayError, StoppedError
from job.processes.lease import Lease
from job.runs import metric_rows
from job.runs.cadence import Cadence
from job.runs.checkpoint_files import CheckpointFiles, Tensors
from job.runs.checkpoints import Manifest, commit_manifest
from job.runs.drawings import put_picture
from job.runs.layout import OF_CHECKPOINT, CheckpointRef, located
from job.runs.metric_rows import History
from job.runs.records import Attempt
from job.runs.retention import Retention, Retirement
from job.sealed import utc_now
from job.stop import GRACE_VARIABLE, Stop
from job.store import Store

WAIT_SECONDS = 0.1


@dataclass(frozen=True)
class LeasedRun:
    """A run whose lease an attempt has, so that no other attempt writes to it."""

    store: Store
    """The run's folder."""
    retention: Retention
    attempt: Attempt
    lease: Lease
    classes: tuple[str, ...]
    """The names of its classes."""
    damaged: Collection[CheckpointRef] = ()
    """Checkpoints that do not verify: they do not count for retention, and are kept for inspection."""


class CheckpointWriter:
    """Commits checkpoints in a thread, in order, while training goes on.

    While the bucket is away the thread retries. It then commits the newest of the checkpoints that fell due meanwhile,
    the metrics of the others, and every picture. An error that ends the thread, such as a bucket that stays away beyond
    the limit, is raised by every later call.

    Attributes:
        rows: of the metrics since the last checkpoint; training appends to them.
        retention: the rules that decide which checkpoints stay.
        cadence: the interval between saves, and the measured duration of the last one.
    """

    def __init__(
        self, leased: LeasedRun, live: Tensors, *, before: Manifest | None, stop: Stop, note: Callable[[str], None]
    ) -> None:
        """Allocates the host buffers and starts the thread.

        Args:
            leased: the run.
            live: the tensors to save, by group.
            before: of the restored checkpoint, whose metrics and snapshots stay those of the run.
            stop: asked while the main thread waits.
            note: receives messages for people.
        """
        self.rows = list[metric_rows.Row]()
        self._snapshots = before.snapshots if before else ()
        self._lineage = (*before.lineage, str(before.ref)) if before else ()
        self.retention = leased.retention
        self._leased, self._stop = leased, stop
        # Unlike `stop` this ends no upload that is under way when a stop is requested.
        self._closing = Stop(stop.grace_seconds)
        self._run = leased.store.within(leased.store.retry.limit_seconds, self._closing)
        self._history = History(self._run, before.segments if before else (), leased.retention.config, note)
        self._files = CheckpointFiles(live, leased.retention, leased.classes)
        every_minutes = leased.retention.config.checkpoint.every_minutes
        self.cadence = Cadence(self._run, self._files.size_bytes, every_minutes, stop.grace_seconds, note)
        self._retirement = Retirement(self._run, leased.lease, leased.damaged, note)
        self._changed = threading.Condition()
        self._queued: tuple[Manifest, list[metric_rows.Row]] | None = None
        self._later: list[Callable[[Store], None]] = []
        self._reading_host = self._committing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def overdue(self) -> bool:
        """Returns whether the last checkpoint is older than the cadence allows."""
        return self.cadence.is_over and not self._busy

    @property
    def troubled(self) -> bool:
        """Returns whether `raise_trouble` raises."""
        return bool(self._leased.lease.lost) or self._error is not None

    def raise_trouble(self) -> None:
        """Raises the reason why this attempt cannot go on, if there is one.

        Raises:
            LostRunError: another attempt took the run.
            JobError: saving failed for good.
        """
        self._leased.lease.check_lost()
        if self._error is not None:
            raise self._error

    def save(self, images_seen: int, loss_sums: list[list[float]]) -> None:
        """Queues a checkpoint of this moment, with the metric rows since the one before.

        Blocks for a local write that is under way, and on a CPU for a copy of the live tensors; on a GPU they must not
        change before `before_change`. While the bucket is away it also blocks for a queued checkpoint that must not be
        replaced: one that is kept for good, or has a snapshot.

        Raises:
            BucketAwayError: a stop was requested, and no time is left to wait.
        """
        self.cadence.begin()
        attempt = self._leased.attempt
        manifest = Manifest(
            fence=attempt.fence,
            attempt=attempt.id,
            images_seen=images_seen,
            created=utc_now(),
            world_size=attempt.world_size,
            loss_sums=loss_sums,
            lineage=self._lineage,
            files=(),
            drawn=self._files.drawn,
        )
        with self._change():
            while self._reading_host or (self._queued and self.retention.needs(self._queued[0].images_seen)):
                self._wait_a_little()
            self.raise_trouble()
            self._files.copy()
            # A checkpoint that this one replaces leaves it its rows.
            rows = (self._queued[1] if self._queued else []) + self.rows
            self._queued, self.rows = (manifest, rows), []
        self.cadence.copied()

    def before_change(self) -> None:
        """Lets the GPU finish the copy of the last save before it changes the live tensors."""
        self._files.before_change()

    def put(self, key: str, picture: bytes, *, images_seen: int) -> None:
        """Queues the upload of a picture that the weights of `images_seen` drew."""
        ref = CheckpointRef(self._leased.attempt.fence, images_seen)
        self.do_later(lambda run: put_picture(run, key, picture, ref))

    def do_later(self, work: Callable[[Store], None]) -> None:
        """Queues a function of the run's store, which the thread calls after everything that was queued before."""
        with self._change():
            self.raise_trouble()
            self._later.append(work)

    def wait(self) -> None:
        """Returns when everything that was queued is in the bucket.

        Raises:
            BucketAwayError: a stop was requested, and there was not enough time for the last checkpoint.
            StoppedError: there was not enough time for the last pictures.
        """
        with self._changed:
            while self._busy or self._later:
                self._wait_a_little()
            self.raise_trouble()

    def close(self, wait: bool) -> None:
        """Ends the thread; with `wait` it first commits the queue, for as long as a preemption would allow."""
        over = time.monotonic() + (self._stop.grace_seconds if wait else 0.0)

        def is_time_left() -> bool:
            self._stop()
            return time.monotonic() < over and self._stop.seconds_left_to_save() > 0

        with self._change():
            while (self._busy or self._later) and self._error is None and is_time_left():
                self._changed.wait(WAIT_SECONDS)
            self._closing.request("the end of its process")
        # A thread that waits for a silent bucket cannot be joined; it ends with the process.
        while self._thread.is_alive() and is_time_left():
            self._thread.join(WAIT_SECONDS)
        if self._error is not None:
            raise self._error

    @property
    def _busy(self) -> bool:
        return self._committing or self._queued is not None

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def _wait_a_little(self) -> None:
        self.raise_trouble()
        if self._stop() and self._stop.seconds_left_to_save() <= 0:
            if self._busy:
                raise BucketAwayError(
                    f"{self._run.uri} did not take the last checkpoint in the {self._stop.grace_seconds:g} s "
                    f"({GRACE_VARIABLE}) between the notice and the end: what was learnt since the one before will be "
                    "learnt again by the same command"
                )
            raise StoppedError(
                f"stopped before the last pictures were in {self._run.uri}; every checkpoint is, and the same command "
                "goes on from there"
            )
        self._changed.wait(WAIT_SECONDS)

    def _work(self) -> None:
        try:
            while self._has_work():
                # In order: a resumed attempt draws only the picture of the checkpoint that it begins with. After a
                # stop request the checkpoint goes first, because there may be no time for both.
                if self._later and not (self._queued and self._stop.reason):
                    self._run.retry(self._leased.lease.confirm)
                    self._later[0](self._run)
                    with self._change():
                        del self._later[0]
                else:
                    self._retirement.after(self._commit(), self.retention)
        except BaseException as error:
            with self._change():
                self._error = error
                self._committing = self._reading_host = False

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._queued or self._later or self._closing.reason):
                self._changed.wait()
            return not self._closing.reason

    def _commit(self) -> Manifest:
        """Commits the queued checkpoint: its files, its rows, a last check of the lease, the manifest."""
        with self._change():
            assert self._queued is not None
            (manifest, rows), self._queued = self._queued, None
            self._committing = self._reading_host = True
        began, processor_began, outages = time.monotonic(), time.thread_time(), self._run.retry.outages
        uploaded = self._files.upload(self._run, self._leased.lease, manifest.ref, self._release_host)
        files = tuple(file for file in uploaded if located(file.key).kind in OF_CHECKPOINT)
        self._snapshots += tuple(file for file in uploaded if file not in files)
        self._history.add(rows, manifest.ref, is_hurried=bool(self._stop.reason))
        named = {"files": files, "snapshots": self._snapshots, "segments": self._history.segments}
        manifest = manifest.model_copy(update=named)

        def commit() -> None:
            # After an outage the lease is checked again: another attempt may have taken the run meanwhile.
            self._leased.lease.confirm()
            commit_manifest(self._run, manifest)

        self._run.retry(commit)
        # The wait for a bucket that is away would pass for the duration of a save.
        if self._run.retry.outages == outages:
            self.cadence.committed(time.monotonic() - began, time.thread_time() - processor_began)
        with self._change():
            self._committing = False
        return manifest

    def _release_host(self) -> None:
        with self._change():
            self._reading_host = False
