"""An attempt's results besides the weights: rows, status, pictures and the page of the run.

The main process writes them. All processes share the work for them between two steps, at the ends of some epochs: the
validation loss, the scores, the sample grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ddpm import figures
from ddpm.state import TrainState, loss_row
from job.config import method
from job.coordination.lease import Lease
from job.coordination.sealed import utc_now
from job.data.latents import latents_of, load_decoder
from job.data.reading.cache import ImageCache
from job.evaluation.evaluate import Evaluator, validation_row
from job.exits import State
from job.plan import RunHandle
from job.printing import open_page
from job.processes.ranks import Agreement
from job.progress import Progress, note
from job.report import PictureCache, facts_of, put_page
from job.requests import GIF_SEEDS
from job.runs import records
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.metric_rows import Row, grid_events, read_rows
from job.runs.retention import Retention, best_images_seen
from job.runs.samples import (
    LOSS_FIGURE,
    SCORES_FIGURE,
    denoising_key,
    grid_key,
    label_at,
    moment_of,
    score_name,
    title_of,
)
from job.runs.writer import CheckpointWriter, LeasedRun
from job.sampling.painter import Painter
from job.sampling.pictures import grid_png, with_class
from job.stop import NEVER, Stop
from job.training.tracking import Tracking

if TYPE_CHECKING:
    from job.training.attempt import TrainingAttempt

PAGE_SECONDS = 300.0
"""How old the page may be: grids come ever more rarely, and a page of yesterday looks like a run that hangs."""
PAGE_PATIENCE_SECONDS = 60.0
"""With a bucket that is away; the page is written again later."""
_EARLY_IMAGES = 20


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

    def __init__(self, attempt: TrainingAttempt, lease: Lease) -> None:
        """Writes the page of a new run, for an attempt that is recorded."""
        self.plan, self.attempt, self._stop, self._lease = attempt.plan, attempt.record, attempt.stop, lease
        plan, request = attempt.plan, attempt.plan.request
        self.rows, self._shown, self._pictures = list[Row](), Row(), PictureCache(note)
        self.tracking = Tracking(plan.config, request.run, plan.run.uri)
        if plan.is_new or request.open_page:
            self._put_page(self._status_of(State.RUNNING), None, stop=self._stop)
        if request.open_page:
            open_page(plan.run, ObjectKind.PAGE.value)

    def begin(self, attempt: TrainingAttempt) -> None:
        """Starts the threads that write checkpoints and the run's status, for an attempt that is restored."""
        plan, restored, seen = attempt.plan, attempt.restored, attempt.record.previous_seen
        self.rows = read_rows(plan.run, restored.metrics, note) if restored else []
        # An attempt that ends before its first row still has a loss in its status.
        self._shown = next((Row(loss=row["loss"]) for row in reversed(self.rows) if "loss" in row), Row())
        leased = LeasedRun(plan.run, self.retention(), attempt.record, self._lease, plan.classes, attempt.damaged)
        tensors = attempt.state.tensors()
        self.writer = CheckpointWriter(leased, tensors, before=restored, stop=self._stop, note=note)
        self._page_due = time.monotonic() + PAGE_SECONDS
        self._state = attempt.state
        self._status = records.StatusReporter(plan.run, self._confirmed_status, note)
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

    def record(self, values: Row) -> None:
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
        ref = CheckpointRef(self.attempt.fence, self.images_seen)
        self.writer.put(key, grid, images_seen=ref.images_seen)
        events = grid_events(grid, ref.images_seen)
        self.writer.do_later(lambda run: run.put(ObjectKind.GRID_EVENTS.key(checkpoint=ref), events))
        self.tracking.log_grid(grid, ref.images_seen)

    def save(self, loss_sums: Tensor) -> None:
        """Queues a checkpoint of this moment."""
        self._shown = self._shown or loss_row(loss_sums)
        self.writer.save(self.images_seen, loss_sums.tolist())

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
        moment = moment_of(label_at(images_seen, plan.index.images, plan.config.train.batch_size))
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
            put_page(facts_of(handle, plan.request.run, rows, status), self._pictures)
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
            fence=self.attempt.fence,
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


class Interludes:
    """Work that all processes do together between two steps, with the weights of that moment.

    An attempt that was killed may have saved a checkpoint without what belongs to the same moment. The next attempt
    asks with `lacks_value` and `lacks_grid` when it begins.
    """

    def __init__(self, attempt: TrainingAttempt, agreement: Agreement) -> None:
        """Computes the features of the real images if the run is scored, which may take minutes. Collective.

        Args:
            attempt: restored.
            agreement: has one flag for stop requests, exchanged at each step of a sampler.

        Raises:
            StoppedError: this process was asked to stop; the same command goes on.
        """
        self._attempt, self._agreement = attempt, agreement
        self._plan, self._config, self._state = attempt.plan, attempt.plan.config, attempt.state
        self._decoder = load_decoder(attempt.plan.bucket, attempt.plan.index, attempt.ranks.device)
        chosen = self._config.evaluate
        self.score_name = score_name(chosen.metrics[0], chosen.extractor)
        if chosen.every_epochs:
            self._evaluator = Evaluator(self._plan, attempt.ranks, attempt.stop)

    def lacks_value(self, name: str) -> bool:
        """Returns whether the newest checkpoint has no row of this moment with this value. Collective."""
        images_seen = self._state.images_seen
        return not self._attempt.on_main(
            lambda recorder: any(name in row and row["images_seen"] == images_seen for row in recorder.rows)
        )

    def lacks_grid(self) -> bool:
        """Returns whether the bucket has no sample grid of this moment. Collective."""
        return self._attempt.ranks.on_main(lambda: not self._plan.run.exists(self._grid_key()))

    def validate(self) -> None:
        """Adds the loss of the averaged weights on images that the run does not learn from to the log. Collective.

        Raises:
            StoppedError: on all processes at once, when any of them was asked to stop.
        """
        held_out, config = self._attempt.held_out, self._config
        assert held_out is not None
        row = validation_row(
            self._painter("ema", config.train.precision),
            held_out,
            method.objective_of(config),
            count=config.log.validate_images,
            batch_size=config.sample.batch_size,
            latents=latents_of(self._plan.index),
        )
        if self._attempt.recorder is not None:
            self._attempt.recorder.record(row)

    def score(self) -> None:
        """Adds the scores of what the run draws to the log, and decides which checkpoint is the best. Collective.

        Raises:
            StoppedError: as for `validate`.
        """
        row = self._evaluator.scores(self._sampling_painter())

        def publish(recorder: Recorder) -> None:
            recorder.record(row)
            recorder.writer.retention = recorder.retention()
            scored = [row for row in recorder.rows if self.score_name in row]
            figure = figures.scores_figure(scored, self._plan.index.images, self._plan.request.run)
            recorder.writer.put(SCORES_FIGURE, figure, images_seen=self._state.images_seen)

        self._attempt.on_main(publish)

    def draw_grid(self) -> None:
        """Draws the sample grid, and writes the run's page with it. Collective.

        Raises:
            StoppedError: as for `validate`.
        """
        count, on_cpu = self._config.sample.images, self._attempt.ranks.device.type == "cpu"
        # On a CPU a whole grid may take longer than the epoch before it.
        self._draw(range(min(count, _EARLY_IMAGES) if on_cpu else count))
        self._attempt.on_main(Recorder.write_page)

    def finish(self) -> None:
        """Draws the last grid and the GIF from noise to image. Collective."""
        painter = self._draw(range(self._config.sample.images))

        def publish(recorder: Recorder) -> None:
            title = with_class(self._title(range(GIF_SEEDS)), self._plan.sampled_classes)
            gif = painter.denoising_gif(range(GIF_SEEDS), method.sampling_of(self._config.sample), title)
            key = denoising_key(self._label(), self._config.sample.name(self._plan.first_sample))
            recorder.writer.put(key, gif, images_seen=self._state.images_seen)

        self._attempt.on_main(publish)

    def _painter(self, weights: str, precision: str) -> Painter:
        """Returns a model that draws with the weights of this moment: `model`, or the name of an average."""
        attempt, config, decoder = self._attempt, self._config, self._decoder
        painter = Painter(config, attempt.ranks, precision, attempt.stop, self._agreement, decoder)
        if weights == "model":
            painter.network.load_state_dict(self._state.model.state_dict())
        else:
            self._state.averages[weights].copy_to(painter.network)
        return painter

    def _sampling_painter(self) -> Painter:
        """Returns a model that draws as the run's section `sample` says."""
        sample = self._config.sample
        precision = self._config.train.precision if sample.precision == "auto" else sample.precision
        return self._painter(sample.weights, precision)

    def _draw(self, seeds: range) -> Painter:
        sample, painter = self._config.sample, self._sampling_painter()
        drawn = painter.sample_together(seeds, method.sampling_of(sample), sample.batch_size, "sampling")

        def publish(recorder: Recorder) -> None:
            grid = grid_png(
                drawn,
                seeds,
                self._plan.sampled_classes,
                training=self._training_images() if sample.nearest else None,
                stop=self._attempt.stop,
                title=self._title(seeds),
            )
            recorder.put_grid(self._grid_key(), grid)

        self._attempt.on_main(publish)
        return painter

    def _training_images(self) -> ImageCache:
        pictures = self._plan.pictures()
        if pictures is self._plan.index:
            return self._attempt.images
        return self._plan.opened_images(pictures, self._attempt.stop)

    def _label(self) -> str:
        return label_at(self._state.images_seen, self._plan.index.images, self._config.train.batch_size)

    def _grid_key(self) -> str:
        return grid_key(self._label(), self._config.sample.name(self._plan.first_sample))

    def _title(self, seeds: Sequence[int]) -> str:
        words = self._config.sample.words(self._plan.first_sample)
        return title_of(self._plan.run, moment_of(self._label()), words, seeds)
