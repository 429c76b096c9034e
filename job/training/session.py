"""`ddpm train` on one process: begins a run or resumes it. There is no resume flag; the same command does both.

`ddpm.training` decides what is learnt. This module connects it to a bucket: which images come in, and what falls due
after a step. All processes call a collective method at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from ddpm import training
from ddpm.consistency import TEACHER, stage_at
from ddpm.optimizer import learning_rate_at
from ddpm.precision import autocast
from ddpm.state import TrainState, loss_row
from ddpm.threads import threads_of
from job.config import RunConfig, method
from job.data.latents import latents_of
from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import crosses, order_of, stream_batches
from job.exits import NotANumberError, StoppedError
from job.plan import Plan
from job.processes import compute
from job.processes.ranks import Agreement, Ranks, build_accelerator
from job.progress import Progress, note
from job.requests import TrainRequest
from job.runs import records
from job.runs.outlook import duration
from job.runs.retention import Retention
from job.stop import NEVER, Stop
from job.training.attempt import TrainingAttempt
from job.training.interludes import Interludes
from job.training.reporting import Recorder

ANOTHER_PROCESS = "another process"
"""The reason of a process that stops because another one was asked to."""
_STARVED_POLL_SECONDS = 0.02
SLOW_FACTOR = 5
"""A step that takes this many times the usual time is slow."""
SLOW_SECONDS = 10.0
"""Seconds lost in slow steps before the run reports them."""
GRIDS_SHARE = 0.1
"""The largest part of an attempt's time for sample grids, if nobody chose their epochs."""
MEASURED_STEPS, SHORT_SECONDS = 100, 300.0


def run_training(request: TrainRequest, stop: Stop = NEVER) -> Plan:
    """Trains until the run is finished; on return everything is committed and the pictures are in the bucket.

    Args:
        request: which run, checked.
        stop: asked all the while.

    Returns:
        The plan that was carried out.

    Raises:
        StoppedError: the state is committed; the same command resumes.
        NotANumberError: a gradient was not finite; the last checkpoint is from before that.
        LostRunError: another attempt holds the run, or took it.
        BucketAwayError: the bucket stayed away beyond the limit.
    """
    attempt = TrainingAttempt(request, stop)
    with attempt.held() as is_finished:
        if not is_finished:
            with attempt.recording():
                attempt.restore()
                # Later, because a parent that trains on may delete its checkpoint while the images are read.
                plan, budget_bytes = attempt.plan, attempt.plan.config.data.cache_gigabytes * 1e9
                indexes = filter(None, (plan.index, plan.held_out))
                attempt.begin(*(open_cache(plan.bucket, index, budget_bytes, stop) for index in indexes))
                session = TrainingSession(attempt)
                session.train()
                session.finish()
    attempt.ranks.state.destroy_process_group()
    return attempt.plan


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
        last_image: int,
        images_that_fit: int | None = None,
    ) -> None:
        """Prepares the network and the batches from the state's image on. Collective.

        Args:
            config: that of the attempt.
            images: the dataset.
            ranks: all processes.
            state: new, or restored from a checkpoint.
            last_image: see `stream_batches`.
            images_that_fit: the images of a micro-batch that fitted the memory before; None: unknown.
        """
        self.config, self.images, self.ranks, self.state, self.stop = config, images, ranks, state, ranks.stop
        self.batch_size, self.device = config.train.batch_size, ranks.device
        self.objective = method.objective_of(config, self._teacher() if config.has_teacher else None)
        self.settings = replace(method.settings_of(config), latents=latents_of(images.index))
        self.slots = compute.slots_of(config.train, ranks)
        # Smaller parts of a slot would be rounded otherwise.
        self.may_cut = config.train.micro_batch_size == "auto" and not self.slots
        if images_that_fit and self.may_cut:
            self._cut(images_that_fit)
        self.threads = threads_of(self.device, config.train.slot_threads or 1) if self.slots else None
        self.accelerator = build_accelerator(deterministic=self.slots is not None)
        self.network = self._wrapped()
        self.batches = stream_batches(
            images,
            order_of(images.index, config),
            batch_size_images=self.batch_size,
            first_image=state.images_seen,
            last_image=last_image,
            places=self._places(),
            pin_memory=self.device.type == "cuda",
            with_labels=bool(config.model.num_classes),
            stop=self.stop,
        )

    def _cast(self, network: nn.Module) -> nn.Module:
        """Returns the network itself, compiled if so configured, and wrapped for autocast."""
        if self.config.train.compile and self.device.type == "cuda":
            network.compile()
        network.forward = autocast(self.config.train.precision, self.device.type)(network.forward)
        return network

    def _teacher(self) -> nn.Module:
        """Returns a network with the parent's weights. Collective."""
        network = method.build_network(self.config, self.device).eval()
        self.state.load_average(TEACHER, network)
        return self._cast(network)

    def _wrapped(self) -> nn.Module:
        """Returns the model after `_cast`, and without slots wrapped for DDP."""
        model, options = self._cast(self.state.model), self.settings.train
        # It is on its device: asking whether its parameters are sharded would import a second's worth of modules.
        # In evaluation mode it is not wrapped for DDP.
        is_whole = self.slots is not None
        network: nn.Module = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=is_whole)
        if self.ranks.world_size > 1 and not is_whole:
            most = training.micro_batch_images(options) or -(-self.batch_size // self.ranks.world_size)
            fitting = compute.fitting_images(model, self.config, most, self.ranks) if self.may_cut else most
            if fitting < most:
                self._cut(fitting)
                if self.ranks.is_main:
                    self.halved(fitting)
            images = min(len(self._places()), fitting)
            compute.settle_buckets(network, self.config, images, self.device)
        return network

    def _cut(self, images: int) -> None:
        train = self.config.train.model_copy(update={"micro_batch_size": images})
        self.settings = replace(self.settings, train=train)

    def halved(self, images: int) -> bool:
        """Says how many images at once follow; returns whether this attempt goes on with them, and not only the next.

        The other processes of DDP wait inside of the step that lacks memory here.
        """
        note(f"memory ran out: from now on {images:,} images at once per process, which changes the rounding")
        return self.ranks.world_size == 1

    def _places(self) -> range:
        """Returns this process's places in each batch."""
        return self.slots.places if self.slots else range(self.ranks.rank, self.batch_size, self.ranks.world_size)

    def alone(self) -> AbstractContextManager[None]:
        """Returns the context in which the loop runs; see `Threads.outside`."""
        return self.threads.outside() if self.threads else nullcontext()

    def learn(self, hooks: training.Hooks) -> None:
        """Trains to the end of the batches, or until a hook ends it."""
        if self.may_cut:
            hooks = replace(hooks, halved=self.halved)
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


@dataclass(frozen=True)
class Due:
    """The work that falls due after a step, in this order."""

    log: bool
    validation: bool
    scores: bool
    save: bool
    grid: bool


def due_at(images_seen: int, plan: Plan) -> Due:
    """Returns what falls due at a moment of a run: the same on all processes, since it depends on nothing else."""
    config, is_last = plan.config, images_seen == plan.target_images
    every_images, sample = min(config.log.every_images, plan.index.images), config.sample
    retention = Retention(config, plan.index.images)
    ends, ended = partial(retention.ends_epoch, images_seen), retention.ended(images_seen)
    begins_trained = config.parent.run is not None and not images_seen
    is_scored = bool(config.evaluate.every_epochs) and (is_last or ends(config.evaluate.every_epochs))
    is_early = any(epoch.bit_count() == 1 for epoch in ended)
    is_sampled = is_early if sample.every_epochs is None else ends(sample.every_epochs)
    return Due(
        log=crosses(images_seen, config.train.batch_size, every_images),
        validation=plan.held_out is not None and (begins_trained or is_last or ends(config.log.validate_epochs)),
        scores=is_scored,
        # The best checkpoint is kept: it must exist. From the first one on the parent is not needed.
        save=begins_trained or ends(config.checkpoint.every_epochs) or is_scored or retention.needs(images_seen),
        # `Interludes.finish` makes the last one.
        grid=is_sampled and not is_last,
    )


class Pace:
    """Measures images per second between two rows of the log, and reports slow steps once.

    Attributes:
        paused_seconds: the time of work between steps.
    """

    def __init__(self, batch_size_images: int, images_seen: int) -> None:
        """Starts all clocks at the first step; `images_seen` is where this attempt begins."""
        self._batch_size, self._logged_images, self._first_image = batch_size_images, images_seen, images_seen
        self._began = self._logged_at = self._step_began = time.monotonic()
        self.paused_seconds = 0.0
        self._waited_seconds = self._best_images_per_second = self._lost_seconds = 0.0

    def images_per_second(self, images_seen: int) -> float:
        """Returns the rate since the last call."""
        now = time.monotonic()
        rate = (images_seen - self._logged_images) / (now - self._logged_at)
        self._best_images_per_second = max(self._best_images_per_second, rate)
        self._logged_at, self._logged_images = now, images_seen
        return rate

    @property
    def trained_seconds(self) -> float:
        """The time of all steps so far."""
        return time.monotonic() - self._began - self.paused_seconds

    def seconds_for(self, images: float, images_seen: int) -> float:
        """Returns the time that training takes for so many images, by all steps so far; 0 before the first."""
        return images * self.trained_seconds / max(1, images_seen - self._first_image)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves work between two steps out of the rate and of the next step's time."""
        began = time.monotonic()
        yield
        self._step_began = time.monotonic()
        self._logged_at += self._step_began - began
        self.paused_seconds += self._step_began - began

    @contextmanager
    def waiting_for_images(self) -> Iterator[None]:
        """Starts the next step's time; the wait inside counts as part of that step."""
        self._step_began = time.monotonic()
        yield
        self._waited_seconds = time.monotonic() - self._step_began

    def check_step(self) -> None:
        """Reports, once per attempt, that slow steps have cost `SLOW_SECONDS`, with the likely cause."""
        step_seconds = time.monotonic() - self._step_began
        usual_seconds = self._batch_size / (self._best_images_per_second or 1e-9)
        if self._lost_seconds <= SLOW_SECONDS and step_seconds >= SLOW_FACTOR * usual_seconds:
            self._lost_seconds += step_seconds - usual_seconds
            if self._lost_seconds > SLOW_SECONDS:
                cause = compute.why_slow(step_seconds, self._waited_seconds)
                note(f"a step took {step_seconds:.1f} s instead of {usual_seconds:.1f} s: {cause}")


class TrainingSession(Loop):
    """The loop of an attempt on one process; all processes make the same decisions at the same step."""

    def __init__(self, attempt: TrainingAttempt) -> None:
        """Prepares the network, the interludes and the stream of batches of a restored attempt. Collective."""
        plan, ranks, recorder = attempt.plan, attempt.ranks, attempt.recorder
        self.attempt, self.plan, self.recorder = attempt, plan, recorder
        self._memory = ranks.world_size, compute.memory_of_gpu_gib()
        fitting = ranks.on_main(lambda: records.images_that_fit(plan.run, *self._memory))
        super().__init__(plan.config, attempt.images, ranks, attempt.state, plan.target_images, fitting)
        copied = recorder.writer.before_change if recorder else lambda: None
        self.hooks = training.Hooks(self.after_step, self._should_abandon, copied)
        self.agreement = Agreement(ranks.world_size, flags=4)
        self.agreement_in_step = Agreement(ranks.world_size, flags=1)
        self.saved_images = attempt.restored.images_seen if attempt.restored else -1
        self.interludes = Interludes(attempt, self.agreement_in_step)
        self.bar = Progress("training", total=plan.target_images, start=self.state.images_seen)
        self.pace = Pace(self.batch_size, self.state.images_seen)
        self._measured_at = self.state.images_seen + MEASURED_STEPS * self.batch_size
        self._grid_seconds = list[float]()

    def train(self) -> None:
        """Runs the loop to the end of the run, or until all processes agree to stop, and commits everything.

        Raises:
            StoppedError: a process was asked to stop; the state is committed.
        """
        state = self.state
        with self.bar:
            with closing(self.batches), self.alone():
                self._catch_up()
                self.pace = Pace(self.batch_size, state.images_seen)
                # After each step all processes agree whether any of them lacks the batch of the step after next.
                if self._can_all_begin(2):
                    self.learn(self.hooks)
                if state.images_seen < self.plan.target_images:
                    self.stop.request(ANOTHER_PROCESS)
                self.agreement.finish()
                self.agreement_in_step.finish()
                # Closing the stream may wait for a shard that does not come.
                self._save()
            self.attempt.on_main(lambda recorder: recorder.writer.wait())
        if state.images_seen < self.plan.target_images:
            raise StoppedError(
                f"stopped by {self.stop.reason} after {state.images_seen:,} images; everything is saved, and the same "
                "command goes on from there"
            )

    def halved(self, images: int) -> bool:
        """Writes the number down for the next attempt, too."""
        records.put_images_that_fit(self.plan.run, images, *self._memory)
        return super().halved(images)

    def finish(self) -> None:
        """Makes the last pictures and the finished page, and waits until the bucket has them. Collective."""
        self.interludes.finish()
        self.attempt.on_main(Recorder.finish)

    def after_step(self, state: TrainState) -> bool:
        """Logs, saves and samples what is due; returns whether all processes stop.

        The flags of `agreement` are those that any process raised one step earlier. Every process reads the same flags
        at the same step, so all take the same branches below, and no step waits for an answer.
        """
        recorder, due = self.recorder, due_at(state.images_seen, self.plan)
        stopping, is_overdue, failed, starved = self.agreement.exchange(
            self.stop(),
            recorder is not None and recorder.writer.overdue,
            recorder is not None and recorder.writer.troubled,
            not self.batches.holds(2),
        )
        self.pace.check_step()
        if failed:
            self.attempt.on_main(lambda recorder: recorder.writer.raise_trouble())
        if due.log:
            self._log()
        if due.validation and not stopping:
            stopping = self._is_stopped_in(self.interludes.validate)
        if due.scores and not stopping:
            stopping = self._is_stopped_in(self.interludes.score)
        if stopping:
            self.stop.request(ANOTHER_PROCESS)
        if due.save or is_overdue or stopping:
            self._save()
        # The checkpoint is queued first: images may never come, and sampling takes long.
        with self.pace.waiting_for_images():
            stopping = stopping or (starved and not self._can_all_begin(1))
        if due.grid and not stopping and self._has_time_for_grid():
            stopping = self._is_stopped_in(self._sample_grid)
        if state.images_seen == self._measured_at:
            self._say_when_it_ends()
        if recorder is not None:
            recorder.show(self.bar)
        return stopping

    def _catch_up(self) -> None:
        """Does what was due at the moment where this attempt begins, and is not in the bucket. Collective."""
        due, interludes = due_at(self.state.images_seen, self.plan), self.interludes
        if validates := due.validation and interludes.lacks_value("val_loss"):
            interludes.validate()
        if scores := due.scores and interludes.lacks_value(interludes.score_name):
            interludes.score()
        if validates or scores:
            # The rows belong to a checkpoint of this moment: one that was committed without them is not enough.
            self.saved_images = -1
        if due.save:
            self._save()
        if due.grid and interludes.lacks_grid() and self._has_time_for_grid():
            self._sample_grid()

    def _has_time_for_grid(self) -> bool:
        """Returns whether the grids of this attempt, with one more, take a tenth of its time at most. Collective.

        Those of epochs that a person chose take what they take. A pass without a gradient takes a third of one with it.
        """
        sample, pace = self.config.sample, self.pace
        if sample.every_epochs is not None:
            return True
        passes = self.interludes.grid_images * sample.steps
        next_seconds = (
            self._grid_seconds[-1] if self._grid_seconds else pace.seconds_for(passes / 3, self.state.images_seen)
        )
        taken_seconds = sum(self._grid_seconds) + next_seconds
        return self.attempt.on_main(lambda _: taken_seconds <= GRIDS_SHARE * pace.trained_seconds)

    def _sample_grid(self) -> None:
        began = time.monotonic()
        self.interludes.sample_grid()
        self._grid_seconds.append(time.monotonic() - began)

    def _say_when_it_ends(self) -> None:
        """Says how long the run takes from here, and what that costs, if it takes longer than anybody waits for."""
        left_seconds = self.pace.seconds_for(self.plan.target_images - self.state.images_seen, self.state.images_seen)
        if left_seconds > SHORT_SECONDS:
            dollars = self.attempt.record.dollars_per_hour
            cost = f", for about ${left_seconds / 3600 * dollars:,.2f}" if dollars is not None else ""
            note(f"by the first {MEASURED_STEPS} steps the run ends in {duration(left_seconds / 3600)}{cost}")

    def _is_stopped_in(self, work: Callable[[], None]) -> bool:
        """Does work between two steps; returns whether a process was asked to stop meanwhile. Collective."""
        try:
            with self.pace.paused():
                work()
        except StoppedError:
            # All processes raise it at the same point, between two steps: the state is saved as after any other step.
            return True
        return False

    def _should_abandon(self) -> bool:
        """Returns whether all processes leave the step that they are in, because one was asked to stop."""
        return self.agreement_in_step.exchange(self.stop())[0]

    def _can_all_begin(self, steps: int) -> bool:
        """Waits until every process has the batches of so many steps; returns False if one stops before. Collective.

        A step that only some processes can begin never ends, and the progress before it could not be saved.
        """
        while True:
            lacking, stopping = self.ranks.sum(not self.batches.holds(steps), self.stop())
            if not lacking or stopping:
                return not lacking
            time.sleep(_STARVED_POLL_SECONDS)

    def _check_finite(self) -> None:
        """Reads a flag on the device, at moments when this process waits for the device anyway.

        Raises:
            NotANumberError: the gradient of a step was not finite.
        """
        if (first := int(self.state.first_nonfinite.item())) >= 0:
            though = ", even at a loss scale of 1 or less" if self.state.loss_scale else ""
            raise NotANumberError(
                f"the gradient was not a finite number after {first:,} images{though}; what {self.plan.run.uri} holds "
                "is from before. It would happen again at the same image: start another run with a lower "
                "train.learning_rate, or with train.precision=fp32"
            )

    def _log(self) -> None:
        """Adds the mean losses since the last row to the log. Collective."""
        self._check_finite()
        images_seen, losses = self.state.images_seen, loss_row(self.state.log.reduced())
        self.state.log.sums.zero_()
        average = self.settings.averages["ema"]
        rate = self.pace.images_per_second(images_seen)
        tuning = self.config.consistency if self.config.diffusion.objective == "consistency" else None
        if self.recorder is not None:
            self.recorder.add_row(
                {
                    **losses,
                    **({"stage": 1 + stage_at(tuning, images_seen - self.batch_size)} if tuning else {}),
                    **({"loss_scale": scale.values[0].item()} if (scale := self.state.loss_scale) else {}),
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
        self._check_finite()
        self.state.finish_averages()
        loss_sums = self.state.log.reduced()
        self.saved_images = self.state.images_seen
        sent = self.state.send()
        self.attempt.on_main(lambda recorder: recorder.save(loss_sums))
        for work in sent:
            work.wait()
