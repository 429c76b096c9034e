"""Training on one process: its state on the device, the loop, and everything that is due after a step.

`ddpm.training` decides what is learnt. This module connects it to a bucket: which images come in, and when a checkpoint
goes out. All processes call a collective method at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ddpm import training
from ddpm.epochs import crosses
from ddpm.optimizer import learning_rate_at
from ddpm.slots import Slots
from ddpm.state import TrainState, check_finite, loss_row
from ddpm.threads import threads_of
from job.config import RunConfig, method
from job.data.autoencoder import latents_of, load_decoder
from job.data.cache import ImageCache
from job.data.order import order_of
from job.data.stream import stream_batches
from job.exits import StoppedError
from job.plan import Plan
from job.processes import compute
from job.processes.ranks import Agreement, Ranks, build_accelerator
from job.progress import Progress
from job.runs.retention import Retention
from job.stop import NEVER, Stop
from job.training.interludes import Grid, Interlude, Scoring, Validation
from job.training.pace import Pace
from job.training.reporting import Recorder

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

ANOTHER_PROCESS = "another process"
"""The reason of a process that stops because another one was asked to."""
_STARVED_POLL_SECONDS = 0.02


def wrapped(
    model: nn.Module, config: RunConfig, ranks: Ranks, accelerator: Accelerator, slots: Slots | None
) -> nn.Module:
    """Returns the model compiled if so configured, and wrapped for autocast and, without slots, for DDP. Collective."""
    device, batch_size = ranks.device, config.train.batch_size
    if config.train.compile and device.type == "cuda":
        model.compile()
    # It is on its device: asking whether its parameters are sharded would import a second's worth of modules.
    # In evaluation mode it is not wrapped for DDP.
    network: nn.Module = accelerator.prepare_model(model, device_placement=False, evaluation_mode=slots is not None)
    if ranks.world_size > 1 and slots is None:
        images = len(range(ranks.rank, batch_size, ranks.world_size))
        compute.settle_buckets(network, config, min(images, config.train.micro_batch_size or images), device)
    return network


class Loop:
    """The parts of `ddpm.training.train` on one process of a run.

    Attributes:
        batches: to be closed.
    """

    def __init__(
        self,
        config: RunConfig,
        images: ImageCache,
        ranks: Ranks,
        state: TrainState,
        *,
        last_image: int,
        stop: Stop,
    ) -> None:
        """Prepares the network and the batches from the state's image on. Collective.

        Args:
            config: that of the attempt.
            images: the dataset.
            ranks: all processes.
            state: new, or restored from a checkpoint.
            last_image: see `stream_batches`.
            stop: asked all the while.
        """
        self.config, self.images, self.ranks, self.state, self.stop = config, images, ranks, state, stop
        self.batch_size, self.device = config.train.batch_size, ranks.device
        self.objective = method.objective_of(config)
        self.settings = replace(method.settings_of(config), latents=latents_of(images.index))
        self.slots = compute.slots_of(config.train, ranks)
        self.threads = threads_of(self.device, config.train.slot_threads or 1) if self.slots else None
        self.accelerator = build_accelerator(config.train.precision, deterministic=self.slots is not None)
        self.network = wrapped(state.model, config, ranks, self.accelerator, self.slots)
        self.batches = stream_batches(
            images,
            order_of(images.index, config),
            batch_size_images=self.batch_size,
            first_image=state.images_seen,
            last_image=last_image,
            places=self.slots.places if self.slots else range(ranks.rank, self.batch_size, ranks.world_size),
            pin_memory=self.device.type == "cuda",
            with_labels=bool(config.model.num_classes),
            stop=stop,
        )

    def alone(self) -> AbstractContextManager[None]:
        """Returns the context in which the loop runs; see `Threads.outside`."""
        return self.threads.outside() if self.threads else nullcontext()

    def learn(self, hooks: training.Hooks) -> None:
        """Trains to the end of the batches, or until a hook ends it."""
        training.train(
            self.state,
            self.network,
            self.batches,
            self.objective,
            settings=self.settings,
            accelerator=self.accelerator,
            hooks=hooks,
            slots=self.slots,
            threads=self.threads,
        )


class TrainingSession(Loop):
    """The loop of an attempt on one process; all processes make the same decisions at the same step."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        state: TrainState,
        images: ImageCache,
        *,
        held_out: ImageCache | None = None,
        recorder: Recorder | None = None,
        saved_images: int = -1,
        stop: Stop = NEVER,
    ) -> None:
        """Prepares the network, the interludes and the stream of batches. Collective.

        Args:
            plan: the run.
            ranks: all processes.
            state: new, or restored from a checkpoint.
            images: the dataset.
            held_out: images for the validation loss.
            recorder: on the main process, which alone writes.
            saved_images: images seen by the checkpoint that was restored, or -1.
            stop: asked all the while.
        """
        super().__init__(plan.config, images, ranks, state, last_image=plan.target_images, stop=stop)
        self.plan, self.held_out, self.recorder = plan, held_out, recorder
        copied = recorder.writer.before_change if recorder else lambda: None
        self.hooks = training.Hooks(self.after_step, self._should_abandon, copied)
        self.decoder = load_decoder(plan.bucket, plan.index, self.device)
        self.agreement = Agreement(ranks.world_size, flags=4)
        self.agreement_in_step = Agreement(ranks.world_size, flags=1)
        self.retention = Retention(self.config, plan.index.images)
        self.saved_images = saved_images
        self.grid = Grid(self)
        self.interludes: list[Interlude] = [Validation(self), Scoring(self), self.grid]
        self.bar = Progress("training", total=plan.target_images, start=state.images_seen)
        self.pace = Pace(self.batch_size, state.images_seen)

    def on_main(self, work: Callable[[Recorder], T]) -> T:
        """Runs `work` with the recorder on the main process; see `Ranks.on_main`. Collective."""

        def with_recorder() -> T:
            assert self.recorder is not None
            return work(self.recorder)

        return self.ranks.on_main(with_recorder)

    def train(self) -> None:
        """Runs the loop to the end of the run, or until all processes agree to stop, and commits everything.

        Raises:
            StoppedError: a process was asked to stop; the state is committed.
        """
        state = self.state
        with self.bar:
            with closing(self.batches), self.alone():
                for interlude in self.interludes:
                    if interlude.is_due(state.images_seen) and self.on_main(interlude.is_missing):
                        self._run(interlude)
                if self.config.parent.run and not state.images_seen:
                    # From here on the parent is not needed.
                    self._save()
                if self.recorder is not None:
                    self.recorder.begins_training()
                self.pace.restart()
                # After each step all processes agree whether any of them lacks the batch of the step after next.
                if self._can_all_begin(2):
                    self.learn(self.hooks)
                self.agreement.finish()
                self.agreement_in_step.finish()
                # Closing the stream may wait for a shard that does not come.
                self._save()
            self.on_main(lambda recorder: recorder.writer.wait())
        if state.images_seen < self.plan.target_images:
            self.stop.request(ANOTHER_PROCESS)
            raise StoppedError(
                f"stopped by {self.stop.reason} after {state.images_seen:,} images; everything is saved, and the same "
                "command goes on from there"
            )

    def finish(self) -> None:
        """Makes the last pictures and the finished page, and waits until the bucket has them. Collective."""
        self.grid.finish()
        self.on_main(Recorder.finish)

    def after_step(self, state: TrainState) -> bool:
        """Logs, saves and draws what is due; returns whether all processes stop.

        The flags of `agreement` are those that any process raised one step earlier. Every process reads the same flags
        at the same step, so all take the same branches below, and no step waits for an answer.
        """
        images_seen, recorder = state.images_seen, self.recorder
        stopping, save_now, failed, starved = self.agreement.exchange(
            self.stop(),
            recorder is not None and recorder.writer.overdue,
            recorder is not None and recorder.writer.troubled,
            not self.batches.holds(2),
        )
        self.pace.check_step()
        if failed:
            self.on_main(lambda recorder: recorder.writer.raise_trouble())

        if crosses(images_seen, self.batch_size, min(self.config.log.every_images, self.plan.index.images)):
            self._log()
        due = [interlude for interlude in self.interludes if interlude.is_due(images_seen)]
        stopping = stopping or self._run_due(due, precedes_save=True)

        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        if (
            stopping
            or save_now
            or self.retention.ends_epoch(images_seen, self.config.checkpoint.every_epochs)
            or any(interlude.needs_save for interlude in due)
            or self.retention.needs(images_seen)
        ):
            self._save()

        # The checkpoint is queued first: images may never come, and drawing takes long.
        with self.pace.waiting_for_images():
            stopping = stopping or (starved and not self._can_all_begin(1))
        stopping = stopping or self._run_due(due, precedes_save=False)
        if recorder is not None:
            recorder.show(self.bar)
        return stopping

    def _should_abandon(self) -> bool:
        """Returns whether all processes leave the step that they are in, because one was asked to stop."""
        (stopping,) = self.agreement_in_step.exchange(self.stop())
        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        return stopping

    def _can_all_begin(self, steps: int) -> bool:
        """Waits until every process has the batches of so many steps; returns False if one stops before. Collective.

        A step that only some processes can begin never ends, and the progress before it could not be saved.
        """
        while True:
            lacking, stopping = self.ranks.sum(not self.batches.holds(steps), self.stop())
            if stopping:
                self.stop.request(ANOTHER_PROCESS)
            if not lacking or stopping:
                return not lacking
            time.sleep(_STARVED_POLL_SECONDS)

    def _run_due(self, due: list[Interlude], *, precedes_save: bool) -> bool:
        """Runs the interludes of one kind; returns whether a process was asked to stop meanwhile. Collective."""
        try:
            for interlude in due:
                if interlude.precedes_save is precedes_save:
                    with self.pace.paused():
                        self._run(interlude)
        except StoppedError:
            # All processes raise it at the same point, between two steps: the state is saved as after any other step.
            self.stop.request(ANOTHER_PROCESS)
            return True
        return False

    def _run(self, interlude: Interlude) -> None:
        row = interlude.run()
        if row and self.recorder is not None:
            self.recorder.record(row)
        if interlude.precedes_save:
            # The row belongs to a checkpoint of this moment: one that was committed without it is not enough.
            self.saved_images = -1

    def _log(self) -> None:
        """Adds the mean losses since the last row to the log. Collective."""
        check_finite(self.state)
        images_seen, losses = self.state.images_seen, loss_row(self.state.log.reduced())
        self.state.log.sums.zero_()
        average = self.settings.averages["ema"]
        rate = self.pace.images_per_second(images_seen)
        if self.recorder is not None:
            self.recorder.record(
                {
                    **losses,
                    "learning_rate": learning_rate_at(self.settings.train, images_seen - self.batch_size),
                    "ema_decay": average.decay_at(images_seen, self.batch_size),
                    "images_per_second": round(rate, 2),
                    "memory_bytes": compute.peak_memory_bytes(self.device),
                }
            )

    def _save(self) -> None:
        """Queues a checkpoint of this moment, unless there is one. Collective."""
        if self.state.images_seen == self.saved_images:
            return
        check_finite(self.state)
        loss_sums = self.state.log.reduced()
        self.saved_images = self.state.images_seen
        self.on_main(lambda recorder: recorder.save(loss_sums))
