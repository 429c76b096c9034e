"""From a checked request to the work: the launcher sees whether it can be done, and the ranks that it starts do it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from job.exits import BadConfigError, BadDataError
from job.outcome import outcome_written
from job.plan import Plan, plan_run
from job.processes.gpus import check_gpus, default_processes
from job.processes.group import Group
from job.processes.launched import is_rank
from job.processes.launcher import HANG_SECONDS, launch
from job.processes.preemption import watch_for_preemption
from job.requests import SampleRequest, TrainRequest
from job.runs.checkpoints import is_there, list_checkpoints, load_manifest
from job.runs.grace import check_writable
from job.runs.records import check_written_here, read_status
from job.sampling.pieces import Batch
from job.sampling.plan import plan_batches, plan_sampling
from job.stop import Stop, deadline


def train_command(
    request: TrainRequest, processes: int | None, *, hang_after_seconds: float = HANG_SECONDS, stop_after: str = ""
) -> None:
    """Trains or goes on; says where everything lies when the run is finished.

    Args:
        request: which run.
        processes: on this machine; None is one per GPU, or one. Under torchrun or accelerate these decide.
        hang_after_seconds: see `launch`.
        stop_after: a duration, see `deadline`.

    Raises:
        BadConfigError: there are more processes than images in a batch.
        SystemExit: the ranks ended with another code than 0.
        JobError: see the message.
    """
    request = request.check()
    node = Group(1) if is_rank() else Group.of(1)
    with deadline(stop_after), outcome_written(request.bucket, node.node, node.nodes):
        stop = _listen()
        plan = plan_run(request, stop)
        # A rank must not ask a process of its own how many GPUs there are.
        here = 1 if is_rank() else processes or default_processes()
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if is_rank() else here * node.nodes
        batch_size = plan.config.train.batch_size
        if world_size > batch_size:
            raise BadConfigError(
                f"{world_size} processes cannot share train.batch_size={batch_size} images: "
                "use fewer with --processes N"
            )
        if (world_size == 1 or not is_rank()) and _finished(plan):
            _tell(plan, request, "is finished already")
            return
        if not is_rank():
            check_writable(plan.run)
            _launch(here, hang_after_seconds)
            return
        from job.train import run_training

        run_training(request, stop)
        if os.environ.get("RANK", "0") == "0":
            _tell(plan_run(request, stop), request, "is finished")


def sample_command(
    request: SampleRequest, processes: int | None, *, hang_after_seconds: float = HANG_SECONDS, stop_after: str = ""
) -> None:
    """Samples, and says where the pictures lie. What is missing shows before there are several processes to say so.

    Args:
        request: what to draw.
        processes: see `train_command`.
        hang_after_seconds: see `launch`.
        stop_after: a duration, see `deadline`.

    Raises:
        SystemExit: the ranks ended with another code than 0.
        JobError: see the message.
    """
    request = request.check()
    with deadline(stop_after), outcome_written(request.bucket, *request.slice_of):
        stop = _listen()
        if not is_rank():
            plan = plan_sampling(request, stop)
            if request.count is None:
                _launch(processes or default_processes(), hang_after_seconds)
            elif not _tell_complete(plan_batches(plan, request)):
                check_writable(plan.run)
                _launch(processes or default_processes(), hang_after_seconds)
        elif request.count is None:
            from job.sampling.sample import run_sampling

            run_sampling(request, stop)
        else:
            from job.sampling.batches import run_batches

            run_batches(request, stop)


def _listen() -> Stop:
    """To be called before anything that takes time. Until its work begins, signals end this process."""
    stop = Stop().install(signals=False)
    watch_for_preemption(stop)
    return stop


def _launch(processes: int, hang_after_seconds: float) -> None:
    check_gpus()
    # -P: a job.py in the working folder must not stand in for the program.
    code = launch([sys.executable, "-P", "-m", "job", *sys.argv[1:]], processes, hang_after_seconds)
    if code:
        raise SystemExit(code)


def _finished(plan: Plan) -> bool:
    status = read_status(plan.run)
    if status is None or status.state != "finished" or _images_seen(plan) < plan.target_images:
        return False
    # One that was lost since then, or is another run's by now, is learnt again.
    newest = max(list_checkpoints(plan.run))
    if not is_there(plan.run, newest):
        return False
    try:
        check_written_here(plan.run, load_manifest(plan.run, newest))
    except BadDataError:
        return False
    return True


def _images_seen(plan: Plan) -> int:
    checkpoints = list_checkpoints(plan.run)
    return max(checkpoints).images_seen if checkpoints else 0


def _tell_complete(batches: list[Batch]) -> bool:
    """Whether all images of all batches are there already; if so, it says where."""
    indices = [batch.index() for batch in batches]
    if not all(indices):
        return False
    for batch, index in zip(batches, indices, strict=True):
        assert index is not None
        batch.check_whole(index)
    for batch in batches:
        print(batch.describe("complete already"))
    return True


def _tell(plan: Plan, request: TrainRequest, what: str) -> None:
    from job.runs.overview import describe_outputs

    images_seen = _images_seen(plan)
    epochs = max(plan.config.train.epochs, images_seen // plan.index.images)
    outputs = describe_outputs(plan.run)
    # All is done: that nobody reads it is no failure.
    with suppress(OSError):
        print(f"Run {request.run!r} {what}: {epochs:,} epoch{'s' * (epochs > 1)}, {images_seen:,} images seen.")
        print(outputs)
        print(f"To go on: the same command with more epochs (EPOCHS={epochs * 2}, or --epochs {epochs * 2}).")
