"""Work between two steps, at the ends of some epochs: the validation loss, the scores, the sample grid.

To add another, write a subclass of `Interlude` and name it in `TrainingSession.__init__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ddpm import figures
from job.config import method
from job.data.cache import ImageCache
from job.evaluation.validation import validation_row
from job.requests import GIF_SEEDS
from job.runs.drawings import SCORES_FIGURE, denoising_key, grid_key, label_at, moment_of, score_name, title_of
from job.runs.metric_rows import Row
from job.sampling.painter import Painter
from job.sampling.pictures import grid_png, with_class
from job.training.reporting import Recorder, retention_of

_EARLY_IMAGES = 20

if TYPE_CHECKING:
    from job.evaluation.evaluate import Evaluator
    from job.training.session import TrainingSession


class Interlude(ABC):
    """Work that all processes do together between two steps, with the weights of that moment.

    An attempt that was killed may have saved a checkpoint without what belongs to the same moment. The next attempt
    asks `is_due` and `is_missing` when it begins, and runs it then.
    """

    precedes_save: ClassVar[bool] = True
    """Whether its row goes into the checkpoint of the same moment; otherwise it runs when that checkpoint is queued."""
    needs_save: ClassVar[bool] = False
    """Whether a checkpoint follows in any case."""

    def __init__(self, session: TrainingSession) -> None:
        """Prepares for training to begin. Collective."""
        self.session, self.plan, self.config = session, session.plan, session.plan.config
        self.ends_epoch = session.retention.ends_epoch

    @abstractmethod
    def is_due(self, images_seen: int) -> bool:
        """Returns whether it belongs to this moment, alike on all processes."""

    @abstractmethod
    def is_missing(self, recorder: Recorder) -> bool:
        """Returns whether the bucket lacks what this moment should have left. Main process only."""

    @abstractmethod
    def run(self) -> Row | None:
        """Does the work; returns a row for the log on the main process, if there is one. Collective.

        Raises:
            StoppedError: on all processes at once, when any of them was asked to stop.
        """

    def is_last(self, images_seen: int) -> bool:
        """Returns whether the run ends at this moment."""
        return images_seen == self.plan.target_images

    def painter(self, weights: str, precision: str) -> Painter:
        """Returns a model that draws with the weights of this moment: `model`, or the name of an average."""
        session = self.session
        painter = Painter(
            self.config,
            session.ranks,
            precision=precision,
            stop=session.stop,
            agreement=session.agreement_in_step,
            decoder=session.decoder,
        )
        if weights == "model":
            painter.network.load_state_dict(session.state.model.state_dict())
        else:
            session.state.averages[weights].copy_to(painter.network)
        return painter

    def sampling_painter(self) -> Painter:
        """Returns a model that draws as the run's section `sample` says."""
        sample = self.config.sample
        precision = self.config.train.precision if sample.precision == "auto" else sample.precision
        return self.painter(sample.weights, precision)


class Validation(Interlude):
    """The loss of the averaged weights on images that the run does not learn from."""

    def is_due(self, images_seen: int) -> bool:
        """See `Interlude`."""
        begins_trained = self.config.parent.run is not None and not images_seen
        is_end = self.is_last(images_seen) or self.ends_epoch(images_seen, self.config.log.validate_epochs)
        return self.session.held_out is not None and (begins_trained or is_end)

    def is_missing(self, recorder: Recorder) -> bool:
        """See `Interlude`."""
        return not recorder.has_saved("val_loss")

    def run(self) -> Row:
        """See `Interlude`."""
        assert self.session.held_out is not None
        return validation_row(
            self.painter("ema", self.config.train.precision),
            self.session.held_out,
            self.session.objective,
            count=self.config.log.validate_images,
            batch_size=self.config.sample.batch_size,
            latents=self.session.settings.latents,
        )


class Scoring(Interlude):
    """The scores of what the run draws, and which checkpoint has the best one."""

    # The best checkpoint is kept: it must exist.
    needs_save = True

    def __init__(self, session: TrainingSession) -> None:
        """Computes the features of the real images, which may take minutes.

        Raises:
            StoppedError: this process was asked to stop; the same command goes on.
        """
        super().__init__(session)
        chosen = self.config.evaluate
        self._score = score_name(chosen.metrics[0], chosen.extractor)
        self._evaluator: Evaluator | None = None
        if chosen.every_epochs:
            from job.evaluation.evaluate import Evaluator

            self._evaluator = Evaluator(self.plan, session.ranks, session.stop)

    def is_due(self, images_seen: int) -> bool:
        """See `Interlude`."""
        every_epochs = self.config.evaluate.every_epochs
        return self._evaluator is not None and (self.is_last(images_seen) or self.ends_epoch(images_seen, every_epochs))

    def is_missing(self, recorder: Recorder) -> bool:
        """See `Interlude`."""
        return not recorder.has_saved(self._score)

    def run(self) -> Row:
        """See `Interlude`."""
        assert self._evaluator is not None
        row = self._evaluator.scores(self.sampling_painter())

        def publish(recorder: Recorder) -> None:
            images_seen = self.session.state.images_seen
            rows = [*recorder.rows, {"images_seen": images_seen, **row}]
            recorder.writer.retention = retention_of(self.plan, rows)
            scored = [row for row in rows if self._score in row]
            figure = figures.scores_figure(scored, self.plan.index.images, self.plan.request.run)
            recorder.writer.put(SCORES_FIGURE, figure, images_seen=images_seen)

        self.session.on_main(publish)
        return row


class Grid(Interlude):
    """The sample grid, and the run's page with it."""

    precedes_save = False

    def is_due(self, images_seen: int) -> bool:
        """See `Interlude`; `finish` draws the last one."""
        every_epochs = self.config.sample.every_epochs
        if self.is_last(images_seen) or every_epochs == 0:
            return False
        if every_epochs:
            return self.ends_epoch(images_seen, every_epochs)
        return any(epoch.bit_count() == 1 for epoch in self.session.retention.ended(images_seen))

    def is_missing(self, recorder: Recorder) -> bool:
        """See `Interlude`."""
        return not self.plan.run.exists(self._key())

    def run(self) -> None:
        """See `Interlude`."""
        count, on_cpu = self.config.sample.images, self.session.device.type == "cpu"
        # On a CPU a whole grid may take longer than the epoch before it.
        self._draw(range(min(count, _EARLY_IMAGES) if on_cpu else count))
        self.session.on_main(Recorder.write_page)

    def finish(self) -> None:
        """Draws the last grid and the GIF from noise to image. Collective."""
        painter = self._draw(range(self.config.sample.images))

        def publish(recorder: Recorder) -> None:
            title = with_class(self._title(range(GIF_SEEDS)), self.plan.drawn_classes)
            gif = painter.denoising_gif(range(GIF_SEEDS), method.sampling_of(self.config.sample), title)
            key = denoising_key(self._label(), self._drawing_name())
            recorder.writer.put(key, gif, images_seen=self.session.state.images_seen)

        self.session.on_main(publish)

    def _draw(self, seeds: range) -> Painter:
        sample, painter = self.config.sample, self.sampling_painter()
        drawn = painter.sample_together(seeds, method.sampling_of(sample), sample.batch_size, "sampling")

        def publish(recorder: Recorder) -> None:
            grid = grid_png(
                drawn,
                seeds,
                self.plan.drawn_classes,
                training=self._training_images() if sample.nearest else None,
                stop=self.session.stop,
                title=self._title(seeds),
            )
            recorder.put_grid(self._key(), grid)

        self.session.on_main(publish)
        return painter

    def _training_images(self) -> ImageCache:
        pictures = self.plan.pictures()
        if pictures is self.plan.index:
            return self.session.images
        return self.plan.opened_images(self.session.stop, index=pictures)

    def _label(self) -> str:
        return label_at(self.session.state.images_seen, self.plan.index.images, self.config.train.batch_size)

    def _drawing_name(self) -> str:
        return self.config.sample.name(self.plan.first_drawing)

    def _key(self) -> str:
        return grid_key(self._label(), self._drawing_name())

    def _title(self, seeds: Sequence[int]) -> str:
        words = self.config.sample.words(self.plan.first_drawing)
        return title_of(self.plan.run, moment_of(self._label()), words, seeds)
