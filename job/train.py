"""`ddpm train`: begins a run or goes on with it. There is no resume flag; the same command does both.

Everything that decides what is learnt happens in `ddpm.training`. Here it is connected to a bucket: which images come
in, when a checkpoint goes out, who is told how it goes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ddpm import figures
from ddpm.ema import ema_decay
from ddpm.epochs import crosses, epochs_completed_by
from ddpm.objective import Objective
from ddpm.schedule import make_schedule
from ddpm.training import (
    Hooks,
    NonFiniteError,
    Settings,
    TrainState,
    check_finite,
    create_state,
    learning_rate_at,
    loss_row,
    train,
)
from job import __version__, compute, metrics, runs
from job.checkpoints import (
    CheckpointRef,
    Manifest,
    MetricSegment,
    Retention,
    delete_checkpoint,
    list_checkpoints,
    newest_good,
)
from job.config import RunConfig, content_hash
from job.data.cache import ImageCache, default_cache_dir, open_cache
from job.data.order import Order
from job.data.stream import stream_batches
from job.exits import JobError, NotANumberError, StoppedError
from job.plan import Plan, plan_run
from job.progress import Progress
from job.requests import TrainRequest
from job.runs import Attempt
from job.sample import GIF_SEEDS, SAMPLES, Painter, default_sampling, draw_run_grid, label_of
from job.saving import CheckpointWriter, Save
from job.status import StatusReporter
from job.stopping import Agreement, StopFlag

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_training(request: TrainRequest, stop: StopFlag) -> None:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Raises:
        StoppedError: a signal came; the state is committed, the same command goes on.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        JobError: see the message.
    """
    plan = plan_run(request)
    precision = plan.config.train.precision
    if precision == "auto":
        precision = compute.best_precision()
    accelerator = compute.build_accelerator(precision, plan.config.train.deterministic)
    config, attempt = compute.on_main_first(accelerator, lambda: _begin(plan, precision, accelerator.num_processes))
    with Progress(
        "reading images", unit="images", total=plan.index.images, disable=not accelerator.is_main_process
    ) as bar:
        cache = open_cache(
            plan.bucket,
            plan.dataset_key,
            plan.index,
            cache_dir=default_cache_dir(),
            budget_bytes=int(config.data.cache_gigabytes * 1e9),
            progress=lambda done, total: bar.update(done),
            should_stop=stop,
        )
    session = TrainingSession(plan, config, attempt, accelerator, cache, stop)
    session.restore()
    session.train()
    session.finish()
    accelerator.end_training()


def _begin(plan: Plan, precision: str, world_size: int) -> tuple[RunConfig, Attempt]:
    config = plan.config
    if plan.is_new:
        resolved = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
        config = runs.create_config(plan.run, resolved)
    return config, runs.new_attempt(plan.run, plan.changes, world_size)


def settings_of(config: RunConfig) -> Settings:
    """The loop's settings from a run's configuration."""
    return Settings(
        batch_size_images=config.train.batch_size,
        micro_batch_size_images=config.train.micro_batch_size,
        learning_rate=config.train.learning_rate,
        warmup_images=config.train.warmup_images,
        clip_norm=config.train.clip_norm,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        seed=config.train.seed,
        flip=config.data.flip,
        dropout=config.model.dropout,
    )


class TrainingSession:
    """One attempt at a run on this process: the state on the device, and what is due after each step.

    Every process makes the same decisions at the same step; only the main one writes.
    """

    def __init__(
        self,
        plan: Plan,
        config: RunConfig,
        attempt: Attempt,
        accelerator: Accelerator,
        cache: ImageCache,
        stop: StopFlag,
    ) -> None:
        self.plan, self.config, self.attempt, self.accelerator = plan, config, attempt, accelerator
        self.cache, self.stop = cache, stop
        self.main = accelerator.is_main_process
        self.batch_size, self.dataset_images = config.train.batch_size, plan.index.images
        keep = config.checkpoint
        self.retention = Retention(keep.keep_last, keep.keep_every_epochs, keep.keep_epochs)
        device = accelerator.device
        model = compute.build_network(config, device)
        self.state = create_state(model, device)
        if config.train.compile and device.type == "cuda":
            model.compile()
        self.network = accelerator.prepare_model(model)
        self.agreement = Agreement(accelerator.num_processes, flags=2)
        self.bar = Progress("training", total=plan.target_images, unit="images", disable=not self.main)
        self.writer: CheckpointWriter | None = None
        self.status: StatusReporter | None = None
        self.rows: list[metrics.Row] = []
        self.segments: list[MetricSegment] = []
        self.last_row: metrics.Row = {}
        self.committed_images = -1
        self.saved_at = self.logged_at = time.monotonic()
        self.logged_images = 0

    def restore(self) -> None:
        """Loads the newest checkpoint that verifies into the state of every process, if there is one."""
        tensors = self.state.tensors()

        def load() -> tuple[int, list[list[float]], list[MetricSegment]] | None:
            with newest_good(self.plan.run, ("model", "ema", "optimizer"), self.bar.note) as restored:
                if restored is None:
                    return None
                restored.copy_into(tensors)
                manifest = restored.manifest
                return manifest.images_seen, manifest.loss_sums, list(manifest.metric_segments)

        found = compute.on_main_first(self.accelerator, load)
        if found is not None:
            images_seen, loss_sums, self.segments = found
            if dist.is_initialized():
                for named in tensors.values():
                    for tensor in named.values():
                        dist.broadcast(tensor, src=0)
            self.state.resume_at(images_seen, self.batch_size)
            if self.main:
                # The others begin at zero: the sums are added up over processes.
                self.state.log.sums.copy_(torch.tensor(loss_sums))
            self.committed_images = images_seen
        self.logged_images = self.state.images_seen
        if self.main:
            self.writer = CheckpointWriter(self.plan.run, tensors, self._after_commit)
            self.status = StatusReporter(self.plan.run, self._status, self.bar.note)

    def train(self) -> None:
        """Runs the loop to the end of the run, or until everyone agreed to stop."""
        config, index = self.config, self.plan.index
        order = Order(tuple(s.images for s in index.shards), config.train.seed, config.data.shuffle_block_images)
        batches = stream_batches(
            self.cache,
            order,
            batch_size_images=self.batch_size,
            first_image=self.state.images_seen,
            last_image=self.plan.target_images,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(self.accelerator.device)
        objective = Objective(schedule, config.diffusion.prediction, config.diffusion.min_snr_gamma)
        try:
            with self.bar.started_at(self.state.images_seen):
                train(self.state, self.network, batches, objective, settings_of(config), self.accelerator, self.hooks)
                self.agreement.finish()
                self._save()
                if self.writer is not None:
                    self.writer.wait()
        except BaseException as error:
            self._fail(error)
            raise
        if self.state.images_seen < self.plan.target_images:
            self._close("stopped")
            raise StoppedError(
                f"stopped by {self.stop.reason or 'another process'} after {self.state.images_seen:,} images; "
                "everything is saved, and the same command goes on from there"
            )

    @property
    def hooks(self) -> Hooks:
        """What the loop calls."""
        return Hooks(after_step=self._after_step)

    def _after_step(self, state: TrainState) -> bool:
        images, config = state.images_seen, self.config
        completed = epochs_completed_by(images, self.dataset_images, self.batch_size)
        minutes = (time.monotonic() - self.saved_at) / 60
        overdue = self.writer is not None and minutes >= config.checkpoint.every_minutes and not self.writer.busy
        stopping, save_now = self.agreement.exchange(self.stop(), overdue)
        if crosses(images, self.batch_size, config.log.every_images):
            self._log()
        every = config.checkpoint.every_epochs
        if stopping or save_now or any(e % every == 0 or self.retention.keeps_epoch(e) for e in completed):
            self._save()
        every = config.sample.every_epochs
        if every and not stopping and images < self.plan.target_images and any(e % every == 0 for e in completed):
            self.draw()
        self.bar.update(images, total=None, **self._bar_fields())
        return stopping

    def _log(self) -> None:
        self._check_finite()
        state, now = self.state, time.monotonic()
        losses = loss_row(state.log.reduced())
        state.log.sums.zero_()
        previous = state.images_seen - self.batch_size
        self.last_row = {
            "images_seen": state.images_seen,
            "epoch": round(state.images_seen / self.dataset_images, 4),
            **losses,
            "learning_rate": learning_rate_at(previous, settings_of(self.config)),
            "ema_decay": ema_decay(state.images_seen, self.batch_size, self.config.ema.decay, self.config.ema.warmup),
            "images_per_second": round((state.images_seen - self.logged_images) / (now - self.logged_at), 2),
            "time": round(time.time(), 3),
        }
        self.rows.append(self.last_row)
        self.logged_at, self.logged_images = now, state.images_seen

    def _save(self) -> None:
        """Queues a checkpoint of this moment, unless there is one; collective."""
        state = self.state
        if state.images_seen == self.committed_images:
            return
        self._check_finite()
        loss_sums = state.log.reduced().tolist()
        self.committed_images, self.saved_at = state.images_seen, time.monotonic()
        if self.writer is None:
            return
        ref = CheckpointRef(self.attempt.fence, state.images_seen)
        objects: dict[str, bytes] = {}
        if self.rows:
            segment, objects = metrics.segment_objects(self.rows, ref)
            self.segments.append(segment)
            self.rows = []
        completed = epochs_completed_by(state.images_seen, self.dataset_images, self.batch_size)
        manifest = Manifest(
            fence=ref.fence,
            attempt=self.attempt.id,
            images_seen=ref.images_seen,
            epoch=completed[-1] if completed else None,
            created=runs.utc_now(),
            code_version=__version__,
            config_sha256=content_hash(self.config),
            world_size=self.accelerator.num_processes,
            loss_sums=loss_sums,
            files=(),
            metric_segments=tuple(self.segments),
        )
        self.writer.save(Save(manifest, objects))

    def _check_finite(self) -> None:
        try:
            check_finite(self.state)
        except NonFiniteError as error:
            raise NotANumberError(
                f"{error}; the last checkpoint in {self.plan.run.uri} is from before. It would happen again at the "
                "same image: start another run with a lower train.learning_rate, or with train.precision=fp32"
            ) from None

    def _after_commit(self, manifest: Manifest) -> None:
        run = self.plan.run
        for ref in self.retention.retire(list_checkpoints(run), self.dataset_images, self.batch_size):
            delete_checkpoint(run, ref)

    def draw(self) -> Painter:
        """Makes the sample grid of this moment from the averaged weights; collective."""
        plan, config = self.plan, self.config
        painter = Painter(config, self.accelerator, config.train.precision, self.stop)
        self.state.ema.copy_to(painter.network)
        draw_run_grid(plan.run, painter, plan.index, self.state.images_seen, self.cache)
        return painter

    def finish(self) -> None:
        """Makes the last pictures and ends the run; collective."""
        run = self.plan.run
        try:
            painter = self.draw()
            if self.main:
                label = label_of(self.state.images_seen, self.dataset_images, self.batch_size)
                gif = painter.denoising_gif(range(GIF_SEEDS), default_sampling(self.config))
                run.put(f"{SAMPLES}/denoising-{label}.gif", gif)
                rows = metrics.read_rows(run, self.segments)
                run.put("figures/loss.png", figures.loss_figure(rows, self.dataset_images))
        except BaseException as error:
            self._fail(error)
            raise
        self._close("finished")

    def _bar_fields(self) -> dict[str, str]:
        """Text beside the bar; from the last row of the log, since reading the loss would wait for the device."""
        if not self.main:
            return {}
        epoch = self.state.images_seen / self.dataset_images
        fields = {"epoch": f"{epoch:.1f}/{self.config.train.epochs}"}
        if "loss" in self.last_row:
            fields["loss"] = f"{self.last_row['loss']:.4f}"
        every = self.config.checkpoint.every_epochs
        fields["next_checkpoint"] = f"epoch {(int(epoch) // every + 1) * every}"
        return fields

    def _status(self, state: str) -> runs.Status:
        images = self.state.images_seen
        return runs.Status(
            state=state,
            fence=self.attempt.fence,
            images_seen=images,
            target_images=self.plan.target_images,
            epoch=round(images / self.dataset_images, 3),
            loss=self.last_row.get("loss"),
            images_per_second=self.last_row.get("images_per_second"),
            updated=runs.utc_now(),
        )

    def _fail(self, error: BaseException) -> None:
        # The checkpoint on its way is a good one: let it arrive before the error is reported.
        try:
            self._close("stopped" if isinstance(error, StoppedError) else "failed")
        except JobError as second:
            if second is error:
                return
            self.bar.note(f"while ending: {second}")

    def _close(self, state: str) -> None:
        if self.status is not None:
            self.status.close(state)
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
