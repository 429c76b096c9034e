"""An attempt at a run, as one of its processes sees it: from the lease to the last status.

An attempt meets the other processes, takes the lease of the run, plans again now that no other attempt changes the run,
and restores the newest checkpoint that verifies. However it ends, queued checkpoints are committed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch

from ddpm.catalogue import OF_CLASSES, OF_IMAGES, OF_NUMBERS
from ddpm.state import TrainState
from job.config import method
from job.coordination.lease import Lease
from job.data.reading.cache import ImageCache
from job.data.reading.order import order_of
from job.evaluation.evaluation_plan import check_scores_in_training
from job.exits import BadDataError, JobError, LostRunError, MissingInputError, State, ending_of, state_after
from job.plan import Plan, plan_run
from job.processes import compute
from job.processes.launcher import is_launched
from job.processes.ranks import meet
from job.progress import note
from job.requests import TrainRequest, check_world_size
from job.runs import records
from job.runs.checkpoints import Manifest, check_average, newest_good, restore
from job.runs.layout import CheckpointRef
from job.runs.retention import kept_while_read
from job.runs.run import RunHandle
from job.stop import Stop
from job.store import open_bucket
from job.training.reporting import Recorder

T = TypeVar("T")

_DEVIATION_IMAGES = 256
_EXIT_SECONDS = 0.5
"""The part of a preemption's notice that the process itself needs to end."""


class TrainingAttempt:
    """An attempt at a run: `held` takes it, `recording` writes down what comes of it, `restore` and `begin` prepare it.

    Attributes:
        plan: made with the lease.
        record: the attempt's own, in the bucket.
        state: new, or restored from a checkpoint.
        restored: the manifest of that checkpoint.
        damaged: the checkpoints that do not verify.
        images: the dataset.
        held_out: images for the validation loss.
        recorder: on the main process while `recording`, which alone writes.
    """

    plan: Plan
    record: records.Attempt
    state: TrainState
    images: ImageCache
    held_out: ImageCache | None = None
    restored: Manifest | None = None
    recorder: Recorder | None = None
    _lease: Lease | None = None

    def __init__(self, request: TrainRequest, stop: Stop) -> None:
        """Meets the other processes. Collective."""
        self.request, self.stop, self.ranks = request, stop, meet(stop)
        self._bucket = open_bucket(request.bucket, stop)
        self._run = records.run_store(self._bucket, request.run)
        self.damaged = set[CheckpointRef]()

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Holds the run's lease, and yields whether the run is finished. Collective.

        The launcher has checked that before, but torchrun has not.

        Raises:
            LostRunError: another attempt holds the run.
        """
        run, request, stop = self._run, self.request, self.stop
        try:
            self._lease = self.ranks.only_on_main(
                lambda: Lease.take(run, records.highest_fence(run), request.wait_seconds, stop, note)
            )
            # Now no other attempt changes the run.
            self._plan()
            config = self.plan.config
            if self.plan.is_new and config.model.kind == "own":
                # Before anything is written: the same command must begin with the mended file.
                method.check_own_network(method.build_network(config, self.ranks.device), config)
            yield not is_launched() and self.ranks.on_main(self.plan.is_finished)
        finally:
            if self._lease is not None:
                self._lease.close(stop.seconds_left() - _EXIT_SECONDS)
            if self.recorder is not None:
                self.recorder.tracking.close(stop.seconds_left() - _EXIT_SECONDS)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Begins the attempt in the bucket, and ends all writing, however the attempt ends. Collective."""
        self.record = self.ranks.on_main(self._begin)
        if self._lease is None:
            yield
            return
        self.recorder = recorder = Recorder(self.plan, self.record, self._lease, self.stop)
        try:
            yield
        except LostRunError:
            # The run and its status are the other attempt's now: nothing more of this one may arrive.
            with suppress(JobError):
                recorder.abandon()
            raise
        except BaseException as error:
            # A queued checkpoint is good, whatever went wrong since: it is committed before the error is reported.
            try:
                recorder.close(state_after(ending_of(error)[0]))
            except JobError as second:
                if second is not error:
                    note(f"while ending: {second}")
            raise
        else:
            recorder.close(State.FINISHED)

    def restore(self) -> None:
        """Makes the state of a new run, or restores it. Collective."""
        config = self.plan.config
        network = method.build_network(config, self.ranks.device)
        self.state = method.initial_state(network, config, self.ranks.rank, self.ranks.world_size)
        self._restore()

    def begin(self, images: ImageCache, held_out: ImageCache | None = None) -> None:
        """Takes the images; the recorder can write checkpoints then. Collective."""
        self.images, self.held_out = images, held_out
        if self.recorder is not None:
            if self.restored is None:
                self._compare_sigma_data()
            self.recorder.begin(self.state, self.restored, self.damaged)
        # Building the network waits for all processes without a heartbeat, which would look like a hang.
        self.ranks.sum(0)

    def on_main(self, work: Callable[[Recorder], T]) -> T:
        """Runs `work` with the recorder on the main process; see `Ranks.on_main`. Collective."""

        def with_recorder() -> T:
            assert self.recorder is not None
            return work(self.recorder)

        return self.ranks.on_main(with_recorder)

    def _plan(self) -> None:
        """Plans on the main process for all: at another moment another process might see another bucket."""

        def plan() -> dict[str, Any]:
            made = plan_run(self.request, self.stop, compute.suited, compute.memory_of_gpu_gib)
            check_world_size(self.ranks.world_size, made.config.train)
            if not is_launched():
                check_scores_in_training(made)
            # A store holds connections, which no other process can use.
            return {name: value for name, value in vars(made).items() if name not in ("bucket", "run")}

        self.plan = Plan(bucket=self._bucket, run=self._run, **self.ranks.on_main(plan))

    def _begin(self) -> records.Attempt:
        """Writes the configuration of a new run and this attempt's record; reports what has changed."""
        plan, lease, ranks, train = self.plan, self._lease, self.ranks, self.plan.config.train
        assert lease is not None
        before, is_exact = records.last_attempt(plan.run), compute.slots_of(train, ranks) is not None
        device = compute.describe_device(ranks.device, train, is_exact, plan.config.ema.device)
        if plan.is_new:
            # Before the configuration, with which the run exists.
            records.put_network(plan.run, plan.config)
            records.create_config(plan.run, plan.config)
            if plan.start:
                names = {"cpu": "a CPU", "mps": "Apple's GPU"}
                where = names.get(ranks.device.type) or f"{compute.memory_of_gpu_gib():.0f} GiB of a GPU"
                of_data = f"{plan.index.images:,} images of {plan.index.size} pixels"
                note(f"for {where} and {of_data} the run begins as with {plan.start.words}; options of yours go first")
            for remark in plan.index.remarks(with_classes=bool(plan.config.model.num_classes)):
                note(remark)
            # A preset of another name knows nothing of these images.
            if plan.config.data.flip and plan.config.preset != plan.index.name:
                note(
                    "half of the images are mirrored, at random; for digits or letters, start another run with "
                    "--set data.flip=false"
                )
            if is_exact:
                note(f"1 to {train.slots} processes give equal bits on this kind of machine: {device}")
            elif train.exact is None and ranks.device.type == "cpu":
                slots = f"train.slots={train.slots}"
                note(f"more than {slots} processes: DDP adds the gradients, another number rounds otherwise")
        record = records.record_attempt(
            plan.run,
            lease.fence,
            lease.holder,
            changes=plan.changes,
            world_size=ranks.world_size,
            device=device,
            is_exact=is_exact,
        )
        for difference in records.what_is_otherwise(before, record) if before else []:
            note(difference)
        return record

    def _restore(self) -> None:
        """Loads the newest checkpoint that verifies, or in a new run the weights that it begins with, if any.

        The main process reads it once and broadcasts it. Collective.
        """
        plan, state, tensors = self.plan, self.state, self.state.tensors()
        into, divided = {group: dict(named) for group, named in tensors.items()}, state.divided()
        for (group, name), tensor in divided.items() if self.ranks.is_main else ():
            into[group][name] = torch.empty(tensor.shape, dtype=tensor.dtype)

        def load() -> Manifest | None:
            assert self._lease is not None
            with self._lease.unless_lost():
                restored = newest_good(plan.run, self.damaged, into)
                if restored is None and plan.config.parent.run:
                    load_parent(state, plan)
                return restored

        self.restored = manifest = self.ranks.on_main(load)
        for group, named in tensors.items():
            for name, tensor in named.items():
                if (group, name) not in divided:
                    self.ranks.broadcast(tensor)
                elif manifest:
                    # One by one: the other processes have no memory for all.
                    read = into[group][name] if self.ranks.is_main else torch.empty(tensor.shape, dtype=tensor.dtype)
                    self.ranks.broadcast(read)
                    if not tensor.is_meta:
                        tensor.copy_(read)
        if manifest is None:
            state.restart_averages()
            note(f"beginning, image 0, attempt {self.record.fence}")
            return
        images_seen = manifest.images_seen
        state.resume_at(images_seen, plan.config.train.batch_size)
        if self.ranks.is_main:
            # The other processes begin at zero, since the sums are added up over processes.
            state.log.sums.copy_(torch.tensor(manifest.loss_sums, dtype=torch.float64))
        epoch = images_seen / plan.index.images
        note(f"resuming at epoch {epoch:.1f}, image {images_seen:,}, attempt {self.record.fence}")

    def _compare_sigma_data(self) -> None:
        """Says it if the first pixels deviate otherwise than EDM's scales suppose (Karras et al. 2022, table 1)."""
        index, config = self.plan.index, self.plan.config
        numbers, sigma_data = np.arange(min(_DEVIATION_IMAGES, index.images)), config.diffusion.sigma_data
        if config.diffusion.schedule == "edm" and not index.encoding:
            found = self.images.read(order_of(index, config).indices(numbers)).std() / (2**index.bits - 1) * 2
            if not 0.8 < found / sigma_data < 1.25:
                said = f"the first images have the deviation {found:.2f}, and diffusion.sigma_data is {sigma_data}"
                note(f"{said}: start another run with --set diffusion.sigma_data={found:.2f}")


def load_parent(state: TrainState, of_run: RunHandle) -> None:
    """Loads the weights that the run begins with, and not yet its averages. Main process only.

    Raises:
        MissingInputError, BadDataError: they are gone, or others than at the time of the pinning.
    """
    parent = of_run.config.parent
    if not (parent.run and parent.checkpoint and parent.weights):
        raise BadDataError(f"{of_run.run.uri_of(records.CONFIG_KEY)} names no checkpoint of the parent {parent.run}")
    at, name = records.place_of_run(of_run.bucket, parent.run)
    run, ref = records.run_store(at, name), CheckpointRef.parse(parent.checkpoint)
    delete = f"ddpm runs delete {of_run.run.uri.rpartition('/')[2]} --yes"
    what_to_do = f"restore it, or delete the run that begins with it ({delete}), and begin another"
    try:
        if check_average(run, ref, parent.weights, name).sha256 != parent.sha256:
            raise BadDataError(f"{run.uri}/{ref.key} has changed since it was pinned: {what_to_do}")
        weights = {parent.weights: state.tensors()["model"]}
        with kept_while_read(run, ref):
            others = restore(run, ref, weights, may_differ=(*OF_CLASSES, *OF_NUMBERS), may_grow=OF_IMAGES).differing
    except MissingInputError as error:
        raise MissingInputError(f"{run.uri}/{ref.key} is gone ({error}): {what_to_do}") from None
    why = {
        "the number of classes differs": [name for name in others if name.startswith(OF_CLASSES)],
        "they are new, and change nothing at first": [name for name in others if name.startswith(OF_NUMBERS)],
    }
    but = "".join(f", but for {', '.join(sorted(names))}: {reason}" for reason, names in why.items() if names)
    note(f"the first weights are those of {parent.words}{but}")
