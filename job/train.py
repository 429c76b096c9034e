"""`ddpm train` on one process: begins a run or goes on with it. There is no resume flag; the same command does both.

`run_training` meets the other processes, takes the run, and hands both to a `TrainingSession`: the state on the device,
and what is due after each step. Everything that decides what is learnt happens in `ddpm.training`. Here it is connected
to a bucket: which images come in, when a checkpoint goes out, who is told how it goes. Methods that are collective must
be called by all processes at the same step; a decision that only one of them could make is therefore agreed on before
anybody acts on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ddpm import figures, training
from ddpm.epochs import crosses, epochs_completed_by
from job import method
from job.data.autoencoder import latents_of, load_decoder
from job.data.cache import ImageCache
from job.data.order import Order
from job.data.stream import stream_batches
from job.exits import JobError, LostRunError, NotANumberError, StoppedError
from job.plan import FoundRun, Plan, plan_run
from job.processes import compute
from job.processes.ranks import Agreement, Ranks, meet
from job.progress import Progress, note
from job.report.facts import facts_of
from job.report.page import put_page
from job.report.pictures import PictureCache
from job.requests import GIF_SEEDS
from job.runs import metrics, records
from job.runs.checkpoints import Manifest, newest_good
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.lease import Lease
from job.runs.retention import Retention, best_images_seen
from job.runs.samples import LOSS_FIGURE, SCORES_FIGURE, denoising_key, grid_key, label_of, moment_of, title_of
from job.runs.scores import score_name
from job.runs.writer import CheckpointWriter, LeasedRun
from job.sampling.painter import Painter
from job.sampling.sample import grid_png, with_class
from job.sealed import utc_now
from job.stop import NEVER, Stop
from job.store import Store
from job.tracking import CLOSE_SECONDS, Tracking
from job.validation import validation_row

if TYPE_CHECKING:
    from job.evaluation.in_training import Judge

ANOTHER_PROCESS = "another process"
"""Why a process stops that was not asked itself."""
SLOW_FACTOR, SLOW_SECONDS = 5, 10.0
"""A step that takes so many times as long as it could is slow; a person hears of it when so much was lost by that."""
_STARVED_POLL_SECONDS = 0.02
PAGE_PATIENCE_SECONDS = 60.0
"""With a bucket that is away, for what is written anew with the next grid anyway."""
_EXIT_SECONDS = 0.5
"""For the process itself to end, of the time that a preemption leaves."""


def run_training(plan: Plan, stop: Stop = NEVER) -> Plan:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Args:
        plan: which run.
        stop: asked all the while.

    Returns:
        The plan that was carried out: whoever held the run until the lease was taken may have begun or changed it.

    Raises:
        StoppedError: the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
    """
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    # What this machine computes in, a new run does for good.
    request = replace(plan.request, changes=plan.request.changes | {"train.precision": precision})
    ranks = meet(stop, precision, plan.config.train.deterministic)
    lease: Lease | None = None

    def take() -> None:
        nonlocal lease
        lease = Lease.take(plan.run, records.highest_fence(plan.run), request.wait_seconds, stop, note)

    tracking: Tracking | None = None

    def begin_tracking() -> None:
        nonlocal tracking
        tracking = Tracking(plan.config, request.run, plan.run.uri)

    try:
        ranks.on_main(take)
        plan = plan_run(request, stop)
        # Of who only finds the run held, nobody is to be told.
        ranks.on_main(begin_tracking)
        attempt = ranks.on_main(lambda: _begin(plan, ranks, lease))
        with Progress("reading images", total=plan.index.images) as bar:
            images = plan.opened_images(stop, lambda done, total: bar.update(done))
            held_out = plan.opened_images(stop, index=plan.held_out) if plan.held_out else None
        # The network waits for all processes and says nothing meanwhile, which would look like a hang.
        ranks.sum(0)
        session = TrainingSession(plan, ranks, images, stop, held_out, tracking)
        with session.restored(attempt, lease):
            session.look_at_references()
            session.train()
            session.finish()
    except training.NonFiniteError as error:
        raise NotANumberError(
            f"{error}; what {plan.run.uri} holds is from before. It would happen again at the same image: "
            "start another run with a lower train.learning_rate, or with train.precision=fp32"
        ) from None
    finally:
        if lease is not None:
            lease.close(stop.seconds_left() - _EXIT_SECONDS)
        if tracking is not None:
            tracking.close(min(CLOSE_SECONDS, stop.seconds_left() - _EXIT_SECONDS))
    ranks.accelerator.end_training()
    return plan


def _begin(plan: Plan, ranks: Ranks, lease: Lease | None) -> records.Attempt:
    """Writes down the run, if it is new, and this attempt; says what is otherwise than in the one before."""
    assert lease is not None
    if plan.is_new:
        records.create_config(plan.run, plan.config)
    before = records.last_attempt(plan.run)
    device = compute.describe_device(ranks.accelerator.device)
    attempt = records.record_attempt(
        plan.run, lease.fence, lease.holder, changes=plan.changes, world_size=ranks.world_size, device=device
    )
    for difference in records.what_is_otherwise(before, attempt) if before else []:
        note(difference)
    return attempt


class TrainingSession:
    """Every process makes the same decisions at the same step; only the main one writes."""

    writer: CheckpointWriter
    """On the main process alone, as are the lease and the status, while the session is `restored`."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        images: ImageCache,
        stop: Stop = NEVER,
        held_out: ImageCache | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        """Builds the network and its state on this process's device; the main one may have a tracker. Collective."""
        self.tracking = tracking
        self.plan, self.config, self.ranks, self.images, self.stop = plan, plan.config, ranks, images, stop
        self.judge: Judge | None = None
        self.score = score_name(self.config.evaluate.metrics[0], self.config.evaluate.extractor)
        self.rows: list[metrics.Row] = []
        """Of the metrics, all that this process knows of; on the main one alone."""
        self.held_out, self.objective = held_out, method.objective_of(self.config)
        self.batch_size, self.dataset_images = self.config.train.batch_size, plan.index.images
        self.settings = replace(method.settings_of(self.config), latents=latents_of(plan.index))
        self.hooks = training.Hooks(self._after_step, self._leaves_step)
        self.retention = Retention(self.config, self.dataset_images)
        device = ranks.accelerator.device
        self.decoder = load_decoder(plan.bucket, plan.index, device)
        model = method.build_network(self.config, device)
        self.state = training.create_state(model, device, self.settings)
        if self.config.train.compile and device.type == "cuda":
            model.compile()
        # It is where it belongs; asking whether its parameters are sharded would import a second's worth of modules.
        self.network = ranks.accelerator.prepare_model(model, device_placement=False)
        self.agreement = Agreement(ranks.world_size, flags=4)
        self.agreement_in_step = Agreement(ranks.world_size, flags=1)
        self.last_row: metrics.Row = {}
        self.saved_images = -1
        self.logged_at, self.logged_images = time.monotonic(), 0
        self.step_began, self.waited_seconds = time.monotonic(), 0.0
        self.best_images_per_second = self.lost_seconds = 0.0

    @contextmanager
    def restored(self, attempt: records.Attempt, lease: Lease | None) -> Iterator[None]:
        """The session with the newest checkpoint that verifies loaded, if there is one; ends all writing on leaving.

        Args:
            attempt: this attempt.
            lease: held by the main process; none on the others.
        """
        aside: set[CheckpointRef] = set()
        manifest = self._restore(aside)
        images_seen, number = self.state.images_seen, attempt.fence
        begins = f"going on from epoch {images_seen / self.dataset_images:.1f}" if manifest else "beginning"
        note(f"{begins}, image {images_seen:,}, attempt {number}")
        if lease is None:
            yield
            return
        self.attempt, self.lease = attempt, lease
        self.rows = metrics.read_rows(self.plan.run, manifest.metrics, note) if manifest else []
        self.page_pictures = PictureCache(note)
        leased = LeasedRun(self.plan.run, self._retention(), attempt, lease, aside)
        self.writer = CheckpointWriter(leased, self.state.tensors(), before=manifest, stop=self.stop, note=note)
        self.status = records.StatusReporter(self.plan.run, self._status, note)
        try:
            yield
        except LostRunError:
            # The run's status is the other attempt's now, and nothing more of this one is to arrive.
            with suppress(JobError):
                self.writer.close(wait=False)
            raise
        except BaseException as error:
            # Whatever went wrong here, a checkpoint on its way is a good one: it arrives before that is told.
            try:
                self._close("stopped" if isinstance(error, StoppedError) else "failed")
            except JobError as second:
                if second is not error:
                    note(f"while ending: {second}")
            raise
        else:
            self._close("finished")

    def _close(self, state: str) -> None:
        try:
            self.writer.close(wait=True)
        finally:
            # The lease is to be given back as well.
            self.status.close(state, min(records.STATUS_CLOSE_SECONDS, self.stop.seconds_left() / 2))

    def _restore(self, aside: set[CheckpointRef]) -> Manifest | None:
        """Loads the newest checkpoint, once for all processes, if there is one. Damaged ones go into `aside`."""
        tensors = self.state.tensors()

        def load() -> Manifest | None:
            with newest_good(self.plan.run, note, aside) as restored:
                if restored is None:
                    return None
                restored.copy_into(tensors)
                return restored.manifest

        manifest = self.ranks.on_main(load)
        if manifest is None:
            return None
        if dist.is_initialized():
            for named in tensors.values():
                for tensor in named.values():
                    dist.broadcast(tensor, src=0)
        self.state.resume_at(manifest.images_seen, self.batch_size)
        if self.ranks.is_main:
            # The others begin at zero: the sums are added up over processes.
            self.state.log.sums.copy_(torch.tensor(manifest.loss_sums, dtype=torch.float64))
        self.saved_images = self.logged_images = manifest.images_seen
        return manifest

    def look_at_references(self) -> None:
        """Shows real images to the network by which this run is scored, if it is; collective."""
        if self.config.evaluate.every_epochs:
            from job.evaluation.in_training import Judge

            self.judge = Judge(self.plan, self._painter())

    def train(self) -> None:
        """Runs the loop to the end of the run, or until everyone agreed to stop; then everything is committed."""
        config, state, accelerator = self.config, self.state, self.ranks.accelerator
        shard_images = tuple(shard.images for shard in self.plan.index.shards)
        self.batches = stream_batches(
            self.images,
            Order(shard_images, config.train.seed, config.data.shuffle_block_images),
            batch_size_images=self.batch_size,
            first_image=state.images_seen,
            last_image=self.plan.target_images,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pin_memory=accelerator.device.type == "cuda",
            with_labels=bool(config.model.num_classes),
            stop=self.stop,
        )
        if self.ranks.world_size > 1:
            slots = len(range(self.ranks.rank, self.batch_size, self.ranks.world_size))
            images = min(slots, config.train.micro_batch_size or slots)
            compute.settle_buckets(self.network, config, images, accelerator.device)
        with Progress("training", total=self.plan.target_images, start=state.images_seen) as self.bar:
            # The attempt that saved this checkpoint may not have got that far. What is made up for goes with another.
            if self._is_validation_due(state.images_seen) and self.ranks.on_main(self._lacks_validation):
                self._validate()
                self.saved_images = -1
            if self._is_scoring_due(state.images_seen) and self.ranks.on_main(self._lacks_scores):
                self._score()
                self.saved_images = -1
            if self._is_grid_due(state.images_seen) and self.ranks.on_main(self._lacks_grid):
                self._draw_grid()
                self.ranks.on_main(self._write_page)
            self.logged_at = self.step_began = time.monotonic()
            with closing(self.batches):
                # Each step tells the step after next whether anybody lacks its batch.
                if self._can_all_begin(2):
                    training.train(
                        state, self.network, self.batches, self.objective, self.settings, accelerator, self.hooks
                    )
                self.agreement.finish()
                self.agreement_in_step.finish()
                # Before the stream is closed, which may take its time while a shard does not come.
                self._save()
            stopped = state.images_seen < self.plan.target_images
            if stopped:
                self.stop.request(ANOTHER_PROCESS)
            self.ranks.on_main(lambda: self.writer.wait())
        if stopped:
            raise StoppedError(
                f"stopped by {self.stop.reason} after {state.images_seen:,} images; everything is saved, and the same "
                "command goes on from there"
            )

    def _can_all_begin(self, steps: int) -> bool:
        """Waits until every process has the batches of so many steps; False if one is to stop before. Collective.

        A step that only some processes can begin never ends, and what was learnt before it could not be saved.
        """
        while True:
            lacking, stopping = self.ranks.sum(not self.batches.holds(steps), self.stop())
            if stopping:
                self.stop.request(ANOTHER_PROCESS)
            if not lacking or stopping:
                return not lacking
            time.sleep(_STARVED_POLL_SECONDS)

    def _leaves_step(self) -> bool:
        """Whether all processes leave the step that they are in, in which any of them was asked to stop."""
        (stopping,) = self.agreement_in_step.exchange(self.stop())
        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        return stopping

    def _after_step(self, state: training.TrainState) -> bool:
        """Does what is due; whether all processes stop.

        What any process raised in the step before, all of them see in this one, so that each does the same.
        """
        images, config, is_main = state.images_seen, self.config, self.ranks.is_main
        stopping, save_now, troubled, starved = self.agreement.exchange(
            self.stop(),
            is_main and self.writer.overdue,
            is_main and self.writer.troubled,
            not self.batches.holds(2),
        )
        self._say_if_slow()
        if troubled:
            self.ranks.on_main(lambda: self.writer.raise_trouble())
        if crosses(images, self.batch_size, min(config.log.every_images, self.dataset_images)):
            self._log()
        if not stopping and self._is_validation_due(images):
            try:
                with self._beside_training():
                    self._validate()
            except StoppedError:
                stopping = True
        is_scored = not stopping and self._is_scoring_due(images)
        if is_scored:
            try:
                with self._beside_training():
                    self._score()
            except StoppedError:
                stopping = True
        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        # Before images are waited for, which may never come.
        is_due = self._completes_epoch(images, config.checkpoint.every_epochs)
        if stopping or save_now or is_due or is_scored or self.retention.needs(images):
            self._save()
        self.step_began = time.monotonic()
        stopping = stopping or (starved and not self._can_all_begin(1))
        self.waited_seconds = time.monotonic() - self.step_began
        if not stopping and self._is_grid_due(images):
            try:
                with self._beside_training():
                    self._draw_grid()
                    self.ranks.on_main(self._write_page)
            except StoppedError:
                # On every process at once, between two steps: what was learnt is saved as after any other.
                self.stop.request(ANOTHER_PROCESS)
                stopping = True
        self._show(images)
        return stopping

    def _say_if_slow(self) -> None:
        """Says once that seconds were lost in steps much slower than the best row of the log, and why it may be."""
        step_seconds = time.monotonic() - self.step_began
        usual_seconds = self.batch_size / (self.best_images_per_second or 1e-9)
        # A hiccup now and then is none.
        self.lost_seconds *= 0.99
        if step_seconds < SLOW_FACTOR * usual_seconds:
            return
        self.lost_seconds += step_seconds - usual_seconds
        if self.lost_seconds > SLOW_SECONDS:
            # Once is enough.
            self.lost_seconds = float("-inf")
            cause = compute.why_slow(step_seconds, self.waited_seconds)
            note(f"a step took {step_seconds:.1f} s, and {usual_seconds:.1f} s when it went well: {cause}")

    def _log(self) -> None:
        training.check_finite(self.state)
        state, now = self.state, time.monotonic()
        losses = training.loss_row(state.log.reduced())
        rate = (state.images_seen - self.logged_images) / (now - self.logged_at)
        self.best_images_per_second = max(self.best_images_per_second, rate)
        state.log.sums.zero_()
        self.last_row = {
            "images_seen": state.images_seen,
            "epoch": round(state.images_seen / self.dataset_images, 4),
            **losses,
            "learning_rate": self.settings.optimizer.learning_rate_at(
                state.images_seen - self.batch_size, self.batch_size
            ),
            "ema_decay": self.settings.averages["ema"].decay_at(state.images_seen, self.batch_size),
            "images_per_second": round(rate, 2),
            "memory_bytes": compute.peak_memory_bytes(self.ranks.accelerator.device),
            "time": round(time.time(), 3),
        }
        self._record(self.last_row)
        self.logged_at, self.logged_images = now, state.images_seen

    def _record(self, row: metrics.Row) -> None:
        """Has a row go with the next checkpoint."""
        if self.ranks.is_main:
            self.writer.rows.append(row)
            self.rows.append(row)
            if self.tracking is not None:
                self.tracking.log(row)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """What happens between two steps does not count as a slow step, nor as time in which images were learnt."""
        began = time.monotonic()
        yield
        self.step_began = time.monotonic()
        self.logged_at += self.step_began - began

    def _save(self) -> None:
        """Queues a checkpoint of this moment, unless there is one; collective."""
        images_seen = self.state.images_seen
        if images_seen == self.saved_images:
            return
        training.check_finite(self.state)
        loss_sums = self.state.log.reduced()
        # A run that is stopped before its first row has a loss all the same.
        self.last_row = self.last_row or training.loss_row(loss_sums)
        self.saved_images = images_seen
        self.ranks.on_main(lambda: self.writer.save(images_seen, loss_sums.tolist()))

    def _is_validation_due(self, images_seen: int) -> bool:
        every, is_last = self.config.log.validate_epochs, images_seen == self.plan.target_images
        return self.held_out is not None and (is_last or self._completes_epoch(images_seen, every))

    def _lacks_validation(self) -> bool:
        rows = metrics.read_rows(self.plan.run, self.writer.saved_metrics[-2:], note)
        return not any("val_loss" in row and row["images_seen"] == self.state.images_seen for row in rows)

    def _validate(self) -> None:
        """Logs the loss of the averaged weights on held-out images; collective."""
        assert self.held_out is not None
        config, images_seen = self.config, self.state.images_seen
        painter = Painter(config, self.ranks, config.train.precision, self.stop, self.agreement_in_step)
        self.state.averages["ema"].copy_to(painter.network)
        losses = validation_row(
            painter,
            self.held_out,
            self.objective,
            config.log.validate_images,
            config.sample.batch_size,
            self.settings.latents,
        )
        if self.ranks.is_main:
            epoch, now = round(images_seen / self.dataset_images, 4), round(time.time(), 3)
            self._record({"images_seen": images_seen, "epoch": epoch, **losses, "time": now})

    def _is_scoring_due(self, images_seen: int) -> bool:
        every = self.config.evaluate.every_epochs
        is_last = images_seen == self.plan.target_images
        return bool(every) and (is_last or self._completes_epoch(images_seen, every))

    def _lacks_scores(self) -> bool:
        rows = metrics.read_rows(self.plan.run, self.writer.saved_metrics[-2:], note)
        return not any(self.score in row and row["images_seen"] == self.state.images_seen for row in rows)

    def _score(self) -> None:
        """Logs the scores of what the run draws, and has the best checkpoint stay; collective."""
        assert self.judge is not None
        row = self.judge.row(self._painter())
        if self.ranks.is_main:
            images_seen = self.state.images_seen
            epoch, now = round(images_seen / self.dataset_images, 4), round(time.time(), 3)
            self._record({"images_seen": images_seen, "epoch": epoch, **row, "time": now})
            self.writer.retention = self._retention()
            scored = [row for row in self.rows if self.score in row]
            figure = figures.scores_figure(scored, self.dataset_images, self.plan.request.run)
            self.writer.put(SCORES_FIGURE, figure, images_seen=images_seen)

    def _retention(self) -> Retention:
        """The run's rules, and the best checkpoint by its scores so far."""
        best = best_images_seen(self.config, self.rows)
        return Retention(self.config, self.dataset_images, best)

    def _lacks_grid(self) -> bool:
        return not self.plan.run.exists(self._grid_key())

    def _grid_key(self) -> str:
        """Where the sample grid of this moment lies."""
        label = label_of(self.state.images_seen, self.dataset_images, self.batch_size)
        return grid_key(label, self.config.sample.name(self.plan.own))

    def _title(self, seeds: Sequence[int]) -> str:
        """What a picture of this moment shows."""
        label = label_of(self.state.images_seen, self.dataset_images, self.batch_size)
        return title_of(self.plan.run, moment_of(label), self.config.sample.words(self.plan.own), seeds)

    def _painter(self) -> Painter:
        """What draws as the run does, with the weights of this moment."""
        config, sample = self.config, self.config.sample
        precision = config.train.precision if sample.precision == "auto" else sample.precision
        painter = Painter(config, self.ranks, precision, self.stop, self.agreement_in_step, self.decoder)
        if sample.weights == "model":
            painter.network.load_state_dict(self.state.model.state_dict())
        else:
            self.state.averages[sample.weights].copy_to(painter.network)
        return painter

    def _draw_grid(self) -> Painter:
        """Makes the sample grid of this moment; collective."""
        sample, images_seen, painter = self.config.sample, self.state.images_seen, self._painter()
        seeds = range(sample.images)
        drawn = painter.draw_together(seeds, method.sampling_of(sample), sample.batch_size, "sampling")

        def publish() -> None:
            learnt = self._pictures() if sample.nearest else None
            grid = grid_png(drawn, seeds, self.plan.drawn_classes, learnt, self.stop, self._title(seeds))
            self.writer.put(self._grid_key(), grid, images_seen=images_seen)
            ref = CheckpointRef(self.attempt.fence, images_seen)
            events = metrics.grid_events(grid, images_seen)
            self.writer.put(ObjectKind.GRID_EVENTS.key(checkpoint=ref), events, images_seen=images_seen)

        self.ranks.on_main(publish)
        return painter

    def _pictures(self) -> ImageCache:
        """The images that people see."""
        pictures = self.plan.pictures()
        return self.images if pictures is self.plan.index else self.plan.opened_images(self.stop, index=pictures)

    def _is_grid_due(self, images_seen: int) -> bool:
        """Whether a grid of this moment belongs to the run; the last one is made by `finish`."""
        every = self.config.sample.every_epochs
        return bool(every) and images_seen < self.plan.target_images and self._completes_epoch(images_seen, every)

    def _completes_epoch(self, images_seen: int, every: int) -> bool:
        """Whether this is the end of an epoch, of each `every`-th one."""
        epochs = epochs_completed_by(images_seen, self.dataset_images, self.batch_size)
        return any(epoch % every == 0 for epoch in epochs)

    def finish(self) -> None:
        """Makes the last pictures; collective."""
        painter, images_seen = self._draw_grid(), self.state.images_seen

        def publish() -> None:
            label = label_of(images_seen, self.dataset_images, self.batch_size)
            sample = self.config.sample
            title = with_class(self._title(range(GIF_SEEDS)), self.plan.drawn_classes)
            gif = painter.denoising_gif(range(GIF_SEEDS), method.sampling_of(sample), title)
            self.writer.put(denoising_key(label, sample.name(self.plan.own)), gif, images_seen=images_seen)
            title = f"{self.plan.request.run} · {moment_of(label)} of {self.config.train.epochs:,}"
            figure = figures.loss_figure(self.rows, self.dataset_images, title)
            self.writer.put(LOSS_FIGURE, figure, images_seen=images_seen)
            self._write_page("finished")
            self.writer.wait()

        self.ranks.on_main(publish)

    def _write_page(self, state: str = "running") -> None:
        """Has the run's page written as it is now."""
        status, rows, plan = self._going(state), list(self.rows), self.plan

        def write(run: Store) -> None:
            found = FoundRun(plan.bucket, run.within(PAGE_PATIENCE_SECONDS), plan.index, self.config, plan.own)
            try:
                self.lease.confirm()
                put_page(facts_of(found, plan.request.run, rows, status), self.page_pictures)
            except Exception as error:
                # Whatever is wrong with it, what is learnt does not depend on a page.
                note(f"the run's page is as it was before: {type(error).__name__}: {error}")

        self.writer.do_later(write)

    def _show(self, images_seen: int) -> None:
        """What is beside the bar is from the last row of the log, since reading the loss would wait for the device."""
        epoch, every = images_seen / self.dataset_images, self.config.checkpoint.every_epochs
        shown = {"loss": f"{self.last_row['loss']:.4f}"} if "loss" in self.last_row else {}
        shown["epoch"] = f"{epoch:.1f}/{self.config.train.epochs}"
        shown["next_checkpoint"] = f"epoch {min((int(epoch) // every + 1) * every, self.config.train.epochs)}"
        self.bar.update(images_seen, total=self.plan.target_images, **shown)

    def _status(self, state: str) -> records.Status:
        # Whoever slept and was replaced must not say on waking how the run was going then.
        self.lease.confirm()
        return self._going(state)

    def _going(self, state: str) -> records.Status:
        images_seen = self.state.images_seen
        return records.Status(
            state=state,
            fence=self.attempt.fence,
            attempt=self.attempt.id,
            images_seen=images_seen,
            target_images=self.plan.target_images,
            epoch=round(images_seen / self.dataset_images, 3),
            loss=self.last_row.get("loss"),
            images_per_second=self.last_row.get("images_per_second"),
            updated=utc_now(),
        )
