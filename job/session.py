"""One attempt at a run on one process: the state on the device, and what is due after each step.

Everything that decides what is learnt happens in `ddpm.training`. Here it is connected to a bucket: which images come
in, when a checkpoint goes out, who is told how it goes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

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
from job.config import RunConfig
from job.data.cache import ImageCache
from job.data.order import Order
from job.data.stream import BatchStream, stream_batches
from job.exits import JobError, LostRunError, NotANumberError, StoppedError
from job.plan import Plan
from job.processes import compute
from job.processes.ranks import Agreement, Ranks
from job.progress import Progress
from job.requests import GIF_SEEDS
from job.runs import metrics, records
from job.runs.checkpoints import CheckpointRef, MetricSegment
from job.runs.commits import Commits
from job.runs.lease import Lease
from job.runs.records import Attempt
from job.runs.restoring import newest_good
from job.runs.retention import Retention
from job.runs.status import CLOSE_SECONDS, StatusReporter
from job.sampling.sample import SAMPLES, Painter, default_sampling, draw_run_grid, label_of, run_grid_key
from job.stop import NEVER, Stop
from job.store.retry import DEADLINE_SECONDS

ANOTHER_PROCESS = "another process"
"""Why a process stops that was not asked itself."""
_STARVED_POLL_SECONDS = 0.02


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
    """Every process makes the same decisions at the same step; only the main one writes."""

    batches: BatchStream
    """What `train` goes through."""

    def __init__(self, plan: Plan, config: RunConfig, ranks: Ranks, cache: ImageCache, stop: Stop = NEVER) -> None:
        """Builds the network and its state on this process's device. Collective."""
        self.plan, self.config, self.ranks = plan, config, ranks
        self.cache, self.stop = cache, stop
        self.batch_size, self.dataset_images = config.train.batch_size, plan.index.images
        self.retention = Retention.of(config)
        device = ranks.accelerator.device
        model = compute.build_network(config, device)
        self.state = create_state(model, device, config.train.adam_betas, config.train.adam_eps)
        if config.train.compile and device.type == "cuda":
            model.compile()
        # It is where it belongs; asking whether its parameters are sharded would import a second's worth of modules.
        self.network = ranks.accelerator.prepare_model(model, device_placement=False)
        self.agreement = Agreement(ranks.world_size, flags=4)
        self.agreement_on_painting = Agreement(ranks.world_size, flags=1)
        self.bar = Progress("training", total=plan.target_images, unit="images", disable=not ranks.is_main)
        self.commits: Commits | None = None
        self.set_aside: set[CheckpointRef] = set()
        """Checkpoints that were found not to verify."""
        self.status: StatusReporter | None = None
        self.last_row: metrics.Row = {}
        self.committed_images = -1
        self.logged_at, self.logged_images = time.monotonic(), 0

    @contextmanager
    def restored(self, attempt: Attempt, lease: Lease | None) -> Iterator[None]:
        """The session with the newest checkpoint that verifies loaded, if there is one; ends all writing on leaving.

        Args:
            attempt: this attempt.
            lease: held by the main process; none on the others.
        """
        segments = self._restore()
        if lease is not None:
            run = self.plan.run
            self.commits = Commits(
                run,
                self.config,
                attempt,
                lease,
                self.state.tensors(),
                dataset_images=self.dataset_images,
                segments=segments,
                aside=self.set_aside,
                stop=self.stop,
                note=self.bar.note,
            )

            def status(state: str) -> records.Status:
                # Whoever slept and was replaced must not say on waking how the run was going then.
                lease.confirm()
                return self._status(state, attempt)

            self.status = StatusReporter(run.within(DEADLINE_SECONDS), status, self.bar.note)
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise
        self._close("finished", wait=True)

    def _restore(self) -> list[MetricSegment]:
        tensors = self.state.tensors()

        def load() -> tuple[int, list[list[float]], list[MetricSegment]] | None:
            groups = ("model", "ema", "optimizer")
            with newest_good(self.plan.run, groups, self.bar.note, self.set_aside) as restored:
                if restored is None:
                    return None
                restored.copy_into(tensors)
                manifest = restored.manifest
                return manifest.images_seen, manifest.loss_sums, list(manifest.metric_segments)

        found = self.ranks.on_main(load)
        if found is None:
            return []
        images_seen, loss_sums, segments = found
        if dist.is_initialized():
            for named in tensors.values():
                for tensor in named.values():
                    dist.broadcast(tensor, src=0)
        self.state.resume_at(images_seen, self.batch_size)
        if self.ranks.is_main:
            # The others begin at zero: the sums are added up over processes.
            self.state.log.sums.copy_(torch.tensor(loss_sums))
        self.committed_images = self.logged_images = images_seen
        return segments

    def train(self) -> None:
        """Runs the loop to the end of the run, or until everyone agreed to stop; then everything is committed."""
        config, index = self.config, self.plan.index
        accelerator = self.ranks.accelerator
        order = Order(tuple(s.images for s in index.shards), config.train.seed, config.data.shuffle_block_images)
        self.batches = stream_batches(
            self.cache,
            order,
            batch_size_images=self.batch_size,
            first_image=self.state.images_seen,
            last_image=self.plan.target_images,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pin_memory=accelerator.device.type == "cuda",
            with_labels=bool(config.model.num_classes),
            stop=self.stop,
        )
        schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(accelerator.device)
        objective = Objective(schedule, config.diffusion.prediction, config.diffusion.min_snr_gamma)
        self.logged_at = time.monotonic()
        with self.bar.started_at(self.state.images_seen):
            self._draw_missed()
            with closing(self.batches):
                # Each step tells the step after next whether anybody lacks its batch.
                if self._can_all_begin(2):
                    train(
                        self.state, self.network, self.batches, objective, settings_of(config), accelerator, self.hooks
                    )
                self.agreement.finish()
                # Before the stream is closed, which may take its time while a shard does not come.
                self._save()
            stopped = self.state.images_seen < self.plan.target_images
            if stopped:
                self.stop.request(ANOTHER_PROCESS)
            self.ranks.on_main(lambda: self.commits.wait() if self.commits else None)
        if stopped:
            raise StoppedError(
                f"stopped by {self.stop.reason} after {self.state.images_seen:,} images; "
                "everything is saved, and the same command goes on from there"
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

    @property
    def hooks(self) -> Hooks:
        """What the loop calls."""
        return Hooks(after_step=self._after_step)

    def _after_step(self, state: TrainState) -> bool:
        images, config, commits = state.images_seen, self.config, self.commits
        completed = epochs_completed_by(images, self.dataset_images, self.batch_size)
        stopping, save_now, troubled, starved = self.agreement.exchange(
            self.stop(),
            commits is not None and commits.overdue,
            commits is not None and commits.troubled,
            not self.batches.holds(2),
        )
        if troubled:
            self.ranks.on_main(lambda: commits.raise_trouble() if commits else None)
        if crosses(images, self.batch_size, min(config.log.every_images, self.dataset_images)):
            self._log()
        every = config.checkpoint.every_epochs
        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        # Before images are waited for, which may never come.
        if stopping or save_now or any(e % every == 0 or self.retention.keeps_epoch(e) for e in completed):
            self._save()
        stopping = stopping or (starved and not self._can_all_begin(1))
        if not stopping and self._is_grid_due(images):
            try:
                self.draw()
            except StoppedError:
                # On every process at once, between two steps: what was learnt is saved as after any other.
                self.stop.request(ANOTHER_PROCESS)
                stopping = True
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
        if self.commits is not None:
            self.commits.rows.append(self.last_row)
        self.logged_at, self.logged_images = now, state.images_seen

    def _save(self) -> None:
        """Queues a checkpoint of this moment, unless there is one; collective."""
        images_seen = self.state.images_seen
        if images_seen == self.committed_images:
            return
        self._check_finite()
        loss_sums = self.state.log.reduced().tolist()
        self.committed_images = images_seen
        self.ranks.on_main(
            lambda: self.commits.save(images_seen, loss_sums, self.ranks.world_size) if self.commits else None
        )

    def _check_finite(self) -> None:
        try:
            check_finite(self.state)
        except NonFiniteError as error:
            raise NotANumberError(
                f"{error}; what {self.plan.run.uri} holds is from before. It would happen again at the same image: "
                "start another run with a lower train.learning_rate, or with train.precision=fp32"
            ) from None

    def draw(self) -> Painter:
        """Makes the sample grid of this moment from the averaged weights; collective."""
        plan, config = self.plan, self.config
        painter = Painter(config, self.ranks, config.train.precision, self.stop, self.agreement_on_painting)
        self.state.ema.copy_to(painter.network)
        draw_run_grid(self._put, painter, plan.index, self.state.images_seen, self.cache)
        return painter

    def _is_grid_due(self, images_seen: int) -> bool:
        """Whether a grid of this moment belongs to the run; the last one is made by `finish`."""
        every = self.config.sample.every_epochs
        completed = epochs_completed_by(images_seen, self.dataset_images, self.batch_size)
        return bool(every) and images_seen < self.plan.target_images and any(e % every == 0 for e in completed)

    def _draw_missed(self) -> None:
        """Draws the restored checkpoint's grid if the attempt that saved it did not get that far; collective."""
        images_seen, run = self.state.images_seen, self.plan.run
        if self._is_grid_due(images_seen):
            key = run_grid_key(self.config, self.dataset_images, images_seen)
            if self.ranks.on_main(lambda: not run.exists(key)):
                self.draw()

    def finish(self) -> None:
        """Makes the last pictures; collective."""
        painter, run = self.draw(), self.plan.run

        def publish() -> None:
            assert self.commits is not None
            label = label_of(self.state.images_seen, self.dataset_images, self.batch_size)
            gif = painter.denoising_gif(range(GIF_SEEDS), default_sampling(self.config))
            self._put(f"{SAMPLES}/denoising-{label}.gif", gif)
            rows = metrics.read_rows(run, self.commits.segments)
            self._put("figures/loss.png", figures.loss_figure(rows, self.dataset_images))
            self.commits.wait()

        self.ranks.on_main(publish)

    def _put(self, key: str, picture: bytes) -> None:
        assert self.commits is not None
        self.commits.put(key, picture, images_seen=self.state.images_seen)

    def _bar_fields(self) -> dict[str, str]:
        """Text beside the bar; from the last row of the log, since reading the loss would wait for the device."""
        if not self.ranks.is_main:
            return {}
        epoch = self.state.images_seen / self.dataset_images
        fields = {"epoch": f"{epoch:.1f}/{self.config.train.epochs}"}
        if "loss" in self.last_row:
            fields["loss"] = f"{self.last_row['loss']:.4f}"
        every = self.config.checkpoint.every_epochs
        fields["next_checkpoint"] = f"epoch {(int(epoch) // every + 1) * every}"
        return fields

    def _status(self, state: str, attempt: Attempt) -> records.Status:
        images = self.state.images_seen
        return records.Status(
            state=state,
            fence=attempt.fence,
            attempt=attempt.id,
            images_seen=images,
            target_images=self.plan.target_images,
            epoch=round(images / self.dataset_images, 3),
            loss=self.last_row.get("loss"),
            images_per_second=self.last_row.get("images_per_second"),
            updated=records.utc_now(),
        )

    def _end(self, error: BaseException) -> None:
        if isinstance(error, LostRunError):
            # The run's status is the other attempt's now.
            self.status = None
        try:
            # Whatever went wrong here, a checkpoint on its way is a good one: let it arrive before that is told.
            wait = not isinstance(error, LostRunError)
            self._close("stopped" if isinstance(error, StoppedError) else "failed", wait)
        except JobError as second:
            if second is not error:
                self.bar.note(f"while ending: {second}")

    def _close(self, state: str, wait: bool) -> None:
        try:
            if self.commits is not None:
                self.commits.close(wait)
        finally:
            if self.status is not None:
                # The lease is to be given back as well.
                self.status.close(state, min(CLOSE_SECONDS, self.stop.seconds_left() / 2))
