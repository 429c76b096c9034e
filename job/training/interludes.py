"""Work that all processes share between two steps: the validation loss, the scores, the sample grid."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm import figures
from ddpm.consistency import TEACHER
from job.data.latents import latents_of, load_decoder
from job.data.reading.cache import ImageCache, open_cache
from job.evaluation.evaluate import Evaluator, validation_row
from job.processes.ranks import Agreement
from job.requests import GIF_SEEDS
from job.runs.run import SCORES_FIGURE, denoising_key, moment_of, score_name, title_of
from job.sampling.conditions import Conditions
from job.sampling.painter import Painter
from job.sampling.pictures import grid_png, with_class
from job.training.attempt import TrainingAttempt
from job.training.reporting import Recorder

_EARLY_IMAGES = 20


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
        self._conditions = None
        if self._config.is_conditioned:
            images = attempt.held_out or attempt.images
            self._conditions = Conditions(self._config, attempt.ranks.device, images)
        chosen = self._config.evaluate
        self.score_name = score_name(chosen.metrics[0], chosen.extractor)
        if chosen.every_epochs:
            self._evaluator = Evaluator(self._plan, attempt.ranks)

    @property
    def grid_images(self) -> int:
        """The number of images in a grid before the last one: on a CPU a whole one may take longer than an epoch."""
        count, on_cpu = self._config.sample.images, self._attempt.ranks.device.type == "cpu"
        return min(count, _EARLY_IMAGES) if on_cpu else count

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
        held_out = self._attempt.held_out
        assert held_out is not None
        painter = self._painter("ema", self._config.train.precision)
        teacher = self._painter(TEACHER, self._config.train.precision).predict if self._config.has_teacher else None
        row = validation_row(painter, held_out, latents_of(self._plan.index), teacher)
        if self._attempt.recorder is not None:
            self._attempt.recorder.add_row(row)

    def score(self) -> None:
        """Adds the scores of what the run samples to the log, and decides which checkpoint is the best. Collective.

        Raises:
            StoppedError: as for `validate`.
        """
        row = self._evaluator.scores(self._sampling_painter())

        def publish(recorder: Recorder) -> None:
            recorder.add_row(row)
            recorder.writer.retention = recorder.retention()
            scored = [row for row in recorder.rows if self.score_name in row]
            figure = figures.scores_figure(scored, self._plan.index.images, self._plan.request.run)
            recorder.writer.put(SCORES_FIGURE, figure, images_seen=self._state.images_seen)

        self._attempt.on_main(publish)

    def sample_grid(self) -> None:
        """Makes the sample grid, and writes the run's page with it. Collective.

        Raises:
            StoppedError: as for `validate`.
        """
        self._sample(range(self.grid_images))
        self._attempt.on_main(Recorder.write_page)

    def finish(self) -> None:
        """Makes the last grid and the GIF from noise to image. Collective."""
        painter = self._sample(range(self._config.sample.images))

        def publish(recorder: Recorder) -> None:
            title = with_class(self._title(range(GIF_SEEDS)), self._plan.sampled_classes)
            gif = painter.denoising_gif(range(GIF_SEEDS), painter.sampling, title)
            key = denoising_key(self._plan.label(self._state.images_seen), self._plan.how_sampled)
            recorder.writer.put(key, gif, images_seen=self._state.images_seen)

        self._attempt.on_main(publish)

    def _painter(self, weights: str, precision: str) -> Painter:
        """Returns a model that samples with the weights of this moment: `model`, or the name of an average."""
        attempt, config, decoder = self._attempt, self._config, self._decoder
        painter = Painter(config, attempt.ranks, precision, self._agreement, decoder)
        if weights == "model":
            painter.network.load_state_dict(self._state.model.state_dict())
        else:
            self._state.load_average(weights, painter.network)
        painter.given = self._conditions.given if self._conditions else painter.given
        return painter

    def _sampling_painter(self) -> Painter:
        """Returns a model that samples as the run's section `sample` says."""
        sample = self._config.sample
        precision = self._config.train.precision if sample.precision == "auto" else sample.precision
        return self._painter(sample.weights, precision)

    def _sample(self, seeds: range) -> Painter:
        sample, painter = self._config.sample, self._sampling_painter()
        images = painter.sample_together(seeds, painter.sampling, sample.batch_size, "sampling")

        def publish(recorder: Recorder) -> None:
            grid = grid_png(
                images,
                seeds,
                self._plan.sampled_classes,
                training=self._training_images() if sample.nearest else None,
                stop=self._attempt.stop,
                title=self._title(seeds),
                show=sample.show,
                beside=self._conditions.beside(seeds) if self._conditions else {},
            )
            recorder.put_grid(self._grid_key(), grid)

        self._attempt.on_main(publish)
        return painter

    def _training_images(self) -> ImageCache:
        pixels = self._plan.pixels()
        if pixels is self._plan.index:
            return self._attempt.images
        assert pixels is not None
        return open_cache(self._plan.bucket, pixels, self._config.data.cache_gigabytes * 1e9, self._attempt.stop)

    def _grid_key(self) -> str:
        return self._plan.grid_key(self._state.images_seen)

    def _title(self, seeds: Sequence[int]) -> str:
        moment = moment_of(self._plan.label(self._state.images_seen))
        how = self._config.sample.words(self._plan.stored.sample) + self._plan.how_shown
        return title_of(self._plan.run, moment, how, seeds)
