"""An attempt's results besides the weights: rows, status, pictures and the page of the run."""

from __future__ import annotations

import time

from torch import Tensor

from ddpm import figures
from ddpm.state import TrainState, loss_row
from job.coordination.lease import Lease
from job.coordination.sealed import utc_now
from job.exits import State
from job.plan import Plan
from job.printing import open_page
from job.progress import Progress, note
from job.report import PAGE_KEY, PictureCache, facts_of, run_page
from job.runs import records
from job.runs.checkpoints import Manifest
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.metric_rows import Row, grid_events, read_rows
from job.runs.retention import Retention, best_images_seen
from job.runs.run import LOSS_FIGURE, RunHandle, moment_of
from job.runs.writer import CheckpointWriter, LeasedRun
from job.stop import NEVER, Stop
from job.training.tracking import Tracking

PAGE_SECONDS = 300.0
"""How old the page may be: grids come ever more rarely, and a page of yesterday looks like a run that hangs."""
PAGE_PATIENCE_SECONDS = 60.0
"""With a bucket that is away; the page is written again later."""


class Recorder:
    """Writes an attempt down: it alone writes to the run's folder, and exists on the main process alone.

    Attributes:
        tracking: the service that also gets the rows.
        rows: the metrics of the run so far, in order; empty before `begin`.
        writer: commits checkpoints and pictures in a thread, from `begin` on.
    """

    writer: CheckpointWriter
    _status: records.StatusReporter
    _state: TrainState | None = None

    def __init__(self, plan: Plan, record: records.Attempt, lease: Lease, stop: Stop) -> None:
        """Writes the page of a new run, for an attempt that is recorded."""
        self.plan, self._record, self._stop, self._lease, request = plan, record, stop, lease, plan.request
        self.rows, self._shown, self._pictures = list[Row](), Row(), PictureCache(note)
        self.tracking = Tracking(plan.config, request.run, plan.run.uri)
        if plan.is_new or request.open_page:
            self._put_page(self._status_of(State.RUNNING), None, stop=self._stop)
        if request.open_page:
            open_page(plan.run, ObjectKind.PAGE.value)

    def begin(self, state: TrainState, restored: Manifest | None, damaged: set[CheckpointRef]) -> None:
        """Starts the threads that write checkpoints and the run's status, for an attempt that is restored."""
        plan, seen = self.plan, self._record.previous_seen
        self.rows = read_rows(plan.run, restored.metrics) if restored else []
        # An attempt that ends before its first row still has a loss in its status.
        self._shown = next((Row(loss=row["loss"]) for row in reversed(self.rows) if "loss" in row), Row())
        leased = LeasedRun(plan.run, self.retention(), self._record, self._lease, plan.classes, damaged)
        self.writer = CheckpointWriter(leased, state.tensors(), before=restored, stop=self._stop, receive=state.receive)
        self._page_due = time.monotonic() + PAGE_SECONDS
        self._state = state
        self._status = records.StatusReporter(plan.run, self._confirmed_status)
        # The page of an attempt that was cut off says what is true again.
        if not plan.is_new and not (seen is not None and seen.state == State.RUNNING):
            # It takes longer than the first steps, which need not wait for it.
            self.write_page()

    @property
    def images_seen(self) -> int:
        """The progress of training; before `begin` that of the run."""
        return self._state.images_seen if self._state else self.plan.images_seen

    def retention(self) -> Retention:
        """Returns the run's retention rules with the best checkpoint by the scores so far."""
        config = self.plan.config
        return Retention(config, self.plan.index.images, best_images_seen(config, self.rows))

    def add_row(self, values: Row) -> None:
        """Adds a row of this moment, which goes into the next checkpoint, to the tracker and to a page that is old."""
        epoch, now = round(self.images_seen / self.plan.index.images, 4), round(time.time(), 3)
        row = {"images_seen": self.images_seen, "epoch": epoch, **values, "time": now}
        self.writer.rows.append(row)
        self.rows.append(row)
        self.tracking.log(row)
        if "images_per_second" in row:
            self._shown = row
        if time.monotonic() > self._page_due:
            self.write_page()

    def put_grid(self, key: str, grid: bytes) -> None:
        """Queues the upload of a sample grid of this moment, also for TensorBoard, and sends it to the tracker."""
        ref = CheckpointRef(self._record.fence, self.images_seen)
        self.writer.put(key, grid, images_seen=ref.images_seen)
        events = grid_events(grid, ref.images_seen)
        self.writer.do_later(lambda run: run.put(ObjectKind.GRID_EVENTS.key(checkpoint=ref), events))
        self.tracking.log_grid(grid, ref.images_seen)

    def save(self, loss_sums: Tensor) -> None:
        """Queues a checkpoint of this moment."""
        self._shown = self._shown or loss_row(loss_sums)
        self.writer.save(self.images_seen, loss_sums.tolist())
        if self.plan.config.log.tracker != "none":
            self.writer.do_later(lambda run: self.tracking.committed())

    def show(self, bar: Progress) -> None:
        """Updates the bar, with the loss of the last row: reading the current one would wait for the device."""
        shown = {"loss": f"{self._shown['loss']:.4f}"} if "loss" in self._shown else {}
        shown["epoch"] = f"{self._epoch_at(self.images_seen):.1f}/{self.plan.config.train.epochs}"
        bar.update(self.images_seen, total=self.plan.target_images, **shown)

    def write_page(self, state: State = State.RUNNING) -> None:
        """Queues the run's page as it is now."""
        self._page_due = time.monotonic() + PAGE_SECONDS
        status, rows = self._status_of(state), list(self.rows)
        self.writer.do_later(lambda run: self._put_page(status, rows))

    def finish(self) -> None:
        """Queues the figure of the losses and the finished page, and waits until everything is in the bucket."""
        plan, images_seen = self.plan, self.images_seen
        moment = moment_of(plan.label(images_seen))
        title = f"{plan.request.run} · {moment} of {plan.config.train.epochs:,}"
        figure = figures.loss_figure(self.rows, plan.index.images, title)
        self.writer.put(LOSS_FIGURE, figure, images_seen=images_seen)
        self.write_page(State.FINISHED)
        self.writer.wait()

    def close(self, state: State) -> None:
        """Commits what is queued and writes the last status and page, as far as a stop leaves time.

        Before `begin` it writes the page alone, which may say that the run goes on.

        Raises:
            JobError: a checkpoint could not be committed.
        """
        try:
            if self._state:
                self.writer.close(wait=True)
                # The last pictures come after the last checkpoint.
                self.tracking.committed()
        finally:
            if self._state:
                self._status.close(state, self._patience_seconds())
            patience_seconds = self._patience_seconds()
            if state is not State.FINISHED and patience_seconds >= 1:
                self._put_page(self._status_of(state), self.rows if self._state else None, patience_seconds)

    def abandon(self) -> None:
        """Writes nothing more.

        Raises:
            JobError: a checkpoint could not be committed before.
        """
        if self._state:
            self.writer.close(wait=False)

    def _patience_seconds(self) -> float:
        """Returns the longest time for the last status, and for the last page."""
        return min(records.STATUS_CLOSE_SECONDS, self._stop.seconds_left() / 2)

    def _put_page(
        self,
        status: records.Status,
        rows: list[Row] | None,
        patience_seconds: float = PAGE_PATIENCE_SECONDS,
        stop: Stop = NEVER,
    ) -> None:
        """Writes the page, without `rows` with those of the newest checkpoint; an error is only a note."""
        plan = self.plan
        bucket, run = (store.within(patience_seconds, stop) for store in (plan.bucket, plan.run))
        handle = RunHandle(bucket, run, plan.index, plan.config, plan.stored)
        try:
            self._lease.confirm()
            page = run_page(facts_of(handle, plan.request.run, rows, status), self._pictures)
            run.put(PAGE_KEY, page)
        except Exception as error:
            note(f"the run's page stays as it was: {type(error).__name__}: {error}")

    def _confirmed_status(self, state: State) -> records.Status:
        # A process that slept and was replaced must not overwrite the status of the attempt that replaced it.
        self._lease.confirm()
        return self._status_of(state)

    def _status_of(self, state: State) -> records.Status:
        images_seen = self.images_seen
        return records.Status(
            state=state,
            fence=self._record.fence,
            images_seen=images_seen,
            target_images=self.plan.target_images,
            epoch=round(self._epoch_at(images_seen), 3),
            loss=self._shown.get("loss"),
            images_per_second=self._shown.get("images_per_second"),
            updated=utc_now(),
        )

    def _epoch_at(self, images_seen: int) -> float:
        # The last batch may go beyond the last epoch: people would read `epoch 1.6 of 1`.
        return min(images_seen / self.plan.index.images, self.plan.config.train.epochs)
