"""The main process's part of an attempt: rows, checkpoints, status, pictures and the page of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from ddpm import figures
from ddpm.state import TrainState, loss_row
from job.exits import State
from job.plan import Plan, RunHandle
from job.processes.lease import Lease
from job.progress import Progress, note
from job.report import PictureCache, facts_of, put_page
from job.runs import records
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.metric_rows import Row, grid_events
from job.runs.retention import Retention, best_images_seen
from job.runs.samples import LOSS_FIGURE, label_at, moment_of
from job.runs.writer import CheckpointWriter
from job.sealed import utc_now
from job.stop import NEVER, Stop
from job.training.tracking import Tracking

PAGE_SECONDS = 300.0
"""How old the page may be: grids come ever more rarely, and a page of yesterday looks like a run that hangs."""
PAGE_PATIENCE_SECONDS = 60.0
"""With a bucket that is away; the page is written again later."""


class Recorder:
    """Writes an attempt down: it alone writes to the run's folder, and exists on the main process alone.

    Attributes:
        rows: the run's metrics so far, in order.
        writer: commits checkpoints and pictures in a thread.
    """

    def __init__(
        self,
        plan: Plan,
        state: TrainState,
        attempt: records.Attempt,
        lease: Lease,
        *,
        writer: CheckpointWriter,
        rows: list[Row],
        tracking: Tracking,
        pictures: PictureCache,
    ) -> None:
        """Starts the thread that writes the run's status.

        Args:
            plan: the run.
            state: the live state, read for the number of images seen.
            attempt: this attempt's record.
            lease: held by this process.
            writer: for this run's checkpoints.
            rows: the metrics up to the checkpoint that was restored.
            tracking: gets every row.
            pictures: those of the page so far.
        """
        self.plan, self.attempt, self.writer, self.rows = plan, attempt, writer, rows
        self._state, self._lease, self._tracking = state, lease, tracking
        self._page_pictures, self._shown = pictures, Row()
        self._page_due = time.monotonic() + PAGE_SECONDS
        self._start_seconds: float | None = None
        self._status = records.StatusReporter(plan.run, self._confirmed_status, note)

    def has_saved(self, name: str) -> bool:
        """Returns whether the newest checkpoint holds a row of this moment with this value, before training begins."""
        return any(name in row and row["images_seen"] == self._state.images_seen for row in self.rows)

    def begins_training(self) -> None:
        """Takes the time from the attempt's record to its first step."""
        waited = datetime.now(UTC) - datetime.fromisoformat(self.attempt.started)
        self._start_seconds = max(0.0, round(waited.total_seconds(), 3))

    def record(self, values: Row) -> None:
        """Adds a row of this moment, which goes into the next checkpoint, to the tracker and to a page that is old."""
        images_seen = self._state.images_seen
        epoch, now = round(images_seen / self.plan.index.images, 4), round(time.time(), 3)
        row = {"images_seen": images_seen, "epoch": epoch, **values, "time": now}
        self.writer.rows.append(row)
        self.rows.append(row)
        self._tracking.log(row)
        if "images_per_second" in row:
            self._shown = row
        if time.monotonic() > self._page_due:
            self.write_page()

    def put_grid(self, key: str, grid: bytes) -> None:
        """Queues the upload of a sample grid of this moment, also for TensorBoard, and sends it to the tracker."""
        images_seen = self._state.images_seen
        ref = CheckpointRef(self.attempt.fence, images_seen)
        self.writer.put(key, grid, images_seen=images_seen)
        events = grid_events(grid, images_seen)
        self.writer.do_later(lambda run: run.put(ObjectKind.GRID_EVENTS.key(checkpoint=ref), events))
        self._tracking.log_grid(grid, images_seen)

    def save(self, loss_sums: Tensor) -> None:
        """Queues a checkpoint of this moment."""
        # A run that stops before its first row still has a loss in its status.
        self._shown = self._shown or loss_row(loss_sums)
        self.writer.save(self._state.images_seen, loss_sums.tolist())

    def show(self, bar: Progress) -> None:
        """Updates the bar, with the loss of the last row: reading the current one would wait for the device."""
        images_seen, epochs = self._state.images_seen, self.plan.config.train.epochs
        shown = {"loss": f"{self._shown['loss']:.4f}"} if "loss" in self._shown else {}
        shown["epoch"] = f"{_epoch_at(self.plan, images_seen):.1f}/{epochs}"
        bar.update(images_seen, total=self.plan.target_images, **shown)

    def write_page(self, state: State = State.RUNNING) -> None:
        """Queues the run's page as it is now."""
        self._page_due = time.monotonic() + PAGE_SECONDS
        status, rows = self._status_of(state), list(self.rows)
        self.writer.do_later(
            lambda run: put_run_page(self.plan, self._lease, rows, status, pictures=self._page_pictures)
        )

    def finish(self) -> None:
        """Queues the figure of the losses and the finished page, and waits until everything is in the bucket."""
        plan, images_seen = self.plan, self._state.images_seen
        moment = moment_of(label_at(images_seen, plan.index.images, plan.config.train.batch_size))
        title = f"{plan.request.run} · {moment} of {plan.config.train.epochs:,}"
        figure = figures.loss_figure(self.rows, plan.index.images, title)
        self.writer.put(LOSS_FIGURE, figure, images_seen=images_seen)
        self.write_page(State.FINISHED)
        self.writer.wait()

    def close(self, state: State, stop: Stop) -> None:
        """Commits what is queued and writes the last status, as far as `stop` leaves time.

        Raises:
            JobError: a checkpoint could not be committed.
        """
        try:
            self.writer.close(wait=True)
        finally:
            self._status.close(state, min(records.STATUS_CLOSE_SECONDS, stop.seconds_left() / 2))
            patience_seconds = min(records.STATUS_CLOSE_SECONDS, stop.seconds_left() / 2)
            if state is not State.FINISHED and patience_seconds >= 1:
                put_run_page(
                    self.plan,
                    self._lease,
                    self.rows,
                    self._status_of(state),
                    pictures=self._page_pictures,
                    patience_seconds=patience_seconds,
                )

    def _confirmed_status(self, state: State) -> records.Status:
        # A process that slept and was replaced must not overwrite the status of the attempt that replaced it.
        self._lease.confirm()
        return self._status_of(state)

    def _status_of(self, state: State) -> records.Status:
        status = status_of(self.plan, self.attempt, state, self._state.images_seen, self._shown)
        cadence, saved = self.writer.cadence, {}
        if cadence.save_seconds is not None:
            saved = {"save_seconds": round(cadence.save_seconds, 3), "stall_seconds": round(cadence.stall_seconds, 3)}
        return status.model_copy(update=saved | {"start_seconds": self._start_seconds})


def status_of(
    plan: Plan, attempt: records.Attempt, state: State, images_seen: int, row: Mapping[str, Any]
) -> records.Status:
    """Returns the status of an attempt with the values of its last row."""
    return records.Status(
        state=state,
        fence=attempt.fence,
        attempt=attempt.id,
        images_seen=images_seen,
        target_images=plan.target_images,
        epoch=round(_epoch_at(plan, images_seen), 3),
        loss=row.get("loss"),
        images_per_second=row.get("images_per_second"),
        updated=utc_now(),
    )


def _epoch_at(plan: Plan, images_seen: int) -> float:
    # The last batch may go beyond the last epoch: people would read `epoch 1.6 of 1`.
    return min(images_seen / plan.index.images, plan.config.train.epochs)


def put_run_page(
    plan: Plan,
    lease: Lease,
    rows: Sequence[Row] | None,
    status: records.Status,
    *,
    pictures: PictureCache,
    patience_seconds: float = PAGE_PATIENCE_SECONDS,
    stop: Stop = NEVER,
) -> None:
    """Writes the run's page, without `rows` with those of its newest checkpoint; an error is only a note."""
    bucket, run = (store.within(patience_seconds, stop) for store in (plan.bucket, plan.run))
    handle = RunHandle(bucket, run, plan.index, plan.config, plan.stored)
    try:
        lease.confirm()
        put_page(facts_of(handle, plan.request.run, rows, status), pictures)
    except Exception as error:
        note(f"the run's page stays as it was: {type(error).__name__}: {error}")


def retention_of(plan: Plan, rows: list[Row]) -> Retention:
    """Returns the run's retention rules with the best checkpoint by the scores so far."""
    return Retention(plan.config, plan.index.images, best_images_seen(plan.config, rows))
