"""`ddpm train` on one process: begins a run or resumes it. There is no resume flag; the same command does both.

An attempt meets the other processes, takes the lease of the run, plans again now that no other attempt changes the run,
restores the newest checkpoint that verifies, and trains. However it ends, queued checkpoints are committed first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ddpm import training
from ddpm.catalogue import OF_CLASSES
from job.data.cache import ImageCache
from job.data.order import order_of
from job.evaluation.evaluation_plan import check_scores_in_training
from job.exits import BadDataError, JobError, LostRunError, MissingInputError, NotANumberError, State, StoppedError
from job.plan import Plan, RunHandle, plan_run
from job.printing import open_page
from job.processes import compute
from job.processes.launched import is_launched
from job.processes.lease import Lease
from job.processes.ranks import Ranks, meet
from job.progress import Progress, note
from job.report.page import PictureCache
from job.requests import TrainRequest, check_world_size
from job.runs import metric_rows, records
from job.runs.checkpoints import Manifest, check_average, newest_good, opened
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.retention import kept_while_read
from job.runs.writer import CheckpointWriter, LeasedRun
from job.stop import NEVER, Stop
from job.store import open_bucket
from job.training.reporting import Recorder, put_run_page, retention_of, status_of
from job.training.session import TrainingSession, initial_state
from job.training.tracking import CLOSE_SECONDS, Tracking

_DEVIATION_IMAGES = 256
_EXIT_SECONDS = 0.5
"""The part of a preemption's notice that the process itself needs to end."""


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
    ranks = meet(stop)
    bucket = open_bucket(request.bucket, stop)
    run = records.run_store(bucket, request.run)

    def planned() -> Plan:
        """Plans on the main process for all: at another moment another process might see another bucket."""

        def plan() -> dict[str, Any]:
            made = plan_run(request, stop, compute.suited)
            check_world_size(ranks.world_size, made.config.train)
            # A store holds connections, which no other process can use.
            return {name: value for name, value in vars(made).items() if name not in ("bucket", "run")}

        return Plan(bucket=bucket, run=run, **ranks.on_main(plan))

    if not is_launched():
        # Under torchrun no launcher of ours has checked the request.
        plan = planned()
        ranks.on_main(lambda: check_scores_in_training(plan))
        if ranks.on_main(plan.is_finished):
            return plan
    lease: Lease | None = None
    tracking: Tracking | None = None
    try:
        lease = ranks.only_on_main(
            lambda: Lease.take(run, records.highest_fence(run), request.wait_seconds, stop, note)
        )
        # Now no other attempt changes the run.
        plan = planned()
        # An attempt that never gets the run must not appear in the tracker.
        tracking = ranks.only_on_main(lambda: Tracking(plan.config, request.run, run.uri))
        _train(plan, ranks, lease, tracking, stop)
    except training.NonFiniteError as error:
        raise NotANumberError(
            f"{error}; what {run.uri} holds is from before. It would happen again at the same image: "
            "start another run with a lower train.learning_rate, or with train.precision=fp32"
        ) from None
    finally:
        if lease is not None:
            lease.close(stop.seconds_left() - _EXIT_SECONDS)
        if tracking is not None:
            tracking.close(min(CLOSE_SECONDS, stop.seconds_left() - _EXIT_SECONDS))
    ranks.state.destroy_process_group()
    return plan


def _train(plan: Plan, ranks: Ranks, lease: Lease | None, tracking: Tracking | None, stop: Stop) -> None:
    """Restores the state, opens the dataset and trains; the main process has the lease and the tracker. Collective."""
    pictures = PictureCache(note)
    attempt = ranks.on_main(lambda: _begin(plan, ranks, lease, pictures, stop))
    damaged = set[CheckpointRef]()
    with _last_page(plan, attempt, lease, pictures, stop):
        # First, because a parent that trains on may delete its checkpoint while the images are read.
        state = initial_state(plan.config, ranks.device)
        with lease.unless_lost() if lease else nullcontext():
            manifest = _restore(state, plan, ranks, attempt, damaged)
        with Progress("reading images", total=plan.index.images) as bar:
            images = plan.opened_images(stop, lambda done, total: bar.update(done))
            held_out = plan.opened_images(stop, index=plan.held_out) if plan.held_out else None
        if manifest is None and ranks.is_main:
            _compare_sigma_data(plan, images)
        # Building the network waits for all processes without a heartbeat, which would look like a hang.
        ranks.sum(0)
    with _recording(
        plan,
        state,
        attempt,
        lease=lease,
        tracking=tracking,
        pictures=pictures,
        restored=manifest,
        damaged=damaged,
        stop=stop,
    ) as recorder:
        # The page of an attempt that was cut off says what is true again.
        was_cut_off = attempt.previous_seen is not None and attempt.previous_seen.state == State.RUNNING
        if recorder is not None and not plan.is_new and not was_cut_off:
            # It takes longer than the first steps, which need not wait for it.
            recorder.write_page()
        session = TrainingSession(
            plan,
            ranks,
            state,
            images,
            held_out=held_out,
            recorder=recorder,
            saved_images=manifest.images_seen if manifest else -1,
            stop=stop,
        )
        session.train()
        session.finish()


def _compare_sigma_data(plan: Plan, images: ImageCache) -> None:
    """Says it if the first pixels deviate otherwise than EDM's scales suppose (Karras et al. 2022, table 1)."""
    numbers, sigma_data = np.arange(min(_DEVIATION_IMAGES, plan.index.images)), plan.config.diffusion.sigma_data
    if plan.config.diffusion.schedule == "edm" and not plan.index.encoding:
        found = images.read(order_of(plan.index, plan.config).indices(numbers)).std() / 127.5
        if not 0.8 < found / sigma_data < 1.25:
            said = f"the first images have the deviation {found:.2f}, and diffusion.sigma_data is {sigma_data}"
            note(f"{said}: start another run with --set diffusion.sigma_data={found:.2f}")


def _begin(plan: Plan, ranks: Ranks, lease: Lease | None, pictures: PictureCache, stop: Stop) -> records.Attempt:
    """Writes the configuration of a new run, this attempt's record and the first page; reports what has changed."""
    assert lease is not None
    if plan.is_new:
        records.create_config(plan.run, plan.config)
        for remark in plan.index.remarks(with_classes=bool(plan.config.model.num_classes)):
            note(remark)
        # A preset of another name knows nothing of these images.
        if plan.config.data.flip and plan.config.preset != plan.index.name:
            note(
                "half of the images are mirrored, at random; for digits or letters, start another run with "
                "--set data.flip=false"
            )
    before = records.last_attempt(plan.run)
    train, is_exact = plan.config.train, compute.slots_of(plan.config.train, ranks) is not None
    device = compute.describe_device(ranks.device, train, is_exact)
    attempt = records.record_attempt(
        plan.run,
        lease.fence,
        lease.holder,
        changes=plan.changes,
        world_size=ranks.world_size,
        device=device,
        is_exact=is_exact,
    )
    if plan.is_new and is_exact:
        note(f"1 to {train.slots} processes give equal bits on this kind of machine: {device}")
    elif plan.is_new and train.exact is None and ranks.device.type == "cpu":
        note(f"more than train.slots={train.slots} processes: DDP adds the gradients, another number rounds otherwise")
    for difference in records.what_is_otherwise(before, attempt) if before else []:
        note(difference)
    if plan.is_new or plan.request.open_page:
        status = status_of(plan, attempt, State.RUNNING, plan.images_seen, {})
        put_run_page(plan, lease, None, status, pictures=pictures, stop=stop)
    if plan.request.open_page:
        open_page(plan.run, ObjectKind.PAGE.value)
    return attempt


@contextmanager
def _last_page(
    plan: Plan, attempt: records.Attempt, lease: Lease | None, pictures: PictureCache, stop: Stop
) -> Iterator[None]:
    """Writes on the main process how the attempt ended, if it ends before it trains: the page would say running."""
    try:
        yield
    except LostRunError:
        raise
    except Exception as error:
        if lease is not None:
            status = status_of(plan, attempt, _state_after(error), plan.images_seen, {})
            patience_seconds = min(records.STATUS_CLOSE_SECONDS, stop.seconds_left() / 2)
            put_run_page(plan, lease, None, status, pictures=pictures, patience_seconds=patience_seconds)
        raise


def _state_after(error: BaseException) -> State:
    return State.STOPPED if isinstance(error, StoppedError) else State.FAILED


def _restore(
    state: training.TrainState,
    plan: Plan,
    ranks: Ranks,
    attempt: records.Attempt,
    damaged: set[CheckpointRef],
) -> Manifest | None:
    """Loads the newest checkpoint that verifies, or in a new run the weights that it begins with, if any. Collective.

    The main process reads it once and broadcasts it; checkpoints that do not verify go into `damaged`.
    """
    tensors, begins_from = state.tensors(), plan.config.parent.run

    def load() -> Manifest | None:
        with newest_good(plan.run, note, damaged, into=tensors) as restored:
            if restored is None and begins_from:
                load_parent(state, plan)
            return restored.manifest if restored else None

    manifest = ranks.on_main(load)
    if dist.is_initialized():
        for named in tensors.values():
            for tensor in named.values():
                dist.broadcast(tensor, src=0)
    if manifest is None:
        note(f"beginning, image 0, attempt {attempt.fence}")
        return None
    images_seen = manifest.images_seen
    state.resume_at(images_seen, plan.config.train.batch_size)
    if ranks.is_main:
        # The other processes begin at zero, since the sums are added up over processes.
        state.log.sums.copy_(torch.tensor(manifest.loss_sums, dtype=torch.float64))
    epoch = images_seen / plan.index.images
    note(f"resuming at epoch {epoch:.1f}, image {images_seen:,}, attempt {attempt.fence}")
    return manifest


def load_parent(state: training.TrainState, of_run: RunHandle) -> None:
    """Loads the weights that the run begins with, also as its averages. Main process only.

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
        with kept_while_read(run, ref), opened(run, ref, into=weights, may_differ=OF_CLASSES) as restored:
            others = restored.differing
    except MissingInputError as error:
        raise MissingInputError(f"{run.uri}/{ref.key} is gone ({error}): {what_to_do}") from None
    for average in state.averages.values():
        average.update(state.model, decay=0.0)
    but = f", but for {', '.join(sorted(others))}: the number of classes differs" if others else ""
    note(f"the first weights are those of {parent.words}{but}")


@contextmanager
def _recording(
    plan: Plan,
    state: training.TrainState,
    attempt: records.Attempt,
    *,
    lease: Lease | None,
    tracking: Tracking | None,
    pictures: PictureCache,
    restored: Manifest | None,
    damaged: set[CheckpointRef],
    stop: Stop,
) -> Iterator[Recorder | None]:
    """Yields the recorder on the main process, None on the others; ends all writing, however training ends."""
    if lease is None or tracking is None:
        yield None
        return
    rows = metric_rows.read_rows(plan.run, restored.metrics, note) if restored else []
    leased = LeasedRun(plan.run, retention_of(plan, rows), attempt, lease, classes=plan.classes, damaged=damaged)
    writer = CheckpointWriter(leased, state.tensors(), before=restored, stop=stop, note=note)
    recorder = Recorder(plan, state, attempt, lease, writer=writer, rows=rows, tracking=tracking, pictures=pictures)
    try:
        yield recorder
    except LostRunError:
        # The run and its status are the other attempt's now: nothing more of this one may arrive.
        with suppress(JobError):
            writer.close(wait=False)
        raise
    except BaseException as error:
        # A queued checkpoint is good, whatever went wrong since: it is committed before the error is reported.
        try:
            recorder.close(_state_after(error), stop)
        except JobError as second:
            if second is not error:
                note(f"while ending: {second}")
        raise
    else:
        recorder.close(State.FINISHED, stop)
