"""What the main process commits while it holds the run: checkpoints, their metrics, and the retiring of older ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ddpm.epochs import epochs_completed_by
from job.code_version import code_version
from job.config import RunConfig, content_hash
from job.exits import BucketAwayError, JobError, LostRunError, StoppedError
from job.runs import metrics, records
from job.runs.checkpoints import FOLDER, CheckpointRef, Manifest, MetricSegment, list_checkpoints
from job.runs.grace import cadence_minutes, fits, measure_save_seconds
from job.runs.lease import Lease
from job.runs.provenance import stamped
from job.runs.records import Attempt
from job.runs.retention import Retention, being_read, delete_checkpoint, orphans
from job.runs.saving import CheckpointWriter, Save
from job.stop import GRACE_VARIABLE, Stop
from job.store import Store
from job.store.retry import DEADLINE_SECONDS

if TYPE_CHECKING:
    from torch import Tensor


class Commits:
    """Decides what goes into a checkpoint, and what goes when it is there. The writer's thread does the work."""

    def __init__(
        self,
        run: Store,
        config: RunConfig,
        attempt: Attempt,
        lease: Lease,
        tensors: dict[str, dict[str, Tensor]],
        *,
        dataset_images: int,
        segments: list[MetricSegment],
        aside: set[CheckpointRef],
        stop: Stop,
        note: Callable[[str], None],
    ) -> None:
        """Starts the writer, and measures meanwhile whether a save fits into the grace of a preemption.

        Args:
            run: the run's folder; checkpoints wait for a bucket that is away as it does.
            config: the run's.
            attempt: on whose behalf.
            lease: what makes this the run's one writer.
            tensors: the live tensors, by group.
            dataset_images: images of an epoch.
            segments: of the checkpoint that was restored; later ones are added.
            aside: checkpoints that do not verify. They push no other out, and stay for somebody to look at.
            stop: asked while the main thread waits, and how long it may.
            note: told what a person should know.
        """
        self._run, self._config, self._attempt, self._lease = run.within(DEADLINE_SECONDS), config, attempt, lease
        self._dataset_images, self._aside = dataset_images, aside
        self._stop, self._note = stop, note
        self.segments, self.rows = segments, list[metrics.Row]()
        self.retention = Retention.of(config)
        self._every_minutes = config.checkpoint.every_minutes
        self._saved_at = time.monotonic()
        self._swept = False
        self._writer = CheckpointWriter(run, tensors, confirm=lease.confirm, after_commit=self._after_commit)
        threading.Thread(target=self._measure, name="measure-save", daemon=True).start()

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is older than the cadence allows."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return minutes >= self._every_minutes and not self._writer.busy

    @property
    def troubled(self) -> bool:
        """Whether this attempt cannot go on: another holds the run, or what was to be saved cannot be."""
        return self._lease.lost or self._writer.failed

    def raise_trouble(self) -> None:
        """Raises why this attempt cannot go on, if it cannot.

        Raises:
            LostRunError: another attempt took the run.
            JobError: saving failed for good.
        """
        self._lease.check_lost()
        self._writer.raise_error()

    def save(self, images_seen: int, loss_sums: list[list[float]], world_size: int) -> None:
        """Queues a checkpoint of this moment, with the metric rows since the one before."""
        self._saved_at = time.monotonic()
        ref = CheckpointRef(self._attempt.fence, images_seen)
        objects: dict[str, bytes] = {}
        if self.rows:
            segment, objects = metrics.segment_objects(self.rows, ref)
            self.segments.append(segment)
            self.rows = []
        completed = epochs_completed_by(images_seen, self._dataset_images, self._config.train.batch_size)
        manifest = Manifest(
            fence=ref.fence,
            attempt=self._attempt.id,
            images_seen=images_seen,
            epoch=completed[-1] if completed else None,
            created=records.utc_now(),
            code_version=code_version(),
            config_sha256=content_hash(self._config),
            world_size=world_size,
            loss_sums=loss_sums,
            files=(),
            metric_segments=tuple(self.segments),
        )
        kept = any(self.retention.keeps_epoch(epoch) for epoch in completed)
        save = Save(manifest, objects, irreplaceable=kept, urgent=self._stop())
        if not self._writer.save(save, self._stop):
            raise self._no_time()

    def put(self, key: str, picture: bytes, *, images_seen: int) -> None:
        """Queues a picture of the weights at `images_seen`, which goes up when the bucket takes it."""
        fence, attempt = self._attempt.fence, self._attempt.id
        self._writer.put(key, stamped(key, picture, fence=fence, attempt=attempt, images_seen=images_seen))

    def wait(self) -> None:
        """Returns when everything is in the bucket; once a stop was asked for, only as long as there is time.

        Raises:
            BucketAwayError: there was not enough time for the last checkpoint.
            StoppedError: there was not enough time for the last pictures.
            JobError: saving failed for good.
        """
        if not self._writer.wait(self._stop):
            if self._writer.busy:
                raise self._no_time()
            raise StoppedError(
                f"stopped before the last pictures were in {self._run.uri}; every checkpoint is, and the same command "
                "goes on from there"
            )

    def close(self, wait: bool) -> None:
        """Ends the writer; with `wait`, after what is queued is committed, for as long as a preemption allows."""
        self._writer.close(self._stop, self._stop.grace_seconds if wait else 0.0)

    def _no_time(self) -> BucketAwayError:
        return BucketAwayError(
            f"{self._run.uri} did not take the last checkpoint in the {self._stop.grace_seconds:g} s "
            f"({GRACE_VARIABLE}) between the notice and the end: what was learnt since the one before will be learnt "
            "again by the same command"
        )

    def _after_commit(self, manifest: Manifest) -> None:
        """Retires what may go. An error costs space, not work: the next commit tries again."""
        run, config = self._run, self._config
        try:
            refs = [ref for ref in list_checkpoints(run) if ref not in self._aside]
            old = self.retention.retire(refs, self._dataset_images, config.train.batch_size, manifest.ref)
            if old:
                read, over = being_read(run)
                for ref in old:
                    if ref not in read:
                        self._lease.confirm()
                        delete_checkpoint(run, ref)
                for key in over:
                    run.delete(key)
            if not self._swept:
                for key in orphans(run, self._attempt.fence):
                    self._lease.confirm()
                    run.delete(key)
                run.sub(FOLDER).sweep()
                self._swept = True
        except LostRunError:
            raise
        except JobError as error:
            self._note(f"old checkpoints of {run.uri} stay for now: {error}")

    def _measure(self) -> None:
        try:
            seconds = measure_save_seconds(self._run, self._writer.checkpoint_bytes)
        except JobError as error:
            self._note(f"could not measure how long a save takes: {error}")
            return
        grace, every = self._stop.grace_seconds, self._config.checkpoint.every_minutes
        self._every_minutes = cadence_minutes(every, seconds, grace)
        if not fits(seconds, grace):
            self._note(
                f"a save takes about {seconds:.1f} s, which does not fit into the {grace:g} s between a preemption "
                f"notice and the end: saving every {self._every_minutes:.1f} instead of {every:g} minutes"
            )
